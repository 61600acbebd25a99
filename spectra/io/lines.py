"""A file that grows with a run: one JSON object a line, each on disk before the next is begun.

The first line is the header; then comes a line for every snapshot. A line that a crash has torn is the last
one and has no end: readers leave it out, and the next run cuts it off before it appends. Numbers are
written in full, so what is read is what was computed to the bit.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from spectra._errors import ResultFileError
from spectra.io.encode import decode, encode
from spectra.io.npz import check_header
from spectra.results import Snapshot, SpectrumHistory

FORMAT = "spectra-history"
SCHEMA = 1
_START = f'{{"format": "{FORMAT}"'


def is_history(path: Path) -> bool:
    """Whether a file is, or begins like, a history."""
    with path.open("rb") as file:
        start = file.read(len(_START))
    return path.suffix == ".jsonl" or start == _START.encode()


class HistoryFile:
    """A history open for writing. A file that is there already is continued."""

    def __init__(self, path: str | os.PathLike, provenance: dict[str, Any]):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.history = SpectrumHistory((), provenance, ())
        if self.path.exists() and (whole := _whole_lines(self.path)):
            self.history = read(self.path)
            if whole < self.path.stat().st_size:
                os.truncate(self.path, whole)
        else:
            self.path.write_bytes(b"")
            self._append({"format": FORMAT, "schema": SCHEMA, "provenance": provenance})
            _sync_folder(self.path.parent)

    def add(self, snapshot: Snapshot) -> None:
        """Append a snapshot; on return it is on disk."""
        self._append({"snapshot": encode(snapshot, lambda _, array: _listed(array))})

    def skip(self, step: int) -> None:
        """Note a snapshot that was due and was left out for its cost."""
        self._append({"skipped": step})

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("ab") as file:
            file.write(json.dumps(_finite(line), allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def read(path: Path) -> SpectrumHistory:
    """The history in a file, up to its last whole line."""
    try:
        text = path.read_bytes()[: _whole_lines(path)].decode()
        header, *rest = [json.loads(line) for line in text.splitlines()] or [None]
    except ValueError as error:
        raise ResultFileError(f"'{path}' is damaged before its last line: {error}") from error
    check_header(header, FORMAT, SCHEMA, path)
    try:
        snapshots = [decode(line["snapshot"], _array) for line in rest if "snapshot" in line]
        skipped = [line["skipped"] for line in rest if "skipped" in line]
        return SpectrumHistory(tuple(snapshots), header["provenance"], tuple(skipped))
    except (AttributeError, KeyError, TypeError, ValueError, StopIteration) as error:
        raise ResultFileError(f"'{path}' lacks or garbles a field: {error!r}") from error


def _whole_lines(path: Path) -> int:
    """Bytes up to the end of the last line that is whole."""
    return path.read_bytes().rfind(b"\n") + 1


def _listed(array: np.ndarray) -> Any:
    return {"dtype": str(array.dtype), "shape": list(array.shape), "values": array.ravel().tolist()}


def _array(stored: Any) -> np.ndarray:
    return np.array(stored["values"], stored["dtype"]).reshape(stored["shape"])


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
