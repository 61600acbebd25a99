"""One run in one folder: what it saved, what it saves, and when it is asked to end.

A record, `record-000012.json` and the like, is a small file with a checksum. It lists what is small, and
names the items that it needs: folders of arrays beside it that Orbax wrote, each with the checksum of its
files. Items are written before the record that names them and never again in place, and records appear whole
or not at all: whatever moment a run is killed at, the newest record that can be read finds what it names. The
last two records stay.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import socket
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from spectra.base import host
from spectra.base.errors import CheckpointError
from spectra.base.files import folder_digest, replacing
from spectra.base.trees import PyTree
from spectra.runs.checkpoint import Checkpoint, differences

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

SCHEMA = 2
FIELDS = {"description": dict, "rows": list, "flight": (dict, type(None))}
ROW = {"probe": int, "alpha": list, "beta": list, "length": int, "asymmetry": (int, float)}
ITEMS = ("probe-*", "item-*")
"""Names of the folders beside the records, which go when no record needs them."""
_NAME = re.compile(r"record-(\d+)\.json")


class Records:
    """The records in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.number = max(self._numbers(), default=-1)
        except (OSError, ValueError) as error:  # a zero in the name
            reason = getattr(error, "strerror", None) or error
            if os.path.isfile(folder):
                reason = "there is a file of that name"
            elif os.path.islink(folder) and not os.path.exists(folder):
                reason = "there is a link of that name to what does not exist"
            raise CheckpointError(
                f"checkpoint='{folder}' cannot be used as a folder: {reason}. Pass one that can "
                "be written to."
            ) from error

    def _numbers(self) -> list[int]:
        found = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return [int(match[1]) for match in found if match]

    def _path(self, number: int) -> Path:
        return self.folder / f"record-{number:06d}.json"

    def read(self) -> tuple[list[dict[str, Any]], list[str]]:
        """The records that can be read, newest first, and what is wrong with the others."""
        records, wrong = [], []
        for number in sorted(self._numbers(), reverse=True):
            path = self._path(number)
            try:
                records.append(_checked(json.loads(path.read_text())))
            except CheckpointError:
                raise
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                wrong.append(f"{path.name}: {_reason(error)}")
        return records, wrong

    def write(self, record: dict[str, Any]) -> None:
        """A new record, then what only older ones need goes. Of several processes the first writes."""
        self.number += 1
        body = json.loads(json.dumps(record, default=np.ndarray.tolist))
        with replacing(self._path(self.number)) as temporary:
            text = {"schema": SCHEMA, "checksum": _checksum([SCHEMA, body]), "record": body}
            temporary.write_text(json.dumps(text))
        self._prune()

    def _prune(self) -> None:
        """Keep the last two records and their items."""
        numbers = sorted(self._numbers())
        for number in numbers[:-2]:
            self._path(number).unlink(missing_ok=True)
        needed = {name for record in self.read()[0] for name in (record["flight"] or {"items": ()})["items"]}
        for path in self.folder.glob("record-*.part"):  # of a process that was killed
            path.unlink(missing_ok=True)
        for path in (path for kind in ITEMS for path in self.folder.glob(kind)):
            if path.name not in needed:
                shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The folder for this run alone, while the block lasts: the system frees it if the process dies.

        Raises:
            CheckpointError: another process works in it.
        """
        file = None
        if fcntl is not None and host.is_first():
            with contextlib.suppress(OSError):  # a file system without locks
                file = (self.folder / "lock").open("a+")
        owner = _take(file)
        (taken,) = host.largest(float(owner is not None))
        if taken:
            if file is not None:
                file.close()
            raise CheckpointError(
                f"the checkpoint in '{self.folder}' is in use by {owner or 'another process'}: wait until it "
                "has ended, or use another folder."
            )
        try:
            self.number = max(self._numbers(), default=-1)  # another run may have ended just before
            yield
        finally:
            if file is not None:
                file.close()


def _take(file: Any) -> str | None:
    """Lock an open file; who holds it, if that is another process."""
    if file is None or fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        return file.read().strip() or "another process"
    except OSError:  # a file system without locks
        return None
    text = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
    with contextlib.suppress(OSError):  # a full disk: the lock holds without the name of its holder
        os.truncate(file.fileno(), 0)
        os.write(file.fileno(), text.encode())  # not kept for later, when closing the file would fail
    return None


def _checksum(body: Any) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _checked(text: Any) -> dict[str, Any]:
    """The record in a file, if it is what was written."""
    if "checksum" in text and text["checksum"] != _checksum([text["schema"], text["record"]]):
        raise ValueError("its checksum is another one")
    if text["schema"] != SCHEMA:
        raise CheckpointError(
            f"the checkpoint has schema {text['schema']}, this version of spectra reads {SCHEMA}: go on with "
            "the version that wrote it, or use another folder."
        )
    record = text["record"]
    for name, kind in FIELDS.items():
        if not isinstance(record[name], kind):
            raise TypeError(f"'{name}' is a {type(record[name]).__name__}")
    for row in record["rows"]:
        if any(not isinstance(row[name], kind) for name, kind in ROW.items()) or not _is_sketch(row):
            raise TypeError("a row has another form")
    return record


def _is_sketch(row: dict[str, Any]) -> bool:
    """Whether a row has none, or numbers for at least each step."""
    if "sketch" not in row:
        return True
    shape = np.shape(row["sketch"])
    return len(shape) == 2 and shape[0] == len(row["alpha"])


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyError):
        return f"it has no {error}"
    return (str(error) or repr(error)).splitlines()[0]


_ONE_AT_A_TIME = threading.Lock()
"""Orbax numbers the saves of a process: of two in threads side by side each waits for the other's signals."""
PACE = 5.0
"""Seconds between two looks at the clock and at signals, where a run can be interrupted."""


