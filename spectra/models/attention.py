"""Attention whose memory grows with the sequence, and not with its square, in every order of derivative."""

import dataclasses
import math
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spectra.base import arrays
from spectra.base.calls import checked
from spectra.base.errors import StructureError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

BLOCK = 128
"""Rows and columns of a block of logits: large enough for matrix products, small enough for a CPU's cache."""
LARGEST, NUMBERS = 1024, 2**25
"""On other devices a block should occupy all of their cores, and each costs kernels to launch: as many rows
and columns as keep the logits of one block, of all heads and examples, within so many numbers (128 MiB)."""
HIDDEN = -0.7 * float(np.finfo(np.float32).max)
"""Logit of a key that does not count, as in JAX: finite, so that a row of them has a softmax."""


@checked
def attention(
    query: 'Float[Any, "*B T N H"]',
    key: 'Float[Any, "*B S K H"]',
    value: 'Float[Any, "*B S K H"]',
    bias: 'Float[Any, "..."] | None' = None,
    mask: 'Bool[Any, "..."] | None' = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: 'Int[Any, " B"] | None' = None,
    key_value_seq_lengths: 'Int[Any, " B"] | None' = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    block_sizes: tuple[int, int] | None = None,
) -> 'Float[jax.Array, "*B T N H"]':
    """softmax(Q Kᵀ scale + bias) V in linear memory: takes what `jax.nn.dot_product_attention` takes.

    Logits exist only one block at a time: the softmax is accumulated block by block, and every derivative
    recomputes the blocks. So a gradient and a Hessian product (forward over reverse, or reverse over reverse)
    need memory only for the inputs, their derivatives and a few blocks. Blocks that a causal or local mask
    hides are skipped.

    Args:
        query: (B, T, N, H) or (T, N, H), floating.
        key: (B, S, K, H) or (S, K, H); N is a multiple of K, and N / K heads of the query share one.
        value: as `key`.
        bias: added to the logits; broadcastable to (B, N, T, S).
        mask: boolean, True where a key counts; broadcastable to (B, N, T, S).
        scale: of the logits; default 1 / sqrt(H).
        is_causal: a query sees keys up to its own position only.
        query_seq_lengths: (B,); rows beyond these lengths are zero.
        key_value_seq_lengths: (B,); keys beyond these lengths do not count.
        local_window_size: keys that a query sees to its left and right, one number or two.
        implementation: ignored; accepted so that this function can replace JAX's.
        block_sizes: rows (queries) and columns (keys) of a block of logits. By default 128 of each on a CPU;
            elsewhere a power of two from 128 to 1024, the largest with at most 2^25 logits in a block of all
            heads and examples. The platform is that of JAX's default device when the function is traced; pass
            sizes if a program is compiled for another one.

    Returns:
        Array like `query`, in its dtype. The softmax is computed in float32 at least, and in float64 for
        float64 inputs (`jax.nn.dot_product_attention` uses float32 there). A row without any key that counts
        averages all values, as in `jax.nn.dot_product_attention`.

    Raises:
        StructureError: shapes that do not fit together, a mask that is not boolean, or sizes of blocks that
            are not positive.

    Cost: the operations of plain attention, plus those of recomputing its blocks; about half of both with a
    causal mask. Memory O(B N (T + S) H), apart from `bias` and `mask`.

    References:
        Milakov and Gimelshein, arXiv:1805.02867; Rabe and Staats, arXiv:2112.05682.

    Examples:
        >>> import jax, jax.numpy as jnp, spectra
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 300, 4, 8))
        >>> ours = spectra.attention(q, k, v, is_causal=True)
        >>> plain = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        >>> bool(jnp.allclose(ours, plain, atol=1e-5))
        True
    """
    del implementation
    shape = jnp.shape(query)
    query, key, value = (_four(x) for x in (query, key, value))
    bias, mask = (None if x is None else _four(x) for x in (bias, mask))
    _check(query, key, value, bias, mask)
    _check_sizes(block_sizes)
    if 0 in (*query.shape, *key.shape):  # no example, row or key
        return jnp.zeros(shape, value.dtype)
    window = local_window_size
    window = (window, window) if isinstance(window, int) else window
    unhidden = mask is None and query_seq_lengths is None and key_value_seq_lengths is None
    rule = _Rule(query.shape[1], key.shape[1], is_causal, window, unhidden)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if query_seq_lengths is not None:
        seen = jnp.arange(rule.queries) < jnp.asarray(query_seq_lengths)[:, None]
        mask = _both(mask, seen[:, None, :, None])
    if key_value_seq_lengths is not None:
        seen = jnp.arange(rule.keys) < jnp.asarray(key_value_seq_lengths)[:, None]
        mask = _both(mask, seen[:, None, None, :])
    sizes = _block_sizes(_platform(), query.shape[0] * query.shape[2]) if block_sizes is None else block_sizes
    out = _blockwise(rule, query, key, value, bias, mask, scale, sizes)
    if query_seq_lengths is not None:
        seen = jnp.arange(rule.queries) < jnp.asarray(query_seq_lengths)[:, None]
        out = jnp.where(seen[:, :, None, None], out, 0)
    return out.reshape(shape)


