"""ATen operators that read or write by index, sort or select."""

from typing import Any

import jax
import jax.numpy as jnp

from spectra.bridge._errors import BridgeError
from spectra.bridge._ops_shape import at, axis_of
from spectra.bridge._promotion import canonical, cast
from spectra.bridge._registry import aten


def read(array, key):
    """Read by index; out of range gives NaN (PyTorch raises), which every operator refuses."""
    return array.at[key].get(mode="fill")


@aten("index.Tensor", "_unsafe_index.Tensor")
def index(self, indices):
    """NumPy's advanced indexing, None standing for a whole axis."""
    return read(self, _index_tuple(indices))


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
    return self.at[key].add(values) if accumulate else self.at[key].set(values)


def _index_tuple(indices):
    return tuple(slice(None) if i is None else i for i in indices)


@aten("index_select.default")
def index_select(self, dim, index):
    axis = axis_of(dim, self.ndim)
    return at(self, axis, index) if self.ndim else self


@aten("index_add.default")
def index_add(self, dim, index, source, alpha=1):
    key = (slice(None),) * axis_of(dim, self.ndim) + (index,)
    return self.at[key].add(source if alpha == 1 else source * alpha)


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
    return self.at[_along(self, axis_of(dim, self.ndim), index)].set(_source(src, index, self))


@aten("scatter_add.default")
def scatter_add(self, dim, index, src):
    return self.at[_along(self, axis_of(dim, self.ndim), index)].add(_source(src, index, self))


def _source(src, index, self):
    if isinstance(src, (bool, int, float)):
        return src
    return cast(src, self.dtype)[tuple(slice(n) for n in index.shape)]


@aten("scatter_reduce.two")
def scatter_reduce(self, dim, index, src, reduce, include_self=True):
    key, src = _along(self, axis_of(dim, self.ndim), index), _source(src, index, self)
    start = {"sum": 0, "mean": 0, "prod": 1, "amax": -jnp.inf, "amin": jnp.inf}
    if reduce not in start:
        raise BridgeError(f"unknown reduction {reduce!r} in scatter_reduce")
    if include_self:
        base = self
    elif reduce in ("amax", "amin") and not jnp.issubdtype(self.dtype, jnp.inexact):
        limits = jnp.iinfo(self.dtype)
        base = self.at[key].set(limits.min if reduce == "amax" else limits.max)
    else:
        base = self.at[key].set(start[reduce])
    if reduce in ("sum", "prod", "amax", "amin"):
        method = {"sum": "add", "prod": "multiply", "amax": "max", "amin": "min"}[reduce]
        return getattr(base.at[key], method)(src)
    count = jnp.ones_like(self).at[key].add(jnp.ones_like(src))
    if not include_self:
        count = jnp.maximum(count - 1, 1)
    total = base.at[key].add(src)
    return total / count if jnp.issubdtype(self.dtype, jnp.inexact) else total // count


@aten("masked_fill.Scalar", "masked_fill.Tensor")
def masked_fill(self, mask, value):
    return jnp.where(mask, cast(value, self.dtype), self)


@aten("masked_scatter.default")
def masked_scatter(self, mask, source):
    """The k-th true position of the mask receives the k-th element of the source."""
    mask = jnp.broadcast_to(mask, self.shape)
    position = jnp.cumsum(mask.reshape(-1)) - 1
    values = source.reshape(-1)[jnp.maximum(position, 0)].reshape(self.shape)
    return jnp.where(mask, values, self)


@aten("sort.default", "sort.stable")
def sort(self, dim=-1, descending=False, stable=True):
    axis = axis_of(dim, self.ndim)
    if not self.ndim:
        return self, jnp.zeros((), canonical("int64"))
    order = jnp.argsort(jax.lax.stop_gradient(self), axis, stable=True, descending=descending)
    return jnp.take_along_axis(self, order, axis), cast(order, canonical("int64"))


@aten("argsort.default", "argsort.stable")
def argsort(self, dim=-1, descending=False, stable=True):
    return sort(self, dim, descending)[1]


@aten("topk.default")
def topk(self, k, dim=-1, largest=True, sorted=True):
    values, order = sort(self, dim, largest)
    axis = axis_of(dim, self.ndim)
    return at(values, axis, slice(k)), at(order, axis, slice(k))


@aten("bucketize.Tensor")
def bucketize(self, boundaries, out_int32=False, right=False):
    side = "right" if right else "left"
    dtype = canonical("int32" if out_int32 else "int64")
    return cast(jnp.searchsorted(boundaries, self, side=side), dtype)


@aten("one_hot.default")
def one_hot(self, num_classes):
    if num_classes < 0:
        raise BridgeError("one_hot needs an explicit number of classes")
    return jax.nn.one_hot(self, num_classes, dtype=canonical("int64"))