def write(path: Path, tree: PyTree) -> None:
    """Write arrays to a folder that appears whole or not at all; every process writes what it holds."""
    import orbax.checkpoint as ocp

    with _ONE_AT_A_TIME, _silent(), ocp.StandardCheckpointer() as saver:
        saver.save(path, tree, force=True)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Orbax logs what it then raises, with the traces of all its threads; the run says it in one line."""

    def from_elsewhere(record: logging.LogRecord) -> bool:
        return "orbax" not in Path(record.pathname).parts

    logger = logging.getLogger("absl")
    logger.addFilter(from_elsewhere)
    try:
        yield
    finally:
        logger.removeFilter(from_elsewhere)


def read(path: Path, like: PyTree) -> PyTree:
    """Read arrays, each placed as `like` says."""
    import orbax.checkpoint as ocp

    with _ONE_AT_A_TIME, ocp.StandardCheckpointer() as loader:
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
        self.unwritten = ""  # why the last checkpoint could not be written

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
                self.refuse(found)

    def refuse(self, found: list[str]) -> NoReturn:
        """Raise for what is saved of another run, of which these are the names of what differs."""
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
        stop, late, seconds = host.largest(host.pending(), late, seconds)
        return int(stop), bool(stop or late), seconds

    def end(self, stop: int, done: str) -> None:
        """Raise for a run that is saved, if a signal asked it to end."""
        if stop:
            host.end(stop, done, self.folder, self.unwritten)

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
            rows = [{"probe": number} | row for number, row in self.rows.items()]
            try:
                self.records.write({"description": self.description, "rows": rows, "flight": flight})
                self.unwritten = ""
            except OSError as error:
                self._not_written(error)
        host.largest(0.0)  # nobody goes on to overwrite what this record may still need

    def _not_written(self, error: Exception) -> None:
        self.unwritten = (str(error) or repr(error)).splitlines()[0].rstrip(".")
        self._warn(
            f"no checkpoint could be written to '{self.folder}': {self.unwritten}. The run goes on, and the "
            "checkpoint before stays."
        )

    @staticmethod
    def _warn(text: str) -> None:
        if host.is_first():
            warnings.warn(text, RuntimeWarning, stacklevel=2)
