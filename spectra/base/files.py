"""Files that appear whole or not at all, JSON from files that may hold anything, and checksums.

The depth of the JSON and the memory that it will take are bounded before it is parsed. Checksums are of
arrays, however they are placed, and of programs, whatever they are called.
"""

import contextlib
import errno
import json
import os
import platform
import re
import tempfile
import time
import zlib
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from spectra.base import arrays, programs
from spectra.base import host as _processes

OLD = 24 * 3600.0
"""Seconds after which a half-written file counts as left behind where its process cannot be asked for."""
_LONGEST = 100  # bytes of a name that its temporary neighbour repeats: names end at 255
_in_use: set[str] = set()  # temporary files that this process is writing


def make_folder_of(path: Path) -> None:
    """Make the folder of a file, and those above it.

    Raises:
        NotADirectoryError: a file has the name of one of them; the message has that name.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        taken = next(above for above in path.parents if above.exists() or above.is_symlink())
        words = f"a file is in the place of a folder of '{path}'"
        raise NotADirectoryError(errno.ENOTDIR, words, str(taken)) from None


@contextlib.contextmanager
def replacing(path: Path, *, overwrite: bool = True) -> Generator[Path]:
    """A new file beside `path`, to be written in the block; it takes its place when the block ends.

    If the block or the disk fails, `path` is what it was before, and nothing is left beside it. A process
    that is killed in the block leaves a `.part` file, which the next one that writes `path` removes.

    Raises:
        FileExistsError: `path` exists, also if it has come to exist meanwhile, and `overwrite` is false.
    """
    path = Path(path)
    sweep(path)
    with _named(path), _temporary(path) as temporary:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        with contextlib.suppress(OSError):  # file systems of networks and clouds may have no modes
            temporary.chmod(0o666 & ~_umask())  # mkstemp's own mode is for the owner only
        if overwrite:
            os.replace(temporary, path)
        else:
            _publish(temporary, path)


@contextlib.contextmanager
def _temporary(path: Path) -> Generator[Path]:
    """A new file beside `path`, which is gone after the block unless it has another name."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{_start(path)}{_owner()}-", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    _in_use.add(temporary.name)
    try:
        yield temporary
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
        _in_use.discard(temporary.name)


@contextlib.contextmanager
def _named(path: Path) -> Generator[None]:
    """Errors of the system in the block name `path`, not a file beside it, nor nothing, as on a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and str(error.filename or ".part").endswith(".part"):
            error.filename, error.filename2 = str(path), None
        raise


def sweep(path: Path) -> None:
    """Remove what processes that were killed left of `path`: files of dead processes, or a day old."""
    # An owner is a host and a process; eight letters alone are tempfile's, in names of earlier versions.
    pattern = re.compile(
        rf"(?:{re.escape(_start(path))}([0-9a-f]{{8}}-\d+)-|{re.escape(path.name)})\w{{8}}\.part"
    )
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            found = pattern.fullmatch(entry.name)
            if found and entry.name not in _in_use and _is_left_behind(entry, found[1]):
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)


def _is_left_behind(entry: os.DirEntry[str], owner: str | None) -> bool:
    host, _, process = (owner or "").partition("-")
    if host == _host() and os.name == "posix":
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):
            return False
        return int(process) == os.getpid()  # of a process that had this number before
    return entry.stat().st_mtime < time.time() - OLD


def _publish(temporary: Path, path: Path) -> None:
    """Give the file its name, unless something else has it: a link, other than a renaming, fails then."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if path.exists():
            raise FileExistsError(f"'{path}' exists") from None
        os.replace(temporary, path)
    else:
        temporary.unlink()


def _start(path: Path) -> str:
    """What the names of all temporary files of `path` begin with."""
    name = os.fsencode(path.name)
    if len(name) <= _LONGEST:
        return f"{path.name}."
    return f"{path.name[: _LONGEST // 4]}~{zlib.crc32(name):08x}."


def _owner() -> str:
    return f"{_host()}-{os.getpid()}"


def _host() -> str:
    return f"{zlib.crc32(platform.node().encode('utf-8', 'surrogateescape')):08x}"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


MAX_BYTES = 3 * 2**27
"""Bytes of memory that one text may take once it is read, which is up to eighty times its length."""
MAX_DEPTH = 100
"""Levels of nesting in what is saved: those of parameter trees are a tenth of it."""
# Bytes that CPython takes for what a character stands for: an object with its table, a list, a pair, an item.
_COSTS = {b"{": 240, b"[": 72, b":": 100, b",": 64}


class JsonError(ValueError):
    """A text is not JSON, or too deep or too large to be read."""


def memory_of(data: bytes) -> int:
    """A bound on the bytes that a JSON text takes once it is read."""
    letters = 3 if data.isascii() else 9  # itself, as text and in its values: up to four bytes a character
    return letters * len(data) + sum(data.count(mark) * size for mark, size in _COSTS.items())


