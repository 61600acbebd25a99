"""NumPy arrays and a JSON header in one `.npz`, readable without spectra and without pickle.

Arrays carry the names of the dataclass fields, with a path in front where results are nested
(`quadrature/nodes`); where two would share a name, one is numbered (`quadrature/nodes~2`). The entry
`header` is a JSON text with `format`, `schema`, the class of each result and all fields that are not
arrays. In the place of an array stand its `name`, `dtype` and `shape`; a dtype that NumPy does not have, such
as bfloat16, is stored as the integers of its bits. The zip format keeps a checksum of each entry.
"""

import math
import re
import zipfile
from pathlib import Path
from typing import IO, Any

import jax.numpy as jnp
import numpy as np

from spectra.base.errors import ResultFileError, SpectraError
from spectra.base.files import JsonError, make_folder_of, parse, replacing
from spectra.report.encode import DAMAGE, checked_text, decode, encode

FORMAT = "spectra-result"
SCHEMA = 1
COMPRESSED = 2**27
"""Bytes of arrays that are compressed in one file: beyond, compression takes longer than it saves room."""
RATIO = 16
"""How much more a file may hold than `COMPRESSED` and its own length, which `write` never exceeds."""
_HEADER_BYTES = 2**28
_KINDS = "biufc"  # dtypes that results hold: logical, integers, real and complex numbers


def write(result: Any, path: Path, *, overwrite: bool = True) -> None:
    """Write the file atomically: it appears whole or not at all."""
    arrays: dict[str, np.ndarray] = {"header": np.empty(0)}

    def store(name: str, array: np.ndarray) -> dict[str, Any]:
        name = _free_name(name, arrays)
        arrays[name] = _storable(array)
        return {"name": name, "dtype": array.dtype.name, "shape": list(array.shape)}

    header = {"format": FORMAT, "schema": SCHEMA, "result": encode(result, store)}
    arrays["header"] = np.array(checked_text(header))
    make_folder_of(path)
    with replacing(path, overwrite=overwrite) as temporary, zipfile.ZipFile(temporary, "w") as file:
        room = COMPRESSED
        for name, array in arrays.items():
            room -= array.nbytes
            entry = zipfile.ZipInfo(f"{name}.npy")
            entry.compress_type = zipfile.ZIP_DEFLATED if room >= 0 else zipfile.ZIP_STORED
            with file.open(entry, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _free_name(name: str, taken: dict[str, Any]) -> str:
    """A name for an array in the archive, near the one wanted: printable, short, and of this array alone.

    NumPy takes `w.npy` for `w`, and the zip format ends a name at its first zero.
    """
    name = re.sub(r"[\x00-\x1f\x7f\\\ud800-\udfff]", "_", name)[-200:] or "array"
    if name.endswith(".npy"):
        name += "~"
    free, number = name, 1
    while free in taken:
        number += 1
        free = f"{name}~{number}"
    return free


def _storable(array: np.ndarray) -> np.ndarray:
    """The array, or the integers of its bits if NumPy does not have its dtype."""
    if array.dtype.kind in _KINDS and array.dtype.isbuiltin != 2:
        return array.astype(array.dtype.newbyteorder("="), copy=False)
    if _foreign(array.dtype.name) is None:
        raise SpectraError(f"cannot save an array of dtype {array.dtype}; results hold numbers.")
    return np.asarray(array, order="C").view(f"u{array.dtype.itemsize}")


def read(path: Path) -> Any:
    """The result in the file."""
    try:
        with path.open("rb") as stream:
            if stream.read(4) != b"PK\x03\x04":
                raise ResultFileError(
                    f"'{path}' is empty, truncated or of another kind: results are npz files."
                )
            archive = zipfile.ZipFile(stream)
            entries = _entries(archive, path.stat().st_size)
            if "header" not in entries:
                raise ResultFileError(f"'{path}' is an npz file, but not a spectra result: no header.")
            header = parse(_text(archive, entries["header"]).encode())
            check_header(header, FORMAT, SCHEMA, path)
            return _decoded(header.get("result"), archive, entries)
    except ResultFileError as error:
        if str(path) in str(error):
            raise
        raise ResultFileError(f"'{path}': {error}") from None
    except (JsonError, *DAMAGE) as error:
        raise ResultFileError(f"'{path}' lacks or garbles a field: {_words(error)}") from error
    except RecursionError:
        raise ResultFileError(f"'{path}' is nested too deeply.") from None
    except OSError as error:
        raise ResultFileError(f"'{path}' cannot be read: {_words(error)}") from error
    except Exception as error:  # zipfile, zlib and struct have errors of their own for damaged archives
        raise ResultFileError(
            f"'{path}' is not a readable result file (truncated, damaged or of another kind): {_words(error)}"
        ) from error


def _decoded(form: Any, archive: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo]) -> Any:
    if not isinstance(form, dict) or not {"class", "dict"} & set(form):
        raise TypeError("the result has no class")

    def fetch(stored: Any) -> np.ndarray:
        stored = {"name": stored} if isinstance(stored, str) else stored  # all that first versions say
        return _array(archive, entries[stored["name"]], stored)

    return decode(form, fetch)


