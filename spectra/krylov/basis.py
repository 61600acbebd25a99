"""A Krylov basis as segments of rows: the sweeps that Gram-Schmidt needs, and all rows at once.

A basis is a tuple of *segments*; a segment holds `SEGMENT` vectors and puts the row axis behind the block
axis, so a panel (B, k) of a vector (see `layout`) has segments (B, SEGMENT, k). Measured (n = 2^20, float32,
2 CPU cores):

* Inner products are batched over blocks and then summed. A matrix-vector product over the full length
  sums in sequence in XLA's CPU backend: 2e-5 off for a self-product, 1e-7 in blocks of 8192, at the same
  bandwidth. With accurate coefficients one Gram-Schmidt pass does what two did before.
* Segments are separate buffers, so a compiled loop reads the filled ones only: `lax.cond` on a whole
  buffer copies nothing, a slice of one large buffer is a copy.

On a mesh the first axis is split, so all of this is local: the sum over blocks at the end of `dots` is one
reduction between devices.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from spectra.base import arrays, draws, programs
from spectra.krylov.layout import Layout, Panels

Basis = tuple[Panels, ...]

SEGMENT = 8
"""Vectors in a segment, at least: half a segment is read in vain on average, and 8 fills the sublanes of
a TPU tile."""
MAX_SEGMENTS = 16
"""Every segment is code to compile; beyond 128 vectors segments grow instead (3 % of the rows in vain)."""
SMALL = 2**18
"""Numbers up to which a basis is one segment: read in vain from a cache, they cost less than code to compile.
At n = 1550 the first call of 100 steps takes a third less time."""
AT_ONCE = {"tpu": (7, 5), "gpu": (5, 5)}
"""Segments in one sweep of `dots` and of `subtract`, by platform, elsewhere one. The vector is read, and by
`subtract` written, once a sweep, so more move fewer bytes. A TPU copies segments where six are subtracted at
once; on a GPU three sweeps of five for 104 rows also take fewer conditionals (benchmarks/results/tpu.md,
gpu.md). On a CPU more rows at once are slower (15.9, 17.6 and 18.6 ms a step for one, two and four segments
at n = 1e6)."""


SKETCHED = 8
"""Random vectors of a sketch: a right angle between unit vectors looks like one below 0.05 once in 10^7."""
_SKETCH = 2**31 - 1  # of their key; no probe reaches it
_UNIFORM = functools.partial(jax.random.uniform, minval=-1, maxval=1)


def segments(num_rows: int) -> tuple[int, int]:
    """Number of segments for `num_rows` vectors, and the vectors in each."""
    rows = SEGMENT * -(-num_rows // (SEGMENT * MAX_SEGMENTS))
    return -(-num_rows // rows), rows


def zeros(layout: Layout, num_rows: int) -> Basis:
    """An empty basis with room for `num_rows` vectors, in whole segments; a small one in a single one."""
    count, rows = segments(num_rows)
    if count * rows * sum(map(math.prod, layout.shapes)) <= SMALL:  # on any number of devices the same
        count, rows = 1, count * rows
    shapes = [((p.shape[0], rows, *p.shape[1:]), layout.row_dtype or p.dtype) for p in layout.panels]
    return tuple(layout.place([jnp.zeros(*shape) for shape in shapes]) for _ in range(count))


def put(basis: Basis, row: jax.Array | int, vector: Panels, layout: Layout) -> Basis:
    """The basis with `vector` in `row`, in place where donated: that row alone is written, nothing is copied.

    By platform, since no one form is right on all. `put_by_branch` copies segments in a program for a GPU,
    which `put_by_scatter` does not; a scatter is a loop over the blocks on a CPU and a TPU, and a row that is
    read, chosen and written back, which is in place on a GPU and a CPU, doubles the memory of a TPU.
    """
    if layout.platform == "gpu":
        return put_by_scatter(basis, row, vector)
    return put_by_branch(basis, row, vector, layout)


def put_by_branch(basis: Basis, row: jax.Array | int, vector: Panels, layout: Layout) -> Basis:
    """`put` with one conditional a segment: a `lax.switch` over all copies the basis on a CPU.

    One row has its numbers in the same places wherever its axis of length one comes. From there libtpu
    0.0.42, that of jax 0.10.2, takes it that the row axis is the first in memory, and copies whole segments
    to that order and back: so it is told the order, here and where rows are subtracted.
    """
    size = basis[0][0].shape[1]

    def write(segment: Panels) -> Panels:
        segment = layout.in_order(segment)
        pairs = [(rows, x.astype(rows.dtype)) for rows, x in zip(segment, vector, strict=True)]
        put: Panels = [lax.dynamic_update_index_in_dim(rows, x[:, None], row % size, 1) for rows, x in pairs]
        return layout.in_order(put)

    return tuple(
        lax.cond(row // size == i, write, lambda segment: segment, segment) for i, segment in enumerate(basis)
    )


def put_by_scatter(basis: Basis, row: jax.Array | int, vector: Panels) -> Basis:
    """`put` with one kernel a segment, which ends at once where the row is not the segment's.

    Each block has an index of its own, all of them equal: a scatter with one index is made a row that is
    read, chosen and written back, for every segment.
    """
    size = basis[0][0].shape[1]
    options: dict[str, Any] = {"mode": "drop", "unique_indices": True, "wrap_negative_indices": False}
    write = jax.vmap(lambda rows, index, x: rows.at[index].set(x.astype(rows.dtype), **options))
    written: list[Panels] = []
    for i, segment in enumerate(basis):
        index = jnp.where(row // size == i, row % size, size)  # behind the last row: dropped
        pairs = zip(segment, vector, strict=True)
        written.append([write(rows, jnp.full(len(rows), index), x) for rows, x in pairs])
    return tuple(written)


def take(basis: Basis, row: jax.Array | int) -> Panels:
    """A copy of the vector in `row`; zero where there is no such row. Reads that row only."""
    size = basis[0][0].shape[1]

    def read(i: int, basis: Basis) -> Panels:
        return [lax.dynamic_index_in_dim(rows, row % size, 1, keepdims=False) for rows in basis[i]]

    def nothing(basis: Basis) -> Panels:
        return [jnp.zeros_like(rows[:, 0]) for rows in basis[0]]

    branches = [*(functools.partial(read, i) for i in range(len(basis))), nothing]
    return lax.switch(jnp.where(row < 0, len(basis), row // size), branches, basis)


def dots(basis: Basis, vector: Panels, filled: jax.Array | int, layout: Layout) -> jax.Array:
    """Coefficients Q v on the first `filled` rows, zero beyond, shape (rows,). Reads rows once.

    They are summed over blocks in one reduction, which on a mesh is all that devices exchange.
    """
    return added(block_dots(basis, vector, filled, layout, square=False))


def block_dots(
    basis: Basis, vector: Panels, filled: jax.Array | int, layout: Layout, *, square: bool = True
) -> list[jax.Array]:
    """`dots` block by block, shape (blocks, rows) for each panel: what a device computes alone. With the
    `square` of the vector as one more; without, it is read once less where nothing else has."""
    parts: list[Panels] = []
    for group, held in _groups(basis, filled, AT_ONCE.get(layout.platform, (1, 1))[0]):
        branches = [functools.partial(_dots_of, count) for count in range(len(basis[group]) + 1)]
        parts += lax.switch(held, branches, basis[group], vector)
    if square:
        parts.append([dot(x, x)[:, None] for x in vector])
    return [jnp.concatenate(blocks, axis=1) for blocks in zip(*parts, strict=True)]


def added(blocks: list[jax.Array]) -> jax.Array:
    """The sum over blocks and panels."""
    dtype = jnp.result_type(*blocks)
    return sum((jnp.sum(x, axis=0).astype(dtype) for x in blocks), jnp.zeros((), dtype))


def subtract(
    basis: Basis, coefficients: jax.Array, vector: Panels, filled: jax.Array | int, layout: Layout
) -> Panels:
    """v - Q^T c over the first `filled` rows. Reads them once."""
    coefficients = coefficients.reshape(len(basis), -1)
    for group, held in _groups(basis, filled, AT_ONCE.get(layout.platform, (1, 1))[1]):
        branches = [functools.partial(_subtract, layout, count) for count in range(len(basis[group]) + 1)]
        vector = lax.switch(held, branches, basis[group], coefficients[group], vector)
    return vector


def _groups(basis: Basis, filled: jax.Array | int, at_once: int) -> Iterator[tuple[slice, jax.Array | int]]:
    """Segments that a sweep reads together, and how many of each such group hold some of the first `filled`
    rows, were there enough of them: `lax.switch` clips what exceeds its branches."""
    for start in range(0, len(basis), at_once):
        yield slice(start, start + at_once), -(-filled // basis[0][0].shape[1]) - start


dot = jax.jit(functools.partial(arrays.inner, first=1, paired=True))
"""Block by block the inner products of a vector, the second argument, with the rows of a segment, or with one
vector, for one panel."""


def _dots_of(count: int, segments: Basis, vector: Panels) -> list[Panels]:
    """The products with the first `count` segments of a group, in each of its panels, and zeros."""
    panels = [[segment[i] for segment in segments[:count]] for i in range(len(vector))]
    columns = [
        _dots(rows, x) if count > 1 else [dot(segment, x) for segment in rows]
        for rows, x in zip(panels, vector, strict=True)
    ]
    skipped = [
        [jnp.zeros(rows.shape[:2], x.dtype) for rows, x in zip(part, vector, strict=True)]
        for part in segments[count:]
    ]
    return [list(parts) for parts in zip(*columns, strict=True)] + skipped


@jax.custom_jvp
def _dots(segments: list[jax.Array], x: jax.Array) -> list[jax.Array]:
    """`dot` for several segments of one panel.

    One reduction of several arrays, for which XLA reads the vector once; several products are several sweeps
    on a TPU.
    """
    products = [rows.astype(x.dtype) * x[:, None] for rows in segments]
    zeros = [jnp.zeros((), x.dtype)] * len(products)
    added = functools.partial(jax.tree.map, lax.add)
    return list(lax.reduce(products, zeros, added, tuple(range(2, products[0].ndim))))


@_dots.defjvp
def _dots_jvp(
    primals: tuple[list[jax.Array], jax.Array], tangents: tuple[list[jax.Array], jax.Array]
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Of the bilinear form; a reduction of several arrays has no transpose of its own."""
    (segments, x), (d_segments, d_x) = primals, tangents
    pairs = zip(segments, d_segments, strict=True)
    return _dots(segments, x), [dot(d_rows, x) + dot(rows, d_x) for rows, d_rows in pairs]


