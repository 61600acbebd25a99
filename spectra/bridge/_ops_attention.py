"""Scaled dot product attention: written out for short sequences, in blocks for long ones.

No precision is set here: an outer `jax.default_matmul_precision` decides.
"""

import functools

import jax
import jax.numpy as jnp

from spectra._attention import attention as blockwise
from spectra.bridge._errors import BridgeError
from spectra.bridge._promotion import cast
from spectra.bridge._registry import aten

LONG = 2**16
"""Logits of one head from which on they are made block by block, and forgotten: memory linear in the sequence
for every derivative, and on a CPU less time as well."""


@aten("scaled_dot_product_attention.default")
def attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """softmax(Q·Kᵀ·scale + mask)·V, a row without any allowed key giving zeros.

    A boolean mask is True where attention is allowed, a floating one is added. It is made of
    plain operations, so it has derivatives of every order.
    """
    if dropout_p:
        raise BridgeError("attention dropout draws random numbers; export in evaluation mode")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if query.shape[-2] * key.shape[-2] > LONG and query.shape[-1] == value.shape[-1] and query.ndim >= 3:
        masked = attn_mask is not None and attn_mask.dtype == jnp.bool_
        bias, mask = (None, attn_mask) if masked else (attn_mask, None)
        return in_blocks(query, key, value, bias, mask, is_causal=is_causal, scale=scale, empty=0.0)
    if enable_gqa:
        key, value = (jnp.repeat(x, query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    return _written_out(query, key, value, attn_mask, is_causal, scale)


def _written_out(query, key, value, attn_mask, is_causal, scale):
    query = query if scale == 1 else query * cast(scale, query.dtype)
    logits = jnp.matmul(query, jnp.swapaxes(key, -1, -2))
    if is_causal:
        logits = jnp.where(jnp.tril(jnp.ones(logits.shape[-2:], bool)), logits, -jnp.inf)
    if attn_mask is None:
        return jnp.matmul(jax.nn.softmax(logits, -1), value)
    masked = attn_mask.dtype == jnp.bool_
    logits = jnp.where(attn_mask, logits, -jnp.inf) if masked else logits + attn_mask
    dead = jnp.all(logits == -jnp.inf, -1, keepdims=True)
    # Both selections: the first keeps the softmax of a dead row, and its derivatives, finite.
    weights = jax.nn.softmax(jnp.where(dead, 0, logits), -1)
    return jnp.matmul(jnp.where(dead, 0, weights), value)


def in_blocks(query, key, value, bias, mask, *, scale, empty, is_causal=False):
    """The same block by block; rows without any allowed key hold `empty`, or the mean of all values."""
    lead = jnp.broadcast_shapes(*(x.shape[:-3] for x in (query, key, value)))
    shape = (*lead, *query.shape[-3:])
    query, key, value = (jnp.swapaxes(_flat(x, lead), 1, 2) for x in (query, key, value))
    bias, mask = (None if x is None else _flat(x, lead) for x in (bias, mask))
    allowed = [x for x in (mask, None if bias is None else bias > -jnp.inf) if x is not None]
    if allowed and is_causal:
        allowed.append(jnp.tril(jnp.ones((query.shape[1], key.shape[1]), bool)))
    out = blockwise(query, key, value, bias, mask, scale=scale, is_causal=is_causal)
    out = jnp.swapaxes(out, 1, 2)
    if allowed and empty is not None:
        out = jnp.where(jnp.any(functools.reduce(jnp.logical_and, allowed), -1, keepdims=True), out, empty)
    return out.reshape(shape)


def _flat(x, lead):
    """With one axis in the place of those before the last three."""
    x = x.reshape((1,) * (len(lead) + 3 - x.ndim) + x.shape)
    if any(n != 1 for n in x.shape[:-3]):
        x = jnp.broadcast_to(x, (*lead, *x.shape[-3:]))
    return x.reshape(-1, *x.shape[-3:])
