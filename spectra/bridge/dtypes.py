"""PyTorch's dtypes and type promotion, stated for JAX arrays and Python scalars.

What a result takes from the program that exported the graph, its release and default dtype, is asked here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import dtypes


@dataclass(frozen=True)
class Exporter:
    """The program that exported a graph; `torch` is (major, minor), by default the latest known."""

    torch: tuple[int, int] = (2, 14)
    default_dtype: str = "float32"


_LATEST = Exporter()
_CURRENT: ContextVar[Exporter] = ContextVar("exporter", default=_LATEST)


@contextmanager
def exported_by(exporter: Exporter) -> Iterator[None]:
    """Evaluate operators as they were in the program that exported them."""
    token = _CURRENT.set(exporter)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def exporter() -> Exporter:
    """Return the program whose graph is being evaluated."""
    return _CURRENT.get()


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
