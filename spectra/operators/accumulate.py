"""Weighted means over the parts of a data set: microbatches under `lax.scan`, streams from the host."""

import contextlib
import time
from collections.abc import Callable, Generator, Iterable
from contextvars import ContextVar
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from spectra.base import programs, trees
from spectra.base.trees import PyTree
from spectra.operators.batches import Shared, batch_size, owned_leaves, replace_owned, rows, weigh

WeightFn = Callable[[PyTree], Any]
Sum = tuple[PyTree, PyTree]
"""A rounded sum, and what rounding has taken from it."""


def mean_over_microbatches(
    fn: Callable[[PyTree], PyTree],
    batch: PyTree,
    microbatch: int | None,
    weight_fn: WeightFn | None,
    shared: Shared = None,
) -> PyTree:
    """Σ w_b fn(b) / Σ w_b over pieces of at most `microbatch` examples; w_b counts examples by default.

    Full pieces run under `lax.scan`, so the program and the peak memory are those of one piece; what is
    left over runs as one smaller piece with its own weight. Every piece has all of the `shared` leaves.
    """
    if microbatch is None or microbatch >= batch_size(batch, shared):
        return fn(batch)
    weight = partial(batch_size, shared=shared) if weight_fn is None else partial(weigh, weight_fn)
    cut = Cut(batch, microbatch, shared)

    def weighted(piece: PyTree) -> tuple[PyTree, Any]:
        w = jnp.asarray(weight(piece))
        w = w.astype(jnp.promote_types(w.dtype, jnp.float32))

        def value(piece: PyTree) -> PyTree:
            return jax.tree.map(lambda x: w.astype(x.dtype) * x, fn(piece))

        if weight_fn is None:
            return w, value(piece)
        # A piece of padding only has weight zero and may have no mean at all (0 / 0): skip it.
        shapes = jax.eval_shape(value, piece)
        nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return w, lax.cond(w > 0, value, lambda _: nothing, piece)

    def body(total: PyTree, piece: PyTree) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, weighted(cut.piece(piece))), None

    first = cut.piece([x[0] for x in cut.columns])
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(weighted, first))
    total, _ = lax.scan(body, zero, cut.columns)
    if cut.last is not None:
        total = jax.tree.map(jnp.add, total, weighted(cut.last))
    weights, value = total
    return jax.tree.map(lambda x: x / weights.astype(x.dtype), value)


def map_microbatches(
    fn: Callable[[PyTree, jax.Array], PyTree],
    batch: PyTree,
    keys: jax.Array,
    microbatch: int | None,
    shared: Shared = None,
) -> PyTree:
    """fn of the batch and a key for each example, for a function that treats examples one by one."""
    if microbatch is None or microbatch >= batch_size(batch, shared):
        return fn(batch, keys)
    cut = Cut(batch, microbatch, shared)
    even = len(keys) // microbatch * microbatch
    columns = cut.columns, keys[:even].reshape(-1, microbatch)
    mapped = lax.map(lambda piece: fn(cut.piece(piece[0]), piece[1]), columns)
    parts = [jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), mapped)]
    if cut.last is not None:
        parts.append(fn(cut.last, keys[even:]))
    return jax.tree.map(lambda *ys: jnp.concatenate(ys), *parts)


class Cut:
    """A batch in pieces of `size` examples: what a loop runs over, and how a piece is put together.

    `columns` are the leaves that examples own, full pieces along a new leading axis; `last` is the batch
    that is left over, or None.
    """

    def __init__(self, batch: PyTree, size: int, shared: Shared):
        n = batch_size(batch, shared)
        steps, rest = divmod(n, size)
        even = steps * size
        self._batch, self._shared = batch, shared
        self.columns = [x[:even].reshape(steps, size, *x.shape[1:]) for x in owned_leaves(batch, shared)]
        self.last = rows(batch, even, n, shared) if rest else None

    def piece(self, columns: list[jax.Array]) -> PyTree:
        """The batch with these in place of the leaves that examples own."""
        return replace_owned(self._batch, self._shared, columns)


