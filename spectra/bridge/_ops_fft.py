"""Discrete Fourier transforms."""

import math

import jax.numpy as jnp

from spectra.bridge._errors import BridgeError
from spectra.bridge._ops_shape import axes_of
from spectra.bridge._registry import aten


def _scale(x, normalization, count):
    """PyTorch's modes: 0 leaves the sum, 1 divides by the root of its length, 2 by the length."""
    if normalization not in (0, 1, 2):
        raise BridgeError(f"normalization must be 0, 1 or 2, got {normalization}")
    return x if normalization == 0 else x / (math.sqrt(count) if normalization == 1 else count)


@aten("_fft_c2c.default")
def fft_c2c(self, dim, normalization, forward):
    axes = axes_of(dim, self.ndim)
    transform, norm = (jnp.fft.fftn, "backward") if forward else (jnp.fft.ifftn, "forward")
    count = math.prod(self.shape[a] for a in axes)
    return _scale(transform(self, axes=axes, norm=norm), normalization, count)


@aten("_fft_r2c.default")
def fft_r2c(self, dim, normalization, onesided):
    axes = axes_of(dim, self.ndim)
    transform = jnp.fft.rfftn if onesided else jnp.fft.fftn
    count = math.prod(self.shape[a] for a in axes)
    return _scale(transform(self, axes=axes), normalization, count)


@aten("_fft_c2r.default")
def fft_c2r(self, dim, normalization, last_dim_size):
    axes = axes_of(dim, self.ndim)
    sizes = [self.shape[a] for a in axes[:-1]] + [last_dim_size]
    out = jnp.fft.irfftn(self, s=sizes, axes=axes, norm="forward")
    return _scale(out, normalization, math.prod(sizes))