def parse(data: bytes, *, max_bytes: int = MAX_BYTES, **hooks: Any) -> Any:
    """The value of a JSON text in UTF-8; `hooks` as for `json.loads`.

    Raises:
        JsonError: it is not JSON, too deep, or would take more than `max_bytes` of memory.
    """
    if (needed := memory_of(data)) > max_bytes:
        raise JsonError(f"its JSON would take {needed >> 20} MiB of memory, more than {max_bytes >> 20}")
    try:
        return json.loads(data.decode(), **hooks)
    except RecursionError:
        raise JsonError("it is nested too deeply") from None
    except ValueError as error:
        raise JsonError(f"it is not JSON: {str(error)[:200]}") from None


PyTree = Any
_ADDRESS = re.compile(r"0x[0-9a-f]+")


def tree_digest(tree: PyTree) -> int:
    """A checksum of all leaves with their shapes and dtypes, equal on any number of devices."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        if not hasattr(leaf, "dtype"):  # a number
            leaf = np.asarray(leaf)
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)  # that of a NumPy array once it is on a device
        total = zlib.crc32(f"{leaf.shape}{dtype}{array_digest(leaf)}".encode(), total)
    return total


def folder_digest(folder: Path) -> int:
    """A checksum of all files of a folder that all processes share; each reads its part of them."""
    total = 0
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files[jax.process_index() :: jax.process_count()]:
        digest = zlib.crc32(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest = zlib.crc32(block, digest)
        total ^= digest
    return _processes.combined(total)


def array_digest(array: Any) -> int:
    """A checksum of an array's bits: on the host for NumPy arrays, where they lie for JAX arrays."""
    if not isinstance(array, jax.Array):
        array = np.asarray(array)
        if not (array.dtype.kind in "iufb" and array.dtype.itemsize <= 8):  # no JAX array holds these
            return zlib.crc32(np.ascontiguousarray(array).tobytes())
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    return int(_mixed(array))


@programs.jit
def _mixed(x: jax.Array) -> jax.Array:
    """Σ_i mix(bits of x_i, i) modulo 2^32: integers, so no order of summation changes it."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag])
    elif x.dtype != bool:
        limits = jnp.finfo if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo
        if limits(x.dtype).bits < 8:  # several share a byte
            x = x.astype(jnp.float32)
    if x.dtype == bool:
        bits = x.astype(jnp.uint32)
    elif x.dtype.itemsize < 4:
        bits = lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    else:
        bits = lax.bitcast_convert_type(x, jnp.uint32)  # numbers of 8 bytes gain an axis of two
    position, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        position = position + arrays.positions(jnp.uint32, bits.shape, axis) * np.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    mixed = (bits ^ (position * np.uint32(2654435761))) * np.uint32(2246822519)
    mixed = (mixed ^ (mixed >> 15)) * np.uint32(3266489917)
    return jnp.sum(mixed ^ (mixed >> 13), dtype=jnp.uint32)


def program_digest(program: ClosedJaxpr) -> int:
    """A checksum of what a traced function computes: operations, their parameters, all constants.

    Two functions with the same operations are equal, wherever they were defined and whatever they are
    called; one that closes over other numbers is not.
    """
    total = 0
    for const in program.consts:
        total = zlib.crc32(f"{tree_digest(const)}".encode(), total)
    names: dict[Any, int] = {}  # variables by their first appearance
    jaxpr = program.jaxpr
    for var in (*jaxpr.constvars, *jaxpr.invars):
        names[var] = len(names)
    for equation in jaxpr.eqns:
        inputs = [_value(x.val) if isinstance(x, Literal) else names[x] for x in equation.invars]
        for var in equation.outvars:
            names[var] = len(names)
        shapes = [str(var.aval) for var in equation.outvars]
        parameters = [(name, _value(value)) for name, value in sorted(equation.params.items())]
        total = zlib.crc32(f"{equation.primitive} {inputs} {shapes} {parameters}".encode(), total)
    outputs = [_value(x.val) if isinstance(x, Literal) else names[x] for x in jaxpr.outvars]
    return zlib.crc32(f"{outputs}".encode(), total)


def _value(value: Any) -> Any:
    """A parameter of an operation in a form that is the same in every process."""
    if isinstance(value, ClosedJaxpr):
        return program_digest(value)
    if isinstance(value, Jaxpr):
        return program_digest(ClosedJaxpr(value, ()))
    if isinstance(value, (jax.Array, np.ndarray)):
        return tree_digest(value)
    if isinstance(value, dict):
        return sorted((str(name), _value(x)) for name, x in cast("dict[Any, Any]", value).items())
    if type(value) in (tuple, list):
        return [_value(x) for x in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, cast("frozenset[Any]", value)))
    if callable(value) and not isinstance(value, type):  # what it computes is traced elsewhere
        return type(value).__name__
    return _ADDRESS.sub("", repr(value))
