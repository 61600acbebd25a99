"""ATen operators that change an array's shape or take parts of it, without arithmetic."""

import math

import jax.numpy as jnp
import numpy as np

from spectra.bridge.dtypes import cast
from spectra.bridge.errors import BridgeError, spend
from spectra.bridge.operators.registry import aten, register

# A file must not be able to ask for an unbounded list of arrays.
MAX_PARTS = 65536


def axis_of(dim: int, ndim: int) -> int:
    """Return a non-negative axis; a 0-d array accepts -1 and 0, as in PyTorch."""
    limit = max(ndim, 1)
    if not -limit <= dim < limit:
        raise BridgeError(f"dimension {dim} is out of range for an array of {ndim} dimensions")
    return dim % limit


def axes_of(dims, ndim: int) -> tuple[int, ...]:
    """Return non-negative axes; None or an empty list means all of them."""
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return tuple(range(ndim))
    dims = [dims] if isinstance(dims, int) else dims
    return tuple(axis_of(d, ndim) for d in dims) if ndim else ()


def slice_bounds(start, end, size: int) -> tuple[int, int]:
    """Clamp Python-style slice bounds into `[0, size]`, as PyTorch does."""
    start = 0 if start is None else start
    end = size if end is None else end
    start, end = (x + size if x < 0 else x for x in (start, end))
    start = min(max(start, 0), size)
    return start, min(max(end, start), size)


def at(array, axis: int, index):
    """Index one axis with anything that NumPy accepts."""
    return array[(slice(None),) * axis + (index,)]


@register("getitem")
def getitem(self, index: int):
    return self[index]


@aten("view.default", "reshape.default", "_unsafe_view.default", "_reshape_alias.default")
def view(self, size, stride=None):
    return jnp.reshape(self, size)


@aten("permute.default")
def permute(self, dims):
    return jnp.transpose(self, axes_of(dims, self.ndim))


@aten("transpose.int")
def transpose(self, dim0, dim1):
    return jnp.swapaxes(self, axis_of(dim0, self.ndim), axis_of(dim1, self.ndim))


@aten("t.default")
def matrix_transpose(self):
    return self.T


@aten("unsqueeze.default")
def unsqueeze(self, dim):
    return jnp.expand_dims(self, axis_of(dim, self.ndim + 1))


@aten("squeeze.dim", "squeeze.dims")
def squeeze(self, dim):
    axes = tuple(a for a in axes_of(dim, self.ndim) if self.shape[a] == 1)
    return jnp.squeeze(self, axes)


@aten("squeeze.default")
def squeeze_all(self):
    return jnp.squeeze(self)


@aten("expand.default")
def expand(self, size, implicit=False):
    if len(size) < self.ndim:
        raise BridgeError(f"cannot expand shape {self.shape} to fewer dimensions {size}")
    own = (1,) * (len(size) - self.ndim) + self.shape
    return jnp.broadcast_to(self, [o if s == -1 else s for s, o in zip(size, own, strict=True)])


@aten("repeat.default")
def repeat(self, repeats):
    return jnp.tile(self, repeats)


@aten("cat.default")
def cat(tensors, dim=0):
    # PyTorch skips empty one-dimensional arrays, whatever the shape of the others.
    kept = [x for x in tensors if x.shape != (0,)] or tensors[:1]
    dtype = jnp.result_type(*(x.dtype for x in tensors))
    return jnp.concatenate([cast(x, dtype) for x in kept], axis_of(dim, kept[0].ndim))


@aten("stack.default")
def stack(tensors, dim=0):
    return jnp.stack(tensors, axis_of(dim, tensors[0].ndim + 1))


@aten("split_with_sizes.default")
def split_with_sizes(self, split_sizes, dim=0):
    axis = axis_of(dim, self.ndim)
    if any(s < 0 for s in split_sizes) or sum(split_sizes) != self.shape[axis]:
        raise BridgeError(f"split sizes {split_sizes} do not add up to {self.shape[axis]}")
    return tuple(jnp.split(self, np.cumsum(split_sizes)[:-1], axis))


@aten("split.Tensor")
def split(self, split_size, dim=0):
    size = self.shape[axis_of(dim, self.ndim)]
    if split_size < 1 or size > MAX_PARTS * split_size:
        raise BridgeError(f"cannot split {size} entries into parts of {split_size}")
    full, rest = divmod(size, split_size)
    spend(full)
    return split_with_sizes(self, [split_size] * full + ([rest] if rest else []), dim)


