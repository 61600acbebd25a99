"""Printing, saving and drawing of results: results go to stdout, everything else to stderr.

The output path is tested before anything is computed, and no other result is overwritten.
"""

import contextlib
import csv
import io
import itertools
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import typer

from spectra.base.errors import SpectraError
from spectra.base.files import make_folder_of, sweep
from spectra.base.host import is_first
from spectra.cli.ending import INTERRUPTED, ResultElsewhereError, echo, fail, printable
from spectra.report.files import save

_NAME = "spectrum"
_ROOM = 2**18  # bytes that must fit before a run begins: its result and its picture, of usual sizes


class Place(NamedTuple):
    """A folder for `spectrum.npz` and `spectrum.png`, and whether those that are there may be replaced."""

    folder: Path
    force: bool

    def check(self) -> None:
        """Make the folder if it is missing, and raise unless files can be made and filled in it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            sweep(self.folder / f"{_NAME}.npz")
            with tempfile.TemporaryFile(dir=self.folder) as file:
                file.write(bytes(_ROOM))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _no_place(self.folder, error) from error

    def keep(self, result: Any) -> Path:
        """Save the result under a name that no other has."""
        for path in self._names():
            try:
                return save(result, path, overwrite=self.force)
            except FileExistsError:
                if not path.exists():  # it is the folder that is something else
                    raise
        raise AssertionError

    def _names(self) -> Iterator[Path]:
        if self.force:
            yield self.folder / f"{_NAME}.npz"
            return
        for number in itertools.count(1):
            path = self.folder / (f"{_NAME}.npz" if number == 1 else f"{_NAME}-{number}.npz")
            if not path.exists() and not path.with_suffix(".png").exists():
                yield path


def require_writable(folder: Path) -> None:
    """Raise before anything is done unless files can be made in a folder, or in the one it would be in."""
    there = next(path for path in (folder, *folder.parents) if path.exists() or path.is_symlink())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise _no_place(folder, error) from error


def _no_place(folder: Path, error: OSError) -> SpectraError:
    return SpectraError(
        f"results cannot be written to '{folder}' ({error.strerror or error}); nothing has been computed "
        "yet: choose another folder with --out."
    )


def require_free(force: bool, *paths: Path) -> None:
    """Raise before anything is done if a file that a command is about to write already exists.

    Raises:
        SpectraError: it does, and `force` is false. Folders are not checked: writing cannot replace them.
    """
    there = [] if force else [path for path in paths if path.is_file()]
    if there:
        raise SpectraError(
            f"'{there[0]}' already exists, and nothing has been written: --force replaces it, -o names "
            "another file."
        )


def keep_elsewhere(result: Any, error: OSError, place: Place, unprinted: OSError | None) -> str:
    """Save the result in a folder for temporary files, and say in words what has become of it."""
    printed = "It is printed above" if unprinted is None else f"It could not be printed ({_why(unprinted)})"
    cause = f"the result could not be written to '{place.folder}' ({_why(error)}). {printed}"
    try:
        path = Place(Path(tempfile.mkdtemp(prefix="spectra-")), False).keep(result)
    except OSError as second:
        return f"{cause}, {'but' if unprinted is None else 'and'} saved nowhere ({_why(second)})."
    return (
        f"{cause}, {'and' if unprinted is None else 'but is'} saved as '{path}'. Copy it before that folder "
        f"is emptied; `spectra plot {shlex.quote(str(path))} -o FILE` draws it."
    )


def _why(error: OSError) -> str:
    return str(error.strerror or error)


class Voice(NamedTuple):
    """How much is said, and in which form results are printed: "text", "json" or "csv"."""

    quiet: bool = False
    form: str = "text"

    def say(self, message: str) -> None:
        """Print a message, in the first process only; to stderr where stdout is for a program to read."""
        if is_first() and not self.quiet:
            echo(message, err=self.form != "text")

    def others(self) -> contextlib.AbstractContextManager[Any]:
        """Around code of the user's: where stdout is for the result alone, what it prints goes to stderr."""
        if self.quiet or self.form != "text":
            return contextlib.redirect_stdout(sys.stderr)
        return contextlib.nullcontext()

    def show(self, result: Any) -> OSError | None:
        """Print a result, and return why that was not possible."""
        return echo(printable({"text": text_of, "json": json_of, "csv": csv_of}[self.form](result)))


