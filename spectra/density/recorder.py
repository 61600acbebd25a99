"""Runs that survive: finished probes in a small record, the basis of a running one by Orbax.

A record (see `spectra.runs.saver`) lists the coefficients of finished probes and the items of the probes in
flight: Orbax checkpoints, each with the checksum of its files. Rows of a basis never change once they are
written, so a checkpoint writes only what is new since the last one. Vectors are stored as the parameters'
leaves, without the mesh they lay on: a run may go on with another number of devices.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from spectra.base import host
from spectra.krylov import storage
from spectra.krylov.layout import Layout
from spectra.krylov.recurrence import LanczosState
from spectra.operators.accumulate import Sum
from spectra.operators.base import LinearOperator
from spectra.runs.checkpoint import Checkpoint, describe
from spectra.runs.saver import Saver

NUMBERS = ("length", "asymmetry")
ARRAYS = {"alpha", "beta", "sketch"}
"""Of a finished probe; the sketch is none that an older version wrote."""


class Recorder(Saver):
    """Saves and restores the runs of one `slq` call; all processes of a run call it alike."""

    def __init__(
        self, checkpoint: Checkpoint, op: LinearOperator, layout: Layout, key: jax.Array, *, keep_basis: bool
    ):
        description = describe(op, key, layout.row_dtype if keep_basis else "none")
        super().__init__(checkpoint, description, op.precision)
        self.layout, self.treedef = layout.anonymous(), layout.treedef
        self.flights: list[dict[str, Any]] = []  # of probes under way, the newest first

    def _load(self) -> None:
        super()._load()
        for record in self.saved[:1]:
            for row in record["rows"]:
                arrays = {name: np.asarray(row[name], np.float64) for name in ARRAYS & row.keys()}
                self.rows[row["probe"]] = {name: row[name] for name in NUMBERS} | arrays
        self.flights = [record["flight"] for record in self.saved if record["flight"]]

    def restore(self, probes: range, state: LanczosState) -> tuple[LanczosState, int]:
        """The state of the probes in flight and the steps done; a fresh `state` and 0 if there are none."""
        self.saved_step = 0
        for flight in self.flights:
            if flight["probes"] != [probes.start, probes.stop] or flight["steps"] != state.alpha.shape[-1]:
                continue
            found = self._read(flight, state)
            if found is not None:
                self.flight, self.saved_step = flight, flight["done"]
                return found, flight["done"]
        return state, 0

    def _read(self, flight: dict[str, Any], state: LanczosState) -> LanczosState | None:
        items = list(flight["items"].items())
        own = dict(items[:-1] if flight["sums"] else items)
        return storage.lanczos_state(self, self.layout, state, own, batched=state.alpha.ndim > 1)

    def sums(self, probes: range, state: LanczosState, done: int) -> list[tuple[int, Sum]]:
        """The passes over a stream that the product of this step has behind it; see `Passes`."""
        flight = self.flight
        if not flight or flight["probes"] != [probes.start, probes.stop] or flight["done"] != done:
            return []
        counts = flight["sums"]
        if not counts:
            return []
        name, digest = list(flight["items"].items())[-1]
        read = self.item(name, storage.sums_like(self.layout, 2 * len(counts), state), digest)
        if read is None:
            return []
        parts = [self.treedef.unflatten(leaves) for leaves in read]
        return list(zip(counts, zip(parts[::2], parts[1::2], strict=True), strict=True))

    def finished(self, probes: range, rows: list[dict[str, Any]]) -> None:
        """Record probes that are done, whose basis is no longer needed."""
        self.saved_step = 0
        self.rows |= zip(probes, rows, strict=True)
        self.commit(None)

    def between(self) -> None:
        """Called between probes: raises where the run is to end."""
        (stop,) = host.largest(float(host.pending()))
        self.end(int(stop), f"after {len(self.rows)} probes" if self.rows else "before its first step")

    def after(
        self,
        probes: range,
        state: LanczosState,
        done: int,
        seconds: float,
        sums: Sequence[tuple[int, Sum]] = (),
    ) -> float:
        """Called between chunks, and with `sums` between the batches of a product: saves where it is time
        to, raises where the run is to end.

        Returns the longest time that a process took since the last call, so that all choose the same next.
        """
        stop, due, seconds = self.due(done, seconds)
        if due:
            self.save(probes, state, done, sums)
        batches = f" and {sum(n for n, _ in sums)} batches of the next step" if sums else ""
        self.end(stop, f"after step {done} of probe {probes.start + 1}{batches}")
        return seconds

    def save(
        self, probes: range, state: LanczosState, done: int, sums: Sequence[tuple[int, Sum]] = ()
    ) -> None:
        """Write what is new since the last checkpoint. What it names is never written again in place."""
        batched, steps = state.alpha.ndim > 1, state.alpha.shape[-1]
        span, stem = [probes.start, probes.stop], f"probe-{probes.start:05d}-of-{steps:05d}"
        sums = sums if all(self._is_vector(total, state) for _, total in sums) else []
        counts = [count for count, _ in sums]
        trees = storage.lanczos_items(self.layout, state, done, stem, batched=batched)
        if sums:
            trees[f"{stem}-step-{done:06d}-batch-{sum(counts):06d}"] = lambda: [
                jax.tree.leaves(part) for _, total in sums for part in total
            ]
        if self.flight and self.flight["probes"] != span:
            self.flight = None
        self.write(trees, {"probes": span, "steps": steps, "done": done, "sums": counts}, done)

    def _is_vector(self, total: Sum, state: LanczosState) -> bool:
        """Whether a sum is what the operator's own products are; parts of another operator's need not be."""
        shapes = [state.alpha.shape[:-1] + shape for shape in self.layout.shapes]
        return all([x.shape for x in jax.tree.leaves(part)] == shapes for part in total)
