"""Checksums: of arrays, however they are placed, and of programs, whatever they are called."""

import re
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from spectra import _processes

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


@jax.jit
def _mixed(x: jax.Array) -> jax.Array:
    """Σ_i mix(bits of x_i, i) modulo 2^32: integers, so no order of summation changes it."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag])
    if x.dtype == bool:
        bits = x.astype(jnp.uint32)
    elif x.dtype.itemsize < 4:
        bits = lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    else:
        bits = lax.bitcast_convert_type(x, jnp.uint32)  # numbers of 8 bytes gain an axis of two
    position, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        position = position + lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * np.uint32(stride % 2**32)
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
        return sorted((str(name), _value(x)) for name, x in value.items())
    if type(value) in (tuple, list):
        return [_value(x) for x in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if callable(value) and not isinstance(value, type):  # what it computes is traced elsewhere
        return type(value).__name__
    return _ADDRESS.sub("", repr(value))
