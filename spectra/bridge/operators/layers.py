"""Activation functions with PyTorch's derivatives at the kinks, and normalisation layers.

Sums run in float32 at least, as PyTorch's do.
"""

import jax
import jax.numpy as jnp
from jax import lax

from spectra.bridge.dtypes import broadcast, cast, promote, promote_float
from spectra.bridge.errors import BridgeError
from spectra.bridge.operators.pointwise import absolute, clamp_inclusive
from spectra.bridge.operators.registry import RANDOM, aten


@aten("hardtanh.default")
def hardtanh(self, min_val=-1.0, max_val=1.0):
    # Unlike clamp, the derivative at the bounds is 0.
    low, high = cast(min_val, self.dtype), cast(max_val, self.dtype)
    return jnp.where(self <= low, low, jnp.where(self >= high, high, self))


@aten("relu.default")
def relu(self):
    # The derivative at 0 is 0, and NaN passes, as in PyTorch.
    return jnp.where(self <= 0, jnp.zeros_like(self), self)


@aten("relu6.default")
def relu6(self):
    return hardtanh(self, 0.0, 6.0)


@aten("leaky_relu.default")
def leaky_relu(self, negative_slope=0.01):
    return jnp.where(self > 0, self, self * cast(negative_slope, self.dtype))


@aten("rrelu_with_noise_functional.default")
def rrelu(self, noise, lower=0.125, upper=1 / 3, training=False):
    if training:
        raise BridgeError(f"rrelu in training: {RANDOM}; export in evaluation mode")
    return leaky_relu(self, (lower + upper) / 2), noise


@aten("prelu.default", "_prelu_kernel.default")
def prelu(self, weight):
    if weight.ndim == 1 and self.ndim > 1:
        weight = weight.reshape((1, -1) + (1,) * (self.ndim - 2))
    # At 0 PyTorch has the slope of the negative side and no second derivative, as in `elu`.
    straight = jnp.where(self > 0, self, self * lax.stop_gradient(weight))
    return jnp.where(self < 0, self * weight, straight)


@aten("elu.default")
def elu(self, alpha=1.0, scale=1.0, input_scale=1.0):
    # The inner selection keeps exp finite where it is not used, so that no derivative is NaN. At 0 PyTorch
    # has the slope of the negative side and no second derivative.
    negative = jnp.where(self < 0, self, jnp.zeros_like(self))
    straight = self * jnp.where(self > 0, scale, alpha * scale * input_scale).astype(self.dtype)
    return jnp.where(self < 0, jnp.expm1(negative * input_scale) * (alpha * scale), straight)


@aten("celu.default")
def celu(self, alpha=1.0):
    return elu(self, alpha, 1.0, 1.0 / alpha)


@aten("selu.default")
def selu(self):
    return elu(self, 1.6732632423543772848170429916717, 1.0507009873554804934193349852946)


@aten("gelu.default")
def gelu(self, approximate="none"):
    if approximate not in ("none", "tanh"):
        raise BridgeError(f"approximate must be 'none' or 'tanh', got {approximate!r}")
    if approximate == "tanh":
        return jax.nn.gelu(self, approximate=True)
    return self * 0.5 * (1.0 + lax.erf(self * 0.70710678118654752440))


@aten("silu.default")
def silu(self):
    return self * jax.nn.sigmoid(self)


@aten("mish.default")
def mish(self):
    return self * jnp.tanh(jax.nn.softplus(self))


@aten("softplus.default")
def softplus(self, beta=1.0, threshold=20.0):
    scaled = self * beta
    safe = jnp.where(scaled > threshold, jnp.zeros_like(self), scaled)
    return jnp.where(scaled > threshold, self, jnp.log1p(jnp.exp(safe)) / beta)


@aten("hardsigmoid.default")
def hardsigmoid(self):
    return hardtanh(self + 3, 0.0, 6.0) / 6


@aten("hardswish.default")
def hardswish(self):
    return self * hardtanh(self + 3, 0.0, 6.0) / 6


@aten("binary_cross_entropy.default")
def binary_cross_entropy(self, target, weight=None, reduction=1):
    x, y = broadcast(*promote_float(self, target))
    total = _binary_cross_entropy(x, y)
    return _reduced(total if weight is None else total * weight, reduction)


# A sigmoid in float32 rounds to 0 and 1. The logarithm's derivative is infinite there and the sigmoid's zero:
# their product would be NaN. As PyTorch's, these three are finite, with its limits.
_SMALLEST_LOG, _SMALLEST = -100.0, 1e-12


@jax.custom_jvp
def _binary_cross_entropy(x, y):
    """-y log x - (1 - y) log(1 - x)."""
    return -y * jnp.maximum(jnp.log(x), _SMALLEST_LOG) - (1 - y) * jnp.maximum(jnp.log1p(-x), _SMALLEST_LOG)


@jax.custom_jvp
def _slope(x, y):
    return (x - y) / jnp.maximum(x * (1 - x), _SMALLEST)


@jax.custom_jvp
def _log_odds(x):
    return jnp.maximum(jnp.log(x), _SMALLEST_LOG) - jnp.maximum(jnp.log1p(-x), _SMALLEST_LOG)


