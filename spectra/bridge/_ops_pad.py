"""Padding, and the exchange of pixels with channels."""

import jax.numpy as jnp

from spectra.bridge._errors import BridgeError
from spectra.bridge._ops_shape import at
from spectra.bridge._promotion import cast
from spectra.bridge._registry import aten


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
