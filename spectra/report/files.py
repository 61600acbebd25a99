"""Results and files: `save`, `load`, and the file that grows with a run.

The latter holds one JSON object a line, each on disk before the next is begun.
"""

import contextlib
import json
import math
import os
import re
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spectra.base.errors import ResultFileError, SpectraError
from spectra.base.files import JsonError, parse
from spectra.report import npz
from spectra.report.encode import CLASSES, DAMAGE, decode, encode
from spectra.report.fields import facts
from spectra.report.npz import check_header
from spectra.results import Snapshot, SpectrumHistory, provides

FORMAT = "spectra-history"
SCHEMA = 1
MAX_LINE = 2**26
"""Bytes of the longest line that is read; a snapshot of 100 steps and 8 probes has 60,000."""
_START = f'{{"format": "{FORMAT}"'
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
        start = file.read(len(_START))
    return path.suffix == ".jsonl" or start == _START.encode()


class HistoryFile:
    """A history open for writing. A file that is there already is continued.

    What cannot be written (the disk is full) is kept, with a warning, and written with the next line; the
    file then ends with its last whole line. A run in training is not ended for that.
    """

    def __init__(self, path: str | os.PathLike, provenance: dict[str, Any]):
        self.path = Path(path)
        self._waiting: list[bytes] = []  # lines that could not be written yet
        self._warned = False
        self.history = SpectrumHistory((), provenance, ())
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and (whole := _whole_lines(self.path)):
                self.history = read(self.path)
                os.truncate(self.path, whole)
            else:
                self.path.write_bytes(b"")
                _append(self.path, [_line({"format": FORMAT, "schema": SCHEMA, "provenance": provenance})])
                _sync_folder(self.path.parent)
        except OSError as error:
            raise SpectraError(
                f"'{self.path}' cannot be written ({error.strerror or error}): choose another path for "
                "the history."
            ) from error

    def add(self, snapshot: Snapshot) -> None:
        """Append a snapshot; on return it is on disk, or there has been a warning."""
        self._write({"snapshot": encode(snapshot, lambda _, array: _listed(array))})

    def skip(self, step: int) -> None:
        """Note a snapshot that was due and was left out for its cost."""
        self._write({"skipped": step})

    def _write(self, line: dict[str, Any]) -> None:
        self._waiting.append(_line(line))
        try:
            _append(self.path, self._waiting)
        except OSError as error:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"'{self.path}' cannot be written ({error.strerror or error}). Training goes on, and "
                    "snapshots are kept in memory (`tracker.history`); they follow as soon as there is room.",
                    stacklevel=6,  # the line of the training loop
                )
        else:
            self._waiting, self._warned = [], False


def _append(path: Path, lines: list[bytes]) -> None:
    """Add lines after the last whole one; if that fails, the file is what it was."""
    with path.open("r+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        if size and (file.seek(size - 1), file.read(1))[1] != b"\n":
            size = _whole_lines(path)
        data = memoryview(b"".join(lines))
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


def _line(content: dict[str, Any]) -> bytes:
    text = json.dumps(_finite(content), allow_nan=False).encode()
    return text[:-1] + b', "crc32": "%08x"}\n' % zlib.crc32(text)


def read(path: Path) -> SpectrumHistory:
    """The history in a file: all that is whole of it, with a warning that names damaged lines."""
    try:
        return _read(path)
    except OSError as error:
        raise ResultFileError(f"'{path}' cannot be read: {error.strerror or error}") from error


def _read(path: Path) -> SpectrumHistory:
    lines = _lines(path)
    first = next(lines, b"")
    header = _object(first)
    if header is not None:
        check_header(header, FORMAT, SCHEMA, path)
    marked = header is not None and "crc32" in header
    snapshots, skipped, damaged = [], [], [1] if header is None else []
    for number, line in enumerate(lines, 2):
        content, whole = _content(line, marked)
        snapshots += [x for x in content if isinstance(x, Snapshot)]
        skipped += [x for x in content if isinstance(x, int)]
        damaged += [] if whole else [number]
    if header is None and not snapshots:
        check_header(_unchecked(first), FORMAT, SCHEMA, path)
        raise ResultFileError(f"'{path}' is damaged: its first line cannot be read, and no snapshot either.")
    provenance: Any = {} if header is None else header.get("provenance")
    if (wrong := facts(provenance)) is not None:
        raise ResultFileError(f"'{path}' lacks or garbles a field: provenance {wrong}")
    if damaged:
        shown = ", ".join(map(str, damaged[:8])) + (
            f" and {len(damaged) - 8} more" if len(damaged) > 8 else ""
        )
        warnings.warn(
            f"'{path}' is damaged in line {shown}, which is left out; {len(snapshots)} snapshots are whole.",
            stacklevel=4,
        )
    return SpectrumHistory(tuple(snapshots), provenance, tuple(skipped))


def _lines(path: Path) -> Iterator[bytes]:
    """The lines that have an end, without it; of one that is too long, a part that is no JSON."""
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE):
            rest = line
            while not rest.endswith(b"\n"):
                if not (rest := file.readline(MAX_LINE)):
                    return
            yield line.rstrip(b"\n") if rest is line else b""


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


