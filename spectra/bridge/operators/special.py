"""Special functions, polynomials, bits of numbers, complex numbers, Fourier transforms."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy import special

from spectra.bridge.dtypes import broadcast, cast, category, promote, promote_float
from spectra.bridge.errors import BridgeError
from spectra.bridge.operators.registry import aten, register
from spectra.bridge.operators.shape import axes_of

MAX_DEGREE = 256  # of a polynomial: each degree is one step of an unrolled recurrence

_UNARY = {
    "i0": special.i0,
    "special_i0e": special.i0e,
    "special_i1": special.i1,
    "special_i1e": special.i1e,
    "special_modified_bessel_i0": special.i0,
    "special_modified_bessel_i1": special.i1,
    "special_ndtri": special.ndtri,
    "special_spherical_bessel_j0": lambda x: jnp.sinc(x / jnp.pi),
}


def _register_unary(name, function):
    @aten(f"{name}.default")
    def unary(self):
        return function(promote_float(self)[0])


for _name, _function in _UNARY.items():
    _register_unary(_name, _function)


@aten("igamma.default")
def igamma(self, other):
    return lax.igamma(*broadcast(*promote_float(self, other)))


@aten("igammac.default")
def igammac(self, other):
    return lax.igammac(*broadcast(*promote_float(self, other)))


@aten("special_zeta.default", "special_zeta.other_scalar", "special_zeta.self_scalar")
def zeta(self, other):
    return lax.zeta(*broadcast(*promote_float(self, other)))


@aten("polygamma.default")
def polygamma(n, self):
    """The n-th derivative of digamma."""
    if not 0 <= n <= MAX_DEGREE:
        raise BridgeError(f"polygamma needs an order from 0 to {MAX_DEGREE}, got {n}")
    x = promote_float(self)[0]
    if n == 0:
        return lax.digamma(x)
    return lax.polygamma(jnp.full_like(x, n), x)


# Up to here exp(x²)·erfc(x) loses fewer than 2·25 roundings; beyond, 40 terms of the continued fraction
# (Abramowitz and Stegun 7.1.14) leave less than one.
_ERFCX_SPLIT, _ERFCX_TERMS = 5.0, 40


@jax.custom_jvp
def _erfcx(x):
    near = jnp.minimum(x, _ERFCX_SPLIT)
    far = tail = jnp.maximum(x, _ERFCX_SPLIT)
    for k in range(_ERFCX_TERMS, 0, -1):
        tail = far + (k / 2) / tail
    return jnp.where(
        x < _ERFCX_SPLIT, jnp.exp(near * near) * lax.erfc(near), 1 / (jnp.sqrt(jnp.pi).astype(x.dtype) * tail)
    )


@_erfcx.defjvp
def _(primals, tangents):
    (x,), (dx,) = primals, tangents
    y = _erfcx(x)
    return y, (2 * x * y - 2 / jnp.sqrt(jnp.pi).astype(x.dtype)) * dx


@aten("special_erfcx.default")
def erfcx(self):
    return _erfcx(promote_float(self)[0])


@aten("special_log_ndtr.default")
def log_ndtr(self):
    """log Φ; JAX's own loses digits where Φ is close to 1."""
    t = promote_float(self)[0] * 0.5**0.5
    low, high = jnp.minimum(t, -1), jnp.maximum(t, -1)
    return jnp.where(t < -1, jnp.log(_erfcx(-low) / 2) - low * low, jnp.log1p(-lax.erfc(high) / 2))


def _degree(n) -> int:
    if isinstance(n, jax.Array) or int(n) != n or n > MAX_DEGREE:
        raise BridgeError(f"a polynomial needs a whole number as its degree, at most {MAX_DEGREE}, got {n}")
    return int(n)


def _chebyshev(first, shifted=False):
    """P₀ = 1, P₁ = first(x), P₊ = 2·x·P - P₋."""

    def recurrence(x, n):
        x = 2 * x - 1 if shifted else x
        return first(x), lambda k, p, q: 2 * x * p - q

    return recurrence


# name: (P₁, and P of degree k + 1 from P of k and of k - 1)
_POLYNOMIALS = {
    "chebyshev_polynomial_t": _chebyshev(lambda x: x),
    "chebyshev_polynomial_u": _chebyshev(lambda x: 2 * x),
    "chebyshev_polynomial_v": _chebyshev(lambda x: 2 * x - 1),
    "chebyshev_polynomial_w": _chebyshev(lambda x: 2 * x + 1),
    "shifted_chebyshev_polynomial_t": _chebyshev(lambda x: x, True),
    "shifted_chebyshev_polynomial_u": _chebyshev(lambda x: 2 * x, True),
    "shifted_chebyshev_polynomial_v": _chebyshev(lambda x: 2 * x - 1, True),
    "shifted_chebyshev_polynomial_w": _chebyshev(lambda x: 2 * x + 1, True),
    "hermite_polynomial_h": lambda x, n: (2 * x, lambda k, p, q: 2 * (x * p - k * q)),
    "hermite_polynomial_he": lambda x, n: (x, lambda k, p, q: x * p - k * q),
    "laguerre_polynomial_l": lambda x, n: (1 - x, lambda k, p, q: ((2 * k + 1 - x) * p - k * q) / (k + 1)),
    "legendre_polynomial_p": lambda x, n: (x, lambda k, p, q: ((2 * k + 1) * x * p - k * q) / (k + 1)),
}


def _register_polynomial(name, recurrence):
    @aten(f"special_{name}.n_scalar")
    def polynomial(x, n):
        x, degree = promote_float(x)[0], _degree(n)
        if degree < 0:
            return jnp.zeros_like(x)
        before = jnp.ones_like(x)
        value, step = recurrence(x, degree)
        for k in range(1, degree):
            before, value = value, step(k, value, before)
        return value if degree else before


for _name, _function in _POLYNOMIALS.items():
    _register_polynomial(_name, _function)


@aten("gcd.default")
def gcd(self, other):
    return jnp.gcd(*promote(self, other))


@aten("lcm.default")
def lcm(self, other):
    return jnp.lcm(*promote(self, other))


@aten("frexp.Tensor")
def frexp(self):
    """Mantissa and exponent; the exponent is a constant to derivatives."""
    exponent = jnp.frexp(lax.stop_gradient(self))[1]
    # Two factors: the reciprocal of the smallest numbers' power of two would overflow.
    half = exponent // 2
    one = jnp.ones((), self.dtype)
    mantissa = self * jnp.ldexp(one, -half) * jnp.ldexp(one, half - exponent)
    return jnp.where(jnp.isfinite(self), mantissa, self), cast(exponent, jnp.int32)


@jax.custom_jvp
def _nextafter(x, y):
    return jnp.nextafter(x, y)


@_nextafter.defjvp
def _(primals, tangents):
    """JAX has no rule for it. PyTorch's is that of x alone: 1 where it moves, 0 where x = y."""
    x, y = primals
    return _nextafter(x, y), jnp.where(x == y, 0, tangents[0])


@aten("nextafter.default")
def nextafter(self, other):
    return _nextafter(*broadcast(*promote(self, other)))


@aten("signbit.default")
def signbit(self):
    return jnp.signbit(self) if jnp.issubdtype(self.dtype, jnp.floating) else self < 0


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
