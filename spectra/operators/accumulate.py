"""Weighted means over the parts of a data set: microbatches under `lax.scan`, streams from the host."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from spectra import _tree
from spectra.data import batch_size

PyTree = Any
WeightFn = Callable[[PyTree], Any]


def mean_over_microbatches(
    fn: Callable[[PyTree], PyTree],
    batch: PyTree,
    microbatch: int | None,
    weight_fn: WeightFn | None,
) -> PyTree:
    """Σ w_b fn(b) / Σ w_b over pieces of at most `microbatch` examples; w_b counts examples by default.

    Full pieces run under `lax.scan`, so the program and the peak memory are those of one piece; what is
    left over runs as one smaller piece with its own weight.
    """
    n = batch_size(batch)
    if microbatch is None or microbatch >= n:
        return fn(batch)
    weight = weight_fn or batch_size
    pieces, last = _cut(batch, microbatch)

    def weighted(piece):
        w = jnp.asarray(weight(piece))
        w = w.astype(jnp.promote_types(w.dtype, jnp.float32))

        def value(piece):
            return jax.tree.map(lambda x: w.astype(x.dtype) * x, fn(piece))

        if weight_fn is None:
            return w, value(piece)
        # A piece of padding only has weight zero and may have no mean at all (0 / 0): skip it.
        shapes = jax.eval_shape(value, piece)
        nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return w, lax.cond(w > 0, value, lambda _: nothing, piece)

    def body(total, piece):
        return jax.tree.map(jnp.add, total, weighted(piece)), None

    first = jax.tree.map(lambda x: x[0], pieces)
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(weighted, first))
    total, _ = lax.scan(body, zero, pieces)
    if last is not None:
        total = jax.tree.map(jnp.add, total, weighted(last))
    weights, value = total
    return jax.tree.map(lambda x: x / weights.astype(x.dtype), value)


def map_microbatches(fn: Callable[[PyTree], PyTree], batch: PyTree, microbatch: int | None) -> PyTree:
    """fn of the batch, for a function that treats examples one by one, a piece at a time."""
    n = batch_size(batch)
    if microbatch is None or microbatch >= n:
        return fn(batch)
    pieces, last = _cut(batch, microbatch)
    parts = [jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), lax.map(fn, pieces))]
    if last is not None:
        parts.append(fn(last))
    return jax.tree.map(lambda *ys: jnp.concatenate(ys), *parts)


def _cut(batch: PyTree, size: int) -> tuple[PyTree, PyTree | None]:
    """Full pieces stacked along a new leading axis, and what is left over, or None."""
    steps, rest = divmod(batch_size(batch), size)
    pieces = jax.tree.map(lambda x: x[: steps * size].reshape(steps, size, *x.shape[1:]), batch)
    return pieces, jax.tree.map(lambda x: x[steps * size :], batch) if rest else None


def weighted_sum(parts: Iterable[tuple[float, PyTree]]) -> PyTree:
    """Σ w x over (w, x), in the order of the stream, with at most two parts in flight.

    Products are dispatched without waiting, so the next batch is read while the device works; without
    a bound a fast source would queue all its batches in the device's memory.
    """
    total = None
    for weight, part in parts:
        before = total
        total = _multiple(weight, part) if total is None else _add(weight, part, total)
        jax.block_until_ready(total if _shares_threads(total) else before)
    return total


def _shares_threads(tree: PyTree) -> bool:
    """Whether several devices of one CPU hold an array: their collectives need a thread each, and two
    programs at once can leave them waiting for one another."""
    if _tree.is_traced(tree):
        return False
    devices = jax.tree.leaves(tree)[0].sharding.addressable_devices
    return len(devices) > 1 and next(iter(devices)).platform == "cpu"


_multiple = jax.jit(_tree.scale)


@jax.jit
def _add(weight, part, total):
    return _tree.axpy(weight, part, total)
