"""ATen operators that order elements, choose one by its rank, count them or find their bins.

What is chosen gets the derivative: which element that is, is a constant to derivatives of every order.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from spectra.bridge.dtypes import canonical, cast, is_float, promote
from spectra.bridge.errors import BridgeError
from spectra.bridge.operators.index import derivative_of, no_number
from spectra.bridge.operators.registry import aten
from spectra.bridge.operators.shape import at, axis_of

MAX_BINS = 2**24


@aten("sort.default", "sort.stable")
def sort(self, dim=-1, descending=False, stable=True):
    axis = axis_of(dim, self.ndim)
    if not self.ndim:
        return self, jnp.zeros((), canonical("int64"))
    order = jnp.argsort(lax.stop_gradient(self), axis, stable=True, descending=descending)
    return jnp.take_along_axis(self, order, axis), cast(order, canonical("int64"))


@aten("argsort.default", "argsort.stable")
def argsort(self, dim=-1, descending=False, stable=True):
    return sort(self, dim, descending)[1]


@aten("topk.default")
def topk(self, k, dim=-1, largest=True, sorted=True):
    values, order = sort(self, dim, largest)
    axis = axis_of(dim, self.ndim)
    return at(values, axis, slice(k)), at(order, axis, slice(k))


def chosen(self, where, axis, keepdim):
    """Return the elements of one axis at the positions `where`, and these."""
    value = jnp.take_along_axis(self, where, axis)
    where = cast(where, canonical("int64"))
    return (value, where) if keepdim else (value.squeeze(axis), where.squeeze(axis))


def _ranked(self, rank, dim, keepdim):
    """The element of each row with this rank; a number, or one for each row with axes of length 1.

    Of equal elements the first has the lowest rank; PyTorch's quick selection may take another.
    """
    axis = axis_of(dim, self.ndim)
    if not self.ndim:
        return self, jnp.zeros((), canonical("int64"))
    order = jnp.argsort(lax.stop_gradient(self), axis, stable=True)  # NaN comes last
    if isinstance(rank, int):
        return chosen(self, at(order, axis, slice(rank, rank + 1)), axis, keepdim)
    return chosen(self, jnp.take_along_axis(order, rank, axis), axis, keepdim)


@aten("kthvalue.default")
def kthvalue(self, k, dim=-1, keepdim=False):
    size = self.shape[axis_of(dim, self.ndim)] if self.ndim else 1
    if not 1 <= k <= size:
        raise BridgeError(f"kthvalue needs k from 1 to {size}, got {k}")
    return _ranked(self, k - 1, dim, keepdim)


@aten("median.dim")
def median(self, dim=-1, keepdim=False):
    """The lower of the two middle elements; NaN where there is one."""
    if not self.ndim:
        return self, jnp.zeros((), canonical("int64"))
    axis = axis_of(dim, self.ndim)
    middle = (self.shape[axis] - 1) // 2
    if not is_float(self):
        return _ranked(self, middle, dim, keepdim)
    # NaN comes last in the order, the first one first.
    missing = jnp.sum(jnp.isnan(self), axis, keepdims=True)
    return _ranked(self, jnp.where(missing > 0, self.shape[axis] - missing, middle), dim, keepdim)


@aten("nanmedian.dim")
def nanmedian(self, dim=-1, keepdim=False):
    if not self.ndim or not is_float(self):
        return median(self, dim, keepdim)
    axis = axis_of(dim, self.ndim)
    count = jnp.sum(~jnp.isnan(self), axis, keepdims=True)
    return _ranked(self, jnp.maximum(count - 1, 0) // 2, dim, keepdim)


def _shared(self, value):
    """`value`, with its derivative shared evenly among the elements that equal it, as in PyTorch."""
    value = lax.stop_gradient(value)
    if not is_float(self):
        return value
    equal = (self == value) | (jnp.isnan(self) & jnp.isnan(value))
    # Only a derivative is added: the value stays exact.
    return value + jnp.sum(jnp.where(equal, derivative_of(self), 0)) / jnp.sum(equal)


@aten("median.default")
def median_all(self):
    return _shared(self, median(self.reshape(-1), 0)[0])


@aten("nanmedian.default")
def nanmedian_all(self):
    return _shared(self, nanmedian(self.reshape(-1), 0)[0])


@aten("mode.default")
def mode(self, dim=-1, keepdim=False):
    """The most frequent element, the smallest of several; of equal elements the last."""
    if not self.ndim:
        return self, jnp.zeros((), canonical("int64"))
    axis = axis_of(dim, self.ndim)
    fixed = jnp.moveaxis(lax.stop_gradient(self), axis, -1)
    order = jnp.argsort(fixed, -1, stable=True)
    ranked = jnp.take_along_axis(fixed, order, -1)
    position = jnp.arange(ranked.shape[-1])
    new = jnp.concatenate([jnp.ones_like(ranked[..., :1], bool), ranked[..., 1:] != ranked[..., :-1]], -1)
    run = position - lax.cummax(jnp.where(new, position, 0), axis=ranked.ndim - 1)
    last = jnp.argmax(run, -1, keepdims=True)  # the first of the longest runs has the smallest value
    where = jnp.moveaxis(jnp.take_along_axis(order, last, -1), -1, axis)
    return chosen(self, where, axis, keepdim)


def _running(self, dim, better):
    """Running extreme and its position; of equal elements the later one, and NaN stays."""
    if not self.ndim:
        return self, jnp.zeros((), canonical("int64"))
    axis = axis_of(dim, self.ndim)
    fixed = lax.stop_gradient(self)
    shape = [1] * self.ndim
    shape[axis] = -1
    where = jnp.broadcast_to(
        jnp.arange(self.shape[axis], dtype=canonical("int64")).reshape(shape), self.shape
    )
    nan = jnp.isnan if is_float(self) else jnp.zeros_like

    def later(a, b):
        (x, i), (y, j) = a, b
        take = better(y, x) & ~nan(x).astype(bool) | nan(y).astype(bool)
        return jnp.where(take, y, x), jnp.where(take, j, i)

    where = lax.associative_scan(later, (fixed, where), axis=axis)[1]
    return jnp.take_along_axis(self, where, axis), where


@aten("cummax.default")
def cummax(self, dim):
    return _running(self, dim, jnp.greater_equal)


@aten("cummin.default")
def cummin(self, dim):
    return _running(self, dim, jnp.less_equal)


@aten("searchsorted.Tensor", "searchsorted.Scalar")
def searchsorted(sorted_sequence, self, out_int32=False, right=False, side=None, sorter=None):
    if side not in (None, "left", "right"):
        raise BridgeError(f"side must be 'left' or 'right', got {side!r}")
    side = "right" if right or side == "right" else "left"
    if sorter is not None:
        sorted_sequence = jnp.take_along_axis(sorted_sequence, sorter, -1)
    rows, values = promote(lax.stop_gradient(sorted_sequence), self)
    values = lax.stop_gradient(values)
    dtype = canonical("int32" if out_int32 else "int64")
    if rows.ndim == 1:
        return cast(jnp.searchsorted(rows, values, side=side), dtype)
    if rows.shape[:-1] != values.shape[:-1]:
        raise BridgeError(f"searchsorted of shapes {rows.shape} and {values.shape}")
    flat = rows.reshape(-1, rows.shape[-1]), values.reshape(-1, values.shape[-1])
    return cast(jax.vmap(lambda r, v: jnp.searchsorted(r, v, side=side))(*flat), dtype).reshape(values.shape)


@aten("bucketize.Tensor", "bucketize.Scalar")
def bucketize(self, boundaries, out_int32=False, right=False):
    return searchsorted(boundaries, self, out_int32, right)


def _counts(position, valid, bins, weights):
    """Weighted counts of positions; what is not valid counts nowhere."""
    return jnp.zeros(bins, weights.dtype).at[jnp.where(valid, position, bins)].add(weights, mode="drop")


def _histogram(self, bins, low, high, weights):
    """Counts in equal bins from low to high, both included, and the bins' edges."""
    if not 1 <= bins <= MAX_BINS:
        raise BridgeError(f"a histogram needs 1 to {MAX_BINS} bins, got {bins}")
    values = lax.stop_gradient(self).reshape(-1)
    low, high = (jnp.asarray(x, self.dtype) for x in (low, high))
    low, high = jnp.where(low == high, low - 1, low), jnp.where(low == high, high + 1, high)
    position = jnp.floor((values - low) * bins / (high - low))
    position = cast(jnp.minimum(position, bins - 1), jnp.int32)
    return _counts(position, (values >= low) & (values <= high), bins, weights), jnp.linspace(
        low, high, bins + 1, dtype=self.dtype
    )


