"""Functions of a real number that users pass, evaluated in float64 on arrays of numbers."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import host, trees
from spectra.base.errors import SpectraError

FEWEST = 64
"""Numbers that a JAX function is given at least, from its second call on."""
ULPS = 4
"""What a function that computes below float64 may be off by, in machine epsilons of its values' dtype."""


def real_numbers(x: Any, what: str) -> np.ndarray:
    """Numbers that a user passed, of any shape, in float64.

    Raises:
        SpectraError: they are none, such as a text or None, or complex.
    """
    try:
        found = np.asarray(x)
        if found.dtype.kind not in "cOUS":
            return found.astype(np.float64)
    except (TypeError, ValueError):
        pass
    raise SpectraError(f"{what} is {x!r:.60}: pass a real number, or an array of such.")


class RealFunction:
    """f in float64, NaN where it is not a real number, without warnings; a scalar stands for all.

    A JAX function would compute in float32 unless x64 is on, and compile each operation anew for every other
    number of eigenvalues: it runs under x64, on the CPU, for a power of two of them. One that is written for
    float32 (`lax.max` beside a float32) runs as it is, and `rounding` tells.
    """

    def __init__(self, f: Callable[[Any], Any]):
        self._f = f
        self._is_jax: bool | None = None  # not known before the first value
        self._in_double = True
        self.rounding = 0.0
        """Of its numbers and its values so far, relative to them: 0 where it computes in float64."""

    def __call__(self, x: Any) -> np.ndarray:
        """The values at x, of its shape."""
        x = np.asarray(x, np.float64)
        if not x.size:
            return x
        with np.errstate(all="ignore"):
            found = self._found(_padded(x) if self._is_jax else x)
        if found.shape not in ((), x.shape):
            found = found[: x.size].reshape(x.shape)
        if found.dtype.kind == "c":
            found = np.where(np.imag(found) == 0, np.real(found), np.nan)
        if jnp.issubdtype(found.dtype, jnp.floating) and found.dtype.itemsize < x.itemsize:
            self.rounding = max(self.rounding, ULPS * float(jnp.finfo(found.dtype).eps))
        return np.broadcast_to(found.astype(np.float64), x.shape)

    def _found(self, x: np.ndarray) -> np.ndarray:
        """What f makes of the numbers: as many, or one for all."""
        if self._is_jax is False:
            return self._checked(self._f(x), x)
        with host.on_cpu():
            try:
                with jax.enable_x64(True) if self._in_double else contextlib.nullcontext():
                    return self._checked(self._f(x), x)
            except TypeError:  # dtypes that differ
                if not self._in_double:
                    raise
        self._in_double = False
        return self._found(x)

    def _checked(self, values: Any, x: np.ndarray) -> np.ndarray:
        self._is_jax = isinstance(values, jax.Array)
        if trees.is_tracer(values):
            raise SpectraError(
                "f depends on what jax.jit, vmap or grad traces, and the operator does not: its eigenvalues "
                "are numbers. Trace the operator, too, as an argument of the same function, or leave f out."
            )
        found = np.asarray(values)
        if values is None or found.dtype.kind in "USmM" or found.shape not in ((), x.shape):
            made = "None" if values is None else f"an array of {found.dtype} of shape {found.shape}"
            raise SpectraError(
                f"f makes {made} of {x.shape} eigenvalues: use a function of one number, applied to each."
            )
        return found


def _padded(x: np.ndarray) -> np.ndarray:
    """Flat, the last number repeated until there are a power of two."""
    flat = x.ravel()
    count = max(FEWEST, 1 << (x.size - 1).bit_length())
    return np.pad(flat, (0, count - x.size), mode="edge")
