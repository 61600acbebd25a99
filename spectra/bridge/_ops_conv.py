"""Convolution, its transpose, unfolding and folding."""

import itertools
import math

import jax.numpy as jnp
from jax import lax

from spectra.bridge._budget import spend
from spectra.bridge._errors import BridgeError
from spectra.bridge._registry import aten

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
