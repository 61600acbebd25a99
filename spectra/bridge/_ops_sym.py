"""Integer arithmetic on array sizes, in plain Python.

A dynamic batch size reaches the graph as `sym_size.int` of an input and as sums, products, floor
divisions and comparisons of such sizes. Under `jit` sizes are static, so these run while tracing. A size
has 64 bits, as in PyTorch: Python's integers would grow with every product that a file asks for.
"""

import math
import operator

from spectra.bridge._errors import BridgeError
from spectra.bridge._ops_shape import axis_of
from spectra.bridge._registry import aten, register

LARGEST = 2**63 - 1


@aten("sym_size.int")
def sym_size(self, dim):
    return self.shape[axis_of(dim, self.ndim)]


@aten("sym_numel.default")
def sym_numel(self):
    return self.size


def _number(value):
    if not isinstance(value, (bool, int, float)):
        raise BridgeError(f"size arithmetic needs plain numbers, got {type(value).__name__}")
    if isinstance(value, int) and not -LARGEST - 1 <= value <= LARGEST:
        raise BridgeError("size arithmetic leaves the range of 64-bit integers")
    return value


def _binary(function):
    def apply(a, b):
        return _number(function(_number(a), _number(b)))

    return apply


for _name, _function in {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "truediv": operator.truediv,
    "mod": operator.mod,
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "min": min,
    "max": max,
    "and": lambda a, b: bool(a) and bool(b),
    "or": lambda a, b: bool(a) or bool(b),
}.items():
    register(f"size.{_name}")(_binary(_function))


@register("size.neg")
def negative(a):
    return _number(-_number(a))


@register("size.not")
def negation(a):
    return not _number(a)


@register("size.int")
def integer(a):
    return _number(int(_number(a)))


@register("size.float")
def floating(a):
    return float(_number(a))


@register("size.floor")
def floor(a):
    return _number(math.floor(_number(a)))


@register("size.ceil")
def ceil(a):
    return _number(math.ceil(_number(a)))


@register("size.pow")
def power(a, b):
    # A bounded exponent: a file must not be able to ask for an astronomically large integer.
    if not 0 <= _number(b) <= 64:
        raise BridgeError(f"a power of a size needs an exponent in [0, 64], got {b}")
    return _number(_number(a) ** b)


@register("size.ite")
def if_then_else(condition, a, b):
    return _number(a) if _number(condition) else _number(b)


@register("size.sum")
def total(values):
    return _number(sum(_number(v) for v in values))
