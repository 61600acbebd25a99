"""Normalisation layers. Sums run in float32 at least, as PyTorch's do."""

import jax.numpy as jnp
from jax import lax

from spectra.bridge._promotion import cast
from spectra.bridge._registry import aten


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
