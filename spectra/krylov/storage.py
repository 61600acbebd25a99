"""States of runs as they are saved: rows and vectors as the parameters' leaves, written and read by Orbax."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from spectra.base import programs
from spectra.base.trees import PyTree
from spectra.krylov.band import Band
from spectra.krylov.layout import Layout, Panels
from spectra.krylov.recurrence import LanczosState
from spectra.runs.saver import Saver

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


def lanczos_items(
    layout: Layout, state: LanczosState, done: int, stem: str, *, batched: bool = False
) -> dict[str, Callable[[], PyTree]]:
    """What is saved of a state with `done` steps behind it: segments of rows, then all that is not a row.

    Rows stay as they are once they are written, so that a segment that is full keeps its name.
    """
    items: dict[str, Callable[[], PyTree]] = {}
    size = state.basis[0][0].shape[2 if batched else 1] if state.basis else 1
    for i in range(-(-done // size) if state.basis else 0):
        rows = partial(rows_tree, layout, state.basis[i], batched=batched)
        items[f"{stem}-rows-{i:03d}-{min(size, done - i * size):03d}"] = rows
    items[f"{stem}-step-{done:06d}"] = partial(vectors_tree, layout, state, batched=batched)
    return items


def lanczos_state(
    saver: Saver, layout: Layout, fresh: LanczosState, items: dict[str, int], *, batched: bool = False
) -> LanczosState | None:
    """The state that `lanczos_items` were made of, by their checksums; None if one cannot be read."""
    *rows, last = items
    basis: list[PyTree] = []
    for name, segment in zip(rows, fresh.basis, strict=False):
        basis.append(saver.item(name, rows_like(layout, segment, batched=batched), items[name]))
    vectors = saver.item(last, vectors_like(layout, fresh, batched=batched), items[last])
    if vectors is None or any(rows is None for rows in basis):
        return None
    segments = [segment_of(layout, rows, batched) for rows in basis]
    fields = state_fields(layout, vectors, batched)
    return LanczosState(basis=(*segments, *fresh.basis[len(segments) :]), **fields)


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


@partial(programs.jit, static_argnames=("layout", "batched"))
def _rows(layout: Layout, segment: Panels, batched: bool) -> list[jax.Array]:
    def one(segment: Panels) -> list[jax.Array]:
        return jax.vmap(layout.unpack)([jnp.moveaxis(x, 1, 0) for x in segment])

    return (jax.vmap(one) if batched else one)(segment)


@partial(programs.jit, static_argnames=("layout", "batched"))
def _segment(layout: Layout, leaves: list[jax.Array], batched: bool) -> Panels:
    def one(leaves: list[jax.Array]) -> Panels:
        panels = [jnp.moveaxis(x, 0, 1) for x in jax.vmap(layout.pack)(leaves)]
        return layout.place([x.astype(layout.row_dtype or x.dtype) for x in panels])

    return (jax.vmap(one) if batched else one)(leaves)


@partial(programs.jit, static_argnames=("layout", "batched"))
def _vectors(layout: Layout, state: LanczosState, batched: bool) -> dict[str, Any]:
    unpack = jax.vmap(layout.unpack) if batched else layout.unpack
    numbers = {name: layout.replicate(getattr(state, name)) for name in NUMBERS}
    return numbers | {name: unpack(getattr(state, name)) for name in VECTORS}


@partial(programs.jit, static_argnames=("layout", "batched"))
def _packed(layout: Layout, leaves: list[jax.Array], batched: bool) -> Panels:
    def one(leaves: list[jax.Array]) -> Panels:
        return layout.place(layout.pack(leaves))

    return (jax.vmap(one) if batched else one)(leaves)


NAMES = ("locked", "processed", "pending", "num_matvecs", "generation")
"""What a band knows of its rows, besides their parents and what is aside."""


def band_items(band: Band) -> tuple[dict[str, Callable[[], PyTree]], dict[str, Any]]:
    """What is saved of a band: the items of its rows, and what is known of them."""
    layout, size, filled = (
        band.layout.anonymous(),
        len(band.coefficients) // len(band.state.basis),
        band.filled,
    )
    trees: dict[str, Callable[[], PyTree]] = {}
    for i in range(-(-filled // size)):
        # Rows stay as they are until a restart, which begins the next generation.
        name = f"item-{band.generation:05d}-rows-{i:03d}-{min(size, filled - i * size):03d}"
        trees[name] = partial(rows_tree, layout, band.state.basis[i], batched=False)
    if band.aside:
        vectors = [vector for vector, _ in band.aside]
        trees[f"item-{band.generation:05d}-aside"] = lambda: [jax.tree.leaves(v) for v in vectors]
    numbers = jax.device_get((band.state.coefficients, band.state.scale))
    return trees, {name: getattr(band, name) for name in NAMES} | {
        "parent": sorted(band.parent.items()),
        "couplings": [coupling.tolist() for _, coupling in band.aside],
        "coefficients": band.coefficients[:filled, :filled].tolist(),
        "columns": numbers[0][:filled, :filled].tolist(),
        "scale": float(numbers[1]),
    }


def save(saver: Saver, band: Band, run: dict[str, Any]) -> None:
    """Write the rows that are new, the coefficients, and `run`, what the iteration knows."""
    trees, known = band_items(band)
    saver.write(trees, {"band": known, "run": run}, band.num_matvecs)


def restore(saver: Saver, band: Band) -> dict[str, Any] | None:
    """Fill an empty band with what was saved, and return what the iteration knew; None if nothing was."""
    for record in saver.saved:
        if (flight := record["flight"]) and fill(saver, band, flight["band"], flight["items"]):
            saver.flight, saver.saved_step = flight, band.num_matvecs
            return flight["run"]
    return None


def fill(saver: Saver, band: Band, known: dict[str, Any], items: dict[str, int]) -> bool:
    """Whether all of what `band_items` gave could be read, by its checksums, into the empty band."""
    layout, items = band.layout.anonymous(), dict(items)
    aside: list[Any] = []
    for name in [name for name in items if name.endswith("-aside")]:
        like = vectors_of(layout, len(known["couplings"]), band.state.scale)
        read = saver.item(name, like, items.pop(name))
        if read is None:
            return False
        aside = read
    segments = list(band.state.basis)
    for i, (name, digest) in enumerate(items.items()):
        rows = saver.item(name, rows_like(layout, segments[i], batched=False), digest)
        if rows is None:
            return False
        segments[i] = segment_of(layout, rows, False)
    for name in NAMES:
        setattr(band, name, known[name])
    band.parent = dict(known["parent"])
    couplings = [np.array(coupling) for coupling in known["couplings"]]
    vectors = [band.layout.treedef.unflatten(leaves) for leaves in aside]
    band.aside = list(zip(vectors, couplings, strict=True))
    filled, columns = band.filled, np.zeros(band.coefficients.shape)
    band.coefficients[:filled, :filled] = known["coefficients"]
    columns[:filled, :filled] = known["columns"]
    numbers = {"coefficients": columns, "filled": filled, "scale": known["scale"]}
    placed = {name: _like(getattr(band.state, name), value) for name, value in numbers.items()}
    band.state = dataclasses.replace(band.state, basis=tuple(segments), **placed)
    return True


def _like(array: jax.Array, value: Any) -> jax.Array:
    return jax.device_put(jnp.asarray(value, array.dtype), array.sharding)
