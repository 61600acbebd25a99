"""All rows of a basis at once: combined, summed, multiplied with one another, and as pytrees."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from spectra.base import arrays, programs
from spectra.base.trees import PyTree
from spectra.krylov.basis import Basis, subtract
from spectra.krylov.layout import LANES, Layout, Panels
from spectra.results import provides

PORTIONS = 64
"""In which rows are combined: enough that two of them are little memory beside the basis, and few kernels."""


def combine(basis: Basis, weights: jax.Array, layout: Layout) -> Basis:
    """New rows Wᵀ Q for square `weights` (rows, rows), in place where the basis is donated.

    Packed panels go a few blocks at a time: one on a CPU, whose cache holds them, and elsewhere about
    `PORTIONS` portions, each a matrix product. The extra memory is two portions; nothing moves between
    devices.
    """

    def one(arguments: tuple[Panels, jax.Array]) -> Panels:
        parts, weights = arguments
        blocks = len(parts[0])
        if blocks == 1 or not layout.packed:
            return _combine(blocks, parts, weights)
        return _combine(1 if layout.platform == "cpu" else max(1, blocks // PORTIONS), parts, weights)

    panels = [list(parts) for parts in zip(*basis, strict=True)]
    columns = [
        layout.locally(one, (panel.spec, PartitionSpec()), panel.spec)((parts, weights))
        for parts, panel in zip(panels, layout.panels, strict=True)
    ]
    return tuple(list(segment) for segment in zip(*columns, strict=True))


def _combine(portion: int, parts: Panels, weights: jax.Array) -> Panels:
    """`combine` for the segments of one panel, so many blocks at a time."""
    size, blocks = parts[0].shape[1], len(parts[0])

    def mixed(parts: Panels) -> Panels:
        rows = jnp.concatenate(parts, axis=1)
        new = arrays.einsum("rs,br...->bs...", weights.astype(rows.dtype), rows)
        return [new[:, i : i + size] for i in range(0, new.shape[1], size)]

    def replaced(count: int, start: int | jax.Array, parts: Panels) -> Panels:
        new = mixed([lax.dynamic_slice_in_dim(part, start, count) for part in parts])
        pairs = zip(parts, new, strict=True)
        return [lax.dynamic_update_slice_in_dim(part, rows, start, 0) for part, rows in pairs]

    if portion == blocks:
        return mixed(parts)
    trips, rest = divmod(blocks, portion)
    parts = lax.fori_loop(0, trips, lambda i, parts: replaced(portion, i * portion, parts), list(parts))
    return replaced(rest, trips * portion, parts) if rest else parts


@functools.partial(programs.jit, static_argnames="layout")
def sum_of_rows(basis: Basis, coefficients: jax.Array, filled: int | jax.Array, layout: Layout) -> PyTree:
    """Σ c_r q_r over the first `filled` rows as a pytree, in float32 at least whatever they are stored in."""
    zeros = [jnp.zeros(x[:, 0].shape, jnp.promote_types(x.dtype, jnp.float32)) for x in basis[0]]
    return layout.unpack(subtract(basis, -coefficients, zeros, filled, layout))


def gram(basis: Basis) -> jax.Array:
    """Q Q^T over all rows, empty ones included; shape (rows, rows)."""

    def split(x: jax.Array) -> jax.Array:
        # Short sums: self-products have terms of one sign, and XLA sums in sequence.
        if x.ndim != 3 or x.shape[2] <= LANES:
            return x
        parts = arrays.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % LANES)))
        return parts.reshape(*x.shape[:2], -1, LANES)

    def block(a: Panels, b: Panels) -> jax.Array:
        dtype = jnp.promote_types(jnp.float32, jnp.result_type(*a))
        total = jnp.zeros((), dtype)
        for x, y in zip(map(split, a), map(split, b), strict=True):
            apart = (0, 2) if x.ndim == 4 and x.shape[3] == LANES else (0,)
            axes = tuple(axis for axis in range(2, x.ndim) if axis not in apart)
            partial = arrays.contract(x.astype(dtype), y.astype(dtype), (axes, axes), (apart, apart))
            total = total + jnp.sum(partial, axis=tuple(range(len(apart))))
        return total

    return jnp.block([[block(a, b) for b in basis] for a in basis])


@provides("orthogonality")
@programs.jit
def orthogonality(basis: Basis, length: jax.Array) -> jax.Array:
    """max |Q Qᵀ - I| over the first `length` rows."""
    products = gram(basis)
    row = jnp.arange(len(products)) < length
    return jnp.max(jnp.where(row[:, None] & row, jnp.abs(products - jnp.eye(len(products))), 0))


@provides("stack")
@functools.partial(programs.jit, static_argnames=("layout", "first", "last"))
def stack(basis: Basis, layout: Layout, first: int, last: int) -> PyTree:
    """The vectors in rows `first` to `last` - 1 as one pytree with leaves (rows, *leaf.shape). A copy."""
    size = basis[0][0].shape[1]
    low, high = first // size, max(-(-last // size), 1)
    rows = [jnp.concatenate(parts, axis=1) for parts in zip(*basis[low:high], strict=True)]
    rows = [jnp.moveaxis(x[:, first - low * size : last - low * size], 1, 0) for x in rows]
    return jax.vmap(layout.unpack)(rows)
