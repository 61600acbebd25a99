"""Runs that survive: finished probes in a small record, the basis of a running one by Orbax.

A folder holds records `record-000012.json` and items, one Orbax checkpoint each. A record lists the
coefficients of finished probes and the items of the probes in flight. Rows of a basis never change once they
are written, so a checkpoint writes only what is new since the last one. Items are written before the record
that names them, and records appear whole or not at all: whatever moment a run is killed at, the newest
record that can be read is consistent. Vectors are stored as the parameters' leaves, without the mesh they
lay on: a run may go on with another number of devices.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spectra import _processes, _tree
from spectra._digest import tree_digest
from spectra._errors import CheckpointError, PreemptedError
from spectra._files import replacing
from spectra.krylov import storage
from spectra.krylov.layout import Layout
from spectra.krylov.recurrence import LanczosState
from spectra.operators.base import LinearOperator

PyTree = Any
SCHEMA = 1
_RECORD = re.compile(r"record-(\d+)\.json")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where and how often `slq` and `spectrum` save a run, so that the same call goes on with it.

    Args:
        directory: a folder of its own, on a file system that all processes of the run share.
        minutes: at most so long between two checkpoints.
        steps: also after so many Lanczos steps; never by count if None.

    A probe that is finished is always recorded. On SIGTERM the run writes a last checkpoint after the steps
    under way (about 5 seconds of them, or one step) and raises `PreemptedError`; the command line then
    ends with code 75, "try again". If these were the last steps, the run is finished instead.

    Cost: one product more, by which a run knows its own operator; disk space of the basis of the probes
    in flight, in the dtype of the vectors.

    Examples:
        >>> import jax, jax.numpy as jnp, spectra, tempfile
        >>> op = spectra.MatrixOperator(jnp.diag(jnp.linspace(0.0, 1.0, 200)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = spectra.Checkpoint(folder, minutes=5)
        ...     first = spectra.slq(op, key=jax.random.key(0), num_steps=20, checkpoint=saved)
        ...     again = spectra.slq(op, key=jax.random.key(0), num_steps=20, checkpoint=saved)  # one product
        >>> bool((first.nodes == again.nodes).all())
        True
    """

    directory: str | os.PathLike
    minutes: float = 10.0
    steps: int | None = None

    @classmethod
    def of(cls, value: "Checkpoint | str | os.PathLike | None") -> "Checkpoint | None":
        """A checkpoint from a folder's name."""
        return value if isinstance(value, Checkpoint) or value is None else cls(value)

    def child(self, name: str) -> "Checkpoint":
        """The checkpoint of one of several runs."""
        return dataclasses.replace(self, directory=Path(self.directory) / re.sub(r"[^\w.-]", "_", name))


def _describe(op: LinearOperator, key: jax.Array, num_steps: int, row_dtype: Any) -> dict[str, Any]:
    """What makes a run the one it is, in words and checksums that do not depend on the devices.

    One product with a fixed vector stands for the loss function and the data: it shows a change in
    either, which their names would not.
    """
    u = _tree.sphere_sample(jax.random.key(0), op.structure)
    product = op @ u
    data = jax.random.key_data(key) if jax.numpy.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    return {
        "operator": f"{type(op).__name__} of order {op.size}",
        "parameters": tree_digest(op.like) if _tree.has_values(op.like) else 0,
        "key": np.asarray(data).ravel().tolist(),
        "num_steps": num_steps,
        "basis_dtype": str(row_dtype or op.dtype),
        "product": [float(_tree.vdot(u, product)), float(_tree.norm(product))],
    }


def _differences(mine: dict[str, Any], saved: dict[str, Any], precision: float) -> list[str]:
    """Names of what differs; products may differ by rounding."""
    names = [name for name in mine if name != "product" and mine[name] != saved.get(name)]
    (value, size), (other, _) = mine["product"], saved.get("product", (np.inf, 0.0))
    if not abs(value - other) <= 1000 * precision * size:
        names.append("product (loss function or data)")
    return names