@functools.partial(jax.jit, static_argnames=("layout", "count"))
def _subtract(layout: Layout, count: int, segments: Basis, coefficients: jax.Array, vector: Panels) -> Panels:
    """v - Σ c_r q_r over all rows of the first `count` segments, in one sweep.

    The sum over rows is written out: XLA fuses it, where a contraction over the row axis makes the CPU
    backend transpose the segment (30 times slower).
    """
    left = list(vector)
    for segment, c in zip(segments[:count], coefficients, strict=False):
        for i, rows in enumerate(layout.in_order(segment)):  # see `put_by_branch`
            for r in range(rows.shape[1]):
                left[i] = left[i] - c[r].astype(left[i].dtype) * rows[:, r].astype(left[i].dtype)
    return left


def sketch(layout: Layout, basis: Basis, key: jax.Array, *, batched: bool = False) -> jax.Array:
    """Products of all rows with the same SKETCHED random vectors for every probe, shape (rows, SKETCHED).

    They tell vectors apart. One vector after another, so that no memory beside one of them is needed. Entries
    are uniform on (-1, 1): signs would see two coordinates as two lines only.
    """
    key = jax.random.fold_in(key, _SKETCH)
    count = len(basis) * basis[0][0].shape[2 if batched else 1]

    def one(number: jax.Array) -> jax.Array:
        v = draws.sample(jax.random.fold_in(key, number), layout.structure, _UNIFORM)
        products = functools.partial(dots, vector=layout.place(layout.pack(v)), filled=count, layout=layout)
        return (jax.vmap(products) if batched else products)(basis)

    return jnp.moveaxis(lax.map(one, jnp.arange(SKETCHED)), 0, -1)


sketches = functools.partial(programs.jit, static_argnames=("layout", "batched"))(sketch)
"""`sketch`, compiled: of each probe in flight where it is batched."""
