"""Matrix products, einsum and embedding bags.

No precision is set here: an outer `jax.default_matmul_precision` decides.
"""

import re

import jax
import jax.numpy as jnp

from spectra.bridge._errors import BridgeError
from spectra.bridge._ops_index import read
from spectra.bridge._promotion import cast
from spectra.bridge._registry import aten


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
