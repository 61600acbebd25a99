"""A Krylov basis as segments of rows, and arithmetic on vectors in panels (see `layout`).

A basis is a tuple of *segments*; a segment holds `SEGMENT` vectors and puts the row axis behind the block
axis, so a panel (B, k) has segments (B, SEGMENT, k). Measured (n = 2^20, float32, 2 CPU cores):

* Inner products are batched over blocks and then summed. A matrix-vector product over the full length
  sums in sequence in XLA's CPU backend: 2e-5 off for a self-product, 1e-7 with blocks of 4096, at the
  same bandwidth (0.5 to 1.6 ms for 32 to 64 MB). With accurate coefficients one Gram-Schmidt pass does
  what two did before.
* Segments are separate buffers, so a compiled loop reads the filled ones only: `lax.cond` on a whole
  buffer copies nothing, a slice of one large buffer is a copy.

On a mesh the first axis is split, so all of this is local: one sum over blocks, at the end of `dots` or
`vdot`, is one reduction between devices.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from spectra.krylov.layout import LANES, Layout, Panels, PyTree

Basis = tuple[Panels, ...]

SEGMENT = 8
"""Vectors in a segment, at least: half a segment is read in vain on average, and 8 fills the sublanes of
a TPU tile."""
MAX_SEGMENTS = 16
"""Every segment is code to compile; beyond 128 vectors segments grow instead (3 % of the rows in vain)."""


def vdot(a: Panels, b: Panels) -> jax.Array:
    """Inner product over all panels, block by block."""

    def one(x, y):
        axes = tuple(range(1, x.ndim))
        dims = ((axes, axes), ((0,), (0,)))
        return jnp.sum(lax.dot_general(x, y, dims, precision=lax.Precision.HIGHEST))

    dtype = jnp.result_type(*a)
    return sum((one(x, y).astype(dtype) for x, y in zip(a, b, strict=True)), jnp.zeros((), dtype))


def norm(a: Panels) -> jax.Array:
    """Euclidean norm over all panels."""
    return jnp.sqrt(vdot(a, a))


def scale(factor: jax.Array, a: Panels) -> Panels:
    """factor * a."""
    return [(factor * x).astype(x.dtype) for x in a]


def axpy(factor: jax.Array, a: Panels, b: Panels) -> Panels:
    """factor * a + b."""
    return [(factor * x + y).astype(y.dtype) for x, y in zip(a, b, strict=True)]


def segments(num_rows: int) -> tuple[int, int]:
    """Number of segments for `num_rows` vectors, and the vectors in each."""
    rows = SEGMENT * -(-num_rows // (SEGMENT * MAX_SEGMENTS))
    return -(-num_rows // rows), rows


def zeros(layout: Layout, num_rows: int) -> Basis:
    """An empty basis with room for `num_rows` vectors, in whole segments."""
    count, rows = segments(num_rows)

    def segment():
        panels = layout.panels
        return layout.place(
            [jnp.zeros((p.shape[0], rows, *p.shape[1:]), layout.row_dtype or p.dtype) for p in panels]
        )

    return tuple(segment() for _ in range(count))


def put(basis: Basis, row: jax.Array, vector: Panels) -> Basis:
    """The basis with `vector` in `row`; touches the segment concerned, in place where donated."""
    size = basis[0][0].shape[1]

    def write(segment):
        return [
            lax.dynamic_update_index_in_dim(rows, x[:, None].astype(rows.dtype), row % size, 1)
            for rows, x in zip(segment, vector, strict=True)
        ]

    return tuple(
        lax.cond(row // size == i, write, lambda segment: segment, segment) for i, segment in enumerate(basis)
    )


def take(basis: Basis, row: jax.Array) -> Panels:
    """A copy of the vector in `row`; zero where there is no such row. Reads that row only."""
    size = basis[0][0].shape[1]

    def read(segment):
        return [lax.dynamic_index_in_dim(rows, row % size, 1, keepdims=False) for rows in segment]

    def skip(segment):
        return [jnp.zeros_like(rows[:, 0]) for rows in segment]

    parts = [lax.cond(row // size == i, read, skip, segment) for i, segment in enumerate(basis)]
    return [functools.reduce(jnp.add, panels) for panels in zip(*parts, strict=True)]


def combine(basis: Basis, weights: jax.Array, layout: Layout) -> Basis:
    """New rows Wᵀ Q for square `weights` (rows, rows), in place where the basis is donated.

    Packed panels go block by block, so that the extra memory is one block of all rows; nothing moves
    between devices.
    """
    size = basis[0][0].shape[1]

    def mix(rows, weights):
        spec = "rs,br...->bs..."
        return jnp.einsum(spec, weights.astype(rows.dtype), rows, precision=lax.Precision.HIGHEST)

    def split(rows):
        return [rows[:, i : i + size] for i in range(0, rows.shape[1], size)]

    def one(arguments):
        parts, weights = arguments
        if len(parts[0]) == 1 or not layout.packed:
            return split(mix(jnp.concatenate(parts, axis=1), weights))

        def block(b, parts):
            rows = jnp.concatenate([lax.dynamic_slice_in_dim(part, b, 1) for part in parts], axis=1)
            pairs = zip(parts, split(mix(rows, weights)), strict=True)
            return [lax.dynamic_update_slice_in_dim(part, new, b, 0) for part, new in pairs]

        return lax.fori_loop(0, len(parts[0]), block, list(parts))

    panels = [list(parts) for parts in zip(*basis, strict=True)]
    columns = [
        layout.locally(one, (spec, PartitionSpec()), spec)((parts, weights))
        for parts, spec in zip(panels, layout.panel_specs, strict=True)
    ]
    return tuple(list(segment) for segment in zip(*columns, strict=True))


def dots(basis: Basis, vector: Panels, filled: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Coefficients Q v on the first `filled` rows, zero beyond, shape (rows,); and |v|². Reads rows once.

    Both are summed over blocks in one reduction, which on a mesh is all that devices exchange.
    """
    dtype, size = jnp.result_type(*vector), basis[0][0].shape[1]

    def dot(rows, x):
        axes = (tuple(range(2, rows.ndim)), tuple(range(1, x.ndim)))
        dims = (axes, ((0,), (0,)))
        return lax.dot_general(rows.astype(x.dtype), x, dims, precision=lax.Precision.HIGHEST)

    def read(segment):
        return [dot(rows, x) for rows, x in zip(segment, vector, strict=True)]

    def skip(segment):
        return [jnp.zeros(rows.shape[:2], x.dtype) for rows, x in zip(segment, vector, strict=True)]

    parts = [lax.cond(i * size < filled, read, skip, segment) for i, segment in enumerate(basis)]
    parts.append([dot(x[:, None], x) for x in vector])
    sums = sum(
        (
            jnp.sum(jnp.concatenate(blocks, axis=1), axis=0).astype(dtype)
            for blocks in zip(*parts, strict=True)
        ),
        jnp.zeros((), dtype),
    )
    return sums[:-1], sums[-1]


