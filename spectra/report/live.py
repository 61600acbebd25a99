"""A page about runs that are still going, read again as their files grow: served here, or written."""

import contextlib
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from spectra.base.errors import ResultFileError, SpectraError
from spectra.base.files import make_folder_of, replacing
from spectra.report.files import load
from spectra.report.histories import HistoryReader, is_history
from spectra.report.page import assemble
from spectra.report.sections import Section, paragraph, runs, sections
from spectra.results import SpectrumHistory

HOSTS = ("127.0.0.1", "localhost")
"""Names under which a browser may ask: another one would be a foreign page that has been led here."""


class _Read(NamedTuple):
    """What a file held when it was last read."""

    stamp: tuple[int, int] | None  # (bytes, time of change), None where there is no file
    history: SpectrumHistory | None
    note: str  # why there is none, or which lines are damaged


class LivePage:
    """The page of one run or several, by the `.jsonl` files that their trackers write.

    A file that does not exist yet is waited for, a last line that is still being written is left out, files
    that have not changed are not read again, and of those that have grown only the new lines are.

    Args:
        paths: the files.
        seconds: between two looks of a browser at the page.
    """

    def __init__(self, paths: Sequence[Path], seconds: int = 5):
        if not paths:
            raise SpectraError("no file to watch: name the .jsonl of a tracker.")
        self.paths, self.seconds = list(paths), seconds
        self._seen: dict[Path, _Read] = {}
        self._readers: dict[Path, HistoryReader] = {}
        self._text, self._lock = "", Lock()

    def text(self) -> str:
        """The page as it is now."""
        with self._lock:  # two browsers at once; matplotlib draws for one
            if self._look() or not self._text:
                self._text = ""  # what fails here is no reason to show the last page again
                self._text = self._made()
            return self._text

    def write(self, path: Path) -> bool:
        """Write the page to a file if a run has gone on; whether it did."""
        before, text = self._text, self.text()
        if text is before and path.exists():
            return False
        make_folder_of(path)
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        return True

    def _look(self) -> bool:
        """Read what has changed; whether anything has."""
        changed = False
        for path in self.paths:
            stamp = _stamp(path)
            before = self._seen[path].stamp if path in self._seen else None
            if path in self._seen and stamp == before:
                continue
            if stamp is None or before is None or stamp[0] <= before[0]:  # it has not just grown
                self._readers[path] = HistoryReader(path)
            self._seen[path] = _read(self._readers[path], stamp)
            changed = True
        return changed

    def _made(self) -> str:
        names = _names(self.paths)
        histories = {
            names[path]: read.history for path, read in self._seen.items() if read.history is not None
        }
        notes = [f"{names[path]}: {read.note}" for path, read in self._seen.items() if read.note]
        make = runs if len(self.paths) > 1 else _of_one
        try:
            parts = make(histories)
        except Exception:
            wrong = {name: why for name, history in histories.items() if (why := _fault(make, name, history))}
            notes += [f"{name}: {why}" for name, why in wrong.items()]
            parts = make({name: history for name, history in histories.items() if name not in wrong})
        if notes:
            parts.insert(0, Section("Files", "".join(map(paragraph, notes))))
        title = ", ".join(names.values())
        looked = f"read at {time.strftime('%H:%M:%S')}, looked at again every {self.seconds} seconds"
        return assemble(title, looked, parts, refresh=self.seconds)


def _of_one(histories: Mapping[str, SpectrumHistory]) -> list[Section]:
    return [section for history in histories.values() for section in sections(history)]


def _fault(make: Callable[..., Any], name: str, history: SpectrumHistory) -> str:
    """Why a run cannot be shown; empty if it can. The others are shown without it."""
    import matplotlib.pyplot as plt

    try:
        make({name: history})
    except Exception as error:
        plt.close("all")  # the picture begun, which pyplot would keep
        return f"cannot be shown: its numbers contradict each other ({type(error).__name__}: {error})."
    return ""


def serve(page: LivePage, port: int) -> ThreadingHTTPServer:
    """A server of the page on this machine alone; port 0 takes any that is free. `serve_forever` runs it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with contextlib.suppress(ConnectionError):  # a browser that was closed, or has asked again
                self._answer()

        def _answer(self) -> None:
            host = self.headers.get("Host", "").rsplit(":", 1)[0]
            if host not in HOSTS:
                self.send_error(403, "served to this machine only")
            elif self.path.split("?")[0] != "/":
                self.send_error(404)
            else:
                content = page.text().encode("utf-8", "backslashreplace")
                self.send_response(200)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Length", str(len(content)))
                self.send_header("Cache-Control", "no-store")
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """A request every few seconds is no news."""

    try:
        return ThreadingHTTPServer((HOSTS[0], port), Handler)
    except OSError as error:
        raise SpectraError(
            f"port {port} cannot be served ({error.strerror or error}): choose another with --port, or write "
            "the page to a file with --out."
        ) from error


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _read(reader: HistoryReader, stamp: tuple[int, int] | None) -> _Read:
    if stamp is None:
        return _Read(stamp, None, "not there yet")
    if not stamp[0]:
        return _Read(stamp, None, "empty so far")
    with warnings.catch_warnings(record=True) as caught:  # damaged lines
        warnings.simplefilter("always")
        try:
            history = reader.read() if _is_history(reader.path) else load(reader.path)
        except (ResultFileError, FileNotFoundError) as error:
            return _Read(stamp, None, str(error))
    if not isinstance(history, SpectrumHistory):
        return _Read(stamp, None, f"holds a {type(history).__name__}, not the history of a run")
    return _Read(stamp, history, " ".join(str(w.message) for w in caught))


def _is_history(path: Path) -> bool:
    try:
        return is_history(path)
    except OSError:  # `load` says why
        return False


def _names(paths: Sequence[Path]) -> dict[Path, str]:
    """Short names of files, with the folder where others have the same."""
    stems = [path.stem for path in paths]
    return {path: path.stem if stems.count(path.stem) == 1 else str(path.with_suffix("")) for path in paths}
