"""Convolution, its transpose, unfolding and folding; pooling and its adaptive forms."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
from jax import lax

from spectra.bridge.dtypes import canonical
from spectra.bridge.errors import BridgeError, spend
from spectra.bridge.operators.registry import aten

# Each element of a window is one term of an unrolled sum or maximum: a bound far beyond real models
# keeps a hostile file from asking for an endless trace.
MAX_WINDOW = 4096


def check_window(kernel) -> None:
    """Raise BridgeError for a window beyond MAX_WINDOW elements."""
    if math.prod(kernel) > MAX_WINDOW:
        raise BridgeError(f"windows of {kernel} exceed {MAX_WINDOW} elements")
    spend(4 * math.prod(kernel))


def spatial(values, n: int) -> tuple[int, ...]:
    """Repeat a single number for n spatial axes."""
    values = (values,) if isinstance(values, int) else tuple(values)
    return values * n if len(values) == 1 else values


@aten("convolution.default")
def convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    n = weight.ndim - 2
    if n < 1 or input.ndim not in (n + 1, n + 2):
        raise BridgeError(f"convolution of shapes {input.shape} and {weight.shape}")
    stride, padding, dilation = (spatial(v, n) for v in (stride, padding, dilation))
    batched = input if input.ndim == n + 2 else input[None]
    window: dict = {"window_strides": stride, "padding": [(p, p) for p in padding]}
    if transposed:
        window = _transposed_window(weight, stride, padding, dilation, spatial(output_padding, n))
        weight = _transposed_weight(weight, groups)
    out = lax.conv_general_dilated(
        batched, weight, rhs_dilation=dilation, feature_group_count=groups, **window
    )
    if bias is not None:
        out = out + bias.reshape((-1,) + (1,) * n)
    return out if input.ndim == n + 2 else out[0]


@aten("conv_tbc.default")
def conv_tbc(self, weight, bias, pad=0):
    """A convolution over the first axis: (time, batch, channels)."""
    kernel = jnp.transpose(weight, (2, 1, 0))
    out = convolution(jnp.transpose(self, (1, 2, 0)), kernel, bias, [1], [pad], [1], False, [0], 1)
    return jnp.transpose(out, (2, 0, 1))


def _transposed_window(weight, stride, padding, dilation, output_padding):
    """The adjoint of a strided convolution is a unit-stride one over an input spread by stride.

    Output length (L - 1)·stride - 2·padding + dilation·(k - 1) + 1 + output_padding, as in PyTorch.
    """
    reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    pads = [(r - p, r - p + o) for r, p, o in zip(reach, padding, output_padding, strict=True)]
    return {"window_strides": (1,) * len(pads), "padding": pads, "lhs_dilation": stride}


def _transposed_weight(weight, groups):
    """(in, out / groups, *k) becomes (out, in / groups, *k) with the kernel reversed."""
    rows, columns, *kernel = weight.shape
    weight = weight.reshape(groups, rows // groups, columns, *kernel).swapaxes(1, 2)
    weight = weight.reshape(groups * columns, rows // groups, *kernel)
    return jnp.flip(weight, range(2, weight.ndim))


def _positions(size, kernel, dilation, padding, stride):
    """Number of window positions on each axis."""
    return [
        (s + 2 * p - d * (k - 1) - 1) // t + 1
        for s, k, d, p, t in zip(size, kernel, dilation, padding, stride, strict=True)
    ]


@aten("im2col.default")
def im2col(self, kernel_size, dilation, padding, stride):
    """(N, C, H, W) to (N, C·kh·kw, L): one column a window position."""
    check_window(kernel_size)
    batched = self if self.ndim == 4 else self[None]
    padded = jnp.pad(batched, [(0, 0), (0, 0), *((p, p) for p in padding)])
    rows, columns = _positions(batched.shape[2:], kernel_size, dilation, padding, stride)
    patches = [
        padded[
            :,
            :,
            i * dilation[0] : i * dilation[0] + stride[0] * (rows - 1) + 1 : stride[0],
            j * dilation[1] : j * dilation[1] + stride[1] * (columns - 1) + 1 : stride[1],
        ]
        for i, j in itertools.product(range(kernel_size[0]), range(kernel_size[1]))
    ]
    stacked = jnp.stack(patches, 2)
    out = stacked.reshape(batched.shape[0], -1, rows * columns)
    return out if self.ndim == 4 else out[0]


@aten("col2im.default")
def col2im(self, output_size, kernel_size, dilation, padding, stride):
    """The adjoint of im2col: overlapping windows add up."""
    check_window(kernel_size)
    batched = self if self.ndim == 3 else self[None]
    rows, columns = _positions(output_size, kernel_size, dilation, padding, stride)
    channels = batched.shape[1] // math.prod(kernel_size)
    patches = batched.reshape(batched.shape[0], channels, *kernel_size, rows, columns)
    height, width = (s + 2 * p for s, p in zip(output_size, padding, strict=True))
    out = jnp.zeros((batched.shape[0], channels, height, width), self.dtype)
    for i, j in itertools.product(range(kernel_size[0]), range(kernel_size[1])):
        out = out.at[
            :,
            :,
            i * dilation[0] : i * dilation[0] + stride[0] * (rows - 1) + 1 : stride[0],
            j * dilation[1] : j * dilation[1] + stride[1] * (columns - 1) + 1 : stride[1],
        ].add(patches[:, :, i, j])
    out = out[:, :, padding[0] : height - padding[0], padding[1] : width - padding[1]]
    return out if self.ndim == 3 else out[0]


# Bounds for hostile files: a bin is a row of a matrix, a count of windows an array on the host.
MAX_BINS, MAX_COUNT = 2**16, 2**25


def _output_size(size, kernel, stride, padding, dilation, ceil_mode):
    """PyTorch's count of windows: with ceil_mode the last may start in the input or left pad."""
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    count = (span + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (count - 1) * stride >= size + padding:
        count -= 1
    if not 1 <= count <= MAX_COUNT:
        raise BridgeError(f"pooling of size {size} with kernel {kernel} leaves {count} windows")
    return count


def _windows(self, n, kernel, stride, padding, dilation, ceil_mode):
    """Normalise arguments; return them with the window counts and the low/high padding."""
    kernel = spatial(kernel, n)
    check_window(kernel)
    stride = spatial(stride, n) if stride not in ((), [], None) else kernel
    padding, dilation = spatial(padding, n), spatial(dilation, n)
    size = self.shape[-n:]
    counts = [
        _output_size(*axis, ceil_mode) for axis in zip(size, kernel, stride, padding, dilation, strict=True)
    ]
    # The high padding makes the array end with the last window; negative where it is not reached.
    pads = [
        (p, (c - 1) * t + d * (k - 1) + 1 - s - p)
        for s, k, t, p, d, c in zip(size, kernel, stride, padding, dilation, counts, strict=True)
    ]
    return kernel, stride, padding, dilation, counts, pads


def _pad_last(array, pads, value):
    config = [(0, 0, 0)] * (array.ndim - len(pads)) + [(low, high, 0) for low, high in pads]
    return lax.pad(array, jnp.asarray(value, array.dtype), config)


def _running_max(views):
    """Fold (value, index) pairs: the first maximum wins and NaN is the largest.

    Selections only, so the gradient goes to one element and both modes of differentiation work.
    """
    best, where = next(views)
    for value, index in views:
        better = (value > best) | jnp.isnan(value)
        best, where = jnp.where(better, value, best), jnp.where(better, index, where)
    return best, where


def _lowest(dtype):
    return -jnp.inf if jnp.issubdtype(dtype, jnp.inexact) else jnp.iinfo(dtype).min


def _max_pool(self, n, kernel, stride, padding, dilation, ceil_mode):
    kernel, stride, padding, dilation, counts, pads = _windows(
        self, n, kernel, stride, padding, dilation, ceil_mode
    )
    if any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
        raise BridgeError(f"max pooling padding {padding} exceeds half of the kernel {kernel}")
    size = self.shape[-n:]
    flat = jnp.arange(math.prod(size), dtype=canonical("int64")).reshape(size)
    padded, places = _pad_last(self, pads, _lowest(self.dtype)), _pad_last(flat, pads, -1)

    def views():
        for offset in itertools.product(*(range(k) for k in kernel)):
            key = (..., *_slices(offset, stride, dilation, counts))
            yield padded[key], places[key]

    best, where = _running_max(views())
    return best, jnp.broadcast_to(where, best.shape)


def _slices(offset, stride, dilation, counts):
    return tuple(
        slice(o * d, o * d + (c - 1) * t + 1, t)
        for o, t, d, c in zip(offset, stride, dilation, counts, strict=True)
    )


@aten("max_pool2d_with_indices.default")
def max_pool2d(self, kernel_size, stride=(), padding=0, dilation=1, ceil_mode=False):
    return _max_pool(self, 2, kernel_size, stride, padding, dilation, ceil_mode)


@aten("max_pool3d_with_indices.default")
def max_pool3d(self, kernel_size, stride=(), padding=0, dilation=1, ceil_mode=False):
    return _max_pool(self, 3, kernel_size, stride, padding, dilation, ceil_mode)


def _avg_pool(self, n, kernel, stride, padding, ceil_mode, count_include_pad, divisor):
    kernel, stride, padding, _, counts, pads = _windows(self, n, kernel, stride, padding, 1, ceil_mode)
    if any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
        raise BridgeError(f"average pooling padding {padding} exceeds half of the kernel {kernel}")
    spend(sum(counts) // 2**9)  # the positions of windows are made on the host
    window = (1,) * (self.ndim - n) + tuple(kernel)
    strides = (1,) * (self.ndim - n) + tuple(stride)
    padded = _pad_last(self, pads, 0)
    total = lax.reduce_window(padded, 0.0, lax.add, window, strides, "VALID")
    if divisor is None:
        divisor = _window_counts(
            self.shape[-n:], kernel, stride, padding, counts, count_include_pad, self.dtype
        )
    return total / jnp.asarray(divisor, self.dtype)


def _window_counts(size, kernel, stride, padding, counts, count_include_pad, dtype):
    """Elements in each window: clipped to the padded input, or to the input itself."""
    result = jnp.ones((), dtype)
    for s, k, t, p, c in zip(size, kernel, stride, padding, counts, strict=True):
        start = np.arange(c) * t - p
        end = np.minimum(start + k, s + p)
        inside = np.minimum(end, s) - np.maximum(start, 0)
        result = result[..., None] * jnp.asarray(end - start if count_include_pad else inside, dtype)
    return result


@aten("avg_pool1d.default")
def avg_pool1d(self, kernel_size, stride=(), padding=0, ceil_mode=False, count_include_pad=True):
    return _avg_pool(self, 1, kernel_size, stride, padding, ceil_mode, count_include_pad, None)


@aten("avg_pool2d.default")
def avg_pool2d(
    self,
    kernel_size,
    stride=(),
    padding=0,
    ceil_mode=False,
    count_include_pad=True,
    divisor_override=None,
):
    return _avg_pool(self, 2, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


@aten("avg_pool3d.default")
def avg_pool3d(
    self,
    kernel_size,
    stride=(),
    padding=0,
    ceil_mode=False,
    count_include_pad=True,
    divisor_override=None,
):
    return _avg_pool(self, 3, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


def _bins(size: int, count: int):
    """Adaptive bin i covers [floor(i·size / count), ceil((i + 1)·size / count))."""
    if not 1 <= count <= MAX_BINS or size * count > MAX_COUNT:
        raise BridgeError(f"adaptive pooling of {size} elements to {count} bins")
    spend(size * count // 2**11)
    i = np.arange(count)
    return i * size // count, -(-(i + 1) * size // count)


def _adaptive_avg(self, output_size, n):
    for axis, count in zip(range(self.ndim - n, self.ndim), output_size, strict=True):
        start, end = _bins(self.shape[axis], count)
        position = np.arange(self.shape[axis])
        inside = (position >= start[:, None]) & (position < end[:, None])
        weights = jnp.asarray(inside / (end - start)[:, None], self.dtype)
        # A mean, not a model's matrix product: it must not follow a reduced matmul precision.
        pooled = lax.dot_general(self, weights, (((axis,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)
        self = jnp.moveaxis(pooled, -1, axis)
    return self


@aten("adaptive_avg_pool1d.default")
def adaptive_avg_pool1d(self, output_size):
    return _adaptive_avg(self, output_size, 1)


@aten("_adaptive_avg_pool2d.default")
def adaptive_avg_pool2d(self, output_size):
    return _adaptive_avg(self, output_size, 2)


@aten("_adaptive_avg_pool3d.default")
def adaptive_avg_pool3d(self, output_size):
    return _adaptive_avg(self, output_size, 3)


def _adaptive_max(self, output_size, n):
    size = self.shape[-n:]
    bins = [_bins(s, c) for s, c in zip(size, output_size, strict=True)]
    longest = [int((end - start).max()) for start, end in bins]
    check_window(longest)
    flat = jnp.arange(math.prod(size), dtype=canonical("int64")).reshape(size)

    def views():
        for offset in itertools.product(*(range(k) for k in longest)):
            # A short bin reads its last element again, which changes no first maximum.
            key = np.ix_(*(np.minimum(lo + o, hi - 1) for o, (lo, hi) in zip(offset, bins, strict=True)))
            yield self[(..., *key)], flat[key]

    best, where = _running_max(views())
    return best, jnp.broadcast_to(where, best.shape)


@aten("adaptive_max_pool2d.default")
def adaptive_max_pool2d(self, output_size):
    return _adaptive_max(self, output_size, 2)


@aten("adaptive_max_pool3d.default")
def adaptive_max_pool3d(self, output_size):
    return _adaptive_max(self, output_size, 3)
