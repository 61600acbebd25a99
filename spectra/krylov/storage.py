"""A Lanczos state as it is saved: rows and vectors as the parameters' leaves.

Panels depend on the mesh, leaves do not: what one number of devices has written another can read.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from spectra.krylov.layout import Layout, Panels
from spectra.krylov.recurrence import LanczosState

PyTree = Any
NUMBERS = ("alpha", "beta", "scale", "asymmetry", "length", "alive", "second_passes")
VECTORS = ("current", "previous")


def rows_like(layout: Layout, segment: Panels, *, batched: bool) -> PyTree:
    """What `rows_tree` of a segment looks like, and where its arrays belong."""
    shapes = jax.eval_shape(partial(_rows, layout, batched=batched), segment)
    return {"rows": _where(layout, shapes, segment[0])}


def rows_tree(layout: Layout, segment: Panels, *, batched: bool) -> PyTree:
    """A segment of the basis."""
    return {"rows": _rows(layout, segment, batched)}


def segment_of(layout: Layout, tree: PyTree, batched: bool) -> Panels:
    """The segment that `rows_tree` was made of."""
    return _segment(layout, tree["rows"], batched)


def vectors_like(layout: Layout, state: LanczosState, *, batched: bool) -> PyTree:
    """What `vectors_tree` of a state looks like, and where its arrays belong."""
    shapes = jax.eval_shape(partial(_vectors, layout, batched=batched), state)
    like = {name: _where(layout, shapes[name], state.alpha) for name in VECTORS}
    return like | {name: _placed(layout, shapes[name], PartitionSpec(), state.alpha) for name in NUMBERS}


def vectors_tree(layout: Layout, state: LanczosState, *, batched: bool) -> PyTree:
    """All of a state but the basis."""
    return _vectors(layout, state, batched)


def state_fields(layout: Layout, tree: PyTree, batched: bool) -> dict[str, Any]:
    """The fields of the state that `vectors_tree` was made of."""
    return tree | {name: _packed(layout, tree[name], batched) for name in VECTORS}


def sums_like(layout: Layout, count: int, state: LanczosState) -> PyTree:
    """`count` vectors, or stacks of them, as lists of leaves like the parameters."""
    return vectors_of(layout, count, state.alpha, state.alpha.shape[:-1])


def vectors_of(layout: Layout, count: int, beside: jax.Array, stack: tuple[int, ...] = ()) -> PyTree:
    """What `count` lists of leaves look like, of vectors or of stacks of them, and where they belong."""
    shapes = [jax.ShapeDtypeStruct(stack + s, d) for s, d in zip(layout.shapes, layout.dtypes, strict=True)]
    return [_where(layout, shapes, beside)] * count


def _where(layout: Layout, shapes: list[Any], beside: jax.Array) -> list[Any]:
    """Stacks of leaves, split as the leaves are."""
    specs = layout.specs or [PartitionSpec()] * len(shapes)
    return [
        _placed(layout, shape, PartitionSpec(*[None] * (len(shape.shape) - len(own)), *spec), beside)
        for shape, own, spec in zip(shapes, layout.shapes, specs, strict=True)
    ]


def _placed(layout: Layout, shape: Any, spec: PartitionSpec, beside: jax.Array) -> Any:
    """A shape on the mesh; without one, on the device of an array of the fresh state."""
    sharding = beside.sharding if layout.mesh is None else NamedSharding(layout.mesh, spec)
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


@partial(jax.jit, static_argnames=("layout", "batched"))
def _rows(layout: Layout, segment: Panels, batched: bool) -> list[jax.Array]:
    def one(segment):
        return jax.vmap(layout.unpack)([jnp.moveaxis(x, 1, 0) for x in segment])

    return (jax.vmap(one) if batched else one)(segment)


@partial(jax.jit, static_argnames=("layout", "batched"))
def _segment(layout: Layout, leaves: list[jax.Array], batched: bool) -> Panels:
    def one(leaves):
        panels = [jnp.moveaxis(x, 0, 1) for x in jax.vmap(layout.pack)(leaves)]
        return layout.place([x.astype(layout.row_dtype or x.dtype) for x in panels])

    return (jax.vmap(one) if batched else one)(leaves)


@partial(jax.jit, static_argnames=("layout", "batched"))
def _vectors(layout: Layout, state: LanczosState, batched: bool) -> dict[str, Any]:
    unpack = jax.vmap(layout.unpack) if batched else layout.unpack
    numbers = {name: layout.replicate(getattr(state, name)) for name in NUMBERS}
    return numbers | {name: unpack(getattr(state, name)) for name in VECTORS}


@partial(jax.jit, static_argnames=("layout", "batched"))
def _packed(layout: Layout, leaves: list[jax.Array], batched: bool) -> Panels:
    def one(leaves):
        return layout.place(layout.pack(leaves))

    return (jax.vmap(one) if batched else one)(leaves)