def _array(stored: Any) -> np.ndarray:
    if stored["dtype"] not in _DTYPES:
        raise TypeError(f"dtype {str(stored['dtype'])[:40]}")
    values = [float(x["float"]) if isinstance(x, dict) else x for x in stored["values"]]
    if not all(type(x) in (bool, int, float) for x in values):
        raise TypeError("an array of something else than numbers")
    return np.array(values, stored["dtype"]).reshape(stored["shape"])


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


@provides("save")
def save(result: Any, path: str | os.PathLike, *, overwrite: bool = True) -> Path:
    """Write a result to an `.npz` file, atomically: the file appears whole or not at all.

    The vectors of `Eigenpairs` come back in the tree that they had if it is made of dicts, lists and
    tuples. Other containers (nnx states, modules) come back as an `OrderedDict` {path: array}, in the
    order of the tree: `jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(vectors))` puts
    them into yours. The basis of a `Tridiagonal` is not saved.

    Args:
        result: any result of this package, or a dict of results by name (blocks).
        path: file name; `.npz` is added if it is missing.
        overwrite: whether an existing file is replaced.

    Returns:
        The path that was written.

    Raises:
        SpectraError: `result` is not a result, or holds values of a trace.
        FileExistsError: the file exists, and `overwrite` is false.
        OSError: the file cannot be written; one that was there is what it was.

    Examples:
        >>> import tempfile, spectra
        >>> from spectra.results import Estimate
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = spectra.save(Estimate(1.5, 0.1, 64, "slq"), folder + "/trace")
        ...     spectra.load(path).value
        1.5
    """
    if type(result).__name__ not in CLASSES and not isinstance(result, dict):
        raise SpectraError(f"cannot save a {type(result).__name__}; results are {', '.join(CLASSES)}.")
    path = Path(path)
    if path.suffix != ".npz":
        path = path.with_name(path.name + ".npz")
    try:
        npz.write(result, path, overwrite=overwrite)
    except jax.errors.TracerArrayConversionError as error:
        raise SpectraError("inside jit a result has no numbers yet: return it from there first.") from error
    return path


def load(path: str | os.PathLike) -> Any:
    """Read a result that `save` wrote, or the history that a `SpectrumTracker` writes, while it grows.

    Nothing in a file is run, no more memory is taken than its size allows, and each field is checked. Of a
    history whose lines are damaged the others are read, with a warning.

    Args:
        path: the file, `.npz` or, of a tracker, `.jsonl`.

    Raises:
        FileNotFoundError: there is no such file.
        ResultFileError: the file cannot be read, is truncated or damaged, not a spectra result, or of a
            newer schema.

    Examples:
        See `save`.
    """
    path = Path(path)
    try:
        history = is_history(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"no result file at '{path}'.") from None
    except (OSError, ValueError) as error:  # a folder, a name that is too long or holds a zero
        raise ResultFileError(
            f"'{path}' cannot be read: {getattr(error, 'strerror', None) or error}."
        ) from error
    return read(path) if history else npz.read(path)
