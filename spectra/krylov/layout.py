"""How a vector lies in memory, as panels, arrays whose first axis counts blocks; and on which device."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

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

_GPUS = {"cuda": "gpu", "rocm": "gpu"}  # a device that exists calls itself "gpu", one of a topology need not


class Part(NamedTuple):
    """Leaves that the same mesh axes split, within a panel on one device."""

    held: tuple[jax.ShapeDtypeStruct, ...]  # what the device has of each leaf
    axes: Axes  # over which they are spread besides
    devices: int  # along these
    share: int  # numbers that the device keeps


@dataclasses.dataclass(frozen=True)
class Panel:
    """What one panel holds: leaves, the mesh axes that split it, and what follows from these."""

    leaves: tuple[int, ...]  # in the order in which they are packed
    axes: Axes
    dtype: Any
    shape: tuple[int, ...] = dataclasses.field(compare=False)  # the blocks of all devices together
    tile: tuple[int, ...] = dataclasses.field(compare=False)  # shape on one device
    parts: tuple[Part, ...] = dataclasses.field(default=(), compare=False)

    @property
    def spec(self) -> PartitionSpec:
        """How its first axis is split."""
        return PartitionSpec(self.axes) if self.axes else PartitionSpec()


@dataclasses.dataclass(frozen=True)
class Layout:
    """The map between pytrees and panels; hashable, so that compiled code depends on it statically."""

    treedef: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]
    panels: tuple[Panel, ...]
    packed: bool = False  # where not, every leaf is a panel of its own
    mesh: Mesh | None = None
    specs: tuple[PartitionSpec, ...] = ()  # of the leaves, on a mesh
    row_dtype: Any = None  # of stored rows, where it differs from the vectors'
    platform: str = "cpu"  # where rows lie: "cpu", "gpu", "tpu"; what is fast there decides how they are read

    @classmethod
    def of(cls, like: PyTree, *, spread: bool = False, row_dtype: Any = None) -> "Layout":
        """The layout of vectors that are placed as the arrays (or shapes) in `like`.

        Raises:
            SpectraError: `spread` where there is no mesh of several devices.
        """
        leaves, layout = jax.tree.leaves(like), cls.leafwise(trees.vector_structure(like))
        if any(isinstance(leaf, Tracer) for leaf in leaves):
            return layout
        shardings = [getattr(leaf, "sharding", None) for leaf in leaves]
        named = any(isinstance(sharding, NamedSharding) for sharding in shardings)
        mesh = meshes.mesh_of(like) if named else None
        if spread and mesh is None:
            raise SpectraError(
                'basis="sharded" spreads the basis over the devices of a mesh, but the parameters lie on '
                "one device: place them with jax.device_put(params, NamedSharding(mesh, PartitionSpec()))."
            )
        if row_dtype is not None and {jnp.dtype(row_dtype)} != set(layout.dtypes):
            layout = dataclasses.replace(layout, row_dtype=jnp.dtype(row_dtype))
        concrete = [s for s in shardings if s and not isinstance(getattr(s, "mesh", None), AbstractMesh)]
        if concrete:
            name = next(iter(concrete[0].device_set)).platform
            layout = dataclasses.replace(layout, platform=_GPUS.get(name, name))
        if mesh is not None:
            specs = tuple(s.spec if isinstance(s, NamedSharding) else PartitionSpec() for s in shardings)
            return dataclasses.replace(layout, mesh=mesh, specs=specs)._on_mesh(mesh, spread)
        if all(sharding is None or sharding.is_fully_replicated for sharding in shardings):
            panel = layout._panel({(): tuple(range(len(leaves)))}, ())
            return dataclasses.replace(layout, panels=(panel,), packed=True)
        return layout

    @classmethod
    def leafwise(cls, structure: PyTree) -> "Layout":
        """Every leaf a panel of its own, placed by the compiler; its platform is the default one."""
        leaves, treedef = jax.tree.flatten(structure)
        shapes = tuple(tuple(leaf.shape) for leaf in leaves)
        dtypes = tuple(jnp.dtype(leaf.dtype) for leaf in leaves)
        blocks = [shape if len(shape) > 1 else (1, math.prod(shape)) for shape in shapes]
        panels = [Panel((i,), (), dtypes[i], shape, shape) for i, shape in enumerate(blocks)]
        return cls(treedef, shapes, dtypes, tuple(panels), platform=jax.default_backend())

    def _on_mesh(self, mesh: Mesh, spread: bool) -> "Layout":
        """A panel for the leaves that the same axes of the mesh split, or one that all axes split."""
        names = tuple(name for name in mesh.axis_names if mesh.shape[name] > 1)
        parts: dict[Axes, tuple[int, ...]] = {}
        for i, spec in enumerate(self.specs):
            own = tuple(name for name in names if name in _names(spec))
            parts[own] = (*parts.get(own, ()), i)
        groups = [(parts, names)] if spread else [({own: leaves}, own) for own, leaves in parts.items()]
        panels = tuple(self._panel(*group) for group in groups)
        return dataclasses.replace(self, panels=panels, packed=True)

    def _panel(self, groups: dict[Axes, tuple[int, ...]], axes: Axes) -> Panel:
        """The panel of leaves by the mesh axes that split them, itself split by `axes`."""
        sizes = {} if self.mesh is None else dict(self.mesh.shape)
        parts: list[Part] = []
        for own, leaves in groups.items():
            shapes = [self.shapes[i] for i in leaves]
            if self.mesh is not None:
                shapes = [NamedSharding(self.mesh, self.specs[i]).shard_shape(self.shapes[i]) for i in leaves]
            spread = tuple(name for name in axes if name not in own)
            devices = math.prod(sizes[name] for name in spread)
            share = -(-sum(map(math.prod, shapes)) // devices)
            held = [jax.ShapeDtypeStruct(s, self.dtypes[i]) for s, i in zip(shapes, leaves, strict=True)]
            parts.append(Part(tuple(held), spread, devices, share))
        size = sum(part.share for part in parts)
        blocks = max(1, -(-size // BLOCK))
        width = -(-size // blocks)
        tile = (blocks, -(-width // LANES), LANES) if blocks > 1 else (blocks, width)
        shape = (math.prod(sizes[name] for name in axes) * blocks, *tile[1:])
        every = tuple(i for leaves in groups.values() for i in leaves)
        dtype = jnp.result_type(*(self.dtypes[i] for i in every))
        return Panel(every, axes, dtype, shape, tile, tuple(parts))

    def anonymous(self) -> "Layout":
        """The layout of the list of leaves: equal for vectors that differ in names only."""
        return dataclasses.replace(self, treedef=jax.tree.structure([0] * len(self.shapes)))

    @property
    def structure(self) -> PyTree:
        """`ShapeDtypeStruct` of a vector as a pytree."""
        pairs = zip(self.shapes, self.dtypes, strict=True)
        return self.treedef.unflatten([jax.ShapeDtypeStruct(s, d) for s, d in pairs])

    @property
    def row_precision(self) -> float:
        """Unit roundoff of stored rows, where it is coarser than that of the vectors; otherwise 0."""
        return 0.0 if self.row_dtype is None else float(jnp.finfo(self.row_dtype).eps)

    def device_bytes(self, dtype: Any = None) -> int:
        """Bytes of one vector on one device, padding included; of a stored row with its dtype."""
        return sum(math.prod(p.tile) * jnp.dtype(dtype or p.dtype).itemsize for p in self.panels)

    def pack(self, tree: PyTree) -> Panels:
        """Panels of a vector given as a pytree."""
        leaves = self.treedef.flatten_up_to(tree)
        if not self.packed:
            pairs = zip(leaves, self.panels, strict=True)
            return [leaf.reshape(panel.shape).astype(panel.dtype) for leaf, panel in pairs]
        packed: Panels = []
        for panel in self.panels:
            pack = partial(_pack, panel)
            if self.mesh is not None:
                pack = self.locally(pack, [self.specs[i] for i in panel.leaves], panel.spec)
            packed.append(pack([leaves[i] for i in panel.leaves]))
        return packed

    def unpack(self, panels: Panels) -> PyTree:
        """The pytree of a vector given as panels."""
        if not self.packed:
            pairs = zip(panels, self.shapes, strict=True)
            return self.treedef.unflatten([panel.reshape(shape) for panel, shape in pairs])
        leaves: list[Any] = [None] * len(self.shapes)
        for panel, array in zip(self.panels, panels, strict=True):
            read = partial(_unpack, panel)
            if self.mesh is not None:
                read = self.locally(read, panel.spec, [self.specs[i] for i in panel.leaves])
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
        pairs = zip(panels, self.panels, strict=True)
        return [lax.with_sharding_constraint(x, NamedSharding(self.mesh, p.spec)) for x, p in pairs]

    def in_order(self, rows: Panels) -> Panels:
        """Panels, or segments of rows, on a TPU with their axes in order in memory.

        Each device is told of what it holds: libtpu 0.0.42 gathers an array on all devices to be told of it.
        Within a caller's jit nobody knows how arrays are split; where that may be so nothing is said.
        """
        if self.platform != "tpu":
            return rows
        if self.mesh is not None:
            pairs = zip(rows, self.panels, strict=True)
            return [self.locally(arrays.in_order, p.spec, p.spec)(x) for x, p in pairs]
        return rows if not self.packed and jax.device_count() > 1 else list(map(arrays.in_order, rows))

    def stack_in_order(self, stack: PyTree) -> PyTree:
        """A stack of vectors, on several GPUs or TPUs with the axes of each leaf in order in memory.

        A product's collectives have the axis that is split first, and all that a loop computes of it would
        have, too: what the loop begins with is copied to that order then, and back.
        """
        if self.mesh is None or self.platform == "cpu":
            return stack
        leaves, treedef = jax.tree.flatten(stack)

        def one(x: jax.Array, spec: PartitionSpec) -> jax.Array:
            spec = PartitionSpec(None, *spec)
            return self.locally(arrays.in_order, spec, spec)(x)

        return treedef.unflatten([one(x, spec) for x, spec in zip(leaves, self.specs, strict=True)])

    def replicate(self, tree: PyTree) -> PyTree:
        """Small arrays, on every device of the mesh."""
        if self.mesh is None:
            return tree
        return lax.with_sharding_constraint(tree, NamedSharding(self.mesh, PartitionSpec()))


@dataclasses.dataclass(frozen=True)
class BasisPlace:
    """Where basis vectors lie: how each does, and on which device, if not on that of the operator."""

    layout: Layout
    device: Any = None

    def to_operator(self, op: LinearOperator, tree: PyTree) -> PyTree:
        """Vectors of the basis on the device of the operator."""
        return tree if self.device is None else jax.device_put(tree, op.device)

    def to_basis(self, tree: PyTree) -> PyTree:
        """Vectors of the operator where the basis lies."""
        return tree if self.device is None else jax.device_put(tree, self.device)


def _pack(panel: Panel, leaves: list[jax.Array]) -> jax.Array:
    """What one device holds of a panel."""
    rest, pieces = iter(leaves), list[jax.Array]()
    for part in panel.parts:
        held = [jnp.ravel(next(rest)).astype(panel.dtype) for _ in part.held]
        if part.axes:
            flat = jnp.concatenate(held)
            flat = arrays.pad(flat, [(0, part.share * part.devices - flat.size)])
            held = [lax.dynamic_slice_in_dim(flat, lax.axis_index(part.axes) * part.share, part.share)]
        pieces += held
    # Zeros at the end are one more piece: a vector that is padded is a copy of it.
    pieces.append(jnp.zeros(math.prod(panel.tile) - sum(piece.size for piece in pieces), panel.dtype))
    return jnp.concatenate(pieces).reshape(panel.tile)


def _unpack(panel: Panel, array: jax.Array) -> list[jax.Array]:
    """What one device holds of the leaves of a panel."""
    flat, start = array.reshape(-1), 0
    leaves: list[jax.Array] = []
    for part in panel.parts:
        own, start = flat[start : start + part.share], start + part.share
        if part.axes:
            own = lax.all_gather(own, part.axes, tiled=True)
        ends = itertools.accumulate((math.prod(leaf.shape) for leaf in part.held), initial=0)
        pieces = arrays.cut_out([own[a:b] for a, b in itertools.pairwise(ends)])
        pairs = zip(pieces, part.held, strict=True)
        leaves += [piece.reshape(leaf.shape).astype(leaf.dtype) for piece, leaf in pairs]
    return leaves


def _names(spec: PartitionSpec) -> set[str]:
    names: set[str] = set()
    for entry in spec:
        names.update(
            cast("tuple[str, ...]", entry) if isinstance(entry, tuple) else () if entry is None else (entry,)
        )
    return names
