"""How Krylov vectors lie in memory: panels, and a basis of row segments.

A vector is stored as *panels*: arrays of two or more axes whose first axis counts blocks. A basis is a
tuple of *segments*; a segment holds `SEGMENT` vectors and puts the row axis behind the block axis, so a
panel (B, k) has segments (B, SEGMENT, k). Both choices were measured (n = 2^20, float32, 2 CPU cores):

* Inner products are batched over blocks and then summed. A matrix-vector product over the full length
  sums in sequence in XLA's CPU backend: 2e-5 off for a self-product, 1e-7 with blocks of 4096, at the
  same bandwidth (0.5 to 1.6 ms for 32 to 64 MB). With accurate coefficients one Gram-Schmidt pass does
  what two did before.
* Segments are separate buffers, so a compiled loop reads the filled ones only: `lax.cond` on a whole
  buffer copies nothing, a slice of one large buffer is a copy.

Vectors that live on one device, or are replicated, are packed into one panel: a network of 150 leaves
then costs as few operations as one of 2. Sharded vectors, and vectors under a caller's `jit` (where
the sharding cannot be seen), keep one panel a leaf with the leaf's own axes: no leaf is ever gathered.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from spectra import _tree

PyTree = Any
Panels = list[jax.Array]
Basis = tuple[Panels, ...]

SEGMENT = 8
"""Vectors in a segment, at least: half a segment is read in vain on average, and 8 fills the sublanes of
a TPU tile."""
MAX_SEGMENTS = 16
"""Every segment is code to compile; beyond 128 vectors segments grow instead (3 % of the rows in vain)."""
BLOCK = 4096
"""Longest block of a packed panel. Over 100 steps with ten outliers 1e5 times the bulk, from a vector of
ones, max|QQ^T - I| was 8e-5, 2e-5, 1e-5, 7e-6 for blocks of 32768, 8192, 4096, 2048; below 4096 the
bandwidth drops by a third."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """The map between pytrees and panels; hashable, so that compiled code depends on it statically."""

    treedef: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]
    packed: bool

    @classmethod
    def of(cls, structure: PyTree, *, packed: bool) -> "Layout":
        """The layout of vectors with this structure, packed into one panel or leaf by leaf."""
        leaves, treedef = jax.tree.flatten(structure)
        shapes = tuple(tuple(leaf.shape) for leaf in leaves)
        return cls(treedef, shapes, tuple(jnp.dtype(leaf.dtype) for leaf in leaves), packed)

    def anonymous(self) -> "Layout":
        """The layout of the list of leaves: equal for vectors that differ in names only."""
        return dataclasses.replace(self, treedef=jax.tree.structure([0] * len(self.shapes)))

    @property
    def structure(self) -> PyTree:
        """`ShapeDtypeStruct` of a vector as a pytree."""
        pairs = zip(self.shapes, self.dtypes, strict=True)
        return self.treedef.unflatten([jax.ShapeDtypeStruct(s, d) for s, d in pairs])

    @property
    def panels(self) -> list[jax.ShapeDtypeStruct]:
        """`ShapeDtypeStruct` of each panel of one vector."""
        if self.packed:
            size = sum(map(math.prod, self.shapes))
            blocks = -(-size // BLOCK)
            width = -(-size // blocks)
            if blocks > 1:
                width = -(-width // 64) * 64  # whole cache lines: rows of a segment stay aligned
            return [jax.ShapeDtypeStruct((blocks, width), jnp.result_type(*self.dtypes))]
        pairs = zip(self.shapes, self.dtypes, strict=True)
        return [jax.ShapeDtypeStruct(s if len(s) > 1 else (1, math.prod(s)), d) for s, d in pairs]

    def pack(self, tree: PyTree) -> Panels:
        """Panels of a vector given as a pytree."""
        leaves = self.treedef.flatten_up_to(tree)
        if self.packed:
            (panel,) = self.panels
            parts = [jnp.ravel(leaf).astype(panel.dtype) for leaf in leaves]
            flat = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
            return [jnp.pad(flat, (0, math.prod(panel.shape) - flat.size)).reshape(panel.shape)]
        return [
            leaf.reshape(panel.shape).astype(panel.dtype)
            for leaf, panel in zip(leaves, self.panels, strict=True)
        ]

    def unpack(self, panels: Panels) -> PyTree:
        """The pytree of a vector given as panels."""
        if self.packed:
            return _tree.unravel(panels[0].reshape(-1), self.structure)
        pairs = zip(panels, self.shapes, strict=True)
        return self.treedef.unflatten([panel.reshape(shape) for panel, shape in pairs])


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
        return [jnp.zeros((p.shape[0], rows, *p.shape[1:]), p.dtype) for p in layout.panels]

    return tuple(segment() for _ in range(count))


def put(basis: Basis, row: jax.Array, vector: Panels) -> Basis:
    """The basis with `vector` in `row`; touches the segment concerned, in place where donated."""
    size = basis[0][0].shape[1]

    def write(segment):
        return [
            lax.dynamic_update_index_in_dim(rows, x[:, None], row % size, 1)
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
    return [jnp.asarray(sum(panels[1:], panels[0])) for panels in zip(*parts, strict=True)]


def combine(basis: Basis, weights: jax.Array) -> Basis:
    """New rows Wᵀ Q for square `weights` (rows, rows), in place where the basis is donated.

    Packed panels go block by block, so that the extra memory is one block of all rows; sharded ones
    leaf by leaf, where only sums over the row axis are formed and nothing moves between devices.
    """
    size = basis[0][0].shape[1]

    def mix(rows):
        spec = "rs,br...->bs..."
        return jnp.einsum(spec, weights.astype(rows.dtype), rows, precision=lax.Precision.HIGHEST)

    def split(rows):
        return [rows[:, i : i + size] for i in range(0, rows.shape[1], size)]

    def one(parts):
        if len(parts[0]) == 1 or parts[0].ndim > 3:
            return split(mix(jnp.concatenate(parts, axis=1)))

        def block(b, parts):
            rows = jnp.concatenate([lax.dynamic_slice_in_dim(part, b, 1) for part in parts], axis=1)
            pairs = zip(parts, split(mix(rows)), strict=True)
            return [lax.dynamic_update_slice_in_dim(part, new, b, 0) for part, new in pairs]

        return lax.fori_loop(0, len(parts[0]), block, list(parts))

    columns = [one(parts) for parts in zip(*basis, strict=True)]
    return tuple(list(segment) for segment in zip(*columns, strict=True))


def dots(basis: Basis, vector: Panels, filled: jax.Array) -> jax.Array:
    """Coefficients Q v on the first `filled` rows, zero beyond; shape (rows,). Reads them once."""
    dtype, size = jnp.result_type(*vector), basis[0][0].shape[1]

    def one(rows, x):
        axes = (tuple(range(2, rows.ndim)), tuple(range(1, x.ndim)))
        dims = (axes, ((0,), (0,)))
        partial = lax.dot_general(rows, x, dims, precision=lax.Precision.HIGHEST)
        return jnp.sum(partial, axis=0).astype(dtype)

    def read(segment):
        return sum((one(r, x) for r, x in zip(segment, vector, strict=True)), jnp.zeros((), dtype))

    def skip(segment):
        del segment
        return jnp.zeros(size, dtype)

    parts = [lax.cond(i * size < filled, read, skip, seg) for i, seg in enumerate(basis)]
    return jnp.concatenate(parts)


def subtract(basis: Basis, coefficients: jax.Array, vector: Panels, filled: jax.Array) -> Panels:
    """v - Q^T c over the first `filled` rows. Reads them once.

    The sum over the rows of a segment is written out: XLA fuses it into one sweep, where a contraction
    over the row axis makes the CPU backend transpose the segment (30 times slower).
    """

    size = basis[0][0].shape[1]

    def one(rows, x, c):
        for r in range(size):
            x = x - c[r].astype(x.dtype) * rows[:, r]
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
        if x.ndim != 3 or x.shape[2] <= 64:
            return x
        parts = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % 64)))
        parts = parts.reshape(x.shape[0], x.shape[1], -1, 64)
        return jnp.moveaxis(parts, 2, 1).reshape(-1, x.shape[1], 64)

    def block(a, b):
        total = jnp.zeros((), jnp.result_type(*a))
        for x, y in zip(map(split, a), map(split, b), strict=True):
            axes = tuple(range(2, x.ndim))
            dims = ((axes, axes), ((0,), (0,)))
            partial = lax.dot_general(x, y, dims, precision=lax.Precision.HIGHEST)
            total = total + jnp.sum(partial, axis=0)
        return total

    return jnp.block([[block(a, b) for b in basis] for a in basis])


def stack(basis: Basis, layout: Layout, num_rows: int) -> PyTree:
    """The first `num_rows` vectors as one pytree with leaves (num_rows, *leaf.shape). A copy."""
    rows = [jnp.concatenate(parts, axis=1) for parts in zip(*basis, strict=True)]
    rows = [jnp.moveaxis(x, 1, 0)[:num_rows] for x in rows]
    return jax.vmap(layout.unpack)(rows)
