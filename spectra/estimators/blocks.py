"""Stacks of vectors: random probes, products in batches, Gram matrices, an orthonormal basis.

Products of neighbouring probes tell whether a map can be linear and symmetric: uᵀHv = vᵀHu.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import arrays, draws, meshes, programs, trees
from spectra.base.stacks import combine, concatenate, gram, inner, length, row_dots, rows, subtract
from spectra.base.trees import PyTree
from spectra.krylov.packed import like_those_of, unpacked
from spectra.operators.base import LinearOperator, in_batches

PROBES = ("rademacher", "normal")
JITTER = 4.0
"""Noise added before a stack is orthonormalised, in roundings of its longest vector: what a product may
be off by anyway, and what fills the basis where the vectors are dependent."""
PASSES = 4
"""A pass brings singular values from s to s / sqrt(eps): two reach those of size eps, the third makes
them orthonormal, the fourth to the last bit."""


def draw(op: LinearOperator, key: jax.Array, indices: arrays.Indices, kind: str) -> PyTree:
    """The probes with the given numbers, entries ±1 ("rademacher") or N(0, 1) ("normal"). On a mesh
    they lie as the parameters do, no device has all of one."""
    return _drawn(op, key, indices, kind, meshes.places(unpacked(op).like))


@partial(programs.jit, static_argnames=("kind", "where"))
def _drawn(
    op: LinearOperator, key: jax.Array, indices: arrays.Indices, kind: str, where: meshes.Places
) -> PyTree:
    return _draw(key, indices, op, kind, where)


def draw_with_noise(
    op: LinearOperator, key: jax.Array, indices: arrays.Indices, kind: str, noise: jax.Array
) -> tuple[PyTree, PyTree]:
    """Probes, and as many normal vectors from the key `noise`: (probes, vectors).

    Together where both are normal: compiling the generator takes longer than all else in a sketch.
    """
    others, where = jnp.arange(len(indices)), meshes.places(unpacked(op).like)
    if kind != "normal":
        return draw(op, key, indices, kind), draw(op, noise, others, "normal")
    keys, numbers = jnp.stack([key, noise]), jnp.stack([indices, others])
    both = jax.vmap(lambda key, indices: _draw(key, indices, op, kind, where))(keys, numbers)
    return tuple(jax.tree.map(lambda x, i=i: x[i], both) for i in (0, 1))


def _draw(
    key: jax.Array, indices: arrays.Indices, op: LinearOperator, kind: str, where: meshes.Places
) -> PyTree:
    distribution = getattr(jax.random, kind)

    def one(i: arrays.Indices) -> PyTree:
        own = jax.random.fold_in(key, i)
        return like_those_of(op, lambda op: draws.sample(own, op.structure, distribution, where=where))

    return jax.vmap(one)(indices)


@programs.jit
def in_unit(stack: PyTree, unit: jax.Array) -> tuple[PyTree, jax.Array]:
    """Products in a unit in which their squares are numbers, and that unit: a power of two, which is exact.

    `unit` is the one of the products before, or 0: then it is set by the largest entry, if there is any.

    That is looked for in every case: of a conditional with a reduction between GPUs the host decides.
    """
    size = trees.largest(stack)
    unit = jnp.where(unit > 0, unit, jnp.where(size > 0, trees.power_of_two(size), 0))
    return trees.scale(1 / jnp.where(unit > 0, unit, 1), stack), unit


def some_unit(unit: Any) -> Any:
    """1 where no unit was found, as all products are zero: their derivatives need not be."""
    return jnp.where(unit == 0, 1, unit)


@partial(programs.jit, static_argnames=("batch", "where"))
def _products(op: LinearOperator, stack: PyTree, batch: int, where: meshes.Places) -> PyTree:
    return placed(in_batches(op, stack, batch), where)


def placed(stack: PyTree, where: meshes.Places) -> PyTree:
    """The stack, each vector of it as `meshes.placed`."""
    return jax.vmap(partial(meshes.placed, where=where))(stack)


def products(op: LinearOperator, stack: PyTree, batch: int) -> PyTree:
    """H v for each vector of a stack, `batch` at a time; a stream reads its data once a batch.

    On a mesh they lie as the parameters do: where a program's results lie is otherwise the compiler's choice,
    which may be whole on every device.
    """
    if not op.on_host:
        return _products(op, stack, batch, meshes.places(op.like))
    starts = range(0, length(stack), batch)
    return concatenate([op.mv_batch(rows(stack, s, s + batch)) for s in starts])


@jax.custom_jvp
def orthonormalize(stack: PyTree, against: PyTree | None, noise: PyTree) -> PyTree:
    """k orthonormal vectors, orthogonal to `against`, whose span holds the stack to rounding.

    Dependent vectors are no exception: `noise`, k normal vectors scaled to their rounding error, takes the
    place of what is missing, so the result always has k orthonormal rows (as Householder's QR would
    give, but from inner products alone). Each pass divides by the eigenvalues of the scaled Gram
    matrix, clipped at eps: never by a small pivot.

    Its derivative is that of the span: a rotation of the rows within it, which no estimate depends on, is
    left out. With S = R B + G A for rows A of `against`, dB = R⁺ (dS - G dA)(1 - AᵀA - BᵀB) - B dAᵀ A.

    References:
        Stathopoulos and Wu, doi:10.1137/S1064827500370883.
    """
    return _orthonormalize(stack, against, noise)


@partial(programs.jit, options=programs.FUSED)
def _orthonormalize(stack: PyTree, against: PyTree | None, noise: PyTree) -> PyTree:
    k = length(stack)
    dtype = trees.scalar_dtype(stack)
    eps = jnp.finfo(dtype).eps
    structure = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stack)
    longest = jnp.sqrt(jnp.max(jnp.sum(row_dots(stack, stack), axis=0)))
    size = JITTER * eps * longest / trees.tree_size(structure) ** 0.5
    stack = trees.axpy(jnp.where(longest > 0, size, 1), noise, stack)
    for _ in range(PASSES):
        if against is not None:
            stack = subtract(stack, combine(jnp.sum(gram(stack, against), axis=0), against))
        products = jnp.sum(gram(stack, stack), axis=0)
        size = arrays.diagonal(products)
        unit = 1 / jnp.sqrt(jnp.where(size > 0, size, 1))
        values, vectors = arrays.eigh(unit[:, None] * products * unit)
        values = jnp.maximum(values, k * eps * jnp.maximum(values[-1], eps))
        stack = combine((vectors / jnp.sqrt(values)).T * unit, stack)
    return stack


@orthonormalize.defjvp
def _span_derivative(
    primals: tuple[PyTree, PyTree, PyTree], tangents: tuple[PyTree, PyTree, PyTree]
) -> tuple[PyTree, PyTree]:
    (stack, against, noise), (moved, against_moved, _) = primals, tangents
    basis = orthonormalize(stack, against, noise)
    if against is not None:
        moved = subtract(moved, combine(inner(stack, against), against_moved))
        moved = subtract(moved, combine(inner(moved, against), against))
    moved = subtract(moved, combine(inner(moved, basis), basis))
    # What the basis was filled with where the stack is dependent does not move with it.
    factor = jnp.linalg.pinv(
        inner(stack, basis), rtol=length(stack) * jnp.finfo(trees.scalar_dtype(stack)).eps
    )
    moved = combine(factor, moved)
    if against is not None:
        moved = subtract(moved, combine(inner(basis, against_moved), against))
    return basis, moved


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
        zeros = meshes.zeros(op.structure, op.like)
        return none, Pairs(zeros, zeros, none, none)
    vectors = normal_vector(op, key)
    images, unit = in_unit(products(op, vectors, 1), none)
    first, image = (jax.tree.map(lambda x: x[0], stack) for stack in (vectors, images))
    return unit, Pairs(first, image, none, none)


def normal_vector(op: LinearOperator, key: jax.Array) -> PyTree:
    """A stack of one normal vector, which is none of the probes."""
    return draw(op, key, jnp.array([ASIDE]), "normal")


def with_products(pairs: Pairs, vectors: PyTree, images: PyTree) -> Pairs:
    """The pairs within a stack of probes, and that of its first with the last one before.

    `images` are in a unit of which squares are numbers, the same for all calls.
    """
    u, hu = (
        jax.tree.map(lambda x, last: jnp.concatenate([last[None], x[:-1]]), stack, last)
        for stack, last in ((vectors, pairs.vector), (images, pairs.image))
    )
    across, back = (jnp.sum(row_dots(a, b), axis=0) for a, b in ((u, images), (vectors, hu)))
    sizes = jnp.sum(row_dots(images, images), axis=0)
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


@programs.jit
def _square(vector: PyTree) -> jax.Array:
    stack = jax.tree.map(lambda x: x[None], vector)
    return row_dots(stack, stack)[:, 0]


def limit(op: LinearOperator, precision: float) -> float:
    """What |uᵀHv - vᵀHu| may be in units of |u| |Hv| / √n, to be rounding.

    The error of a product is a vector of `precision` |Hv| that u meets like a random one, and the sum over
    its entries adds eps √n at the worst. The square root of the precision is what Lanczos runs allow as well.
    """
    rounding = max(float(np.sqrt(precision)), COARSE * precision)
    return rounding + float(jnp.finfo(op.dtype).eps) * float(np.sqrt(op.size))
