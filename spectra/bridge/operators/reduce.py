"""ATen reductions, scans and softmaxes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spectra.bridge.dtypes import canonical, cast, is_float
from spectra.bridge.errors import BridgeError, spend
from spectra.bridge.operators.order import chosen
from spectra.bridge.operators.pointwise import absolute
from spectra.bridge.operators.registry import aten
from spectra.bridge.operators.shape import axes_of, axis_of


def _accumulator(self, dtype=None):
    """Sums and products of integers and booleans are int64 in PyTorch."""
    if dtype is not None:
        return cast(self, dtype)
    return self if is_float(self) else cast(self, canonical("int64"))


@aten("sum.dim_IntList", "sum.default")
def sum_(self, dim=None, keepdim=False, dtype=None):
    return jnp.sum(_accumulator(self, dtype), axes_of(dim, self.ndim), keepdims=keepdim)


@aten("mean.dim", "mean.default")
def mean(self, dim=None, keepdim=False, dtype=None):
    self = self if dtype is None else cast(self, dtype)
    return jnp.mean(self, axes_of(dim, self.ndim), keepdims=keepdim)


@aten("prod.dim_int")
def prod(self, dim=None, keepdim=False, dtype=None):
    return jnp.prod(_accumulator(self, dtype), axes_of(dim, self.ndim), keepdims=keepdim)


@aten("prod.default")
def prod_all(self, dtype=None):
    return jnp.prod(_accumulator(self, dtype))


@aten("var.correction")
def var(self, dim=None, correction=1, keepdim=False):
    axes = axes_of(dim, self.ndim)
    count = math.prod(self.shape[a] for a in axes)
    centred = self - jnp.mean(self, axes, keepdims=True)
    correction = 1 if correction is None else correction
    squared = jnp.real(centred * jnp.conj(centred))  # real, of complex numbers too
    return jnp.sum(squared, axes, keepdims=keepdim) / max(count - correction, 0)


@aten("var.dim", "var.default")
def var_unbiased(self, dim=None, unbiased=True, keepdim=False):
    return var(self, dim, 1 if unbiased else 0, keepdim)


@aten("var_mean.correction")
def var_mean(self, dim=None, correction=1, keepdim=False):
    return var(self, dim, correction, keepdim), mean(self, dim, keepdim)


@aten("std.correction")
def std(self, dim=None, correction=1, keepdim=False):
    return _root(var(self, dim, correction, keepdim), 2)


@aten("std_mean.correction")
def std_mean(self, dim=None, correction=1, keepdim=False):
    return std(self, dim, correction, keepdim), mean(self, dim, keepdim)


def _root(total, ord):
    """total^(1/ord) with derivatives 0 at 0, as in PyTorch; a bare root has an infinite one."""
    zero = total == 0
    safe = jnp.where(zero, jnp.ones_like(total), total)
    root = jnp.sqrt(safe) if ord == 2 else safe ** (1 / ord)
    return jnp.where(zero, jnp.zeros_like(total), root)


@jax.custom_jvp
def _length(total):
    """A root whose first derivative is 0 at 0, and whose second is not a number there, as in PyTorch.

    A length has none, and a zero would make that of its square, which is 2, a zero as well.
    """
    return jnp.sqrt(total)


@jax.custom_jvp
def _half_over_root(total):
    return jnp.where(total == 0, 0, 0.5 * lax.rsqrt(total))


_length.defjvps(lambda d, root, total: _half_over_root(total) * d)
_half_over_root.defjvps(lambda d, value, total: -0.25 * lax.rsqrt(total) / total * d)


@aten("amax.default")
def amax(self, dim=(), keepdim=False):
    return jnp.max(self, axes_of(dim, self.ndim), keepdims=keepdim)


@aten("amin.default")
def amin(self, dim=(), keepdim=False):
    return jnp.min(self, axes_of(dim, self.ndim), keepdims=keepdim)


@aten("max.default")
def max_all(self):
    return jnp.max(self)


@aten("min.default")
def min_all(self):
    return jnp.min(self)


def _extreme(self, dim, keepdim, position):
    """Value and index along one axis: the gradient goes to the chosen element, unlike in amax."""
    if not self.ndim:
        return self, jnp.zeros((), canonical("int64"))
    axis = axis_of(dim, self.ndim)
    return chosen(self, position(lax.stop_gradient(self), axis=axis, keepdims=True), axis, keepdim)


@aten("max.dim")
def max_dim(self, dim, keepdim=False):
    return _extreme(self, dim, keepdim, jnp.argmax)


@aten("min.dim")
def min_dim(self, dim, keepdim=False):
    return _extreme(self, dim, keepdim, jnp.argmin)


@aten("argmax.default")
def argmax(self, dim=None, keepdim=False):
    return _position(self, dim, keepdim, jnp.argmax)


@aten("argmin.default")
def argmin(self, dim=None, keepdim=False):
    return _position(self, dim, keepdim, jnp.argmin)


def _position(self, dim, keepdim, function):
    axis = None if dim is None or not self.ndim else axis_of(dim, self.ndim)
    return cast(function(self, axis=axis, keepdims=keepdim), canonical("int64"))


@aten("any.default")
def any_all(self):
    return jnp.any(self)


@aten("any.dim", "any.dims")
def any_(self, dim=None, keepdim=False):
    return jnp.any(self, axes_of(dim, self.ndim), keepdims=keepdim)


@aten("all.default")
def all_all(self):
    return jnp.all(self)


@aten("all.dim", "all.dims")
def all_(self, dim=None, keepdim=False):
    return jnp.all(self, axes_of(dim, self.ndim), keepdims=keepdim)


@aten("cumsum.default")
def cumsum(self, dim, dtype=None):
    self = _accumulator(self, dtype)
    return jnp.cumsum(self, axis_of(dim, self.ndim)) if self.ndim else self


@aten("cumprod.default")
def cumprod(self, dim, dtype=None):
    self = _accumulator(self, dtype)
    return jnp.cumprod(self, axis_of(dim, self.ndim)) if self.ndim else self


@aten("logcumsumexp.default")
def logcumsumexp(self, dim):
    return lax.cumlogsumexp(self, axis_of(dim, self.ndim)) if self.ndim else self


@aten("logsumexp.default")
def logsumexp(self, dim, keepdim=False):
    return jax.scipy.special.logsumexp(self, axes_of(dim, self.ndim), keepdims=keepdim)


@aten("_softmax.default")
def softmax(self, dim, half_to_float=False):
    self = _softmax_input(self, half_to_float)
    return jax.nn.softmax(self, axis_of(dim, self.ndim)) if self.ndim else jnp.ones_like(self)


@aten("_log_softmax.default")
def log_softmax(self, dim, half_to_float=False):
    self = _softmax_input(self, half_to_float)
    return jax.nn.log_softmax(self, axis_of(dim, self.ndim)) if self.ndim else self * 0


def _softmax_input(self, half_to_float):
    return cast(self, jnp.float32) if half_to_float else self


@aten("linalg_vector_norm.default")
def vector_norm(self, ord=2, dim=None, keepdim=False, dtype=None):
    self = self if dtype is None else cast(self, dtype)
    if ord == 2:
        return _length(_square(self, axes_of(dim, self.ndim), keepdim))
    return _norm(self, ord, dim, keepdim)


def _square(x, axes, keepdim):
    """Not of |x|, whose derivatives are zero at zero."""
    real, imag = jnp.real(x), jnp.imag(x)
    parts = real * real + imag * imag if jnp.iscomplexobj(x) else x * x
    return jnp.sum(parts, axes, keepdims=keepdim)


def _norm(self, ord, dim=None, keepdim=False):
    """A norm with derivatives 0 where it is 0."""
    axes = axes_of(dim, self.ndim)
    size = absolute(self)
    if ord == math.inf:
        return jnp.max(size, axes, keepdims=keepdim)
    if ord == -math.inf:
        return jnp.min(size, axes, keepdims=keepdim)
    if ord == 0:
        return jnp.sum((self != 0).astype(size.dtype), axes, keepdims=keepdim)
    if ord == 1:
        return jnp.sum(size, axes, keepdims=keepdim)
    if ord == 2:
        return _root(_square(self, axes, keepdim), 2)
    return _root(jnp.sum(size**ord, axes, keepdims=keepdim), ord)


MAX_POINTS = 2**12  # the indices of all pairs are made on the host


@aten("_cdist_forward.default")
def cdist(x1, x2, p=2.0, compute_mode=None):
    return _norm(x1[..., :, None, :] - x2[..., None, :, :], p, [-1])


@aten("_pdist_forward.default")
def pdist(self, p=2.0):
    if self.shape[0] > MAX_POINTS:
        raise BridgeError(f"pdist of {self.shape[0]} points: at most {MAX_POINTS}")
    spend(self.shape[0] ** 2 // 2**11)
    rows, columns = np.triu_indices(self.shape[0], 1)
    return _norm(self[rows] - self[columns], p, [-1])


@aten("count_nonzero.dim_IntList", "count_nonzero.default")
def count_nonzero(self, dim=None):
    return cast(jnp.count_nonzero(self, axes_of(dim, self.ndim)), canonical("int64"))
