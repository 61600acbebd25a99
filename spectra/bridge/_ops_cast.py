"""ATen operators that copy or cast; the stop of gradients."""

import jax.numpy as jnp
from jax import lax

from spectra.bridge._promotion import cast, category, is_float
from spectra.bridge._registry import aten, register


@aten("_to_copy.default", "to.dtype")
def to_copy(self, dtype=None):
    if dtype is None or self.dtype == dtype:
        return self
    if category(self.dtype) == 3 and category(dtype) < 3:
        self = jnp.real(self)
    return cast(self, dtype)


@aten("clone.default", "alias.default", "contiguous.default", "lift_fresh_copy.default")
def identity(self):
    return self


@aten("copy.default")
def copy(self, src):
    return jnp.broadcast_to(cast(src, self.dtype), self.shape)


@register("spectra.stop_gradient")
def stop_gradient(self):
    """`Tensor.detach()` and results computed under `torch.no_grad()`."""
    return lax.stop_gradient(self) if is_float(self) else self
