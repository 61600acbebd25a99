"""One run in one folder: what it saved, what it saves, and when it is asked to end.

A record (see `records`) lists what is small, and names the items that it needs: folders of arrays that Orbax
wrote, each with the checksum of its files. An item is never written again in place, so that a record which
can be read finds what it names.
"""

import contextlib
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from spectra.base import host, progress
from spectra.base.errors import CheckpointError
from spectra.base.files import folder_digest
from spectra.base.trees import PyTree
from spectra.runs.checkpoint import Checkpoint, differences
from spectra.runs.records import Records

PACE = 5.0
"""Seconds between two looks at the clock and at signals, where a run can be interrupted."""


def write(path: Path, tree: PyTree) -> None:
    """Write arrays to a folder that appears whole or not at all; every process writes what it holds."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as saver:
        saver.save(path, tree, force=True)


def read(path: Path, like: PyTree) -> PyTree:
    """Read arrays, each placed as `like` says."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as loader:
        return loader.restore(path, like)


class Saver:
    """Saves and restores one run; all processes of a run call it alike."""

    def __init__(self, checkpoint: Checkpoint, description: dict[str, Any], precision: float):
        self.folder = Path(checkpoint.directory).absolute()
        self.seconds, self.steps = 60 * checkpoint.minutes, checkpoint.steps
        self.description, self.precision = description, precision
        self.records = Records(self.folder)
        self.saved: list[dict[str, Any]] = []  # the records that can be read, the newest first
        self.rows: dict[int, dict[str, Any]] = {}  # of what is finished, by number
        self.flight: dict[str, Any] | None = None  # what is under way: restored, or saved last
        self.saved_at, self.saved_step = time.monotonic(), 0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Around all that the run computes: reads what was saved; nobody else writes into the folder."""
        with self.records.held():
            self._load()
            yield

    def _load(self) -> None:
        """What the records hold that can be read; refuses those of another problem."""
        self.saved, wrong = self.records.read()
        for text in wrong:
            rest = "the one before is used." if self.saved else "the run starts anew."
            self._warn(f"a record of the checkpoint in '{self.folder}' cannot be used ({text}); {rest}")
        for record in self.saved:
            found = differences(self.description, record["description"], self.precision)
            if found:
                raise CheckpointError(
                    f"the checkpoint in '{self.folder}' belongs to another run; these differ: "
                    f"{', '.join(found)}. Use another folder, or remove this one to start anew."
                )

    def item(self, name: str, like: PyTree, digest: int) -> PyTree | None:
        """The arrays of an item; None, with a warning, if they are not those that were written."""
        path, reason = self.folder / name, "its checksum is another one"
        if folder_digest(path) == digest:
            try:
                return read(path, like)
            except Exception as error:  # Orbax passes on whatever it meets
                reason = (str(error) or repr(error)).splitlines()[0]
        self._warn(
            f"'{name}' of the checkpoint in '{self.folder}' is damaged ({reason}); the checkpoint before is "
            "used where it does not need it, or else the computation that it held starts anew."
        )
        return None

    def due(self, done: int, seconds: float) -> tuple[int, bool, float]:
        """The signal that asks the run to end, or 0; whether to save now, with `done` steps behind it; and
        the longest time that a process took since the last call, so that all choose the same next."""
        late = time.monotonic() - self.saved_at > self.seconds
        late = late or (self.steps is not None and done - self.saved_step >= self.steps)
        stop, late, seconds = host.largest(progress.pending(), late, seconds)
        return int(stop), bool(stop or late), seconds

    def end(self, stop: int, done: str) -> None:
        """Raise for a run that is saved, if a signal asked it to end."""
        if stop:
            progress.end(stop, done, self.folder)

    def write(self, trees: dict[str, Callable[[], PyTree]], flight: dict[str, Any], done: int) -> None:
        """Write the items that are new and the record that names them all, or warn if the disk refuses."""
        known = self.flight["items"] if self.flight else {}
        items = {name: known.get(name) for name in trees}
        new = [name for name in items if name not in known]
        try:
            for name in new:
                write(self.folder / name, trees[name]())
                items[name] = folder_digest(self.folder / name)
        except (OSError, ValueError, RuntimeError) as error:  # Orbax passes on what the file system said
            for name in new:
                shutil.rmtree(self.folder / name, ignore_errors=True)
            self._not_written(error)
        else:
            self.commit(flight | {"items": items})
            self.saved_step = done
        self.saved_at = time.monotonic()

    def commit(self, flight: dict[str, Any] | None) -> None:
        """A new record of what is done and what is under way."""
        self.flight = flight
        if host.is_first():
            rows = list(self.rows.values())
            try:
                self.records.write({"description": self.description, "rows": rows, "flight": flight})
            except OSError as error:
                self._not_written(error)
        host.largest(0.0)  # nobody goes on to overwrite what this record may still need

    def _not_written(self, error: Exception) -> None:
        reason = (str(error) or repr(error)).splitlines()[0]
        self._warn(
            f"no checkpoint could be written to '{self.folder}': {reason} The run goes on, and the "
            "checkpoint before stays."
        )

    @staticmethod
    def _warn(text: str) -> None:
        if host.is_first():
            warnings.warn(text, RuntimeWarning, stacklevel=2)