class Recorder:
    """Saves and restores the runs of one `slq` call; all processes of a run call it alike."""

    def __init__(
        self, checkpoint: Checkpoint, op: LinearOperator, layout: Layout, key: jax.Array, num_steps: int
    ):
        self.folder = Path(checkpoint.directory).absolute()
        self.seconds, self.steps = 60 * checkpoint.minutes, checkpoint.steps
        self.layout = layout.anonymous()
        self.description = _describe(op, key, num_steps, layout.row_dtype)
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
            differences = _differences(self.description, saved, op.precision)
            if differences:
                raise CheckpointError(
                    f"the checkpoint in '{self.folder}' belongs to another run; these differ: "
                    f"{', '.join(differences)}. Use another folder, or remove this one to start anew."
                )
            self.rows, self.flight = rows, flight
            return

    def _records(self) -> list[int]:
        found = (_RECORD.fullmatch(path.name) for path in self.folder.iterdir())
        return [int(match[1]) for match in found if match]

    def _path(self, number: int) -> Path:
        return self.folder / f"record-{number:06d}.json"

    def restored(self) -> list[dict[str, Any]]:
        """The finished probes that were found."""
        return [
            row | {name: np.asarray(row[name], np.float64) for name in ("alpha", "beta")} for row in self.rows
        ]

    def restore(self, probes: range, state: LanczosState) -> tuple[LanczosState, int]:
        """The state of the probes in flight and the steps done; a fresh `state` and 0 if there are none."""
        flight = self.flight
        if flight is None or flight["probes"] != [probes.start, probes.stop]:
            return state, 0
        batched, *names, last = state.alpha.ndim > 1, *flight["items"]
        rows = [
            storage.read_rows(self.folder / name, self.layout, segment, batched=batched)
            for name, segment in zip(names, state.basis, strict=False)
        ]
        fields = storage.read_vectors(self.folder / last, self.layout, state, batched=batched)
        self.saved_step = flight["done"]
        return LanczosState(basis=(*rows, *state.basis[len(rows) :]), **fields), flight["done"]

    def finished(self, rows: list[dict[str, Any]]) -> None:
        """Record probes that are done, whose basis is no longer needed."""
        self.saved_step = 0
        self._commit(rows, None)

    def after(self, probes: range, state: LanczosState, done: int, seconds: float) -> float:
        """Called between chunks: saves where it is time to, raises where the run is to end.

        Returns the longest time that a process took for the chunk, so that all choose the same next.
        """
        due = time.monotonic() - self.saved_at > self.seconds
        due = due or (self.steps is not None and done - self.saved_step >= self.steps)
        stop, due, seconds = _processes.largest(self.stop_requested, due, seconds)
        if stop or due:
            self.save(probes, state, done)
        if stop:
            raise PreemptedError(
                f"the run was asked to end (SIGTERM) and did, after step {done} of probe {probes.start + 1}; "
                f"its checkpoint is in '{self.folder}'. The same command goes on from there."
            )
        return seconds

    def save(self, probes: range, state: LanczosState, done: int) -> None:
        """Write what is new since the last checkpoint."""
        batched = state.alpha.ndim > 1
        size = state.basis[0][0].shape[2 if batched else 1]
        span = [probes.start, probes.stop]
        known = self.flight["items"] if self.flight and self.flight["probes"] == span else []
        stem, items = f"probe-{probes.start:05d}", []
        try:
            for i in range(-(-done // size)):
                items.append(f"{stem}-rows-{i:03d}-{min(size, done - i * size):03d}")
                if items[-1] not in known:
                    path = self.folder / items[-1]
                    storage.write_rows(path, self.layout, state.basis[i], batched=batched)
            items.append(f"{stem}-step-{done:06d}")
            storage.write_vectors(self.folder / items[-1], self.layout, state, batched=batched)
        except (OSError, ValueError, RuntimeError) as error:  # Orbax passes on what the file system said
            for name in set(items) - set(known):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            self._warn(error)
        else:
            self._commit(self.rows, {"probes": span, "done": done, "items": items})
            self.saved_step = done
        self.saved_at = time.monotonic()

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