_binary_cross_entropy.defjvps(
    lambda dx, value, x, y: _slope(x, y) * dx,
    lambda dy, value, x, y: -_log_odds(x) * dy,
)
_slope.defjvps(
    lambda dx, value, x, y: (x * x - 2 * x * y + y) / ((x + _SMALLEST) * (1 - x + _SMALLEST)) ** 2 * dx,
    lambda dy, value, x, y: -dy / jnp.maximum(x * (1 - x), _SMALLEST),
)
_log_odds.defjvps(lambda dx, value, x: dx / jnp.maximum(x * (1 - x), _SMALLEST))


def _reduced(values, reduction):
    """PyTorch's numbers for "none", "mean" and "sum"."""
    return values if reduction == 0 else jnp.mean(values) if reduction == 1 else jnp.sum(values)


# Parts of the square itself rather than of |x|², which has no second derivative where x is 0.
@aten("huber_loss.default")
def huber_loss(self, target, reduction=1, delta=1.0):
    x = jnp.subtract(*promote(self, target))
    far = delta * (jnp.abs(x) - 0.5 * delta)
    return _reduced(jnp.where(jnp.abs(x) < delta, 0.5 * x * x, far), reduction)


@aten("smooth_l1_loss.default")
def smooth_l1_loss(self, target, reduction=1, beta=1.0):
    x = jnp.subtract(*promote(self, target))
    if beta == 0:
        return _reduced(absolute(x), reduction)
    return _reduced(jnp.where(jnp.abs(x) < beta, 0.5 * x * x / beta, jnp.abs(x) - 0.5 * beta), reduction)


@aten("threshold.default")
def threshold(self, threshold, value):
    return jnp.where(self <= threshold, cast(value, self.dtype), self)


@aten("logit.default")
def logit(self, eps=None):
    x = promote_float(self)[0]
    x = x if eps is None else clamp_inclusive(x, eps, 1 - eps)
    return jnp.log(x / (1 - x))


def _wide(x):
    return cast(x, jnp.promote_types(x.dtype, jnp.float32))


def _standardise(x, axes, eps):
    """Return (x - mean) / sqrt(var + eps), the mean and the reciprocal root, in a wide dtype."""
    x = _wide(x)
    mean = jnp.mean(x, axes, keepdims=True)
    centred = x - mean
    rstd = lax.rsqrt(jnp.mean(centred * centred, axes, keepdims=True) + eps)
    return centred * rstd, mean, rstd


def _affine(x, weight, bias, shape=None):
    for operand, apply in ((weight, jnp.multiply), (bias, jnp.add)):
        if operand is not None:
            x = apply(x, operand if shape is None else operand.reshape(shape))
    return x


@aten("native_layer_norm.default")
def layer_norm(input, normalized_shape, weight, bias, eps):
    axes = tuple(range(input.ndim - len(normalized_shape), input.ndim))
    out, mean, rstd = _standardise(input, axes, eps)
    return cast(_affine(out, weight, bias), input.dtype), mean, rstd


@aten("_fused_rms_norm.default")
def rms_norm(input, normalized_shape, weight, eps):
    axes = tuple(range(input.ndim - len(normalized_shape), input.ndim))
    x = _wide(input)
    eps = jnp.finfo(x.dtype).eps if eps is None else eps
    rstd = lax.rsqrt(jnp.mean(x * x, axes, keepdims=True) + eps)
    return cast(_affine(x * rstd, weight, None), input.dtype), rstd


@aten("native_group_norm.default")
def group_norm(input, weight, bias, N, C, HxW, group, eps):
    out, mean, rstd = _standardise(input.reshape(N, group, -1), (2,), eps)
    shape = (1, C) + (1,) * (input.ndim - 2)
    out = _affine(out.reshape(input.shape), weight, bias, shape)
    return cast(out, input.dtype), mean.reshape(N, group), rstd.reshape(N, group)


def _channels(x):
    return (1, x.shape[1]) + (1,) * (x.ndim - 2)


@aten("_native_batch_norm_legit_no_training.default")
def batch_norm_inference(input, weight, bias, running_mean, running_var, momentum, eps):
    shape = _channels(input)
    x = _wide(input) - running_mean.reshape(shape)
    out = _affine(x * lax.rsqrt(running_var.reshape(shape) + eps), weight, bias, shape)
    empty = jnp.zeros((0,), input.dtype)
    return cast(out, input.dtype), empty, empty


@aten("_native_batch_norm_legit.no_stats")
def batch_norm_no_stats(input, weight, bias, training, momentum, eps):
    axes = (0, *range(2, input.ndim))
    out, mean, rstd = _standardise(input, axes, eps)
    out = cast(_affine(out, weight, bias, _channels(input)), input.dtype)
    return out, mean.reshape(-1), rstd.reshape(-1)


@aten("_native_batch_norm_legit_functional.default")
def batch_norm_functional(input, weight, bias, running_mean, running_var, training, momentum, eps):
    """Return the updated running statistics too: (1 - momentum)·old + momentum·batch."""
    if not training:
        out = batch_norm_inference(input, weight, bias, running_mean, running_var, momentum, eps)
        return *out, running_mean, running_var
    out, mean, rstd = batch_norm_no_stats(input, weight, bias, training, momentum, eps)
    axes = (0, *range(2, input.ndim))
    variance = jnp.var(_wide(input), axes, ddof=1)
    new_mean = (1 - momentum) * running_mean + momentum * mean
    new_var = (1 - momentum) * running_var + momentum * variance
    return out, mean, rstd, new_mean, new_var
