"""ATen operators that create arrays."""

import math

import jax.numpy as jnp

from spectra.bridge._promotion import canonical, cast, default_dtype
from spectra.bridge._registry import aten


@aten("scalar_tensor.default")
def scalar_tensor(s, dtype=None):
    return cast(s, default_dtype() if dtype is None else dtype)


@aten("full.default")
def full(size, fill_value, dtype=None):
    return jnp.full(size, fill_value, _dtype_for(fill_value) if dtype is None else dtype)


@aten("full_like.default")
def full_like(self, fill_value, dtype=None):
    return jnp.full(self.shape, fill_value, self.dtype if dtype is None else dtype)


@aten("fill.Scalar", "fill.Tensor")
def fill(self, value):
    return jnp.broadcast_to(cast(value, self.dtype), self.shape)


# Memory that `empty` leaves uninitialised may hold anything: zeros are as good as any.
@aten("empty.memory_format", "empty_strided.default", "zeros.default")
def zeros(size, stride=None, dtype=None):
    return jnp.zeros(size, default_dtype() if dtype is None else dtype)


@aten("empty_permuted.default")
def empty_permuted(size, physical_layout, dtype=None):
    return zeros(size, None, dtype)


@aten("ones.default")
def ones(size, dtype=None):
    return jnp.ones(size, default_dtype() if dtype is None else dtype)


@aten("zeros_like.default", "empty_like.default")
def zeros_like(self, dtype=None):
    return full_like(self, 0, dtype)


@aten("ones_like.default")
def ones_like(self, dtype=None):
    return full_like(self, 1, dtype)


@aten("new_zeros.default", "new_empty.default", "new_empty_strided.default")
def new_zeros(self, size, stride=None, dtype=None):
    return jnp.zeros(size, self.dtype if dtype is None else dtype)


@aten("new_ones.default")
def new_ones(self, size, dtype=None):
    return jnp.ones(size, self.dtype if dtype is None else dtype)


@aten("new_full.default")
def new_full(self, size, fill_value, dtype=None):
    return jnp.full(size, fill_value, self.dtype if dtype is None else dtype)


@aten("eye.default", "eye.m")
def eye(n, m=None, dtype=None):
    return jnp.eye(n, m, dtype=default_dtype() if dtype is None else dtype)


@aten("arange.start_step")
def arange(start, end, step=1, dtype=None):
    if dtype is None:
        floating = any(isinstance(x, float) for x in (start, end, step))
        dtype = default_dtype() if floating else canonical("int64")
    length = max(math.ceil((end - start) / step), 0)
    return cast(start + jnp.arange(length) * step, dtype)


@aten("fft_fftfreq.default")
def fftfreq(n, d=1.0, dtype=None):
    return jnp.fft.fftfreq(n, d).astype(default_dtype() if dtype is None else dtype)


@aten("fft_rfftfreq.default")
def rfftfreq(n, d=1.0, dtype=None):
    return jnp.fft.rfftfreq(n, d).astype(default_dtype() if dtype is None else dtype)


@aten("linspace.default")
def linspace(start, end, steps, dtype=None):
    return jnp.linspace(start, end, steps, dtype=default_dtype() if dtype is None else dtype)


def _dtype_for(value):
    if isinstance(value, bool):
        return jnp.bool_
    return canonical("int64") if isinstance(value, int) else default_dtype()
