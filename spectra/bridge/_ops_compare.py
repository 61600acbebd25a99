"""Pointwise ATen operators that compare, select or clamp, and the logical and bitwise ones."""

import jax
import jax.numpy as jnp

from spectra.bridge._exporter import exporter
from spectra.bridge._promotion import cast, promote
from spectra.bridge._registry import aten


def _compare(function):
    def compare(self, other):
        return function(*promote(self, other))

    return compare


for _name, _function in {
    "eq": jnp.equal,
    "ne": jnp.not_equal,
    "lt": jnp.less,
    "le": jnp.less_equal,
    "gt": jnp.greater,
    "ge": jnp.greater_equal,
}.items():
    aten(f"{_name}.Tensor", f"{_name}.Scalar")(_compare(_function))

for _name, _function in {
    "logical_and": jnp.logical_and,
    "logical_or": jnp.logical_or,
    "logical_xor": jnp.logical_xor,
}.items():
    aten(f"{_name}.default")(_compare(_function))

for _name, _function in {
    "bitwise_and": jnp.bitwise_and,
    "bitwise_or": jnp.bitwise_or,
    "bitwise_xor": jnp.bitwise_xor,
    "bitwise_left_shift": jnp.left_shift,
    "bitwise_right_shift": jnp.right_shift,
}.items():
    _last = "Tensor_Scalar" if "shift" in _name else "Scalar"
    aten(f"{_name}.Tensor", f"{_name}.{_last}")(_compare(_function))


@aten("logical_not.default")
def logical_not(self):
    return jnp.logical_not(self)


@aten("bitwise_not.default")
def bitwise_not(self):
    return jnp.bitwise_not(self)


@aten("isinf.default")
def isinf(self):
    return jnp.isinf(self)


@aten("isnan.default")
def isnan(self):
    return jnp.isnan(self)


@aten("isfinite.default")
def isfinite(self):
    return jnp.isfinite(self)


@aten("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar")
def where(condition, self, other):
    self, other = promote(self, other)
    return jnp.where(condition, self, other)


@aten("clamp.default", "clamp.Tensor")
def clamp(self, min=None, max=None):
    bounds = [x for x in (min, max) if x is not None]
    self = promote(self, *bounds)[0]
    if exporter().torch < (2, 14):
        return clamp_inclusive(self, min, max)
    if any(isinstance(bound, jax.Array) for bound in bounds):
        return _clamp_shared(self, *(None if x is None else cast(x, self.dtype) for x in (min, max)))
    # Selections rather than minimum/maximum: at a number the derivative is 0. A NaN compares false and stays.
    if min is not None:
        self = jnp.where(self <= min, cast(min, self.dtype), self)
    if max is not None:
        self = jnp.where(self >= max, cast(max, self.dtype), self)
    return self


def clamp_inclusive(self, min, max):
    """Clamp with derivative 1 at the bounds and none for a bound that is met: PyTorch up to 2.13.

    One difference is left: below two equal bounds, where that release gave neither of them a
    derivative, the lower one has it, as in later ones.
    """
    if min is not None:
        self = jnp.where(self < min, cast(min, self.dtype), self)
    if max is not None:
        self = jnp.where(self > max, cast(max, self.dtype), self)
    return self


def _clamp_shared(self, min, max):
    """Clamp as since PyTorch 2.14: where a value meets an array of bounds, both share the derivative."""
    if max is None:
        return jnp.maximum(self, min)
    if min is None:
        return jnp.minimum(self, max)
    clamped = jnp.where(self < max, jnp.maximum(self, min), jnp.minimum(self, max))
    # Where bounds coincide, the value that meets both keeps it all; where they cross, max is the result.
    clamped = jnp.where((self == min) & (min == max), self, clamped)
    return jnp.where(min > max, max, clamped)


@aten("clamp_min.default", "clamp_min.Tensor")
def clamp_min(self, min):
    return clamp(self, min)


@aten("clamp_max.default", "clamp_max.Tensor")
def clamp_max(self, max):
    return clamp(self, None, max)
