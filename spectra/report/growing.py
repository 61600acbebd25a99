"""The file that grows with a run, as it is written: each line is on disk before the next is begun."""

import contextlib
import json
import math
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from spectra.base.errors import ResultFileError, SpectraError, warn_user
from spectra.report.encode import encode
from spectra.report.histories import FORMAT, SCHEMA, START, read
from spectra.results import Snapshot, SpectrumHistory

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class HistoryFile:
    """A history open for writing. A file that is there already is continued.

    What cannot be written (the disk is full) is kept, with a warning, and written with the next line; the
    file then ends with its last whole line. A run in training is not ended for that. A file that somebody has
    removed meanwhile is written anew, with all that has been recorded.
    """

    def __init__(self, path: str | os.PathLike, provenance: dict[str, Any]):
        self.path = Path(path).absolute()  # a program may change its folder
        self._waiting: list[bytes] = []  # lines that could not be written yet
        self._warned = self._shared = False
        self.history = SpectrumHistory((), provenance, ())
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and (whole := _whole_lines(self.path)):
                self.history = read(self.path)
                os.truncate(self.path, whole)
            else:
                self._begin()
            self._size = self.path.stat().st_size
        except OSError as error:
            raise SpectraError(
                f"'{self.path}' cannot be written ({error.strerror or error}): choose another path for "
                "the history."
            ) from error

    def add(self, snapshot: Snapshot) -> None:
        """Append a snapshot; on return it is on disk, or there has been a warning."""
        known = self.history
        self.history = known.of((*known.snapshots, snapshot), known.provenance, known.skipped)
        self._write(_of_snapshot(snapshot))

    def skip(self, step: int) -> None:
        """Note a snapshot that was due and was left out for its cost."""
        known = self.history
        self.history = known.of(known.snapshots, known.provenance, (*known.skipped, step))
        self._write(_line({"skipped": step}))

    def _begin(self) -> None:
        """The file with its first line, in the place of none or of a first line that is torn."""
        with self.path.open("ab+", buffering=0) as file:
            file.seek(0)
            begun = file.read(len(START))
            if not START.encode().startswith(begun):
                raise ResultFileError(
                    f"'{self.path}' is not a spectra result, and stays as it is: choose another path for the "
                    "history."
                )
            file.truncate(0)
            header = {"format": FORMAT, "schema": SCHEMA, "provenance": self.history.provenance}
            file.write(_line(header))
            os.fsync(file.fileno())
        _sync_folder(self.path.parent)

    def _write(self, line: bytes) -> None:
        self._waiting.append(line)
        try:
            if not self.path.exists():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._begin()
                self._size, self._waiting = self.path.stat().st_size, self._all()
            before, after = _append(self.path, self._waiting)
        except OSError as error:
            if not self._warned:
                self._warned = True
                warn_user(
                    f"'{self.path}' cannot be written ({error.strerror or error}). Training goes on, and "
                    "snapshots are kept in memory (`tracker.history`); they follow as soon as there is room.",
                )
            return
        changed, self._size = before != self._size, after
        self._waiting, self._warned = [], False
        if changed and not self._shared:
            self._shared = True
            warn_user(
                f"'{self.path}' was changed by something else than this tracker, which adds to it what it "
                "records. If another run writes it, too, give each a path of its own.",
            )

    def _all(self) -> list[bytes]:
        """The lines of all that is known."""
        skipped = [_line({"skipped": step}) for step in self.history.skipped]
        return [_of_snapshot(snapshot) for snapshot in self.history] + skipped


def _append(path: Path, lines: list[bytes]) -> tuple[int, int]:
    """Add lines after the last whole one; if that fails, the file is what it was. Other processes that add
    lines wait meanwhile.

    Returns:
        Where the last whole line ended before, and where it ends now.
    """
    with path.open("r+b", buffering=0) as file, _alone(file):
        size = file.seek(0, os.SEEK_END)
        if size and (file.seek(size - 1), file.read(1))[1] != b"\n":
            size = _whole_lines(path)
        data = memoryview(b"".join(lines))
        after = size + len(data)
        try:
            file.truncate(size)
            file.seek(size)
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(size)
            raise
    return size, after


@contextlib.contextmanager
def _alone(file: Any) -> Iterator[None]:
    """No other process writes the file in the block, where the file system has locks: its end stays."""
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
    yield


def _of_snapshot(snapshot: Snapshot) -> bytes:
    return _line({"snapshot": encode(snapshot, lambda _, array: _listed(array))})


def _line(content: dict[str, Any]) -> bytes:
    text = json.dumps(_finite(content), allow_nan=False).encode()
    return text[:-1] + b', "crc32": "%08x"}\n' % zlib.crc32(text)


def _whole_lines(path: Path) -> int:
    """Bytes up to the end of the last line that is whole."""
    with path.open("rb") as file:
        at = file.seek(0, os.SEEK_END)
        while at:
            start = max(0, at - 2**20)
            file.seek(start)
            if (found := file.read(at - start).rfind(b"\n")) >= 0:
                return start + found + 1
            at = start
    return 0


def _listed(array: np.ndarray) -> Any:
    return {"dtype": array.dtype.name, "shape": list(array.shape), "values": array.ravel().tolist()}


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity (a loss that diverged has): they become `{"float": "nan"}`."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list) else value


def _sync_folder(folder: Path) -> None:
    """The name of a new file is on disk only when its folder is."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
