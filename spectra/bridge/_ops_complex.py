"""ATen operators that make complex numbers, take them apart or conjugate them."""

import jax.numpy as jnp
from jax import lax

from spectra.bridge._promotion import broadcast, category, promote_float
from spectra.bridge._registry import aten, register


@aten("complex.default")
def complex_(real, imag):
    return lax.complex(*broadcast(real, imag))


@aten("polar.default")
def polar(abs, angle):
    return lax.complex(*broadcast(abs * jnp.cos(angle), abs * jnp.sin(angle)))


@aten("view_as_real.default", "view_as_real_copy.default")
def view_as_real(self):
    return jnp.stack([jnp.real(self), jnp.imag(self)], -1)


@aten("view_as_complex.default", "view_as_complex_copy.default")
def view_as_complex(self):
    return lax.complex(self[..., 0], self[..., 1])


@aten("real.default")
def real(self):
    return jnp.real(self)


@aten("imag.default")
def imag(self):
    return jnp.imag(self)


@aten("_conj.default", "_conj_copy.default", "_conj_physical.default", "conj_physical.default")
def conjugate(self):
    return jnp.conj(self) if category(self.dtype) == 3 else self


register("prims.conj_physical.default")(conjugate)


# PyTorch marks a view as conjugated or negated; here the numbers themselves are, at once.
@aten("_neg_view.default", "_neg_view_copy.default")
def negated(self):
    return -self


@aten("resolve_conj.default", "resolve_neg.default")
def resolved(self):
    return self


@aten("angle.default")
def angle(self):
    """The argument; of a real number 0 or π. Its derivative at 0, and of real numbers, is 0."""
    self = promote_float(self)[0]
    if category(self.dtype) == 3:
        safe = jnp.where(self == 0, jnp.ones_like(self), self)
        return jnp.where(self == 0, lax.stop_gradient(jnp.angle(self)), jnp.angle(safe))
    value = jnp.where(jnp.signbit(self) & (self != 0), jnp.pi, 0.0).astype(self.dtype)
    return jnp.where(jnp.isnan(self), self, value)
