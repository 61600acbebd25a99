"""Where the command line puts a result: tested before anything is computed, and never over another."""

import itertools
import os
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from spectra._errors import SpectraError
from spectra._files import sweep
from spectra.io import save

_NAME = "spectrum"
_ROOM = 2**18  # bytes that must fit before a run begins: its result and its picture, of usual sizes


class ResultElsewhereError(SpectraError):
    """The result was computed, but could not be written where it should be; the message says where it is."""


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
            raise SpectraError(
                f"the result could not be written in '{self.folder}' ({error.strerror or error}); nothing "
                "has been computed yet: choose another folder with --out."
            ) from error

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


def require_free(force: bool, *paths: Path) -> None:
    """Raise before anything is done if a file that a command is about to write is there already.

    Raises:
        SpectraError: it is, and `force` is false; a folder is left to the writing, which can't replace it.
    """
    there = [] if force else [path for path in paths if path.is_file()]
    if there:
        raise SpectraError(
            f"'{there[0]}' is there already, and nothing has been written: --force replaces it, -o names "
            "another place."
        )


def keep_elsewhere(result: Any, error: OSError, place: Place) -> ResultElsewhereError:
    """Save the result in a folder for temporary files, and say so in the error that is returned."""
    reason = error.strerror or error
    cause = f"the result could not be written in '{place.folder}' ({reason}). It is printed above"
    try:
        path = Place(Path(tempfile.mkdtemp(prefix="spectra-")), False).keep(result)
    except OSError as second:
        return ResultElsewhereError(f"{cause}, and nowhere else ({second.strerror or second}).")
    return ResultElsewhereError(
        f"{cause}, and is kept in '{path}'. Copy it before that folder is emptied; "
        f"`spectra plot {shlex.quote(str(path))} -o FILE` draws it."
    )
