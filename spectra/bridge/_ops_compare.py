"""Pointwise ATen operators that compare, select or clamp, and the logical and bitwise ones."""

import jax.numpy as jnp

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
    # Selections rather than minimum/maximum: at a bound PyTorch's gradient is 1, not one half.
    # A NaN compares false and stays.
    if min is not None:
        self = jnp.where(self < min, cast(min, self.dtype), self)
    if max is not None:
        self = jnp.where(self > max, cast(max, self.dtype), self)
    return self


@aten("clamp_min.default", "clamp_min.Tensor")
def clamp_min(self, min):
    return clamp(self, min)


@aten("clamp_max.default", "clamp_max.Tensor")
def clamp_max(self, max):
    return clamp(self, None, max)
