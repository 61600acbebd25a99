"""Whether products can be those of a symmetric linear map: uᵀHv = vᵀHu for neighbouring probes.

Quadratic forms see the symmetric part of a map alone, and random signs take any odd function of an entry for
a multiple of it. Both show where a product meets another probe, at no product more. Where a function of one's
own is asked for its trace by signs, one of the products goes to a normal vector that the first probe is
compared with. In the same way n columns are compared with the product of a vector that is none of them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spectra.estimators import blocks
from spectra.operators.base import LinearOperator

PyTree = Any
ASIDE = 2**31 - 2
"""Number of the key of the vector that is compared with, which no probe reaches."""
LEAST = 3
"""Products from which one may go to a vector aside: of two an interval would lose too much."""
COARSE = 16.0
"""What |uᵀHv - vᵀHu| may be at least, in roundings of a product: 0.6 to 4 were measured, in float32, float16
and bfloat16, on networks of one to eight layers and gains up to 3."""


class Pairs(NamedTuple):
    """What the neighbours of a sequence of probes differ by, so far."""

    vector: PyTree  # the last probe, and its product
    image: PyTree
    count: Any  # of pairs
    square: Any  # sum of (uᵀHv - vᵀHu)² in units of the larger of |Hu|² and |Hv|², |u|² = |v|² = n


def aside(op: LinearOperator, kind: str, num_matvecs: int) -> int:
    """How many of the products go to a vector that is none of the probes: 1 for signs and a function."""
    return int(kind == "rademacher" and not op.known_linear and num_matvecs >= LEAST)


def begin_pairs(op: LinearOperator, key: jax.Array, aside: int) -> tuple[jax.Array, Pairs]:
    """The unit of products, 0 for none yet, and the pairs before the first probe, or with a vector aside."""
    none = jnp.zeros((), op.dtype)
    if not aside:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), op.structure)
        return none, Pairs(zeros, zeros, none, none)
    vectors = normal_vector(op, key)
    images, unit = blocks.in_unit(blocks.products(op, vectors, 1), none)
    first, image = (jax.tree.map(lambda x: x[0], stack) for stack in (vectors, images))
    return unit, Pairs(first, image, none, none)


def normal_vector(op: LinearOperator, key: jax.Array) -> PyTree:
    """A stack of one normal vector, which is none of the probes."""
    return blocks.draw(op, key, jnp.array([ASIDE]), "normal")


def with_products(pairs: Pairs, vectors: PyTree, images: PyTree) -> Pairs:
    """The pairs within a stack of probes, and that of its first with the last one before.

    `images` are in a unit of which squares are numbers, the same for all calls.
    """
    u, hu = (
        jax.tree.map(lambda x, last: jnp.concatenate([last[None], x[:-1]]), stack, last)
        for stack, last in ((vectors, pairs.vector), (images, pairs.image))
    )
    across, back = (jnp.sum(blocks.row_dots(a, b), axis=0) for a, b in ((u, images), (vectors, hu)))
    sizes = jnp.sum(blocks.row_dots(images, images), axis=0)
    sizes = jnp.maximum(sizes, jnp.append(jnp.sum(_square(pairs.image))[None], sizes[:-1]))
    known = jnp.sum(_square(pairs.vector)) > 0  # the first probe of all has nobody before it
    known = jnp.append(known[None], jnp.ones(len(sizes) - 1, bool))
    defects = jnp.where(known, (across - back) ** 2 / jnp.where(sizes > 0, sizes, 1), 0)
    return Pairs(
        jax.tree.map(lambda x: x[-1], vectors),
        jax.tree.map(lambda x: x[-1], images),
        pairs.count + jnp.sum(known),
        pairs.square + jnp.sum(defects),
    )


@jax.jit
def _square(vector: PyTree) -> jax.Array:
    stack = jax.tree.map(lambda x: x[None], vector)
    return blocks.row_dots(stack, stack)[:, 0]


def limit(op: LinearOperator) -> float:
    """What |uᵀHv - vᵀHu| may be in units of |u| |Hv| / √n, to be rounding.

    The error of a product is a vector of `precision` |Hv| that u meets like a random one, and the sum over
    its entries adds eps √n at the worst. The square root of the precision is what Lanczos runs allow as well.
    """
    rounding = max(float(np.sqrt(op.precision)), COARSE * op.precision)
    return rounding + float(jnp.finfo(op.dtype).eps) * float(np.sqrt(op.size))
