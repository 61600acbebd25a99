"""The step that all Lanczos runs share: what a product leaves beside the rows, and the vector it leads to.

With q the vector that was multiplied, p the one before it, and rows v_j,

    w = H q - β p;  α = qᵀw;  w -= α q;  w ⟂ v_0 .. v_i;  v_{i+1} = w / |w|

Subtracting the large coefficients first leaves others of rounding size, so that one Gram-Schmidt pass over
the rows is as good as two over the raw product. A step computes in a unit near |H|, a power of two, which the
subtraction brings in without a pass of its own: squares neither under- nor overflow.

Two kinds of runs keep books of it. `recurrence` has the coefficients of T alone, and beside rows that may be
stored in less precision or not at all one vector at hand in full; it runs under `vmap`. `band` has the
coefficients of a product on all rows, from any of them, which restarts and several start vectors need.

Vectors are panels (see `layout`). A sum over blocks, as at the end of `vdot`, is the one reduction between
devices; all before is local.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from spectra.base import arrays, trees
from spectra.krylov import basis as _basis
from spectra.krylov.basis import Basis
from spectra.krylov.layout import Layout, Panels
from spectra.quadrature.rules import breakdown_noise

REPEAT = 0.1
"""A second Gram-Schmidt pass follows where the first removed more than this share of what is left."""


def vdot(a: Panels, b: Panels) -> jax.Array:
    """Inner product over all panels, block by block."""
    return _basis.added([_basis.dot(x, y) for x, y in zip(a, b, strict=True)])


norm = partial(trees.norm, dot=vdot)
"""Euclidean norm over all panels, of numbers of any size."""


def unit_of_step(first: bool | jax.Array, product: Panels, size: jax.Array) -> jax.Array:
    """A power of two near |H|, in which a step computes: the largest entry of the first product, then `size`.

    |H| is known once there was a product, so that no later one is read for this.
    """
    return lax.cond(
        first,
        lambda product: trees.power_of_two(trees.largest(product)),
        lambda _: trees.power_of_two(size),
        product,
    )


def three_terms(
    w: Panels, q: Panels, previous: Panels, beta: jax.Array, unit: jax.Array
) -> tuple[Panels, jax.Array]:
    """The product w = H q in the unit of the step, without β q_{i-1} and α q_i; and α.

    α is taken behind the subtraction of β q_{i-1}. Before it, what q_i has along q_{i-1} by rounding would
    enter α times β, and pass from step to step: without reorthogonalisation Ritz values were up to ten times
    as far from eigenvalues (Paige, doi:10.1093/imamat/10.3.373).
    """
    w = trees.axpy(-beta, previous, trees.scale(1 / unit, w))
    alpha = vdot(q, w)
    return trees.axpy(-alpha, q, w), alpha


def following(
    rest: Panels, norm: jax.Array, scale: jax.Array, size: int, going: bool | jax.Array
) -> tuple[Panels, jax.Array]:
    """The next vector, and whether there is one: zero where rounding alone can have left the rest.

    Args:
        rest: what the three terms and the passes over the rows left of the product.
        norm: of the rest.
        scale: |H| in the unit of the step.
        size: numbers of a vector.
        going: whether the run has come this far.
    """
    alive = going & (norm > breakdown_noise(size, float(jnp.finfo(scale.dtype).eps)) * scale)
    inverse = jnp.where(alive, 1 / jnp.where(alive, norm, 1), 0)
    return [jnp.where(alive, x, 0) for x in trees.scale(inverse, rest)], alive


def orthogonalize(
    basis: Basis, vector: Panels, filled: jax.Array | int, layout: Layout
) -> tuple[Panels, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Make `vector` orthogonal to the first `filled` rows of `basis`, by classical Gram-Schmidt.

    `vector` is in a unit in which its square is a number, see `unit_of_step`.

    Returns the new vector, its norm, the coefficients of the first pass, the sum of the coefficients
    of all passes, and whether a second one ran. Costs one pass, or two where the first removed a
    relevant part; a pass, w' = w - QᵀQw, is two reads of the rows.

    |w'|² = |w|² - |Qw|², both from one reduction; it loses no digits where the pass removes little, and
    where it removes much a second pass follows.
    """
    blocks = _basis.block_dots(basis, vector, filled, layout)
    sums = _basis.added(blocks)
    first, square = sums[:-1], sums[-1]
    removed = jnp.vdot(first, first, precision=lax.Precision.HIGHEST)
    left = jnp.maximum(square - removed, 0)
    vector = _basis.subtract(basis, first, vector, filled, layout)
    repeat = removed > REPEAT**2 * left
    vector, second, square = _second_pass(basis, vector, filled, layout, repeat, blocks)
    left = jnp.where(repeat, square, left)
    # The derivative is 0 at 0: where a space ends, the norm of what is left says nothing.
    norm = jnp.where(left > 0, jnp.sqrt(jnp.where(left > 0, left, 1)), 0)
    return vector, norm, first, first + second, repeat


def _second_pass(
    basis: Basis,
    vector: Panels,
    filled: jax.Array | int,
    layout: Layout,
    wanted: jax.Array,
    blocks: list[jax.Array],
) -> tuple[Panels, jax.Array, jax.Array]:
    """A pass where it is `wanted`: w', the coefficients, else zero, and |w'|², else without a meaning.

    Under `vmap` the rows are read for all lanes where one of them wants it, and change those that do.

    Sums over devices are taken behind the conditionals, in every step: one that contains a reduction between
    GPUs is decided on the host, which waits for the cards.
    """
    before, anywhere = [x[:, -1] for x in blocks], arrays.anywhere(wanted)
    first = [x[:, :-1] for x in blocks]
    # The compiler does not look into branches for how a result is split: that it may be one of the sums of
    # the first pass, tells it.
    either = partial(jax.tree.map, partial(jnp.where, wanted))
    measure = partial(_basis.block_dots, basis, filled=filled, layout=layout, square=False)
    measured = lax.cond(anywhere, measure, lambda _: [jnp.zeros_like(x) for x in first], vector)
    second = jnp.where(wanted, _basis.added(either(measured, first)), 0)
    less = partial(_basis.subtract, basis, second, filled=filled, layout=layout)
    vector = lax.cond(anywhere, lambda x: less(vector=x), lambda x: x, vector)
    # At a breakdown nothing but rounding is left, and no difference of squares tells how much.
    nothing = [jnp.zeros_like(x) for x in before]
    squares = lax.cond(anywhere, lambda panels: [_basis.dot(x, x) for x in panels], lambda _: nothing, vector)
    # XLA makes no graph of fewer than five kernels between two reductions, and leaves their conditionals to
    # the host: so there are two conditionals, and the choice is apart from the sum.
    return vector, second, _basis.added(arrays.barrier(either(squares, before)))
