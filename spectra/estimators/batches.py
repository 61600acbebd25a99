"""Disjoint batches of an operator's own data, and what the spread between them says about a distribution."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from spectra.base import trees
from spectra.base.errors import DataError, SpectraError
from spectra.operators.batches import batch_size, owned_leaves, replace_owned
from spectra.operators.data import DataOperator
from spectra.operators.means import require_mean
from spectra.operators.streams import Stream
from spectra.results import Interval
from spectra.results.estimates import fieller, skewed_t, skewness

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
    union: Callable[[Indices], DataOperator]


def draw_batches(
    op: DataOperator, key: jax.Array, num_batches: int, num_examples: int | None, folds: int
) -> Batches:
    """Batches of equal size of one batch in random order; those of a stream as they come.

    Raises:
        DataError: too few examples or batches.
        SpectraError: `num_examples` with a stream, whose batches are chosen when it is opened.
    """
    if trees.is_traced((op.params, op.data)):
        raise SpectraError("batches are drawn on the host: call outside jit and vmap.")
    if op.stream is not None:
        if num_examples is not None:
            raise SpectraError(
                "num_examples is for one batch: of a stream give num_batches= to the operator."
            )
        return _of_stream(op)
    return _of_one_batch(op, key, num_batches, num_examples, folds)


def _of_one_batch(op, key, num_batches, num_examples, folds) -> Batches:
    total = batch_size(op.data, op.shared)
    wanted = total if num_examples is None else num_examples
    if not LEAST <= wanted <= total:
        raise DataError(f"{wanted} of {total} examples: the spread between them takes {LEAST} or more.")
    count = _count(min(num_batches, wanted), wanted, folds)
    size = wanted // count
    require_mean(op, size)
    order = np.asarray(jax.random.permutation(key, total))[: count * size].reshape(count, size)

    def union(batches: Indices) -> DataOperator:
        chosen = order[np.asarray(batches)].ravel()
        rows = [x[chosen] for x in owned_leaves(op.data, op.shared)]
        return op._on(data=replace_owned(op.data, op.shared, rows))

    def each():
        return (union([i]) for i in range(count))

    weights = np.ones(count)
    if op.weight_fn is not None:
        weights = np.array([float(op.weight_fn(part.data)) for part in each()])
    return Batches(_shares(weights), np.full(count, size), each, union)


def _count(most: int, examples: int, folds: int) -> int:
    """Batches of equal size, a multiple of the folds: as many as leave 2 % of the examples over, or a quarter
    fewer."""
    largest = most // folds * folds
    allowed = range(largest, min(largest, max(most * 3 // 4, LEAST)) - 1, -folds)
    few = (count for count in allowed if examples % count <= LEFT_OVER * examples)
    return next(few, max(allowed, key=lambda count: -(examples % count)))


def _of_stream(op: DataOperator) -> Batches:
    assert op.stream is not None
    stream = op.stream
    used = [i for i, weight in enumerate(stream.weights) if weight > 0]
    if len(used) < LEAST:
        raise DataError(f"{len(used)} batches: the spread between them takes {LEAST} or more.")
    places = tuple(range(len(stream.weights))) if stream.indices is None else stream.indices
    weights = np.array([stream.weights[i] for i in used])

    def union(batches: Indices) -> DataOperator:
        chosen = sorted(used[i] for i in batches)
        share = tuple(_shares(np.array([stream.weights[i] for i in chosen])))
        digests = tuple(stream.digests[i] for i in chosen)
        return op._on(stream=Stream(stream.source, share, tuple(places[i] for i in chosen), digests))

    def each():
        for _, batch in stream:
            yield op._on(data=batch, stream=None)

    return Batches(_shares(weights), _sizes(op, stream), each, union)


def _sizes(op: DataOperator, stream: Stream) -> np.ndarray:
    """Examples of each batch; one where its leaves have no common axis."""

    def size(batch):
        try:
            return batch_size(batch, op.shared)
        except DataError:
            return 1

    return np.array([size(batch) for _, batch in stream])


def _shares(weights: np.ndarray) -> np.ndarray:
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
        raise DataError(f"weight_fn gave weights {weights[:8]}...; they must be >= 0 and not all 0.")
    return weights / weights.sum()


class Seen(NamedTuple):
    """What each batch shows, b batches; k vectors, values descending."""

    held_out: np.ndarray  # (b, k, k), VᵀHV on vectors of the other folds
    in_sample: np.ndarray  # (b, k, k), on those of all batches
    traces: np.ndarray  # (b, probes)


class Law:
    """Means over batches with weights, and their errors.

    Args:
        weights: (b,), sum one.
        folds: (b,) the part that each batch belongs to.
        tail: probability below an upper limit.
        left: share of what is spoken about that was not drawn: 1 of a distribution. The variance of a mean
            without replacement is smaller by it.
    """

    def __init__(self, weights: np.ndarray, folds: np.ndarray, tail: float, left: float = 1.0):
        self.weights, self.folds, self.tail, self.left = weights, folds, tail, left

    def stderr(self, errors: np.ndarray, known: int = 1) -> float:
        """Of the weighted mean of (b, ...), of which the errors are given; `known` means were taken off."""
        count = len(self.weights)
        squares = np.sum(errors.reshape(count, -1) ** 2, axis=1)
        return float(np.sqrt(self.left * (self.weights**2 @ squares) * count / (count - known)))

    def t(self, known: int = 1, tail: float | None = None) -> float:
        """Student's quantile."""
        dof = max(1 / float(np.sum(self.weights**2)) - known, 1.0)
        from scipy.special import stdtrit

        return float(stdtrit(dof, self.tail if tail is None else tail))

    def limit(self, errors: np.ndarray, up: bool, known: int = 1) -> float:
        """How far the mean may be below (`up`) or above the truth."""
        shape = skewness(self.weights * errors)
        return skewed_t(self.t(known), shape, len(errors), up) * self.stderr(errors, known)

    def held_out(self, seen: Seen) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(k,) each: λ_min of the leading j x j means, its error, and how far above the truth it may be."""
        count, k = seen.held_out.shape[:2]
        parts = range(self.folds.max() + 1)
        value, stderr, reach = np.zeros(k), np.zeros(k), np.zeros(k)
        for j in range(k):
            errors = np.zeros(count)
            for part in parts:
                mine = self.folds == part
                share = self.weights[mine].sum()
                matrices = seen.held_out[mine, : j + 1, : j + 1]
                mean = np.tensordot(self.weights[mine] / share, matrices, 1)
                values, vectors = np.linalg.eigh(mean)
                along = vectors[:, 0]
                value[j] += share * values[0]
                errors[mine] = np.einsum("i,bij,j->b", along, matrices, along) - values[0]
            stderr[j] = self.stderr(errors, len(parts))
            reach[j] = self.limit(errors, False, len(parts))
        return value, stderr, reach

    def in_sample(self, seen: Seen, stderr: np.ndarray) -> np.ndarray:
        """(k,) how far below the truth the eigenvalues of the sample may be; `stderr` on vectors held out.

        The error is that along the eigenvectors of the whole distribution. Those of the sample lean towards
        examples of large curvature, those held out away from them: the larger error of the two counts.
        """
        errors = seen.in_sample - np.tensordot(self.weights, seen.in_sample, 1)
        reach = np.zeros(len(stderr))
        for j in range(len(stderr)):
            part = errors[:, : j + 1, : j + 1]
            size = max(self.stderr(part), stderr[j])
            if j == 0:
                shape = skewness(self.weights * part[:, 0, 0])
                reach[j] = skewed_t(self.t(), shape, len(part), True) * size
            else:
                reach[j] = self.t(tail=(1 + self.tail) / 2) * size  # of a length, both tails
        return reach

    def trace(self, traces: np.ndarray) -> tuple[Interval, float, float]:
        """The mean over batches and probes, its error over examples, and that over the probes."""
        each = traces.mean(axis=1)
        mean = float(self.weights @ each)
        errors = each - mean
        within = np.var(traces, axis=1, ddof=1) / traces.shape[1]
        of_probes = float(np.sqrt(self.weights**2 @ within))
        both = self.stderr(errors) / math.sqrt(self.left) if self.left else of_probes
        of_examples = math.sqrt(self.left * max(both**2 - of_probes**2, 0.0))
        stderr, shape = math.hypot(of_examples, min(of_probes, both)), skewness(self.weights * errors)
        below, above = (skewed_t(self.t(), shape, len(errors), up) * stderr for up in (False, True))
        return Interval(mean - below, mean, mean + above), of_examples, of_probes

    def shares(self, seen: Seen, whole: np.ndarray, values: np.ndarray) -> Interval:
        """(k,) of the trace in the j largest eigenvalues: Fieller's limits, of held-out and sample values."""
        traces = seen.traces.mean(axis=1)
        mean = float(self.weights @ traces)
        if mean <= 0:
            nothing = np.full(len(whole), np.nan)
            return Interval(nothing, nothing, nothing)
        limits = np.zeros((2, len(whole)))
        for up, matrices in ((False, seen.held_out), (True, seen.in_sample)):
            sums = np.cumsum(np.diagonal(matrices, axis1=1, axis2=2), axis=1)
            for j in range(len(whole)):
                own = float(self.weights @ sums[:, j])
                top = float(np.sum(whole[: j + 1])) if up else own
                pair = np.stack([sums[:, j] - own, traces - mean])
                count = len(traces)
                covariance = (self.weights**2 * pair) @ pair.T * count / (count - 1)
                shape = skewness(self.weights * (pair[0] - top / mean * pair[1]))
                t = skewed_t(self.t(), shape, count, up)
                limits[int(up), j] = fieller(top, mean, covariance, t, up=up)
        value = np.cumsum(values) / mean
        return Interval(np.minimum(limits[0], value), value, np.maximum(limits[1], value))
