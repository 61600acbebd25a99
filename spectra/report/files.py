"""Results and files: `save` and `load`."""

import os
from pathlib import Path
from typing import Any

import jax

from spectra.base.calls import checked
from spectra.base.errors import ResultFileError, SpectraError
from spectra.report import npz
from spectra.report.encode import CLASSES
from spectra.report.histories import is_history, read
from spectra.results import provides


@provides("save")
@checked
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
        SpectraError: `result` is not a result, or holds values of a trace; `path` is a folder or no name.
        FileExistsError: the file exists, and `overwrite` is false.
        OSError: the file cannot be written; an existing file is unchanged.

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
    named, path = os.fspath(path), Path(path)
    if not path.name or path.is_dir() or named.endswith(("/", os.sep)):
        raise SpectraError(f"path='{named}' is a folder: pass the name of a file in it.")
    if "\0" in str(path):
        raise SpectraError(f"path={named!r} holds a zero byte, which no name of a file may.")
    if path.suffix != ".npz":
        path = path.with_name(path.name + ".npz")
    try:
        npz.write(result, path, overwrite=overwrite)
    except jax.errors.TracerArrayConversionError as error:
        raise SpectraError("inside jit a result has no numbers yet: return it from there first.") from error
    return path


@checked
def load(path: str | os.PathLike) -> Any:
    """Read a result that `save` wrote, or the history that a `SpectrumTracker` writes, while it grows.

    No code in a file is run, the memory is limited in proportion to the file's size, and each field is
    checked. If some lines of a history are damaged, the others are read, with a warning.

    Args:
        path: the file, `.npz` or, of a tracker, `.jsonl`.

    Raises:
        FileNotFoundError: there is no such file.
        ResultFileError: the file cannot be read, is truncated or damaged, is not a spectra result, or has a
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
