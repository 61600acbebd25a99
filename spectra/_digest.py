"""Checksums of arrays that do not depend on how they are placed."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

PyTree = Any


def tree_digest(tree: PyTree) -> int:
    """A checksum of all leaves with their shapes and dtypes, equal on any number of devices."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)  # that of a NumPy array once it is on a device
        total = zlib.crc32(f"{leaf.shape}{dtype}{array_digest(leaf)}".encode(), total)
    return total


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
