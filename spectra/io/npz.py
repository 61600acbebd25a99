"""NumPy arrays and a JSON header in one `.npz`, readable without spectra and without pickle.

Arrays carry the names of the dataclass fields, with a path in front where results are nested
(`quadrature/nodes`). The entry `header` is a JSON text with `format`, `schema`, the class of each result
and all fields that are not arrays.
"""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from spectra._errors import ResultFileError
from spectra._files import replacing
from spectra.io.encode import decode, encode

FORMAT = "spectra-result"
SCHEMA = 1


def write(result: Any, path: Path) -> None:
    """Write the file atomically: it appears whole or not at all."""
    arrays: dict[str, np.ndarray] = {}

    def store(name, array):
        arrays[name] = array
        return name

    header = {"format": FORMAT, "schema": SCHEMA, "result": encode(result, store)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, header=np.array(json.dumps(header)), **arrays)


def read(path: Path) -> Any:
    """The result in the file."""
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
    check_header(header, FORMAT, SCHEMA, path)
    try:
        if not {"class", "dict"} & set(header["result"]):
            raise TypeError("the result has no class")
        return decode(header["result"], lambda name: arrays[name])
    except (AttributeError, KeyError, TypeError, ValueError, StopIteration) as error:
        raise ResultFileError(f"'{path}' lacks or garbles a field: {error!r}") from error


def check_header(header: Any, form: str, schema: int, path: Path) -> None:
    """Raise unless the header is one of this format and of a schema that is known."""
    if not isinstance(header, dict) or header.get("format") != form:
        raise ResultFileError(f"'{path}' is not a spectra result.")
    if header.get("schema") != schema:
        raise ResultFileError(
            f"'{path}' has schema {header.get('schema')}, this version of spectra reads {schema}: "
            "update spectra."
        )
