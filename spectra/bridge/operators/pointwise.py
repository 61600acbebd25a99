"""Pointwise ATen operators: arithmetic, rounding, comparisons, choices, logic and bits."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from spectra.bridge.dtypes import broadcast, cast, category, exporter, is_float, promote, promote_float
from spectra.bridge.errors import BridgeError
from spectra.bridge.operators.registry import aten

_FLOAT_UNARY = {
    "acos": jnp.arccos,
    "acosh": jnp.arccosh,
    "asin": jnp.arcsin,
    "asinh": jnp.arcsinh,
    "atan": jnp.arctan,
    "atanh": jnp.arctanh,
    "cos": jnp.cos,
    "cosh": jnp.cosh,
    "digamma": jax.scipy.special.digamma,
    "erf": lax.erf,
    "erfc": lax.erfc,
    "erfinv": lax.erf_inv,
    "exp": jnp.exp,
    "exp2": jnp.exp2,
    "expm1": jnp.expm1,
    "lgamma": lax.lgamma,
    "log": jnp.log,
    "log10": jnp.log10,
    "log1p": jnp.log1p,
    "log2": jnp.log2,
    "reciprocal": lambda x: 1 / x,
    "rsqrt": lax.rsqrt,
    "sigmoid": jax.nn.sigmoid,
    "sin": jnp.sin,
    "sinh": jnp.sinh,
    "sqrt": jnp.sqrt,
    "tan": jnp.tan,
    "tanh": jnp.tanh,
}


def _register_float_unary(name: str, function: Any) -> None:
    """Integers go to the default float first, as all of these do in PyTorch."""

    @aten(f"{name}.default")
    def unary(self):
        return function(promote_float(self)[0])


for _name, _function in _FLOAT_UNARY.items():
    _register_float_unary(_name, _function)


@aten("add.Tensor", "add.Scalar")
def add(self, other, alpha=1):
    self, other = promote(self, other)
    if self.dtype == jnp.bool_:
        return self | other
    return self + other if alpha == 1 else self + other * cast(alpha, other.dtype)


@aten("sub.Tensor", "sub.Scalar")
def sub(self, other, alpha=1):
    self, other = promote(self, other)
    return self - other if alpha == 1 else self - other * cast(alpha, other.dtype)


@aten("rsub.Tensor", "rsub.Scalar")
def rsub(self, other, alpha=1):
    self, other = promote(self, other)
    return other - (self if alpha == 1 else self * cast(alpha, self.dtype))


@aten("mul.Tensor", "mul.Scalar")
def mul(self, other):
    self, other = promote(self, other)
    return self & other if self.dtype == jnp.bool_ else self * other


@aten("div.Tensor", "div.Scalar")
def div(self, other):
    self, other = promote_float(self, other)
    return self / other


@aten("div.Tensor_mode", "div.Scalar_mode")
def div_mode(self, other, rounding_mode=None):
    if rounding_mode is None:
        return div(self, other)
    self, other = promote(self, other)
    if rounding_mode == "floor":
        if not is_float(self):
            return jnp.floor_divide(self, other)
        by_zero = other == 0  # PyTorch gives the signed infinity, Python's floor division NaN
        safe = jnp.where(by_zero, jnp.ones_like(other), other)
        return jnp.where(by_zero, self / other, jnp.floor_divide(self, safe))
    if rounding_mode == "trunc":
        # lax.div truncates towards zero on integers; floats need an explicit rounding.
        return jnp.trunc(self / other) if is_float(self) else lax.div(*broadcast(self, other))
    raise BridgeError(f"rounding_mode must be 'floor', 'trunc' or None, got {rounding_mode!r}")


@aten("floor_divide.default")
def floor_divide(self, other):
    return div_mode(self, other, "floor")


@aten("remainder.Tensor", "remainder.Scalar", "remainder.Scalar_Tensor")
def remainder(self, other):
    """The result has the sign of the divisor."""
    return jnp.remainder(*promote(self, other))


@aten("fmod.Tensor", "fmod.Scalar")
def fmod(self, other):
    """The result has the sign of the dividend."""
    return lax.rem(*broadcast(*promote(self, other)))


@aten("pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar")
def power(self, exponent):
    if isinstance(exponent, (int, float)) and not isinstance(self, (int, float)):
        base = promote(self, exponent)[0]
        if exponent == 0.5:
            return jnp.sqrt(base)
        if float(exponent).is_integer() and abs(exponent) <= 64:
            # x**k with a static k has every derivative at 0; a traced exponent gives NaN there.
            return lax.integer_pow(base, int(exponent))
        return jnp.power(base, exponent)
    base, exponent = promote(self, exponent)
    if not is_float(base):
        return jnp.power(base, exponent)
    # 0**0 and 0**1, as in the powers of a polynomial: the rule for any exponent has a NaN second derivative.
    plain = (base == 0) & ((exponent == 0) | (exponent == 1))
    general = jnp.power(jnp.where(plain, jnp.ones_like(base), base), exponent)
    return jnp.where(plain, jnp.where(exponent == 0, jnp.ones_like(base), base), general)


@aten("maximum.default")
def maximum(self, other):
    return jnp.maximum(*promote(self, other))


@aten("minimum.default")
def minimum(self, other):
    return jnp.minimum(*promote(self, other))


@aten("fmax.default")
def fmax(self, other):
    return _unless_missing(jnp.maximum, *promote(self, other))


@aten("fmin.default")
def fmin(self, other):
    return _unless_missing(jnp.minimum, *promote(self, other))


def _unless_missing(function, self, other):
    """One of two numbers, or that which is no NaN.

    Equal numbers share the derivative; up to PyTorch 2.13 the first had it.
    """
    chosen = function(self, other)
    if exporter().torch < (2, 14):
        chosen = jnp.where(chosen == self, self, other)
    return jnp.where(jnp.isnan(other), self, jnp.where(jnp.isnan(self), other, chosen))


@aten("atan2.default")
def atan2(self, other):
    return jnp.arctan2(*promote_float(self, other))


@aten("hypot.default")
def hypot(self, other):
    return jnp.hypot(*promote(self, other))


@aten("copysign.Tensor", "copysign.Scalar")
def copysign(self, other):
    return jnp.copysign(*promote_float(self, other))


@aten("abs.default")
def absolute(self):
    # The derivatives at 0 are 0 in PyTorch. In JAX the first of a real number is 1, and the second of |z|² is
    # the part that the first does not have.
    if category(self.dtype) == 3:
        zero = self == 0
        return jnp.where(zero, 0, jnp.abs(jnp.where(zero, jnp.ones_like(self), self)))
    if category(self.dtype) != 2:
        return jnp.abs(self)
    return jnp.where(self == 0, jnp.zeros_like(self), jnp.where(self < 0, -self, self))


@aten("neg.default")
def negative(self):
    return -self


@aten("sign.default", "sgn.default")
def sign(self):
    if self.dtype == jnp.bool_:
        return self
    # PyTorch's sign of NaN is 0.
    return jnp.where(jnp.isnan(self), jnp.zeros_like(self), jnp.sign(self))


@aten("ceil.default")
def ceil(self):
    return jnp.ceil(self) if is_float(self) else self


@aten("floor.default")
def floor(self):
    return jnp.floor(self) if is_float(self) else self


@aten("trunc.default")
def trunc(self):
    return jnp.trunc(self) if is_float(self) else self


@aten("round.default", "round.decimals")
def round_half_even(self, decimals=0):
    return jnp.round(self, decimals) if is_float(self) else self


@aten("frac.default")
def frac(self):
    return self - jnp.trunc(self)


@aten("xlogy.Tensor", "xlogy.Scalar_Other", "xlogy.Scalar_Self")
def xlogy(self, other):
    return jax.scipy.special.xlogy(*promote_float(self, other))


@aten("addcmul.default")
def addcmul(self, tensor1, tensor2, value=1):
    return add(self, mul(mul(tensor1, tensor2), value))


@aten("addcdiv.default")
def addcdiv(self, tensor1, tensor2, value=1):
    return add(self, mul(div(tensor1, tensor2), value))


@aten("lerp.Tensor", "lerp.Scalar")
def lerp(self, end, weight):
    return self + weight * (end - self)


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
