"""Padding, exchange of pixels with channels, antialiased resizing, volumes read at the points of a grid."""

import itertools

import jax.numpy as jnp
import numpy as np
from jax import lax

from spectra.bridge.dtypes import cast
from spectra.bridge.errors import BridgeError
from spectra.bridge.operators.registry import aten
from spectra.bridge.operators.shape import at


@aten("constant_pad_nd.default")
def constant_pad_nd(self, pad, value=0):
    """Pairs of `pad` go from the last axis backwards; a negative entry crops."""
    widths = [(0, 0)] * self.ndim
    for i in range(len(pad) // 2):
        widths[self.ndim - 1 - i] = (pad[2 * i], pad[2 * i + 1])
    crop = tuple(
        slice(max(-low, 0), size - max(-high, 0))
        for (low, high), size in zip(widths, self.shape, strict=True)
    )
    grow = [(max(low, 0), max(high, 0)) for low, high in widths]
    return jnp.pad(self[crop], grow, constant_values=cast(value, self.dtype))


def _crop(self, axis, low, high):
    """Apply the negative part of a padding."""
    return at(self, axis, slice(max(-low, 0), self.shape[axis] - max(-high, 0)))


def _pad(self, padding, mode):
    for i in range(len(padding) // 2):
        axis, (low, high) = self.ndim - 1 - i, padding[2 * i : 2 * i + 2]
        if mode == "reflect" and max(low, high) >= self.shape[axis]:  # as in PyTorch; NumPy would repeat it
            raise BridgeError(f"reflection by ({low}, {high}) of an axis of {self.shape[axis]} entries")
        self = _crop(self, axis, low, high)
        widths = [(0, 0)] * self.ndim
        widths[axis] = (max(low, 0), max(high, 0))
        self = jnp.pad(self, widths, mode=mode)
    return self


@aten("reflection_pad1d.default", "reflection_pad2d.default", "reflection_pad3d.default")
def reflection_pad(self, padding):
    return _pad(self, padding, "reflect")


@aten("replication_pad1d.default", "replication_pad2d.default", "replication_pad3d.default")
def replication_pad(self, padding):
    return _pad(self, padding, "edge")


@aten("pixel_shuffle.default")
def pixel_shuffle(self, upscale_factor):
    r = upscale_factor
    *batch, c, h, w = self.shape
    x = self.reshape(*batch, c // r**2, r, r, h, w)
    n = len(batch)
    x = jnp.transpose(x, (*range(n), n, n + 3, n + 1, n + 4, n + 2))
    return x.reshape(*batch, c // r**2, h * r, w * r)


@aten("pixel_unshuffle.default")
def pixel_unshuffle(self, downscale_factor):
    r = downscale_factor
    *batch, c, h, w = self.shape
    x = self.reshape(*batch, c, h // r, r, w // r, r)
    n = len(batch)
    x = jnp.transpose(x, (*range(n), n, n + 2, n + 4, n + 1, n + 3))
    return x.reshape(*batch, c * r**2, h // r, w // r)


MAX_WEIGHTS = 2**22  # entries of one axis's matrix, which is made on the host


def _triangle(x):
    return np.maximum(1 - np.abs(x), 0)


def _cubic(x):
    """Keys' kernel with a = -1/2, the one of antialiased resizing (elsewhere PyTorch has -3/4)."""
    x = np.abs(x)
    return np.where(
        x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0)
    )


def _antialias(size, count, align_corners, scale, kernel, radius):
    """Weights (count, size): the kernel, widened by the ratio of a reduction, and normalised."""
    if count < 1 or count * size > MAX_WEIGHTS:
        raise BridgeError(f"resizing {size} entries to {count}")
    if align_corners:
        scale = (size - 1) / (count - 1) if count > 1 else 0.0
    else:
        scale = size / count if scale is None or scale <= 0 else 1 / scale
    wide = max(scale, 1.0)
    center = scale * (np.arange(count) + 0.5)[:, None]
    low = np.maximum(np.trunc(center - radius * wide + 0.5), 0)
    high = np.minimum(np.trunc(center + radius * wide + 0.5), size)
    position = np.arange(size)
    weights = kernel((position - center + 0.5) / wide) * ((position >= low) & (position < high))
    return weights / weights.sum(1, keepdims=True)


def _resized(self, output_size, align_corners, scales, kernel, radius):
    for axis, count, scale in zip((-2, -1), output_size, scales, strict=True):
        axis %= self.ndim
        weights = _antialias(self.shape[axis], count, align_corners, scale, kernel, radius)
        # A resampling, not a model's matrix product: it must not follow a reduced matmul precision.
        out = lax.dot_general(
            self,
            jnp.asarray(weights, self.dtype),
            (((axis,), (1,)), ((), ())),
            precision=lax.Precision.HIGHEST,
        )
        self = jnp.moveaxis(out, -1, axis)
    return self


@aten("_upsample_bilinear2d_aa.default")
def bilinear_aa(self, output_size, align_corners, scales_h=None, scales_w=None):
    return _resized(self, output_size, align_corners, (scales_h, scales_w), _triangle, 1)


@aten("_upsample_bicubic2d_aa.default")
def bicubic_aa(self, output_size, align_corners, scales_h=None, scales_w=None):
    return _resized(self, output_size, align_corners, (scales_h, scales_w), _cubic, 2)


def _reflected(x, low, span):
    """x reflected at low and low + span; a point is brought back as often as it takes."""
    if span <= 0:
        return jnp.zeros_like(x)
    distance = jnp.abs(x - low)
    flips = jnp.floor(lax.stop_gradient(distance) / span)
    rest = distance - flips * span
    return jnp.where(flips % 2 == 0, rest + low, span - rest + low)


def _source(x, size, padding_mode, align_corners):
    """From [-1, 1] to positions of the input. On and beyond a border the derivative is 0, as in PyTorch."""
    x = (x + 1) / 2 * (size - 1) if align_corners else ((x + 1) * size - 1) / 2
    if padding_mode == 0:
        return x
    if padding_mode == 2:
        x = _reflected(x, 0.0, size - 1) if align_corners else _reflected(x, -0.5, size)
    return jnp.where(x <= 0, 0.0, jnp.where(x >= size - 1, size - 1.0, x)).astype(x.dtype)


@aten("grid_sampler_3d.default")
def grid_sampler_3d(input, grid, interpolation_mode, padding_mode, align_corners):
    """Read (N, C, D, H, W) at the points (N, d, h, w, 3), whose last axis is (x, y, z) in [-1, 1]."""
    if interpolation_mode not in (0, 1) or padding_mode not in (0, 1, 2):
        raise BridgeError(
            f"grid_sampler_3d with interpolation {interpolation_mode} and padding {padding_mode}"
        )
    sizes = input.shape[2:]
    points = [_source(grid[..., 2 - a], size, padding_mode, align_corners) for a, size in enumerate(sizes)]
    if interpolation_mode == 1:
        return _corner(input, [jnp.round(p) for p in points])
    floors = [jnp.floor(lax.stop_gradient(p)) for p in points]
    total = jnp.zeros((), input.dtype)
    for corner in itertools.product((0, 1), repeat=3):
        places = [f + c for f, c in zip(floors, corner, strict=True)]
        weight = jnp.ones((), grid.dtype)
        for point, floor, high in zip(points, floors, corner, strict=True):
            weight = weight * (point - floor if high else floor + 1 - point)
        total = total + _corner(input, places) * weight[:, None]
    return total


def _corner(input, places):
    """The entries at whole positions, 0 outside."""
    sizes = input.shape[2:]
    inside = jnp.ones(places[0].shape, bool)
    for place, size in zip(places, sizes, strict=True):
        inside &= (place >= 0) & (place < size)
    index = [jnp.where(inside, p, 0).astype(jnp.int32) for p in places]
    batch = jnp.arange(input.shape[0]).reshape(-1, 1, 1, 1)
    values = jnp.moveaxis(input, 1, -1)[(batch, *index)]
    return jnp.where(inside[:, None], jnp.moveaxis(values, -1, 1), 0)
