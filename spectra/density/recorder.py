"""Runs that survive: finished probes in a small record, the basis of a running one by Orbax.

A folder holds records `record-000012.json` and items, one Orbax checkpoint each. A record lists the
coefficients of finished probes and the items of the probes in flight. Rows of a basis never change once they
are written, so a checkpoint writes only what is new since the last one. Items are written before the record
that names them, and records appear whole or not at all: whatever moment a run is killed at, the newest
record that can be read is consistent. Vectors are stored as the parameters' leaves, without the mesh they
lay on: a run may go on with another number of devices.
"""

import contextlib
import json
import re
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spectra import _processes
from spectra._errors import CheckpointError, PreemptedError
from spectra._files import replacing
from spectra.checkpoint import Checkpoint
from spectra.density.identity import describe, differences
from spectra.krylov import storage
from spectra.krylov.layout import Layout
from spectra.krylov.recurrence import LanczosState
from spectra.operators.base import LinearOperator

PyTree = Any
SCHEMA = 1
_RECORD = re.compile(r"record-(\d+)\.json")


class Recorder:
    """Saves and restores the runs of one `slq` call; all processes of a run call it alike."""

    def __init__(
        self, checkpoint: Checkpoint, op: LinearOperator, layout: Layout, key: jax.Array, num_steps: int
    ):
        self.folder = Path(checkpoint.directory).absolute()
        self.seconds, self.steps = 60 * checkpoint.minutes, checkpoint.steps
        self.layout, self.treedef = layout.anonymous(), layout.treedef
        self.description = describe(op, key, num_steps, layout.row_dtype)
        self.rows: list[dict[str, Any]] = []
        self.flight: dict[str, Any] | None = None
        self.saved_at, self.saved_step = time.monotonic(), 0
        self.stop_requested = False
        self.folder.mkdir(parents=True, exist_ok=True)
        self.number = max(self._records(), default=-1)
        self._load(op)

    def _load(self, op: LinearOperator) -> None:
        """The newest record that can be read; refuses one of another problem."""
        for number in sorted(self._records(), reverse=True):
            try:
                record = json.loads(self._path(number).read_text())
                saved, rows, flight = record["description"], record["rows"], record["flight"]
                complete = flight is None or all((self.folder / name).is_dir() for name in flight["items"])
            except (OSError, ValueError, KeyError, TypeError):
                continue  # written by halves: the one before is whole
            if record["schema"] != SCHEMA:
                raise CheckpointError(
                    f"the checkpoint in '{self.folder}' has schema {record['schema']}, this version of "
                    f"spectra reads {SCHEMA}: go on with the version that wrote it, or use another folder."
                )
            if not complete:
                continue
            found = differences(self.description, saved, op.precision)
            if found:
                raise CheckpointError(
                    f"the checkpoint in '{self.folder}' belongs to another run; these differ: "
                    f"{', '.join(found)}. Use another folder, or remove this one to start anew."
                )
            self.rows, self.flight = rows, flight
            return

    def _records(self) -> list[int]:
        found = (_RECORD.fullmatch(path.name) for path in self.folder.iterdir())
        return [int(match[1]) for match in found if match]

    def _path(self, number: int) -> Path:
        return self.folder / f"record-{number:06d}.json"

    def _flight_of(self, probes: range) -> dict[str, Any] | None:
        """What was saved of these probes."""
        flight = self.flight
        return flight if flight and flight["probes"] == [probes.start, probes.stop] else None

    def restored(self) -> list[dict[str, Any]]:
        """The finished probes that were found."""
        return [
            row | {name: np.asarray(row[name], np.float64) for name in ("alpha", "beta")} for row in self.rows
        ]

    def restore(self, probes: range, state: LanczosState) -> tuple[LanczosState, int]:
        """The state of the probes in flight and the steps done; a fresh `state` and 0 if there are none."""
        flight = self._flight_of(probes)
        if flight is None:
            return state, 0
        items = flight["items"][:-1] if flight.get("sums") else flight["items"]
        batched, *names, last = state.alpha.ndim > 1, *items
        rows = [
            storage.read_rows(self.folder / name, self.layout, segment, batched=batched)
            for name, segment in zip(names, state.basis, strict=False)
        ]
        fields = storage.read_vectors(self.folder / last, self.layout, state, batched=batched)
        self.saved_step = flight["done"]
        return LanczosState(basis=(*rows, *state.basis[len(rows) :]), **fields), flight["done"]

    def sums(self, probes: range, state: LanczosState, done: int) -> list[tuple[int, PyTree]]:
        """The passes over a stream that the product of this step has behind it; see `Passes`."""
        flight = self._flight_of(probes)
        if flight is None or flight["done"] != done:
            return []
        path, counts = self.folder / flight["items"][-1], flight.get("sums", [])
        if not counts:
            return []
        read = storage.read_sums(path, self.layout, len(counts), state, self.treedef)
        return list(zip(counts, read, strict=True))

    def finished(self, rows: list[dict[str, Any]]) -> None:
        """Record probes that are done, whose basis is no longer needed."""
        self.saved_step = 0
        self._commit(rows, None)

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
        stop, due, seconds = _processes.largest(self.stop_requested, due, seconds)
        if stop or due:
            self.save(probes, state, done, sums)
        if stop:
            batches = f" and {sum(n for n, _ in sums)} batches of the next step" if sums else ""
            raise PreemptedError(
                f"the run was asked to end (SIGTERM) and did, after step {done} of probe {probes.start + 1}"
                f"{batches}; its checkpoint is in '{self.folder}'. The same command goes on from there."
            )
        return seconds

    def save(
        self, probes: range, state: LanczosState, done: int, sums: Sequence[tuple[int, PyTree]] = ()
    ) -> None:
        """Write what is new since the last checkpoint. What it names is never written again in place."""
        batched = state.alpha.ndim > 1
        size = state.basis[0][0].shape[2 if batched else 1]
        span, stem = [probes.start, probes.stop], f"probe-{probes.start:05d}"
        known = (self._flight_of(probes) or {"items": []})["items"]
        sums = sums if all(self._is_vector(total, state) for _, total in sums) else []
        counts = [count for count, _ in sums]
        items: dict[str, Callable[[Path], None]] = {}
        for i in range(-(-done // size)):
            items[f"{stem}-rows-{i:03d}-{min(size, done - i * size):03d}"] = partial(
                storage.write_rows, layout=self.layout, segment=state.basis[i], batched=batched
            )
        items[f"{stem}-step-{done:06d}"] = partial(
            storage.write_vectors, layout=self.layout, state=state, batched=batched
        )
        if sums:
            items[f"{stem}-step-{done:06d}-batch-{sum(counts):06d}"] = partial(
                storage.write_sums, sums=[total for _, total in sums]
            )
        new = [name for name in items if name not in known]
        try:
            for name in new:
                items[name](self.folder / name)
        except (OSError, ValueError, RuntimeError) as error:  # Orbax passes on what the file system said
            for name in new:
                shutil.rmtree(self.folder / name, ignore_errors=True)
            self._warn(error)
        else:
            self._commit(self.rows, {"probes": span, "done": done, "items": list(items), "sums": counts})
            self.saved_step = done
        self.saved_at = time.monotonic()

    def _is_vector(self, total: PyTree, state: LanczosState) -> bool:
        """Whether a sum is what the operator's own products are; parts of another operator's need not be."""
        return [x.shape for x in jax.tree.leaves(total)] == [
            state.alpha.shape[:-1] + shape for shape in self.layout.shapes
        ]

    def _commit(self, rows: list[dict[str, Any]], flight: dict[str, Any] | None) -> None:
        """A new record, then what only older records need goes."""
        self.rows, self.flight = list(rows), flight
        self.number += 1
        if _processes.is_first():
            record = {"schema": SCHEMA, "description": self.description, "rows": self.rows, "flight": flight}
            try:
                with replacing(self._path(self.number)) as temporary:
                    temporary.write_text(json.dumps(record, default=np.ndarray.tolist))
                self._prune()
            except OSError as error:
                self._warn(error)
        _processes.largest(0.0)  # nobody goes on to overwrite what this record may still need

    def _prune(self) -> None:
        """Keep the last two records and their items."""
        records = sorted(self._records())
        for number in records[:-2]:
            self._path(number).unlink(missing_ok=True)
        needed: set[str] = set()
        for number in records[-2:]:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                needed |= set((json.loads(self._path(number).read_text())["flight"] or {})["items"])
        for path in self.folder.glob("record-*.part"):  # of a process that was killed
            path.unlink(missing_ok=True)
        for path in self.folder.glob("probe-*"):
            if path.name not in needed:
                shutil.rmtree(path, ignore_errors=True)

    def _warn(self, error: Exception) -> None:
        reason = (str(error) or repr(error)).splitlines()[0]
        warnings.warn(
            f"no checkpoint could be written to '{self.folder}': {reason} The run goes on, and the "
            "checkpoint before stays.",
            RuntimeWarning,
            stacklevel=2,
        )

    @contextlib.contextmanager
    def watching(self):
        """While the run lasts, SIGTERM asks it to end at the next chance."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(*_):
            self.stop_requested = True

        before = signal.signal(signal.SIGTERM, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