def _platform() -> str:
    """Where what is traced now will run, unless its arguments lie elsewhere."""
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def _block_sizes(platform: str, rows: int) -> tuple[int, int]:
    """Rows and columns of a block of which there are `rows` side by side, one for each head and example."""
    size = BLOCK
    while platform != "cpu" and size < LARGEST and rows * (2 * size) ** 2 <= NUMBERS:
        size *= 2
    return size, size


@dataclasses.dataclass(frozen=True)
class _Rule:
    """Which keys a query sees by their positions."""

    queries: int
    keys: int
    is_causal: bool
    window: tuple[int, int] | None
    open: bool  # whether nothing else hides keys

    @property
    def skips(self) -> bool:
        """Whether hidden blocks may be left out: a row that sees nothing averages over all keys instead."""
        if not self.open or (self.window is None and not self.is_causal):
            return False
        return self.window is None or (min(self.window) >= 0 and self.queries <= self.keys)

    def sees(self, rows: jax.Array, columns: jax.Array) -> jax.Array | None:
        """(t, s) mask of a block; None where all is seen."""
        seen = None
        if self.is_causal:
            seen = columns <= rows[:, None]
        if self.window is not None:
            left, right = self.window
            near = (columns >= rows[:, None] - left) & (columns <= rows[:, None] + right)
            seen = near if seen is None else seen & near
        return seen

    def sees_some(self, rows: jax.Array, columns: jax.Array) -> jax.Array:
        """Whether anything of a block may be seen, from its corners."""
        some = jnp.array(True)
        if self.is_causal:
            some &= columns[0] <= rows[-1]
        if self.window is not None:
            left, right = self.window
            some &= (columns[-1] >= rows[0] - left) & (columns[0] <= rows[-1] + right)
        return some


