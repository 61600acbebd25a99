"""ATen operators that read or write by index, or select."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from spectra.bridge.dtypes import canonical, cast
from spectra.bridge.errors import BridgeError
from spectra.bridge.operators.registry import aten
from spectra.bridge.operators.shape import axis_of


def read(array, key, wraps=False):
    """Read by index; out of range gives NaN (PyTorch raises), which every operator refuses.

    So does a negative index, but in brackets (`wraps`), where it counts from the end.
    """
    return array.at[key].get(mode="fill", wrap_negative_indices=wraps)


def _written(result, key, wraps=False):
    """What was written by index: a number nowhere if an index is one that `read` refuses."""
    inside = jnp.asarray(True)
    for k, size in zip(key, result.shape, strict=False):
        if not isinstance(k, slice):
            inside &= jnp.all((k >= (-size if wraps else 0)) & (k < size))
    return jnp.where(inside, result, no_number(result.dtype))


def no_number(dtype):
    """As `read` fills."""
    if jnp.issubdtype(dtype, jnp.inexact):
        return jnp.nan
    if dtype == jnp.bool_:
        return True
    return jnp.iinfo(dtype).min or jnp.iinfo(dtype).max  # the largest where there is no sign


@jax.custom_jvp
def derivative_of(x):
    """Zero, with the derivative of x: x - stop_gradient(x) is not a number where x is infinite."""
    return jnp.zeros_like(x)


derivative_of.defjvps(lambda d, zero, x: d)


@aten("index.Tensor", "_unsafe_index.Tensor")
def index(self, indices):
    """NumPy's advanced indexing, None standing for a whole axis."""
    return read(self, _index_tuple(indices), wraps=True)


@aten("index_put.default", "_unsafe_index_put.default")
def index_put(self, indices, values, accumulate=False):
    key: Any = _index_tuple(indices)
    values = cast(values, self.dtype)
    masks = [i for i, k in enumerate(key) if getattr(k, "dtype", None) == jnp.bool_]
    if masks:
        if values.size != 1 or sum(not isinstance(k, slice) for k in key) > 1:
            raise BridgeError(
                "assignment through a boolean mask needs a scalar value; use torch.where instead"
            )
        mask = key[masks[0]]
        mask = mask.reshape(mask.shape + (1,) * (self.ndim - masks[0] - mask.ndim))
        values = values.reshape(())
        return jnp.where(mask, self + values if accumulate else values, self)
    return _written(self.at[key].add(values) if accumulate else self.at[key].set(values), key, wraps=True)


def _index_tuple(indices):
    return tuple(slice(None) if i is None else i for i in indices)


@aten("index_select.default")
def index_select(self, dim, index):
    axis = axis_of(dim, self.ndim)
    return read(self, (slice(None),) * axis + (index,)) if self.ndim else self


@aten("index_add.default")
def index_add(self, dim, index, source, alpha=1):
    key = (slice(None),) * axis_of(dim, self.ndim) + (index,)
    return _written(self.at[key].add(source if alpha == 1 else source * alpha), key)


@aten("embedding.default")
def embedding(weight, indices, padding_idx=-1, scale_grad_by_freq=False, sparse=False):
    """The padding row is read as it is but gets no gradient, as in PyTorch."""
    if scale_grad_by_freq:
        raise BridgeError(
            "scale_grad_by_freq=True makes PyTorch's gradient another one than the loss's: switch it off"
        )
    rows = read(weight, indices)
    if padding_idx < 0:
        return rows
    # A selection among the rows read: marking the row in the table would copy the table.
    padding = (indices == padding_idx)[..., None]
    return jnp.where(padding, jax.lax.stop_gradient(rows), rows)


@aten("gather.default")
def gather(self, dim, index, sparse_grad=False):
    if not self.ndim:
        return self
    return read(self, _along(self, axis_of(dim, self.ndim), index))


def _along(self, axis, index):
    """Full index arrays for gather/scatter: the other axes of `index` may be shorter."""
    grid = list(jnp.indices(index.shape, sparse=True))
    grid[axis] = index
    return tuple(grid)


@aten("scatter.src", "scatter.value")
def scatter(self, dim, index, src):
    if not self.ndim:
        return cast(src, self.dtype)
    key = _along(self, axis_of(dim, self.ndim), index)
    return _written(self.at[key].set(_source(src, index, self)), key)


@aten("scatter_add.default")
def scatter_add(self, dim, index, src):
    key = _along(self, axis_of(dim, self.ndim), index)
    return _written(self.at[key].add(_source(src, index, self)), key)


def _source(src, index, self):
    if isinstance(src, (bool, int, float)):
        return src
    return cast(src, self.dtype)[tuple(slice(n) for n in index.shape)]


@aten("scatter_reduce.two")
def scatter_reduce(self, dim, index, src, reduce, include_self=True):
    key = _along(self, axis_of(dim, self.ndim), index)
    return _reduced(self, key, _source(src, index, self), reduce, include_self)