def subtract(basis: Basis, coefficients: jax.Array, vector: Panels, filled: jax.Array) -> Panels:
    """v - Q^T c over the first `filled` rows. Reads them once.

    The sum over the rows of a segment is written out: XLA fuses it into one sweep, where a contraction
    over the row axis makes the CPU backend transpose the segment (30 times slower).
    """

    size = basis[0][0].shape[1]

    def one(rows, x, c):
        for r in range(size):
            x = x - c[r].astype(x.dtype) * rows[:, r].astype(x.dtype)
        return x

    for i, segment in enumerate(basis):
        c = coefficients[i * size : (i + 1) * size]

        def read(v, segment=segment, c=c):
            return [one(rows, x, c) for rows, x in zip(segment, v, strict=True)]

        vector = lax.cond(i * size < filled, read, lambda v: v, vector)
    return vector


def gram(basis: Basis) -> jax.Array:
    """Q Q^T over all rows, empty ones included; shape (rows, rows)."""

    def split(x):  # short sums: self-products have terms of one sign, and XLA sums in sequence
        if x.ndim != 3 or x.shape[2] <= LANES:
            return x
        parts = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % LANES)))
        return parts.reshape(*x.shape[:2], -1, LANES)

    def block(a, b):
        dtype = jnp.promote_types(jnp.float32, jnp.result_type(*a))
        total = jnp.zeros((), dtype)
        for x, y in zip(map(split, a), map(split, b), strict=True):
            apart = (0, 2) if x.ndim == 4 and x.shape[3] == LANES else (0,)
            axes = tuple(axis for axis in range(2, x.ndim) if axis not in apart)
            dims = ((axes, axes), (apart, apart))
            partial = lax.dot_general(x.astype(dtype), y.astype(dtype), dims, precision=lax.Precision.HIGHEST)
            total = total + jnp.sum(partial, axis=tuple(range(len(apart))))
        return total

    return jnp.block([[block(a, b) for b in basis] for a in basis])


@functools.partial(jax.jit, static_argnames=("layout", "first", "last"))
def stack(basis: Basis, layout: Layout, first: int, last: int) -> PyTree:
    """The vectors in rows `first` to `last` - 1 as one pytree with leaves (rows, *leaf.shape). A copy."""
    size = basis[0][0].shape[1]
    low, high = first // size, max(-(-last // size), 1)
    rows = [jnp.concatenate(parts, axis=1) for parts in zip(*basis[low:high], strict=True)]
    rows = [jnp.moveaxis(x[:, first - low * size : last - low * size], 1, 0) for x in rows]
    return jax.vmap(layout.unpack)(rows)
