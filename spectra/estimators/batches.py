"""Disjoint batches of an operator's own data."""

# pyright: reportPrivateUsage=false
# Operators have parts that only this package uses.

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import trees
from spectra.base.errors import DataError, SpectraError
from spectra.base.trees import PyTree
from spectra.estimators import strata
from spectra.operators.base import LinearOperator
from spectra.operators.batches import batch_size, owned_leaves, replace_owned, weigh
from spectra.operators.data import DataOperator
from spectra.operators.means import require_mean
from spectra.operators.streams import Stream

Indices = Sequence[int] | np.ndarray
LEAST = 8
"""Batches below which the spread between them says little."""
LEFT_OVER = 0.02
"""Share of the examples that may go unused, since batches are of one size."""


class Batches(NamedTuple):
    """Disjoint batches: their weights, the operator of each, and the operator of a union of some."""

    weights: np.ndarray  # (b,), sum one
    sizes: np.ndarray  # (b,) examples
    each: Callable[[], Iterator[DataOperator]]
    union: Callable[[Indices], LinearOperator]
    strata: np.ndarray  # (b,) what each was drawn from
    drawn: np.ndarray  # (s,) share of the examples of each stratum that was drawn


def draw_batches(
    op: DataOperator, key: jax.Array, num_batches: int, num_examples: int | None, folds: int
) -> Batches:
    """Batches of equal size of one batch in random order; those of a stream as they come.

    Raises:
        DataError: too few examples or batches.
        SpectraError: `num_examples` with a stream, whose batches are chosen when it is opened.
    """
    if trees.is_traced((op.params, op.data, key)):
        raise SpectraError("batches are drawn on the host: call outside jit, vmap and grad.")
    if op.stream is not None:
        if num_examples is not None:
            raise SpectraError(
                "num_examples is for one batch: of a stream give num_batches= to the operator."
            )
        return _of_stream(op, folds)
    return _of_one_batch(op, key, num_batches, num_examples, folds)


def in_order(op: DataOperator, count: int) -> Batches:
    """Runs of examples, or every count-th batch of a stream: `split_data` with its weights.

    Raises:
        DataError: fewer examples or batches than parts.
    """
    parts = op.split_data(count)
    if op.stream is not None:
        weights = np.array([sum(op.stream.weights[i::count]) for i in range(count)])
        sizes = np.array([_sizes(part, part.stream).sum() for part in parts if part.stream is not None])
    else:
        sizes = np.array([batch_size(part.data, op.shared) for part in parts])
        weights = sizes if op.weight_fn is None else _weights(op.weight_fn, parts)
    return listed(parts, _shares(np.asarray(weights, float)), sizes, op)


def listed(
    parts: Sequence[Any],
    weights: np.ndarray,
    sizes: np.ndarray,
    whole: LinearOperator | None = None,
) -> Batches:
    """Operators of disjoint batches as they are given, and that of all of them, their mean by default."""
    total = whole
    if total is None:
        total = parts[0] * float(weights[0])
        for weight, part in zip(weights[1:], parts[1:], strict=True):
            total = total + float(weight) * part

    def union(batches: Indices) -> LinearOperator:
        assert len(batches) == len(parts)
        assert total is not None
        return total

    return Batches(weights, sizes, lambda: iter(parts), union, np.zeros(len(parts), int), np.ones(1))


def _of_one_batch(
    op: DataOperator, key: jax.Array, num_batches: int, num_examples: int | None, folds: int
) -> Batches:
    total = batch_size(op.data, op.shared)
    wanted = total if num_examples is None else num_examples
    if not LEAST <= wanted <= total:
        raise DataError(f"{wanted} of {total} examples: their spread takes at least {LEAST}.")
    _require_two_a_fold(wanted, "examples", folds)
    if wanted < total and op.weight_fn is None:
        plan = strata.plan(wanted, min(num_batches, wanted), folds)
        if plan is not None:
            return _stratified(op, key, plan)
    count = _count(min(num_batches, wanted), wanted, folds)
    size = wanted // count
    require_mean(op, size)
    order = np.asarray(jax.random.permutation(key, total))[: count * size].reshape(count, size)

    def union(batches: Indices) -> DataOperator:
        return _of_rows(op, order[np.asarray(batches)].ravel())

    def each() -> Iterator[DataOperator]:
        return (union([i]) for i in range(count))

    weights = np.ones(count)
    if op.weight_fn is not None:
        weights = _weights(op.weight_fn, each())
    drawn = np.array([count * size / total])
    used = np.flatnonzero(weights)  # others are padding only, and may have no mean at all
    if len(used) < count:
        _require_used(len(used), folds)
        order, weights, count = order[used], weights[used], len(used)
    alone = np.zeros(count, int)
    return Batches(_shares(weights), np.full(count, size), each, union, alone, drawn)