@aten("unbind.int")
def unbind(self, dim=0):
    axis = axis_of(dim, self.ndim)
    if self.shape[axis] > MAX_PARTS:
        raise BridgeError(f"cannot unbind {self.shape[axis]} entries")
    spend(self.shape[axis])
    return tuple(at(self, axis, i) for i in range(self.shape[axis]))


@aten("slice.Tensor")
def slice_(self, dim=0, start=None, end=None, step=1):
    axis = axis_of(dim, self.ndim)
    start, end = slice_bounds(start, end, self.shape[axis])
    return at(self, axis, slice(start, end, step))


@aten("slice_scatter.default")
def slice_scatter(self, src, dim=0, start=None, end=None, step=1):
    axis = axis_of(dim, self.ndim)
    start, end = slice_bounds(start, end, self.shape[axis])
    return self.at[(slice(None),) * axis + (slice(start, end, step),)].set(src)


@aten("select.int")
def select(self, dim, index):
    axis = axis_of(dim, self.ndim)
    size = self.shape[axis] if self.ndim else 0
    if not -size <= index < size:
        raise BridgeError(f"index {index} is out of range for size {size}")
    return at(self, axis, index)


@aten("select_scatter.default")
def select_scatter(self, src, dim, index):
    return self.at[(slice(None),) * axis_of(dim, self.ndim) + (index,)].set(src)


@aten("diagonal.default")
def diagonal(self, offset=0, dim1=0, dim2=1):
    return jnp.diagonal(self, offset, axis_of(dim1, self.ndim), axis_of(dim2, self.ndim))


@aten("diagonal_scatter.default")
def diagonal_scatter(self, src, offset=0, dim1=0, dim2=1):
    axes = axis_of(dim1, self.ndim), axis_of(dim2, self.ndim)
    moved = jnp.moveaxis(self, axes, (-2, -1))
    place = jnp.arange(src.shape[-1])
    moved = moved.at[..., place + max(-offset, 0), place + max(offset, 0)].set(cast(src, self.dtype))
    return jnp.moveaxis(moved, (-2, -1), axes)


@aten("diag_embed.default")
def diag_embed(self, offset=0, dim1=-2, dim2=-1):
    size = self.shape[-1] + abs(offset)
    rows = jnp.arange(self.shape[-1]) + max(-offset, 0)
    full = jnp.zeros((*self.shape[:-1], size, size), self.dtype)
    full = full.at[..., rows, rows + offset].set(self)
    return jnp.moveaxis(full, (-2, -1), (axis_of(dim1, full.ndim), axis_of(dim2, full.ndim)))


@aten("flip.default")
def flip(self, dims):
    return jnp.flip(self, axes_of(dims, self.ndim)) if dims else self


@aten("roll.default")
def roll(self, shifts, dims=()):
    return jnp.roll(self, tuple(shifts) if dims else shifts[0], tuple(dims) or None)


@aten("tril.default")
def tril(self, diagonal=0):
    return jnp.tril(self, diagonal)


@aten("triu.default")
def triu(self, diagonal=0):
    return jnp.triu(self, diagonal)


@aten("unfold.default")
def unfold(self, dimension, size, step):
    axis = axis_of(dimension, self.ndim)
    starts = jnp.arange((self.shape[axis] - size) // step + 1) * step
    windows = at(self, axis, starts[:, None] + jnp.arange(size)[None, :])
    return jnp.moveaxis(windows, axis + 1, -1)


@aten("as_strided.default")
def as_strided(self, size, stride, storage_offset=None):
    """Gather from the flat array: right for contiguous inputs, the only ones that export emits."""
    offset = storage_offset or 0
    reach = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min(size, default=1) < 1 or min(stride, default=0) < 0 or offset < 0:
        raise BridgeError(f"as_strided with sizes {size}, strides {stride}, offset {offset}")
    if offset + reach >= self.size or math.prod(size) > self.size:
        raise BridgeError("as_strided reads outside of its array, or an element twice")
    index = jnp.full((), offset)
    for length, step in zip(size, stride, strict=True):
        index = index[..., None] + jnp.arange(length) * step
    return self.reshape(-1)[index]
