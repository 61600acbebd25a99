"""A band of rows on disk: `eigsh` goes on with it, to the same bits on the same devices."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectra.krylov import storage
from spectra.krylov.band import Band
from spectra.runs.saver import Saver

NAMES = ("locked", "processed", "pending", "num_matvecs", "generation")
"""What a band knows of its rows, besides their parents and what is aside."""


def save(saver: Saver, band: Band, run: dict[str, Any]) -> None:
    """Write the rows that are new, the coefficients, and `run`, what the iteration knows."""
    layout, size, filled = (
        band.layout.anonymous(),
        len(band.coefficients) // len(band.state.basis),
        band.filled,
    )
    trees = {}
    for i in range(-(-filled // size)):
        # Rows stay as they are until a restart, which begins the next generation.
        name = f"item-{band.generation:05d}-rows-{i:03d}-{min(size, filled - i * size):03d}"
        trees[name] = partial(storage.rows_tree, layout, band.state.basis[i], batched=False)
    if band.aside:
        vectors = [vector for vector, _ in band.aside]
        trees[f"item-{band.generation:05d}-aside"] = lambda: [jax.tree.leaves(v) for v in vectors]
    numbers = jax.device_get((band.state.coefficients, band.state.scale))
    known = {name: getattr(band, name) for name in NAMES} | {
        "parent": sorted(band.parent.items()),
        "couplings": [coupling.tolist() for _, coupling in band.aside],
        "coefficients": band.coefficients[:filled, :filled].tolist(),
        "columns": numbers[0][:filled, :filled].tolist(),
        "scale": float(numbers[1]),
    }
    saver.write(trees, {"band": known, "run": run}, band.num_matvecs)


def restore(saver: Saver, band: Band) -> dict[str, Any] | None:
    """Fill an empty band with what was saved, and return what the iteration knew; None if nothing was."""
    for record in saver.saved:
        if (flight := record["flight"]) and _read(saver, band, flight):
            saver.flight, saver.saved_step = flight, band.num_matvecs
            return flight["run"]
    return None


def _read(saver: Saver, band: Band, flight: dict[str, Any]) -> bool:
    """Whether everything that a record names could be read into the band."""
    layout, known, items = band.layout.anonymous(), flight["band"], dict(flight["items"])
    aside: list[Any] = []
    for name in [name for name in items if name.endswith("-aside")]:
        like = storage.vectors_of(layout, len(known["couplings"]), band.state.scale)
        read = saver.item(name, like, items.pop(name))
        if read is None:
            return False
        aside = read
    segments = list(band.state.basis)
    for i, (name, digest) in enumerate(items.items()):
        rows = saver.item(name, storage.rows_like(layout, segments[i], batched=False), digest)
        if rows is None:
            return False
        segments[i] = storage.segment_of(layout, rows, False)
    for name in NAMES:
        setattr(band, name, known[name])
    band.parent = dict(known["parent"])
    couplings = [np.array(coupling) for coupling in known["couplings"]]
    band.aside = list(zip(map(band.layout.treedef.unflatten, aside), couplings, strict=True))
    filled, columns = band.filled, np.zeros(band.coefficients.shape)
    band.coefficients[:filled, :filled] = known["coefficients"]
    columns[:filled, :filled] = known["columns"]
    numbers = {"coefficients": columns, "filled": filled, "scale": known["scale"]}
    placed = {name: _like(getattr(band.state, name), value) for name, value in numbers.items()}
    band.state = dataclasses.replace(band.state, basis=tuple(segments), **placed)
    return True


def _like(array: jax.Array, value: Any) -> jax.Array:
    return jax.device_put(jnp.asarray(value, array.dtype), array.sharding)