def _stratified(op: DataOperator, key: jax.Array, plan: strata.Plan) -> Batches:
    """Batches from strata of examples of similar loss, of which those of large loss are drawn more often."""
    require_mean(op, plan.size)
    groups = strata.split(strata.losses(op), plan)
    drawn: list[float] = []
    rows: list[np.ndarray] = []
    for i, group in enumerate(groups):
        order = np.asarray(jax.random.permutation(jax.random.fold_in(key, i), len(group)))
        rows.append(group[order[: plan.each * plan.size]].reshape(plan.each, plan.size))
        drawn.append(plan.each * plan.size / len(group))
    places = np.concatenate(rows)
    shares = np.array([len(group) for group in groups]) / sum(map(len, groups))
    weights = np.repeat(shares / plan.each, plan.each)

    def union(batches: Indices) -> LinearOperator:
        chosen = np.asarray(batches)
        parts = _of_rows(op, places[chosen].ravel())
        return strata.WeightedBatches(parts, jnp.asarray(_shares(weights[chosen])))

    def each() -> Iterator[Any]:
        return (_of_rows(op, row) for row in places)

    of = np.repeat(np.arange(len(groups)), plan.each)
    return Batches(weights, np.full(len(places), plan.size), each, union, of, np.array(drawn))


def _of_rows(op: DataOperator, chosen: np.ndarray) -> DataOperator:
    rows = [x[chosen] for x in owned_leaves(op.data, op.shared)]
    return op._on(data=replace_owned(op.data, op.shared, rows))


def _count(most: int, examples: int, folds: int) -> int:
    """Batches of equal size, a multiple of the folds: as many as leave 2 % of the examples over, or a quarter
    fewer."""
    largest = most // folds * folds
    allowed = range(largest, min(largest, max(most * 3 // 4, LEAST)) - 1, -folds)
    few = (count for count in allowed if examples % count <= LEFT_OVER * examples)
    return next(few, max(allowed, key=lambda count: -(examples % count)))


def _require_two_a_fold(count: int, what: str, folds: int) -> None:
    """Within a fold of one there is no spread."""
    if count < 2 * folds:
        raise DataError(f"{count} {what} for num_folds={folds}: use at least two for each fold.")


def _require_used(count: int, folds: int) -> None:
    """Of batches that have weight."""
    if count < LEAST:
        raise DataError(f"{count} batches: their spread takes at least {LEAST}.")
    _require_two_a_fold(count, "batches", folds)


def _of_stream(op: DataOperator, folds: int) -> Batches:
    assert op.stream is not None
    stream = op.stream
    used = [i for i, weight in enumerate(stream.weights) if weight > 0]
    _require_used(len(used), folds)
    weights = np.array([stream.weights[i] for i in used])

    def union(batches: Indices) -> DataOperator:
        chosen = sorted(used[i] for i in batches)
        return op._on(stream=stream.part(chosen, np.array([stream.weights[i] for i in chosen])))

    def each() -> Iterator[DataOperator]:
        for _, batch in stream:
            yield op._on(data=batch, stream=None)

    alone = np.zeros(len(used), int)
    return Batches(_shares(weights), _sizes(op, stream), each, union, alone, np.ones(1))


def _sizes(op: DataOperator, stream: Stream) -> np.ndarray:
    """Examples of each batch; one where its leaves have no common axis."""

    def size(batch: PyTree) -> float:
        try:
            return batch_size(batch, op.shared)
        except DataError:
            return 1

    return np.array([size(batch) for _, batch in stream])


def _weights(weight_fn: Callable[[PyTree], Any], parts: Iterable[DataOperator]) -> np.ndarray:
    return np.array([float(weigh(weight_fn, part.data)) for part in parts])


def _shares(weights: np.ndarray) -> np.ndarray:
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
        raise DataError(f"weight_fn gave weights {weights[:8]}...; they must be >= 0 and not all 0.")
    return weights / weights.sum()
