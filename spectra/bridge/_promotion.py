"""PyTorch's dtypes and type promotion, stated for JAX arrays and Python scalars.

PyTorch ranks operands in three classes: arrays with dimensions, 0-d arrays, Python numbers. A lower
class decides the dtype only if its category (bool < integer < floating < complex) is higher than
that of every class above it; a Python number then brings the default dtype of its category. JAX
promotes differently (`int64 + 1.5` is float64 under x64, float32 in PyTorch), so every pointwise
operator converts its operands here first.

Complex numbers of half precision (complex32, and bcomplex32, which bfloat16 with a complex number
gives since PyTorch 2.14) have no counterpart in JAX: here they are complex64, as up to PyTorch 2.13,
and a module that computes with them is refused when it is exported.

Source: "Tensor Attributes", section "torch.dtype", of the PyTorch documentation.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import dtypes

from spectra.bridge._exporter import exporter

DTYPES = (
    "bool",
    "uint8",
    "int8",
    "int16",
    "int32",
    "int64",
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "complex64",
    "complex128",
)


def default_dtype() -> Any:
    """Return the dtype of floating results that neither an operand nor an argument decides."""
    return canonical(exporter().default_dtype)


def canonical(name: Any) -> Any:
    """Return the dtype that JAX uses for `name`: without x64, 64-bit types become 32-bit."""
    return dtypes.canonicalize_dtype(jnp.dtype(name))


def category(dtype: Any) -> int:
    """Return 0 for bool, 1 for integers, 2 for floating and 3 for complex dtypes."""
    if jnp.issubdtype(dtype, jnp.bool_):
        return 0
    if jnp.issubdtype(dtype, jnp.integer):
        return 1
    return 2 if jnp.issubdtype(dtype, jnp.floating) else 3


def is_float(x: Any) -> bool:
    """Say whether an array has a floating or complex dtype."""
    return category(jnp.result_type(x)) >= 2


def result_type(*operands: Any) -> Any:
    """Return PyTorch's result dtype of arrays and Python numbers."""
    best: list[Any] = [None, None, None]
    for operand in operands:
        if isinstance(operand, (bool, int, float, complex)):
            rank, dtype = 2, _scalar_dtype(operand)
        else:
            rank, dtype = (0 if operand.ndim else 1), operand.dtype
        current = best[rank]
        best[rank] = dtype if current is None else jnp.promote_types(current, dtype)
    result = None
    for dtype in best:
        if dtype is not None and (result is None or category(dtype) > category(result)):
            result = _complex_of(result, dtype)
    return result


def promote(*operands: Any) -> list[jax.Array]:
    """Convert operands to arrays of their common PyTorch dtype, without broadcasting."""
    dtype = result_type(*operands)
    return [cast(operand, dtype) for operand in operands]


def promote_float(*operands: Any) -> list[jax.Array]:
    """Convert operands to their common dtype, integers and booleans to the default float."""
    dtype = result_type(*operands)
    return [cast(x, dtype if category(dtype) >= 2 else default_dtype()) for x in operands]


def cast(x: Any, dtype: Any) -> jax.Array:
    """Convert to `dtype`; a float becomes an integer by truncation, as in PyTorch."""
    return jnp.asarray(x).astype(dtype)


def _scalar_dtype(value: bool | complex) -> Any:
    if isinstance(value, bool):
        return jnp.dtype(bool)
    if isinstance(value, int):
        return canonical("int64")
    return default_dtype() if isinstance(value, float) else jnp.dtype(jnp.complex64)


def _complex_of(above: Any, dtype: Any) -> Any:
    """A complex number beside float64 arrays is complex128, not the default complex64."""
    if above is not None and category(dtype) == 3 and above == jnp.float64:
        return jnp.dtype(jnp.complex128)
    return dtype


def broadcast(*arrays: jax.Array) -> list[jax.Array]:
    """Bring arrays to their common shape, as `lax` functions of two operands need it."""
    shape = jnp.broadcast_shapes(*(x.shape for x in arrays))
    return [jnp.broadcast_to(x, shape) for x in arrays]
