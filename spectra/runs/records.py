"""The records of a run: small files with a checksum, of which the newest that can be read counts.

A folder holds `record-000012.json` and the like, each naming the items (folders beside it) that it needs.
Items are written before the record that names them, and records appear whole or not at all: whatever moment
a run is killed at, the newest record that can be read is consistent. The last two records stay.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from spectra.base import host
from spectra.base.errors import CheckpointError
from spectra.base.files import replacing

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
        folder.mkdir(parents=True, exist_ok=True)
        self.number = max(self._numbers(), default=-1)

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
    file.truncate(0)
    file.write(
        f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
    )
    file.flush()
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