class Passes:
    """The passes over streams within one product: how far each is, so that a run can end between batches.

    Args:
        sums: batches added and their sum for each pass, in the order in which the product makes them; where a
            run goes on inside a product, those of the run before.
        look: called between batches with the sums and the seconds since the last call; what it returns, in
            place of the seconds, decides after how many batches it is called again.
        pace: seconds that should lie between two calls.
    """

    def __init__(
        self,
        sums: list[tuple[int, Sum]],
        look: Callable[[list[tuple[int, Sum]], float], float],
        pace: float,
    ):
        self.sums = list(sums)
        self._look, self._pace = look, pace
        self._begun = self._batches = 0
        self._stride, self._looked = 1, time.monotonic()

    @contextlib.contextmanager
    def observed(self) -> Generator[None]:
        """Every `weighted_sum` inside is one of the passes."""
        token = _observer.set(self)
        try:
            yield
        finally:
            _observer.reset(token)

    def begin(self) -> tuple[int, Sum | None]:
        """Batches that the next pass has behind it, and their sum."""
        self._begun += 1
        return self.sums[self._begun - 1] if len(self.sums) >= self._begun else (0, None)

    def after(self, count: int, total: Sum) -> None:
        """Note a batch of the pass under way."""
        self.sums[self._begun - 1 :] = [(count, total)]
        self._batches += 1
        if self._batches < self._stride:
            return
        seconds = self._look(self.sums, time.monotonic() - self._looked)
        self._stride = max(1, int(self._pace * self._batches / max(seconds, 1e-9)))
        self._batches, self._looked = 0, time.monotonic()


_observer: ContextVar[Passes | None] = ContextVar("passes", default=None)


def weighted_sum(fn: Callable[[Any], PyTree], pieces: Iterable[tuple[float, Any]]) -> PyTree:
    """Σ w fn(x) over (w, x), in the order of the stream, with at most two parts in flight.

    Products are dispatched without waiting, so the next batch is read while the device works; without
    a bound a fast source would queue all its batches in the device's memory. What a saved pass has behind
    it is read, since streams cannot skip, and not computed again.

    What rounding takes from the sum is added at the end: of thousands of batches that would be several times
    the precision of a product, and a second sum in float64 of the same batches would not show it.
    """
    passes = _observer.get()
    done, total = passes.begin() if passes else (0, None)
    before = None
    for count, (weight, piece) in enumerate(pieces, start=1):
        if count <= done:
            continue
        part = fn(piece)
        # What vmap has stacked is no place for what is not: nothing is lost of the first part, of any vector.
        add = _add if trees.is_traced(part) else _add_in_place
        total, added = _first(weight, part) if total is None else add(weight, part, total)
        jax.block_until_ready(total if _shares_threads(total) else before)
        before = added
        if passes:
            passes.after(count, total)
    return total if total is None else _whole(*total)


def _shares_threads(tree: PyTree) -> bool:
    """Whether several devices of one CPU hold an array: their collectives need a thread each, and two
    programs at once can leave them waiting for one another."""
    if trees.is_traced(tree):
        return False
    devices = jax.tree.leaves(tree)[0].sharding.addressable_devices
    return len(devices) > 1 and next(iter(devices)).platform == "cpu"


_ADDED = 0.0
"""What a program returns beside a sum, to be waited for: the next part is added in place of the sum."""


@programs.jit
def _first(weight: Any, part: PyTree) -> tuple[Sum, Any]:
    total = trees.scale(weight, part)
    return (total, jax.tree.map(jnp.zeros_like, total)), _ADDED


def _sums(weight: Any, part: PyTree, total: Sum) -> tuple[Sum, Any]:
    """The rounded sum, and what rounding has taken from it so far (Knuth's two-sum)."""

    def one(x: jax.Array, old: jax.Array, rest: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = (weight * x).astype(old.dtype)
        new = old + x
        added = new - old
        return new, rest + ((old - (new - added)) + (x - added))

    leaves, treedef = jax.tree.flatten(total[0])
    pairs = map(one, jax.tree.leaves(part), leaves, jax.tree.leaves(total[1]))
    sums, rests = zip(*pairs, strict=True)
    return (treedef.unflatten(sums), treedef.unflatten(rests)), _ADDED


_add = programs.jit(_sums)
_add_in_place = programs.jit(_sums, donate_argnames="total")


@programs.jit
def _whole(total: PyTree, lost: PyTree) -> PyTree:
    return jax.tree.map(lambda x, rest: jnp.where(jnp.isfinite(x), x + rest, x), total, lost)
