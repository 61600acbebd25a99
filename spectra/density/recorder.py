"""Runs that survive: finished probes in a small record, the basis of a running one by Orbax.

A record (see `records`) lists the coefficients of finished probes and the items of the probes in flight:
Orbax checkpoints, each with the checksum of its files. Rows of a basis never change once they are
written, so a checkpoint writes only what is new since the last one. Vectors are stored as the parameters'
leaves, without the mesh they lay on: a run may go on with another number of devices.
"""

import contextlib
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spectra import _processes, _signals
from spectra._digest import folder_digest
from spectra._errors import CheckpointError
from spectra.checkpoint import Checkpoint
from spectra.density.identity import describe, differences
from spectra.density.records import Records
from spectra.krylov import storage
from spectra.krylov.layout import Layout
from spectra.krylov.recurrence import LanczosState
from spectra.operators.base import LinearOperator

PyTree = Any
ARRAYS = {"alpha", "beta", "sketch"}
"""Of a finished probe; the sketch is none that an older version wrote."""


class Recorder:
    """Saves and restores the runs of one `slq` call; all processes of a run call it alike."""

    def __init__(
        self, checkpoint: Checkpoint, op: LinearOperator, layout: Layout, key: jax.Array, *, keep_basis: bool
    ):
        self.folder = Path(checkpoint.directory).absolute()
        self.seconds, self.steps = 60 * checkpoint.minutes, checkpoint.steps
        self.layout, self.treedef = layout.anonymous(), layout.treedef
        self.records = Records(self.folder)
        self.rows: dict[int, dict[str, Any]] = {}  # of finished probes, by their number
        self.flights: list[dict[str, Any]] = []  # of probes under way, the newest first
        self.flight: dict[str, Any] | None = None  # the one that was restored, or saved last
        self.saved_at, self.saved_step = time.monotonic(), 0
        self.description, self.precision = (
            describe(op, key, layout.row_dtype if keep_basis else "none"),
            op.precision,
        )

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Around all that the run computes: reads what was saved; nobody else writes into the folder."""
        with self.records.held():
            self._load()
            yield

    def _load(self) -> None:
        """What the records hold that can be read; refuses those of another problem."""
        records, wrong = self.records.read()
        for text in wrong:
            rest = "the one before is used." if records else "the run starts anew."
            self._warn(f"a record of the checkpoint in '{self.folder}' cannot be used ({text}); {rest}")
        for record in records:
            found = differences(self.description, record["description"], self.precision)
            if found:
                raise CheckpointError(
                    f"the checkpoint in '{self.folder}' belongs to another run; these differ: "
                    f"{', '.join(found)}. Use another folder, or remove this one to start anew."
                )
        for record in records[:1]:
            self.rows = {
                row["probe"]: row | {name: np.asarray(row[name], np.float64) for name in ARRAYS & row.keys()}
                for row in record["rows"]
            }
        self.flights = [record["flight"] for record in records if record["flight"]]

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
        batched = state.alpha.ndim > 1
        names = list(flight["items"])
        *rows, last = names[:-1] if flight["sums"] else names
        basis = []
        for name, segment in zip(rows, state.basis, strict=False):
            like = storage.rows_like(self.layout, segment, batched=batched)
            basis.append(self._item(name, like, flight["items"][name]))
        vectors = self._item(
            last, storage.vectors_like(self.layout, state, batched=batched), flight["items"][last]
        )
        if vectors is None or any(rows is None for rows in basis):
            return None
        segments = [storage.segment_of(self.layout, rows, batched) for rows in basis]
        fields = storage.state_fields(self.layout, vectors, batched)
        return LanczosState(basis=(*segments, *state.basis[len(segments) :]), **fields)

    def _item(self, name: str, like: PyTree, digest: int) -> PyTree | None:
        """The arrays of an item; None, with a warning, if they are not those that were written."""
        path, reason = self.folder / name, "its checksum is another one"
        if folder_digest(path) == digest:
            try:
                return storage.read(path, like)
            except Exception as error:  # Orbax passes on whatever it meets
                reason = (str(error) or repr(error)).splitlines()[0]
        self._warn(
            f"'{name}' of the checkpoint in '{self.folder}' is damaged ({reason}); the checkpoint before is "
            "used where it does not need it, or else these probes start anew."
        )
        return None

    def sums(self, probes: range, state: LanczosState, done: int) -> list[tuple[int, PyTree]]:
        """The passes over a stream that the product of this step has behind it; see `Passes`."""
        flight = self.flight
        if not flight or flight["probes"] != [probes.start, probes.stop] or flight["done"] != done:
            return []
        counts = flight["sums"]
        if not counts:
            return []
        name, digest = list(flight["items"].items())[-1]
        read = self._item(name, storage.sums_like(self.layout, len(counts), state), digest)
        if read is None:
            return []
        return [(count, self.treedef.unflatten(sum)) for count, sum in zip(counts, read, strict=True)]

    def finished(self, probes: range, rows: list[dict[str, Any]]) -> None:
        """Record probes that are done, whose basis is no longer needed."""
        self.saved_step = 0
        self.rows |= {probe: {"probe": probe} | row for probe, row in zip(probes, rows, strict=True)}
        self._commit(None)

    def between(self) -> None:
        """Called between probes: raises where the run is to end."""
        (stop,) = _processes.largest(float(_signals.pending()))
        if stop:
            done = f"after {len(self.rows)} probes" if self.rows else "before its first step"
            _signals.end(int(stop), done, self.folder)

    def after(
        self,
        probes: range,
        state: LanczosState,
        done: int,
        seconds: float,
        sums: Sequence[tuple[int, PyTree]] = (),
    ) -> float:
        """Called between chunks, and with `sums` between the batches of a product: saves where it is time
        to, raises where the run is to end.

        Returns the longest time that a process took since the last call, so that all choose the same next.
        """
        due = time.monotonic() - self.saved_at > self.seconds
        due = due or (self.steps is not None and done - self.saved_step >= self.steps)
        stop, due, seconds = _processes.largest(_signals.pending(), due, seconds)
        if stop or due:
            self.save(probes, state, done, sums)
        if stop:
            batches = f" and {sum(n for n, _ in sums)} batches of the next step" if sums else ""
            _signals.end(int(stop), f"after step {done} of probe {probes.start + 1}{batches}", self.folder)
        return seconds

    def save(
        self, probes: range, state: LanczosState, done: int, sums: Sequence[tuple[int, PyTree]] = ()
    ) -> None:
        """Write what is new since the last checkpoint. What it names is never written again in place."""
        batched = state.alpha.ndim > 1
        steps = state.alpha.shape[-1]
        size = state.basis[0][0].shape[2 if batched else 1] if state.basis else steps
        span, stem = [probes.start, probes.stop], f"probe-{probes.start:05d}-of-{steps:05d}"
        sums = sums if all(self._is_vector(total, state) for _, total in sums) else []
        counts = [count for count, _ in sums]
        trees: dict[str, Callable[[], PyTree]] = {}
        for i in range(-(-done // size) if state.basis else 0):
            trees[f"{stem}-rows-{i:03d}-{min(size, done - i * size):03d}"] = partial(
                storage.rows_tree, self.layout, state.basis[i], batched=batched
            )
        trees[f"{stem}-step-{done:06d}"] = partial(storage.vectors_tree, self.layout, state, batched=batched)
        if sums:
            trees[f"{stem}-step-{done:06d}-batch-{sum(counts):06d}"] = lambda: [
                jax.tree.leaves(total) for _, total in sums
            ]
        known = self.flight["items"] if self.flight and self.flight["probes"] == span else {}
        items = {name: known.get(name) for name in trees}
        new = [name for name in items if name not in known]
        try:
            for name in new:
                storage.write(self.folder / name, trees[name]())
                items[name] = folder_digest(self.folder / name)
        except (OSError, ValueError, RuntimeError) as error:  # Orbax passes on what the file system said
            for name in new:
                shutil.rmtree(self.folder / name, ignore_errors=True)
            self._not_written(error)
        else:
            self._commit({"probes": span, "steps": steps, "done": done, "items": items, "sums": counts})
            self.saved_step = done
        self.saved_at = time.monotonic()

    def _is_vector(self, total: PyTree, state: LanczosState) -> bool:
        """Whether a sum is what the operator's own products are; parts of another operator's need not be."""
        return [x.shape for x in jax.tree.leaves(total)] == [
            state.alpha.shape[:-1] + shape for shape in self.layout.shapes
        ]

    def _commit(self, flight: dict[str, Any] | None) -> None:
        """A new record of what is done and what is under way."""
        self.flight = flight
        if _processes.is_first():
            rows = list(self.rows.values())
            try:
                self.records.write({"description": self.description, "rows": rows, "flight": flight})
            except OSError as error:
                self._not_written(error)
        _processes.largest(0.0)  # nobody goes on to overwrite what this record may still need

    def _not_written(self, error: Exception) -> None:
        reason = (str(error) or repr(error)).splitlines()[0]
        self._warn(
            f"no checkpoint could be written to '{self.folder}': {reason} The run goes on, and the "
            "checkpoint before stays."
        )

    @staticmethod
    def _warn(text: str) -> None:
        if _processes.is_first():
            warnings.warn(text, RuntimeWarning, stacklevel=2)
