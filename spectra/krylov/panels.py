"""Arithmetic on vectors in panels (see `layout`), and the terms of a Lanczos step that need no basis.

A sum over blocks, at the end of `vdot`, is the one reduction between devices; all before is local.
"""

import jax
import jax.numpy as jnp
from jax import lax

from spectra.base import arrays, trees
from spectra.krylov.layout import Panels


def vdot(a: Panels, b: Panels) -> jax.Array:
    """Inner product over all panels, block by block."""
    return total(block_vdot(a, b))


def block_vdot(a: Panels, b: Panels) -> list[jax.Array]:
    """`vdot` block by block, shape (blocks,) for each panel: what a device computes alone."""

    def one(x: jax.Array, y: jax.Array) -> jax.Array:
        axes = tuple(range(1, x.ndim))
        return arrays.contract(x, y, (axes, axes), ((0,), (0,)))

    return [one(x, y) for x, y in zip(a, b, strict=True)]


def total(blocks: list[jax.Array]) -> jax.Array:
    """The result of `vdot` from that of `block_vdot`."""
    dtype = jnp.result_type(*blocks)
    return sum((jnp.sum(x).astype(dtype) for x in blocks), jnp.zeros((), dtype))


def norm(a: Panels) -> jax.Array:
    """Euclidean norm over all panels, of numbers of any size."""
    unit = trees.power_of_two(trees.largest(a))
    a = trees.scale(1 / unit, a)
    return unit * jnp.sqrt(vdot(a, a))


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
    """(w / unit - β q_{i-1} - α q_i, α), β in that unit: what Lanczos leaves of a product w = H q_i.

    α is taken behind the subtraction of β q_{i-1}. Before it, what q_i has along q_{i-1} by rounding would
    enter α times β, and pass from step to step: without reorthogonalisation Ritz values were up to ten times
    as far from eigenvalues (Paige, doi:10.1093/imamat/10.3.373).
    """
    w = trees.axpy(-beta, previous, trees.scale(1 / unit, w))
    alpha = vdot(q, w)
    return trees.axpy(-alpha, q, w), alpha
