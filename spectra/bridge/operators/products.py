"""Matrix products: plain, grouped, einsum, embedding bags, and scaled dot product attention.

Attention is written out for short sequences, and goes in blocks for long ones.
"""

import functools
import re

import jax
import jax.numpy as jnp
from jax import lax

from spectra.bridge.dtypes import cast
from spectra.bridge.errors import BridgeError
from spectra.bridge.operators.index import read
from spectra.bridge.operators.registry import aten, register
from spectra.models.attention import attention as blockwise


@aten("mm.default", "bmm.default", "matmul.default", "mv.default", "dot.default")
def matmul(self, other):
    return jnp.matmul(self, other)


@aten("linear.default")
def linear(input, weight, bias=None):
    out = jnp.matmul(input, weight.T)
    return out if bias is None else out + bias


def _scaled(x, factor):
    return x if factor == 1 else x * cast(factor, x.dtype)


@aten("addmm.default", "baddbmm.default", "addmv.default")
def addmm(self, mat1, mat2, beta=1, alpha=1):
    product = _scaled(jnp.matmul(mat1, mat2), alpha)
    # With beta = 0 PyTorch ignores the first operand, NaN included.
    return product if beta == 0 else _scaled(self, beta) + product


@aten("addbmm.default")
def addbmm(self, batch1, batch2, beta=1, alpha=1):
    return _scaled(self, beta) + _scaled(jnp.sum(jnp.matmul(batch1, batch2), 0), alpha)


@aten("addr.default")
def addr(self, vec1, vec2, beta=1, alpha=1):
    return _scaled(self, beta) + _scaled(jnp.outer(vec1, vec2), alpha)


@aten("_trilinear.default")
def trilinear(i1, i2, i3, expand1, expand2, expand3, sumdim, unroll_dim=1):
    operands = []
    for x, axes in ((i1, expand1), (i2, expand2), (i3, expand3)):
        for axis in sorted(axes):
            x = jnp.expand_dims(x, axis)
        operands.append(x)
    letters = "abcdefghijklmnopqrstuvwxyz"
    # Named axes instead of a broadcast product: the sum never materialises.
    ndim = operands[0].ndim
    if any(x.ndim != ndim for x in operands):
        raise BridgeError("_trilinear operands expand to different numbers of dimensions")
    terms, arrays = [], []
    for x, axes in zip(operands, (expand1, expand2, expand3), strict=True):
        terms.append("".join(letters[a] for a in range(ndim) if a not in axes))
        arrays.append(jnp.squeeze(x, tuple(axes)))
    out = "".join(letters[a] for a in range(ndim) if a not in sumdim)
    return jnp.einsum(f"{','.join(terms)}->{out}", *arrays)


_EQUATION = re.compile(r"[A-Za-z.,\->\s]{1,512}")


@aten("einsum.default")
def einsum(equation, tensors, path=None):
    """`path` is PyTorch's order of contractions; XLA chooses its own."""
    if not _EQUATION.fullmatch(equation):
        raise BridgeError(f"not an einsum equation: {equation[:80]!r}")
    return jnp.einsum(equation, *tensors)


@aten("_embedding_bag.default", "_embedding_bag_forward_only.default")
def embedding_bag(
    weight,
    indices,
    offsets,
    scale_grad_by_freq=False,
    mode=0,
    sparse=False,
    per_sample_weights=None,
    include_last_offset=False,
    padding_idx=-1,
):
    """Sum (mode 0), average (1) or take the maximum (2) of the rows of each bag.

    Only the first of PyTorch's four outputs is computed: the others serve its own backward.
    """
    if scale_grad_by_freq:
        raise BridgeError(
            "scale_grad_by_freq=True makes PyTorch's gradient another one than the loss's: switch it off"
        )
    bags = offsets.shape[0] - (1 if include_last_offset else 0)
    starts = offsets[:bags]
    bag = jnp.searchsorted(starts, jnp.arange(indices.shape[0]), side="right") - 1
    keep = indices != padding_idx
    rows = read(weight, indices)
    if mode == 2:
        rows = jnp.where(keep[:, None], rows, -jnp.inf)
        best = jax.ops.segment_max(rows, bag, bags)
        return (jnp.where(jnp.isneginf(best), 0, best),)
    if mode not in (0, 1):
        raise BridgeError(f"embedding bag mode must be 0, 1 or 2, got {mode}")
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[:, None]
    total = jax.ops.segment_sum(jnp.where(keep[:, None], rows, 0), bag, bags)
    if mode == 1:
        count = jax.ops.segment_sum(keep.astype(total.dtype), bag, bags)
        total = total / jnp.maximum(count, 1)[:, None]
    return (total,)


def _sizes(offs):
    return jnp.diff(offs, prepend=jnp.zeros(1, offs.dtype))


@register("transformers.grouped_mm_fallback.default")
def grouped_rows(input, weight, offs):
    """Rows `offs[g - 1]` to `offs[g]` of (rows, inside) times `weight[g]`; 0 beyond the last group."""
    return lax.ragged_dot(input, weight, cast(_sizes(offs), jnp.int32))


@aten("_grouped_mm.default")
def grouped_mm(self, mat2, offs=None, bias=None, out_dtype=None):
    """Groups of rows, of columns or of the summed axis, by which of the operands are stacks of matrices."""
    if bias is not None:
        raise BridgeError("_grouped_mm with a bias: add it to the result")
    if offs is None:
        out = jnp.matmul(self, mat2)
    elif self.ndim == 2 and mat2.ndim == 3:
        out = grouped_rows(self, mat2, offs)
    elif self.ndim == 3 and mat2.ndim == 2:
        out = grouped_rows(mat2.T, jnp.swapaxes(self, 1, 2), offs).T
    elif self.ndim == mat2.ndim == 2:
        position = jnp.arange(self.shape[1])
        inside = (position >= (offs - _sizes(offs))[:, None]) & (position < offs[:, None])
        out = jnp.einsum("mk,gk,kn->gmn", self, cast(inside, self.dtype), mat2)
    else:
        raise BridgeError(f"_grouped_mm of shapes {self.shape} and {mat2.shape} with offsets")
    return out if out_dtype is None else cast(out, out_dtype)


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
    """With one axis in place of those before the last three."""
    x = x.reshape((1,) * (len(lead) + 3 - x.ndim) + x.shape)
    if any(n != 1 for n in x.shape[:-3]):
        x = jnp.broadcast_to(x, (*lead, *x.shape[-3:]))
    return x.reshape(-1, *x.shape[-3:])