def _entries(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The members of the archive by name, before any is unpacked: what they say that they hold must fit."""
    total = sum(entry.file_size for entry in archive.infolist())
    if total > COMPRESSED + RATIO * size:
        raise ResultFileError(
            f"its {size:,} bytes claim to hold {total:,}, which no file that spectra writes does."
        )
    entries: dict[str, zipfile.ZipInfo] = {}
    for entry in archive.infolist():
        # bzip2 and LZMA, which NumPy does not write either, may ask for gigabytes by themselves.
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or entry.flag_bits & 1:
            raise ResultFileError(
                f"its entry '{entry.filename[:80]}' is encrypted, or packed in an unknown way."
            )
        name = entry.filename.removesuffix(".npy")
        if name in entries:
            raise ResultFileError(f"it has two entries '{name[:80]}'.")
        entries[name] = entry
    return entries


def _text(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> str:
    if entry.file_size > _HEADER_BYTES:
        raise ResultFileError(f"its header claims {entry.file_size:,} bytes, more than {_HEADER_BYTES:,}.")
    return str(_unpacked(archive, entry, "U"))


def _unpacked(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, kinds: str) -> np.ndarray:
    """A member as an array; its own header must describe exactly the bytes that it has."""
    with archive.open(entry) as member:
        shape, fortran, dtype, start = _own_header(member)
        if dtype.kind not in kinds:
            raise ResultFileError(f"its array '{entry.filename[:80]}' has dtype {dtype}.")
        if start + math.prod(shape) * dtype.itemsize != entry.file_size:
            raise ResultFileError(
                f"its array '{entry.filename[:80]}' of shape {shape} and dtype {dtype} has "
                f"{entry.file_size:,} bytes."
            )
        array = np.empty(shape[::-1] if fortran else shape, dtype)  # memory that the archive's limit allows
        _fill(member, array.reshape(-1).view(np.uint8).data)
    return array.T if fortran else array


def _own_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    version = np.lib.format.read_magic(member)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
    elif version == (2, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(member)
    else:
        raise ResultFileError(f"it holds an array of NumPy's format {version}.")
    if any(size < 0 for size in shape):
        raise ResultFileError(f"it holds an array of shape {shape}.")
    return shape, fortran, dtype, member.tell()


def _fill(member: IO[bytes], memory: memoryview) -> None:
    """Read all of a member, whose checksum is compared at its end."""
    at = 0
    while got := member.readinto(memory[at : at + 2**20]):  # pyright: ignore[reportAttributeAccessIssue]
        at += got
    if at != len(memory) or member.read(1):
        raise EOFError(f"{at:,} of {len(memory):,} bytes are there")


def _array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, stored: dict[str, Any]) -> np.ndarray:
    """An array in the dtype that it had, if its header says so: files of first versions do not."""
    array = _unpacked(archive, entry, _KINDS + "V")
    name = stored.get("dtype", array.dtype.name)
    if array.dtype == np.dtype("V2") and "dtype" not in stored:  # how first versions wrote bfloat16
        array, name = array.view(np.uint16), "bfloat16"
    if name != array.dtype.name:
        dtype = _foreign(name)
        if dtype is None or array.dtype != np.dtype(f"u{dtype.itemsize}"):
            raise ResultFileError(
                f"its array '{entry.filename[:80]}' is {array.dtype}, not {str(name)[:40]}."
            )
        array = array.view(dtype)
    if array.dtype == np.bool_ and array.view(np.uint8).max(initial=0) > 1:
        raise ResultFileError(f"its array '{entry.filename[:80]}' holds bytes that are not booleans.")
    if stored.get("shape", list(array.shape)) != list(array.shape):
        raise ResultFileError(
            f"its array '{entry.filename[:80]}' has shape {array.shape}, not the one stated."
        )
    return array


def _foreign(name: Any) -> np.dtype | None:
    """A dtype of JAX that NumPy does not have, by name."""
    if not isinstance(name, str) or not re.fullmatch(r"(bfloat|float|u?int)\d\w{0,20}", name):
        return None
    scalar = getattr(jnp, name, None)
    dtype = None if scalar is None else np.dtype(scalar)
    return dtype if dtype is not None and dtype.isbuiltin == 2 else None


def _words(error: Exception) -> str:
    """What an error says, within a line; some of NumPy's and zlib's quote what they could not read."""
    return (str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}")[:300]


def check_header(header: Any, form: str, schema: int, path: Path) -> None:
    """Raise unless the header is one of this format and of a schema that is known."""
    if not isinstance(header, dict) or header.get("format") != form:
        raise ResultFileError(f"'{path}' is not a spectra result.")
    if header.get("schema") != schema:
        raise ResultFileError(
            f"'{path}' has schema {str(header.get('schema'))[:40]}, this version of spectra reads {schema}: "
            "update spectra."
        )
