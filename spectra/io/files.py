"""`save` and `load`: any result, to and from one file."""

import os
from pathlib import Path
from typing import Any

from spectra._errors import SpectraError
from spectra.io import lines, npz
from spectra.io.encode import CLASSES


def save(result: Any, path: str | os.PathLike) -> Path:
    """Write a result to an `.npz` file, atomically: the file appears whole or not at all.

    The vectors of `Eigenpairs` come back in the tree that they had if it is made of dicts, lists and
    tuples. Other containers (nnx states, modules) come back as an `OrderedDict` {path: array}, in the
    order of the tree: `jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(vectors))` puts
    them into yours. The basis of a `Tridiagonal` is not saved.

    Args:
        result: any result of this package, or a dict of results by name (blocks).
        path: file name; `.npz` is added if it is missing. An existing file is replaced.

    Returns:
        The path that was written.

    Raises:
        SpectraError: `result` is not a result, or holds values of a trace.

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
    npz.write(result, path)
    return path


def load(path: str | os.PathLike) -> Any:
    """Read a result that `save` wrote, or the history that a `SpectrumTracker` writes, while it grows.

    Args:
        path: the file, `.npz` or, of a tracker, `.jsonl`.

    Raises:
        FileNotFoundError: there is no such file.
        ResultFileError: the file is truncated, not a spectra result, or of a newer schema.

    Examples:
        See `save`.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no result file at '{path}'.")
    return lines.read(path) if lines.is_history(path) else npz.read(path)