@aten("index_reduce.default")
def index_reduce(self, dim, index, source, reduce, include_self=True):
    axis = axis_of(dim, self.ndim)
    shape = [-1 if a == axis else 1 for a in range(self.ndim)]
    key = _along(self, axis, jnp.broadcast_to(index.reshape(shape), source.shape))
    return _reduced(self, key, cast(source, self.dtype), reduce, include_self)


def _reduced(self, key, src, reduce, include_self):
    """Combine what is written to one place, with what stood there if `include_self`."""
    return _written(_combined(self, key, src, reduce, include_self), key)


def _combined(self, key, src, reduce, include_self):
    if reduce not in ("sum", "mean", "prod", "amax", "amin"):
        raise BridgeError(f"unknown reduction {reduce!r} of what is scattered")
    written = jnp.zeros(self.shape, bool).at[key].set(True)
    kept = jnp.ones(self.shape, bool) if include_self else ~written
    if reduce in ("amax", "amin"):
        return _extreme(self, key, src, kept, reduce)
    if reduce == "prod":
        return jnp.where(kept, self, 1) * _product(key, src, self.shape)
    total = jnp.where(kept, self, 0).at[key].add(src)
    if reduce == "sum":
        return total
    count = cast(kept, self.dtype).at[key].add(jnp.ones_like(src))
    return total / count if jnp.issubdtype(self.dtype, jnp.inexact) else total // count


def _extreme(self, key, src, kept, reduce):
    """The extreme of each place; equal elements share its derivative evenly, as in PyTorch."""
    fixed, new = jax.lax.stop_gradient(self), jax.lax.stop_gradient(src)
    floating = jnp.issubdtype(self.dtype, jnp.inexact)
    limits = jnp.finfo(self.dtype) if floating else jnp.iinfo(self.dtype)
    far = (
        (-jnp.inf if floating else limits.min) if reduce == "amax" else (jnp.inf if floating else limits.max)
    )
    places = jnp.where(kept, fixed, far).at[key]
    best = places.max(new) if reduce == "amax" else places.min(new)
    if not floating:
        return best
    equal, theirs = fixed == best, new == best[key]
    # PyTorch counts an equal element of `self` also where it takes no part, and so do these derivatives.
    count = cast(equal, self.dtype).at[key].add(cast(theirs, self.dtype))
    change = jnp.where(kept & equal, derivative_of(self), 0)
    change = change.at[key].add(jnp.where(theirs, derivative_of(src), 0))
    return best + change / jnp.maximum(count, 1)


def _product(key, src, shape):
    """The product of what each place receives, 1 where it is nothing.

    JAX cannot differentiate a scattered product: this is a running one over the elements in the order of
    their places, made of plain products, with every derivative also at zeros.
    """
    if not src.size:
        return jnp.ones(shape, src.dtype)
    place = jnp.ravel_multi_index(tuple(k % n for k, n in zip(key, shape, strict=True)), shape, mode="clip")
    place = jnp.broadcast_to(place, src.shape).reshape(-1)
    order = jnp.argsort(place, stable=True)
    place, values = place[order], src.reshape(-1)[order]
    first = jnp.concatenate([jnp.ones(1, bool), place[1:] != place[:-1]])

    def join(a, b):
        (start, x), (new, y) = a, b
        return start | new, jnp.where(new, y, x * y)

    values = jax.lax.associative_scan(join, (first, values))[1]
    last = jnp.concatenate([first[1:], jnp.ones(1, bool)])
    size = math.prod(shape)
    flat = jnp.ones(size, src.dtype).at[jnp.where(last, place, size)].set(values, mode="drop")
    return flat.reshape(shape)


@aten("put.default")
def put(self, index, source, accumulate=False):
    flat, key, values = self.reshape(-1), (index.reshape(-1),), cast(source, self.dtype).reshape(-1)
    result = flat.at[key].add(values) if accumulate else flat.at[key].set(values)
    return _written(result, key, wraps=True).reshape(self.shape)


@aten("masked_fill.Scalar", "masked_fill.Tensor")
def masked_fill(self, mask, value):
    return jnp.where(mask, cast(value, self.dtype), self)


@aten("masked_scatter.default")
def masked_scatter(self, mask, source):
    """The k-th true position of the mask receives the k-th element of the source."""
    mask = jnp.broadcast_to(mask, self.shape)
    position = jnp.cumsum(mask.reshape(-1)) - 1
    values = read(source.reshape(-1), jnp.maximum(position, 0)).reshape(self.shape)
    return jnp.where(mask, values, self)


@aten("one_hot.default")
def one_hot(self, num_classes):
    if num_classes < 0:
        raise BridgeError("one_hot needs an explicit number of classes")
    dtype = canonical("int64")
    inside = (self >= 0) & (self < num_classes)
    return jnp.where(inside[..., None], jax.nn.one_hot(self, num_classes, dtype=dtype), no_number(dtype))
