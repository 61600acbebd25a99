"""What the commands do with results that are there: print, compare, draw, write and serve pages."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import typer

from spectra.base.errors import SpectraError
from spectra.cli.output import Voice, draw, picture_path, require_free
from spectra.report.files import load
from spectra.report.live import LivePage, serve
from spectra.report.page import page_path, write_report
from spectra.report.summary import Summary
from spectra.results import as_quadrature


def show(result: Path, voice: Voice) -> None:
    """Print a result."""
    loaded = _load(result)
    with _about(result):
        unprinted = voice.show(loaded)
    _printed(unprinted)


def compare(results: list[Path], out: Path | None, voice: Voice, force: bool) -> None:
    """Print a row for each spectrum, and draw them into one picture."""
    if out is not None:
        require_free(force, _named(picture_path, out))
    table = Summary({name: q for path in results for name, q in _spectra_of(path, results).items()})
    _printed(voice.show(table))
    if out is not None:
        with _writing(out):
            draw(table.quadratures, out, voice)


def plot(result: Path, output: Path, learning_rate: float | None, force: bool) -> None:
    """Write the picture of a result."""
    require_free(force, _named(picture_path, output))
    loaded = _load(result)
    with _about(result), _writing(output):
        draw(loaded, output, Voice(), learning_rate)


def report(result: Path, output: Path, title: str | None, force: bool) -> None:
    """Write the page of a result."""
    require_free(force, _named(page_path, output))
    loaded = _load(result)
    with _about(result), _writing(output):
        page = write_report(loaded, output, title=title, source=result.name)
    Voice().say(f"page     {page}")


def watch(runs: list[Path], output: Path | None, port: int, seconds: int, once: bool) -> None:
    """Serve or write a page of runs, until Ctrl-C."""
    matplotlib.use("Agg")  # pages are drawn in threads, which have no windows
    page = LivePage(runs, seconds)
    with contextlib.suppress(KeyboardInterrupt):
        if output is None:
            with serve(page, port) as server:
                Voice().say(f"page     http://127.0.0.1:{server.server_port}/   (Ctrl-C ends)")
                server.serve_forever()
        else:
            path = _named(page_path, output)
            with _writing(path):
                page.write(path)
            Voice().say(f"page     {path}")
            while not once:
                time.sleep(seconds)
                with _writing(path):
                    page.write(path)


def _printed(error: OSError | None) -> None:
    """Raise for what could not be printed. A reader that has gone had enough, as `| head`: no failure."""
    if error is not None and not isinstance(error, BrokenPipeError):
        raise SpectraError(f"the result could not be printed ({error.strerror or error}).") from error


def _named(of_kind: Callable[[Path], Path], path: Path) -> Path:
    """Where a file goes; an ending that nothing writes is a wrong argument."""
    try:
        return of_kind(path)
    except SpectraError as error:
        raise typer.BadParameter(str(error)) from error


def _spectra_of(path: Path, among: list[Path]) -> dict[str, Any]:
    """The quadratures of a file, named after it, with its folder where another file has the same name."""
    loaded = _load(path)
    name = path.stem if sum(other.stem == path.stem for other in among) == 1 else str(path.with_suffix(""))
    if isinstance(loaded, dict):
        return {f"{name}: {block}": as_quadrature(part) for block, part in loaded.items()}
    return {name: as_quadrature(loaded)}


def _load(path: Path) -> Any:
    if path.is_dir():
        held = sorted(path.glob("*.npz")) + sorted(path.glob("*.jsonl"))
        inside = f"with {', '.join(repr(str(file)) for file in held[:3])}" if held else "without results"
        raise SpectraError(f"'{path}' is a folder, {inside}: name a file.")
    return load(path)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """What keeps a file from being written, without the names of temporary ones."""
    try:
        yield
    except OSError as error:
        raise SpectraError(f"'{path}' could not be written ({error.strerror or error}).") from error


@contextlib.contextmanager
def _about(path: Path) -> Iterator[None]:
    """Numbers that pass every check and cannot be shown all the same are the file's fault, in words."""
    try:
        yield
    except (SpectraError, OSError):
        raise
    except Exception as error:
        raise SpectraError(
            f"'{path}' cannot be shown: its numbers contradict each other ({type(error).__name__}: {error})."
        ) from error
