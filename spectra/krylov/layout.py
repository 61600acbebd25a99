"""How a vector lies in memory: as panels, arrays whose first axis counts blocks.

Callers' vectors, one or several in any of the forms that users have them in, become stacks here.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spectra.base import arrays, meshes, trees
from spectra.base.errors import SpectraError
from spectra.base.trees import PyTree
from spectra.operators.base import LinearOperator

Panels = list[jax.Array]
Axes = tuple[str, ...]

BLOCK = 8192
"""Longest block of a packed panel. On a CPU XLA multiplies a segment of eight rows by a block on one core up
to 8 · 4096 numbers, and on both of two beyond (4104 already): orthogonalisation at n = 1e6 and 96
rows took 32.4 ms a step in blocks of 4096, and 22.0, 22.3, 22.3 in blocks of 4352, 8192, 16384 (2 cores). The
basis is equally orthogonal: with ten outliers 1e5 times the bulk, from a vector of ones, max|QQᵀ - I| was
2.3e-7 to 3.3e-7 for all lengths from 2048 to 32768."""
LANES = 128
"""Last axis of a packed panel. With the lanes of a TPU tile as an axis of their own, a row of a segment is
read in place; rows of panels (blocks, width) are copied to another layout first, at twice the bytes."""


@dataclasses.dataclass(frozen=True)
class Panel:
    """What one panel holds: leaves by the mesh axes that split them, and the axes that split the panel."""

    parts: tuple[tuple[Axes, tuple[int, ...]], ...]
    axes: Axes

    @property
    def leaves(self) -> list[int]:
        """Indices of the leaves, in the order in which they are packed."""
        return [i for _, leaves in self.parts for i in leaves]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The map between pytrees and panels; hashable, so that compiled code depends on it statically."""

    treedef: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]
    packed: tuple[Panel, ...]  # () where every leaf is a panel of its own
    mesh: Mesh | None = None
    specs: tuple[PartitionSpec, ...] = ()  # of the leaves, on a mesh
    row_dtype: Any = None  # of stored rows, where it differs from the vectors'

    @classmethod
    def of(cls, like: PyTree, *, spread: bool = False, row_dtype: Any = None) -> "Layout":
        """The layout of vectors that are placed as the arrays (or shapes) in `like`.

        Raises:
            SpectraError: `spread` where there is no mesh of several devices.
        """
        leaves, mesh = jax.tree.leaves(like), meshes.mesh_of(like)
        bare = cls.leafwise(trees.vector_structure(like))
        everything = tuple(range(len(leaves)))
        if any(isinstance(leaf, Tracer) for leaf in leaves):
            return bare
        if spread and mesh is None:
            raise SpectraError(
                'basis="sharded" spreads the basis over the devices of a mesh, but the parameters lie on '
                "one device: place them with jax.device_put(params, NamedSharding(mesh, PartitionSpec()))."
            )
        row_dtype = None if row_dtype is None else jnp.dtype(row_dtype)
        if mesh is None:
            whole = all(map(_is_whole, leaves))
            packed = (Panel((((), everything),), ()),) if whole else ()
            return dataclasses.replace(bare, packed=packed, row_dtype=row_dtype)
        specs = tuple(map(_spec, leaves))
        names = tuple(name for name in mesh.axis_names if mesh.shape[name] > 1)
        parts: dict[Axes, tuple[int, ...]] = {}
        for i, spec in enumerate(specs):
            own = tuple(name for name in names if name in _names(spec))
            parts[own] = (*parts.get(own, ()), i)
        packed = [Panel((part,), part[0]) for part in parts.items()]
        if spread:
            packed = [Panel(tuple(parts.items()), names)]
        return dataclasses.replace(bare, packed=tuple(packed), mesh=mesh, specs=specs, row_dtype=row_dtype)

    @classmethod
    def leafwise(cls, structure: PyTree) -> "Layout":
        """Every leaf a panel of its own, placed by the compiler."""
        leaves, treedef = jax.tree.flatten(structure)
        dtypes = tuple(jnp.dtype(leaf.dtype) for leaf in leaves)
        return cls(treedef, tuple(tuple(leaf.shape) for leaf in leaves), dtypes, ())

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
        """`ShapeDtypeStruct` of each panel of one vector, the blocks of all devices together."""
        if not self.packed:
            pairs = zip(self.shapes, self.dtypes, strict=True)
            return [jax.ShapeDtypeStruct(s if len(s) > 1 else (1, math.prod(s)), d) for s, d in pairs]
        shapes: list[jax.ShapeDtypeStruct] = []
        for panel in self.packed:
            blocks, *block = self._tile(panel)
            dtype = jnp.result_type(*(self.dtypes[i] for i in panel.leaves))
            shapes.append(jax.ShapeDtypeStruct((self._count(panel.axes) * blocks, *block), dtype))
        return shapes

    @property
    def panel_specs(self) -> list[PartitionSpec]:
        """How the first axis of each panel is split."""
        return [_first(panel.axes) for panel in self.packed] or [PartitionSpec()] * len(self.shapes)

    @property
    def row_precision(self) -> float:
        """Unit roundoff of stored rows, where it is coarser than that of the vectors; otherwise 0."""
        return 0.0 if self.row_dtype is None else float(jnp.finfo(self.row_dtype).eps)

    def device_bytes(self, dtype: Any = None) -> int:
        """Bytes of one vector on one device, padding included; of a stored row with its dtype."""
        counts = [self._count(panel.axes) for panel in self.packed] or [1] * len(self.shapes)
        pairs = zip(counts, self.panels, strict=True)
        return sum(math.prod(p.shape) // count * jnp.dtype(dtype or p.dtype).itemsize for count, p in pairs)

    def pack(self, tree: PyTree) -> Panels:
        """Panels of a vector given as a pytree."""
        leaves = self.treedef.flatten_up_to(tree)
        if not self.packed:
            pairs = zip(leaves, self.panels, strict=True)
            return [leaf.reshape(panel.shape).astype(panel.dtype) for leaf, panel in pairs]
        return [
            self.locally(partial(self._pack, panel), self._leaf_specs(panel), _first(panel.axes))(
                [leaves[i] for i in panel.leaves]
            )
            for panel in self.packed
        ]

    def unpack(self, panels: Panels) -> PyTree:
        """The pytree of a vector given as panels."""
        if not self.packed:
            pairs = zip(panels, self.shapes, strict=True)
            return self.treedef.unflatten([panel.reshape(shape) for panel, shape in pairs])
        leaves: list[Any] = [None] * len(self.shapes)
        for panel, array in zip(self.packed, panels, strict=True):
            read = self.locally(partial(self._unpack, panel), _first(panel.axes), self._leaf_specs(panel))
            for i, leaf in zip(panel.leaves, read(array), strict=True):
                leaves[i] = leaf
        return self.treedef.unflatten(leaves)

    def locally(self, fn: Callable[..., Any], inputs: Any, outputs: Any) -> Callable[..., Any]:
        """`fn` of one argument, run by every device on what it holds."""
        if self.mesh is None:
            return fn
        return jax.shard_map(fn, mesh=self.mesh, in_specs=(inputs,), out_specs=outputs, check_vma=False)

    def place(self, panels: Panels) -> Panels:
        """Panels, or segments of rows, where they belong on the mesh."""
        if self.mesh is None:
            return panels
        pairs = zip(panels, self.panel_specs, strict=True)
        return [lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec)) for x, spec in pairs]

    def replicate(self, tree: PyTree) -> PyTree:
        """Small arrays, on every device of the mesh."""
        if self.mesh is None:
            return tree
        return lax.with_sharding_constraint(tree, NamedSharding(self.mesh, PartitionSpec()))

    def _count(self, axes: Axes) -> int:
        """Devices along mesh axes."""
        return math.prod(self.mesh.shape[name] for name in axes) if self.mesh is not None else 1

    def _leaf_specs(self, panel: Panel) -> list[PartitionSpec]:
        return [self.specs[i] for i in panel.leaves] if self.mesh is not None else []

    def _held(self, leaf: int) -> tuple[int, ...]:
        """Shape of what one device holds of a leaf."""
        if self.mesh is None:
            return self.shapes[leaf]
        return NamedSharding(self.mesh, self.specs[leaf]).shard_shape(self.shapes[leaf])

    def _shares(self, panel: Panel) -> list[tuple[Axes, int]]:
        """For each part of a panel the axes over which it is spread, and the numbers a device keeps."""
        shares: list[tuple[Axes, int]] = []
        for own, leaves in panel.parts:
            axes = tuple(name for name in panel.axes if name not in own)
            size = sum(math.prod(self._held(i)) for i in leaves)
            shares.append((axes, -(-size // self._count(axes))))
        return shares

    def _tile(self, panel: Panel) -> tuple[int, ...]:
        """Blocks of a panel on one device, and the shape of a block."""
        size = sum(share for _, share in self._shares(panel))
        blocks = max(1, -(-size // BLOCK))
        width = -(-size // blocks)
        return (blocks, -(-width // LANES), LANES) if blocks > 1 else (blocks, width)

    def _pack(self, panel: Panel, leaves: list[jax.Array]) -> jax.Array:
        dtype, rest = jnp.result_type(*(self.dtypes[i] for i in panel.leaves)), iter(leaves)
        parts: list[jax.Array] = []
        for (_, indices), (axes, share) in zip(panel.parts, self._shares(panel), strict=True):
            flat = _concatenate([jnp.ravel(next(rest)).astype(dtype) for _ in indices])
            if axes:
                flat = _padded(flat, share * self._count(axes))
                flat = lax.dynamic_slice_in_dim(flat, lax.axis_index(axes) * share, share)
            parts.append(flat)
        tile = self._tile(panel)
        return _padded(_concatenate(parts), math.prod(tile)).reshape(tile)

    def _unpack(self, panel: Panel, array: jax.Array) -> list[jax.Array]:
        flat, start = array.reshape(-1), 0
        leaves: list[jax.Array] = []
        for (_, indices), (axes, share) in zip(panel.parts, self._shares(panel), strict=True):
            part, start = flat[start : start + share], start + share
            if axes:
                part = lax.all_gather(part, axes, tiled=True)
            held = [jax.ShapeDtypeStruct(self._held(i), self.dtypes[i]) for i in indices]
            leaves += trees.unravel(part, held)
        return leaves


def _concatenate(parts: list[jax.Array]) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _padded(flat: jax.Array, size: int) -> jax.Array:
    return arrays.pad(flat, [(0, size - flat.size)])


def _first(axes: Axes) -> PartitionSpec:
    """The first axis split over these mesh axes."""
    return PartitionSpec(axes) if axes else PartitionSpec()


def _names(spec: PartitionSpec) -> set[str]:
    names: set[str] = set()
    for entry in spec:
        names.update(
            cast("tuple[str, ...]", entry) if isinstance(entry, tuple) else () if entry is None else (entry,)
        )
    return names


def _spec(leaf: Any) -> PartitionSpec:
    sharding = getattr(leaf, "sharding", None)
    return sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()


def _is_whole(leaf: Any) -> bool:
    """Whether every device that has the leaf has all of it."""
    sharding = getattr(leaf, "sharding", None)
    return sharding is None or sharding.is_fully_replicated


def stacked(op: LinearOperator, b: PyTree, what: str) -> tuple[PyTree, bool, Callable[[PyTree], PyTree]]:
    """`b` as leaves (k, *leaf.shape), whether it is more than one vector, and the way back to its form.

    One vector is a pytree or a flat array (n,). Several are the columns of an (n, k) array, as for `op @ V`,
    or have a leading axis: a pytree with leaves (k, *leaf.shape), or an array (k, n).
    """
    structure = op.structure
    shape, own = getattr(b, "shape", None), getattr(op.like, "shape", None)
    if op.is_matrix(b):
        rows = jax.vmap(lambda row: trees.unravel(row, structure))(jnp.asarray(b, op.dtype).T)
        return rows, True, lambda x: jax.vmap(trees.ravel)(x).T
    if (
        shape is not None
        and len(shape) == 2
        and shape[0]
        and shape[1] == op.size
        and own != shape
        and own is None
    ):
        rows = jax.vmap(lambda row: trees.unravel(row, structure))(jnp.asarray(b, op.dtype))
        return rows, True, jax.vmap(trees.ravel)
    if (count := _common_axis(b, structure)) is not None:
        like = jax.tree.map(lambda s: jax.ShapeDtypeStruct((count, *s.shape), s.dtype), structure)
        trees.check_structure(b, like, what)
        return trees.cast_like(b, like), True, lambda x: x
    vector = jax.tree.map(lambda x: x[None], op.as_vector(b, what))
    flat = op.is_flat(b)

    def back(x: jax.Array) -> jax.Array:
        one = jax.tree.map(lambda leaf: leaf[0], x)
        return trees.ravel(one) if flat else one

    return vector, False, back


def _common_axis(b: PyTree, structure: PyTree) -> int | None:
    """k, if every leaf of b has the shape of its vector's behind an axis of k."""
    if jax.tree.structure(b) != jax.tree.structure(structure):
        return None
    shapes: list[tuple[int, ...]] = [tuple(getattr(leaf, "shape", ())) for leaf in jax.tree.leaves(b)]
    wanted = [leaf.shape for leaf in jax.tree.leaves(structure)]
    if any(
        shape[1:] != want or len(shape) != len(want) + 1 for shape, want in zip(shapes, wanted, strict=True)
    ):
        return None
    counts = {shape[0] for shape in shapes}
    return counts.pop() if len(counts) == 1 and 0 not in counts else None