def _range(self, low, high):
    """The data's own range where none is given."""
    if low != high or not self.size:
        return low, high
    fixed = lax.stop_gradient(self)
    return jnp.min(fixed), jnp.max(fixed)


@aten("histc.default")
def histc(self, bins=100, min=0, max=0):
    low, high = _range(self, min, max)
    return _histogram(self, bins, low, high, jnp.ones(self.size, self.dtype))[0]


@aten("histogram.bin_ct")
def histogram(self, bins=100, range=None, weight=None, density=False):
    low, high = _range(self, *(range or (0.0, 0.0)))
    weights = jnp.ones(self.size, self.dtype) if weight is None else weight.reshape(-1)
    counts, edges = _histogram(self, bins, low, high, weights)
    if density:
        counts = counts / (jnp.sum(counts) * jnp.diff(edges))
    return counts, edges


def _known(x, advice):
    """The values of an array that is the same in every call; JAX's error for one that is not."""
    if isinstance(x, Tracer):
        raise jax.errors.ConcretizationTypeError(x, f"The length depends on the values: {advice}.")
    return np.asarray(x, np.int64)


@aten("bincount.default")
def bincount(self, weights=None, minlength=0):
    """Counts of 0, 1, … up to the largest element, which has to be known before the values are.

    Where the elements are not constants, `minlength` is the length; elements beyond it make the counts NaN,
    or the least integer.
    """
    length = minlength
    if not (minlength and isinstance(self, Tracer)):
        known = _known(self, "give bincount minlength=, the number of different ones")
        length = max(minlength, int(known.max(initial=-1)) + 1)
    if length > MAX_BINS:
        raise BridgeError(f"bincount of {length} different values, at most {MAX_BINS}")
    if weights is None:
        weights = jnp.ones(self.shape, canonical("int64"))
    else:
        weights = weights if is_float(weights) else cast(weights, canonical("float64"))
    counts = _counts(self, self >= 0, length, weights)
    return jnp.where(jnp.any((self < 0) | (self >= length)), no_number(weights.dtype), counts)


@aten("repeat_interleave.Tensor")
def repeat_interleave(repeats, output_size=None):
    """Position i as often as `repeats[i]` says; out of range if these are not `output_size` in all."""
    if output_size is None:
        output_size = int(_known(repeats, "give repeat_interleave output_size=").sum())
    dtype = canonical("int64")
    if not repeats.size:
        return jnp.zeros((output_size,), dtype)
    position = jnp.arange(repeats.shape[0], dtype=dtype)
    result = jnp.repeat(position, repeats, total_repeat_length=output_size)
    return jnp.where(jnp.sum(repeats) == output_size, result, jnp.iinfo(dtype).max)


@aten("nonzero_static.default")
def nonzero_static(self, size, fill_value=-1):
    if not 0 <= size <= MAX_BINS:
        raise BridgeError(f"nonzero_static needs a size from 0 to {MAX_BINS}, got {size}")
    found = jnp.nonzero(self, size=size, fill_value=fill_value)
    return cast(jnp.stack(found, -1), canonical("int64"))


@aten("isin.Tensor_Tensor")
def isin(elements, test_elements, assume_unique=False, invert=False):
    return jnp.isin(elements, test_elements, invert=invert)