def text_of(result: Any) -> str:
    """A result as a table; of several by name a line each, or one after the other."""
    result = _in_one(result)
    if not isinstance(result, Mapping):
        return repr(result)
    return "\n\n".join(f"{name}\n{part!r}" for name, part in result.items())


def json_of(result: Any) -> str:
    """A result as JSON, with the fields that its class has."""
    from spectra.results import plain

    return json.dumps(plain(result), allow_nan=False)


def csv_of(result: Any) -> str:
    """The rows of a result as comma-separated values, the names of the columns first."""
    result = _in_one(result)
    if isinstance(result, Mapping):
        records = [{"name": name, **row} for name, part in result.items() for row in _records(part)]
    else:
        records = _records(result)
    columns = dict.fromkeys(name for record in records for name in record)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return stream.getvalue().rstrip("\n")


def _in_one(result: Any) -> Any:
    """Quadratures by name, such as those of blocks, as their summary; another result as it is."""
    from spectra.report.summary import Summary
    from spectra.results import Quadrature

    if isinstance(result, Mapping) and result and all(isinstance(x, Quadrature) for x in result.values()):
        return Summary(dict(result))
    return result


def _records(result: Any) -> list[dict[str, Any]]:
    from spectra.results import called

    if not hasattr(result, "records"):
        raise SpectraError(f"{called(result)} has no rows: use --json.")
    return result.records()


def keep(result: Any, place: Place, voice: Voice) -> None:
    """Save, then print, then draw; of several processes the first does it for all."""
    if not is_first():
        return
    failure, path, unprinted = None, None, None
    try:
        try:
            path = place.keep(result)
        except OSError as error:
            failure = error
        finally:  # whatever went wrong, the numbers have been paid for
            voice.say("")
            unprinted = voice.show(result)
            voice.say("")
        if path is None:
            raise ResultElsewhereError(
                keep_elsewhere(result, failure or OSError("no reason"), place, unprinted)
            )
        voice.say(f"result   {path}")
        draw(result, path.with_suffix(".png"), voice)
    except KeyboardInterrupt:  # not one that has lost a result
        if path is None:
            raise
        fail(f"interrupted: the result is in '{path}', but there is no picture yet: `spectra plot` draws it.")
        raise typer.Exit(INTERRUPTED) from None
    except OSError as error:
        raise ResultElsewhereError(
            f"the picture could not be written ({_why(error)}); the result is in '{path}'."
        ) from error
    if unprinted is not None:
        raise ResultElsewhereError(
            f"the result could not be printed ({_why(unprinted)}); it is in '{path}'."
        ) from unprinted


def picture_path(path: Path) -> Path:
    """Where a picture of this name is written.

    Raises:
        SpectraError: nothing draws pictures of its kind.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    path = path if path.suffix else path.with_name(f"{path.name}.png")
    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise SpectraError(f"'{path}': a picture ends in {', '.join(f'.{kind}' for kind in kinds)}.")
    return path


def draw(result: Any, path: Path, voice: Voice, learning_rate: float | None = None) -> None:
    """Write the picture of a result, in the form that the name of the file asks for."""
    import matplotlib

    matplotlib.use("Agg")
    from spectra.base.files import replacing
    from spectra.report.plots.gallery import draw as axes_of
    from spectra.report.plots.style import plot_style
    from spectra.results import called

    ax = axes_of(result, learning_rate=learning_rate)
    if ax is None:
        raise SpectraError(f"{called(result)} has no picture: print it with spectra show.")
    path = picture_path(path)
    make_folder_of(path)
    with replacing(path) as temporary, plot_style():  # which has fonts that editors can change
        ax.figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=300)
    voice.say(f"picture  {path}")
