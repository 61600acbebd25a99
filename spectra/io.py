"""Result files: NumPy arrays and a JSON header in one `.npz`, readable without spectra and without pickle.

Arrays carry the names of the dataclass fields, with a path in front where results are nested
(`quadrature/nodes`). The entry `header` is a JSON text with `format`, `schema`, the class of each result
and all fields that are not arrays.
"""

import contextlib
import dataclasses
import json
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from spectra._errors import ResultFileError, SpectraError
from spectra._status import Status
from spectra.report import SpectrumReport
from spectra.results import (
    ConditionNumber,
    Density,
    Estimate,
    Interval,
    LayerConditions,
    Moments,
    Quadrature,
)

FORMAT = "spectra-result"
SCHEMA = 1
_SAVED = (SpectrumReport, Quadrature, Moments, Density, Estimate, Interval, ConditionNumber, LayerConditions)
_CLASSES = {cls.__name__: cls for cls in _SAVED}


def save(result: Any, path: str | os.PathLike) -> Path:
    """Write a result to an `.npz` file, atomically: the file appears whole or not at all.

    Args:
        result: `SpectrumReport`, `Quadrature`, `Moments`, `Density`, `Estimate` or a condition number, or a
            dict of such by name (blocks).
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
    if type(result).__name__ not in _CLASSES and not isinstance(result, dict):
        raise SpectraError(f"cannot save a {type(result).__name__}; results are {', '.join(_CLASSES)}.")
    path = Path(path)
    if path.suffix != ".npz":
        path = path.with_name(path.name + ".npz")
    arrays: dict[str, np.ndarray] = {}
    header = {"format": FORMAT, "schema": SCHEMA, "result": _encode(result, "", arrays)}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, header=np.array(json.dumps(header)), **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    return path


def load(path: str | os.PathLike) -> Any:
    """Read a result that `save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ResultFileError: the file is truncated, not a spectra result, or of a newer schema.

    Examples:
        See `save`.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no result file at '{path}'.")
    try:
        # Opened here: np.load leaves the file open when the archive is damaged.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            if "header" not in file:
                raise ResultFileError(f"'{path}' is an npz file, but not a spectra result: no header.")
            header = json.loads(str(file["header"]))
            arrays = {name: file[name] for name in file.files if name != "header"}
    except ResultFileError:
        raise
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, AttributeError) as error:
        raise ResultFileError(
            f"'{path}' is not a readable result file (truncated, or of another kind): {error}"
        ) from error
    except Exception as error:  # zlib.error and friends from damaged members
        raise ResultFileError(f"'{path}' is damaged: {error}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ResultFileError(f"'{path}' is not a spectra result.")
    if header.get("schema") != SCHEMA:
        raise ResultFileError(
            f"'{path}' has schema {header.get('schema')}, this version of spectra reads {SCHEMA}: "
            "update spectra."
        )
    try:
        if not {"class", "dict"} & set(header["result"]):
            raise TypeError("the result has no class")
        return _decode(header["result"], "", arrays)
    except (AttributeError, KeyError, TypeError, ValueError, StopIteration) as error:
        raise ResultFileError(f"'{path}' lacks or garbles a field: {error!r}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _encode(value: Any, prefix: str, arrays: dict[str, np.ndarray]) -> Any:
    """The JSON form of a value; arrays go to `arrays` under their path."""
    if type(value).__name__ in _CLASSES:
        is_plain = dataclasses.is_dataclass(value)
        names = [field.name for field in dataclasses.fields(value)] if is_plain else list(value._fields)
        fields = {
            name: _encode(getattr(value, name), f"{prefix}/{name}" if prefix else name, arrays)
            for name in names
        }
        return {"class": type(value).__name__, "fields": fields}
    if isinstance(value, Status):
        return {"status": value.code}
    if isinstance(value, dict):
        return {"dict": {k: _encode(v, f"{prefix}/{k}", arrays) for k, v in value.items()}}
    if isinstance(value, (np.generic, np.ndarray)) or hasattr(value, "__array__"):
        array = np.asarray(value)
        if array.ndim == 0:
            return array.item()
        arrays[prefix] = array
        return {"array": prefix}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise SpectraError(f"cannot save a {type(value).__name__} ('{prefix}') in a result file.")


def _decode(value: Any, prefix: str, arrays: dict[str, np.ndarray]) -> Any:
    if not isinstance(value, dict):
        return value
    if "class" in value:
        fields = {name: _decode(v, name, arrays) for name, v in value["fields"].items()}
        return _CLASSES[value["class"]](**fields)
    if "status" in value:
        return Status.from_code(value["status"])
    if "dict" in value:
        return {name: _decode(v, name, arrays) for name, v in value["dict"].items()}
    return arrays[value["array"]]
