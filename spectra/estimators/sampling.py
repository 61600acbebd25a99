"""What the spread between batches says about means over a distribution."""

import math
from typing import NamedTuple

import numpy as np

from spectra._ratios import fieller, skewed_t, skewness
from spectra.results import Interval


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