def _blockwise(rule: _Rule, query, key, value, bias, mask, scale, block_sizes) -> jax.Array:
    batch, _, heads, width = query.shape
    groups = key.shape[2]
    t, s = (min(size, n) for size, n in zip(block_sizes, (rule.queries, rule.keys), strict=True))
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    query = query.reshape(batch, -1, groups, heads // groups, width)
    bias, mask = (None if x is None else _grouped(x, groups) for x in (bias, mask))
    columns = jnp.arange(-(-rule.keys // s) * s).reshape(-1, s)
    keys, values = (_cut(x, 1, rule.keys, s) for x in (key, value))

    @partial(jax.checkpoint, prevent_cse=False)
    def one(piece):
        q, rows, bias, mask = piece
        start = (
            jnp.full((batch, groups, heads // groups, t), HIDDEN, dtype),
            jnp.zeros((batch, groups, heads // groups, t), dtype),
            jnp.zeros((batch, groups, heads // groups, t, width), dtype),
        )
        start = arrays.carried(start, *(x for x in (q, keys, values, bias, mask) if x is not None))

        @partial(jax.checkpoint, prevent_cse=False)
        def body(carry, piece):
            if not rule.skips:
                return _add(rule, carry, q, rows, piece, scale), None
            some = rule.sees_some(rows, piece[2])
            return lax.cond(some, lambda: _add(rule, carry, q, rows, piece, scale), lambda: carry), None

        pieces = (keys, values, columns, _cut(bias, 4, rule.keys, s), _cut(mask, 4, rule.keys, s))
        (_, total, out), _ = lax.scan(body, start, pieces)
        return out / total[..., None]

    rows = jnp.arange(-(-rule.queries // t) * t).reshape(-1, t)
    query, bias, mask = (_cut(x, axis, rule.queries, t) for x, axis in ((query, 1), (bias, 3), (mask, 3)))
    out = lax.map(one, (query, rows, bias, mask))
    out = jnp.moveaxis(out, (0, 4), (1, 2))  # blocks, b, k, g, t, h -> b, blocks, t, k, g, h
    return out.reshape(batch, -1, heads, width)[:, : rule.queries].astype(value.dtype)


def _add(rule: _Rule, carry, q, rows, piece, scale):
    """The running maximum, sum and weighted values of a block of rows, with one more block of keys."""
    highest, total, out = carry
    k, v, columns, bias, mask = piece
    logits = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=total.dtype)
    logits = logits * jnp.asarray(scale, logits.dtype)
    if bias is not None:
        # No lower than what is hidden: a row of nothing else then has a softmax, as it has written out.
        logits = logits + jnp.maximum(bias.astype(logits.dtype), HIDDEN)
    for seen in (mask, rule.sees(rows, columns)):
        if seen is not None:
            logits = jnp.where(seen, logits, HIDDEN)
    padding = rule.keys % columns.size != 0
    if padding:
        logits = jnp.where(columns < rule.keys, logits, HIDDEN)
    # The maximum cancels from the quotient: it is no part of any derivative.
    highest, before = lax.stop_gradient(jnp.maximum(highest, logits.max(axis=-1))), highest
    weights, kept = jnp.exp(logits - highest[..., None]), jnp.exp(before - highest)
    if padding:
        weights = jnp.where(columns < rule.keys, weights, 0)
    added = jnp.einsum("bkgts,bskh->bkgth", weights.astype(v.dtype), v, preferred_element_type=out.dtype)
    return highest, total * kept + weights.sum(axis=-1), out * kept[..., None] + added


def _cut(x: jax.Array | None, axis: int, n: int, size: int) -> jax.Array | None:
    """Blocks along an axis as a new leading one, the last one padded."""
    if x is None:
        return None
    count = -(-n // size)
    if x.shape[axis] == 1:  # the same for all of them
        return jnp.broadcast_to(x, (count, *x.shape))
    x = jnp.pad(x, [(0, count * size - n if i == axis else 0) for i in range(x.ndim)])
    return jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)


def _grouped(x: jax.Array, groups: int) -> jax.Array:
    b, n, t, s = x.shape
    return x.reshape(b, 1, 1, t, s) if n == 1 else x.reshape(b, groups, n // groups, t, s)


def _both(mask: jax.Array | None, seen: jax.Array) -> jax.Array:
    return seen if mask is None else mask & seen


def _four(x: Any) -> jax.Array:
    x = jnp.asarray(x)
    return x.reshape((1,) * (4 - x.ndim) + x.shape)


def _check(query, key, value, bias, mask) -> None:
    if not query.ndim == key.ndim == 4 or key.shape != value.shape or not _fit(query.shape, key.shape):
        raise StructureError(
            f"attention of query {query.shape}, key {key.shape}, value {value.shape}: give (B, T, N, H) and "
            "twice (B, S, K, H), with N a multiple of K."
        )
    whole = (*query.shape[::2], query.shape[1], key.shape[1])
    for name, x in (("bias", bias), ("mask", mask)):
        if x is not None and (
            x.ndim != 4 or any(a not in (1, b) for a, b in zip(x.shape, whole, strict=True))
        ):
            raise StructureError(f"{name} of shape {x.shape} does not broadcast to (B, N, T, S) = {whole}.")
    if mask is not None and mask.dtype != bool:
        raise StructureError(f"mask is {mask.dtype}: give booleans, or add the numbers as bias.")


def _check_sizes(sizes: Any) -> None:
    if sizes is None:
        return
    pair = tuple(sizes) if isinstance(sizes, (tuple, list)) else ()
    if len(pair) != 2 or not all(isinstance(size, int) and size > 0 for size in pair):
        raise StructureError(f"block_sizes={sizes!r}: give two positive integers, rows and columns.")


def _fit(query: tuple[int, ...], key: tuple[int, ...]) -> bool:
    """Whether batches and widths are the same, and heads of the query a multiple of the key's."""
    return query[::3] == key[::3] and key[2] > 0 and query[2] % key[2] == 0
