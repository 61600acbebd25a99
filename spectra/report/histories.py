"""The file that grows with a run, as it is read: one JSON object a line, of which any may be damaged."""

import re
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from spectra.base.errors import ResultFileError, warn_user
from spectra.base.files import JsonError, parse
from spectra.report.encode import DAMAGE, decode
from spectra.report.fields import facts
from spectra.report.npz import check_header
from spectra.results import Snapshot, SpectrumHistory

FORMAT = "spectra-history"
SCHEMA = 1
MAX_LINE = 2**26
"""Bytes of the longest line that is read; a snapshot of 100 steps and 8 probes has 60,000."""
_KNOWN = 4096  # bytes by which a file is recognised: checksum and step of its last snapshot are among them
START = f'{{"format": "{FORMAT}"'
_CHECK = re.compile(rb', "crc32": "([0-9a-f]{8})"\}$')
_BEGINNINGS = (b'{"snapshot": ', b'{"skipped": ')
_DTYPES = (
    "bool",
    "float16",
    "float32",
    "float64",
    *(f"{u}int{n}" for u in ("", "u") for n in (8, 16, 32, 64)),
)


def is_history(path: Path) -> bool:
    """Whether a file is, or begins like, a history."""
    with path.open("rb") as file:
        start = file.read(len(START))
    return path.suffix == ".jsonl" or start == START.encode()


def read(path: Path) -> SpectrumHistory:
    """The history in a file: all that is whole of it, with a warning that names damaged lines."""
    return HistoryReader(path).read()


class HistoryReader:
    """A history that is read again as its file grows: each time the lines that are new.

    A last line without an end is left for the next time. Where the file is no longer the one that was read
    (shorter, or with other bytes at its start or before the first new line), it is read from the start.
    """

    def __init__(self, path: Path):
        self.path = path
        self._begin()

    def _begin(self) -> None:
        self._at, self._number, self._ends = 0, 0, b""
        self._first, self._header = b"", None
        self._snapshots: list[Snapshot] = []
        self._skipped: list[int] = []
        self._damaged: list[int] = []

    def read(self) -> SpectrumHistory:
        """All that is whole of the file as it is now, with a warning that names damaged lines."""
        try:
            with self.path.open("rb") as file:
                self._take(file)
            provenance = self._provenance()
        except OSError as error:
            self._begin()
            raise ResultFileError(f"'{self.path}' cannot be read: {error.strerror or error}") from error
        except ResultFileError:
            self._begin()
            raise
        if self._damaged:
            shown = ", ".join(map(str, self._damaged[:8]))
            more = f" and {len(self._damaged) - 8} more" if len(self._damaged) > 8 else ""
            warn_user(
                f"'{self.path}' is damaged in line {shown}{more}, which is left out; "
                f"{len(self._snapshots)} snapshots are whole.",
            )
        return SpectrumHistory.of(self._snapshots, provenance, self._skipped)

    def _take(self, file: BinaryIO) -> None:
        """Decode the lines that are new, and note where they end."""
        if _ends(file, self._at) != self._ends:
            self._begin()
        file.seek(self._at)
        for line in _lines(file):
            self._at, self._number = file.tell(), self._number + 1
            if self._number == 1:
                self._first, self._header = line, self._checked(line)
                whole = self._header is not None
            else:
                marked = self._header is not None and "crc32" in self._header
                content, whole = _content(line, marked)
                self._snapshots += [x for x in content if isinstance(x, Snapshot)]
                self._skipped += [x for x in content if isinstance(x, int)]
            self._damaged += [] if whole else [self._number]
        self._ends = _ends(file, self._at)

    def _checked(self, line: bytes) -> dict[str, Any] | None:
        header = _object(line)
        if header is not None:
            check_header(header, FORMAT, SCHEMA, self.path)
        return header

    def _provenance(self) -> Any:
        if self._header is None and not self._snapshots:
            check_header(_unchecked(self._first), FORMAT, SCHEMA, self.path)
            raise ResultFileError(
                f"'{self.path}' is damaged: its first line cannot be read, and no snapshot either."
            )
        provenance: Any = {} if self._header is None else self._header.get("provenance")
        if (wrong := facts(provenance)) is not None:
            raise ResultFileError(f"'{self.path}' lacks or garbles a field: provenance {wrong}")
        return provenance


def _ends(file: BinaryIO, at: int) -> bytes:
    """Bytes by which a file up to here is known again: its first, and the last of them."""
    file.seek(0)
    first = file.read(min(at, _KNOWN))
    file.seek(max(0, at - _KNOWN))
    return first + file.read(min(at, _KNOWN))


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines that have an end, without it; of one that is too long, a part that is no JSON.

    Ends as Windows has them, and its mark at the beginning of a file, come from programs that copy text.
    """
    if file.tell() == 0 and file.read(len(BOM_UTF8)) != BOM_UTF8:
        file.seek(0)
    while line := file.readline(MAX_LINE):
        rest = line
        while not rest.endswith(b"\n"):
            if not (rest := file.readline(MAX_LINE)):
                return
        yield line.rstrip(b"\r\n") if rest is line else b""


def _content(line: bytes, marked: bool) -> tuple[list[Snapshot | int], bool]:
    """What a line holds, and whether it is whole; of two that a full disk has run together, the second."""
    found = _record(line, marked)
    if found is not None:
        return [found], True
    start = max(line.rfind(beginning) for beginning in _BEGINNINGS)
    found = _record(line[start:], marked) if start > 0 else None
    return ([] if found is None else [found]), False


def _record(line: bytes, marked: bool) -> Snapshot | int | None:
    """The snapshot or the step left out in a line; None if it is damaged."""
    content = _object(line)
    if content is None or (marked and "crc32" not in content):
        return None
    if type(content.get("skipped")) is int and len(content) == 1 + ("crc32" in content):
        return content["skipped"]
    try:
        if set(content) - {"crc32"} != {"snapshot"}:
            return None
        found = decode(content["snapshot"], _array)
    except DAMAGE:
        return None
    return found if isinstance(found, Snapshot) else None


def _object(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line whose checksum, if it has one, is right."""
    check = _CHECK.search(line)
    if check is not None and zlib.crc32(line[: check.start()] + b"}") != int(check[1], 16):
        return None
    content = _unchecked(line)
    return content if isinstance(content, dict) and (check is not None) == ("crc32" in content) else None


def _unchecked(line: bytes) -> Any:
    try:
        return parse(line)
    except JsonError:
        return None


def _array(stored: Any) -> np.ndarray:
    if stored["dtype"] not in _DTYPES:
        raise TypeError(f"dtype {str(stored['dtype'])[:40]}")
    values = [float(x["float"]) if isinstance(x, dict) else x for x in stored["values"]]
    if not all(type(x) in (bool, int, float) for x in values):
        raise TypeError("an array of something else than numbers")
    return np.array(values, stored["dtype"]).reshape(stored["shape"])
