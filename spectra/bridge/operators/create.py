"""ATen operators that make arrays, copy or cast them; sizes as numbers; control flow."""

import math
import operator

import jax
import jax.numpy as jnp
from jax import lax

from spectra.bridge.dtypes import canonical, cast, category, default_dtype, is_float
from spectra.bridge.errors import BridgeError
from spectra.bridge.operators.registry import aten, register
from spectra.bridge.operators.shape import axis_of


@aten("scalar_tensor.default")
def scalar_tensor(s, dtype=None):
    return cast(s, default_dtype() if dtype is None else dtype)


@aten("full.default")
def full(size, fill_value, dtype=None):
    return jnp.full(size, fill_value, _dtype_for(fill_value) if dtype is None else dtype)


@aten("full_like.default")
def full_like(self, fill_value, dtype=None):
    return jnp.full(self.shape, fill_value, self.dtype if dtype is None else dtype)


@aten("fill.Scalar", "fill.Tensor")
def fill(self, value):
    return jnp.broadcast_to(cast(value, self.dtype), self.shape)


# Memory that `empty` leaves uninitialised may hold anything: zeros are as good as any.
@aten("empty.memory_format", "empty_strided.default", "zeros.default")
def zeros(size, stride=None, dtype=None):
    return jnp.zeros(size, default_dtype() if dtype is None else dtype)


@aten("empty_permuted.default")
def empty_permuted(size, physical_layout, dtype=None):
    return zeros(size, None, dtype)


@aten("ones.default")
def ones(size, dtype=None):
    return jnp.ones(size, default_dtype() if dtype is None else dtype)


@aten("zeros_like.default", "empty_like.default")
def zeros_like(self, dtype=None):
    return full_like(self, 0, dtype)


@aten("ones_like.default")
def ones_like(self, dtype=None):
    return full_like(self, 1, dtype)


@aten("new_zeros.default", "new_empty.default", "new_empty_strided.default")
def new_zeros(self, size, stride=None, dtype=None):
    return jnp.zeros(size, self.dtype if dtype is None else dtype)


@aten("new_ones.default")
def new_ones(self, size, dtype=None):
    return jnp.ones(size, self.dtype if dtype is None else dtype)


@aten("new_full.default")
def new_full(self, size, fill_value, dtype=None):
    return jnp.full(size, fill_value, self.dtype if dtype is None else dtype)


@aten("eye.default", "eye.m")
def eye(n, m=None, dtype=None):
    return jnp.eye(n, m, dtype=default_dtype() if dtype is None else dtype)


@aten("arange.start_step")
def arange(start, end, step=1, dtype=None):
    if dtype is None:
        floating = any(isinstance(x, float) for x in (start, end, step))
        dtype = default_dtype() if floating else canonical("int64")
    length = max(math.ceil((end - start) / step), 0)
    return cast(start + jnp.arange(length) * step, dtype)


@aten("fft_fftfreq.default")
def fftfreq(n, d=1.0, dtype=None):
    return jnp.fft.fftfreq(n, d).astype(default_dtype() if dtype is None else dtype)


@aten("fft_rfftfreq.default")
def rfftfreq(n, d=1.0, dtype=None):
    return jnp.fft.rfftfreq(n, d).astype(default_dtype() if dtype is None else dtype)


@aten("linspace.default")
def linspace(start, end, steps, dtype=None):
    return jnp.linspace(start, end, steps, dtype=default_dtype() if dtype is None else dtype)


def _dtype_for(value):
    if isinstance(value, bool):
        return jnp.bool_
    return canonical("int64") if isinstance(value, int) else default_dtype()


@aten("_to_copy.default", "to.dtype")
def to_copy(self, dtype=None):
    if dtype is None or self.dtype == dtype:
        return self
    if category(self.dtype) == 3 and category(dtype) < 3:
        self = jnp.real(self)
    return cast(self, dtype)


@aten("clone.default", "alias.default", "contiguous.default", "lift_fresh_copy.default")
def identity(self):
    return self


@aten("copy.default")
def copy(self, src):
    return jnp.broadcast_to(cast(src, self.dtype), self.shape)


@register("spectra.stop_gradient")
def stop_gradient(self):
    """`Tensor.detach()` and results computed under `torch.no_grad()`."""
    return lax.stop_gradient(self) if is_float(self) else self


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


@register("spectra.cond")
def cond(pred, true_fn, false_fn, operands=()):
    """One of two branches; the other is not evaluated and has no derivative."""
    if isinstance(pred, bool):
        return tuple((true_fn if pred else false_fn)(*operands))
    arrays = [x for x in operands if isinstance(x, jax.Array)]

    def with_sizes(branch):
        def run(*values):
            rest = iter(values)
            return tuple(branch(*(next(rest) if isinstance(x, jax.Array) else x for x in operands)))

        return run

    return lax.cond(pred.reshape(()), with_sizes(true_fn), with_sizes(false_fn), *arrays)
