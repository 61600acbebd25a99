"""What the spread between batches says about the mean that they are drawn from."""

import math
from typing import NamedTuple

import numpy as np

from spectra.base.errors import DataError
from spectra.results import Interval
from spectra.results.estimates import fieller, skewed_t


class Seen(NamedTuple):
    """What each batch shows, b batches; k vectors, values descending."""

    held_out: np.ndarray  # (b, k, k), VᵀHV on vectors of the other folds
    in_sample: np.ndarray  # (b, k, k), on those of all batches
    traces: np.ndarray  # (b, probes)


class Errors(NamedTuple):
    """The error of a weighted mean in independent parts: the sum of their squares is its variance."""

    parts: np.ndarray  # (r, ...)
    dof: float

    @property
    def stderr(self) -> float:
        """Standard error; of an array, the root of the sum of all variances."""
        return float(np.sqrt(np.sum(self.parts**2)))

    def reach(self, tail: float, up: bool) -> float:
        """Student's quantile for one end, lengthened by the skewness of the parts."""
        size, count = self.stderr, len(self.parts)
        skewness = math.sqrt(count) * float(np.sum(self.parts**3) / size**3) if size > 0 else 0.0
        return skewed_t(self.t(tail), skewness, count, up)

    def t(self, tail: float) -> float:
        """Student's quantile."""
        from scipy.special import stdtrit

        return float(stdtrit(self.dof, tail))


class Ends(NamedTuple):
    """(k,) each: eigenvalues on vectors held out, their errors, how far these may be above the truth, and how
    far those of the sample below it."""

    held_out: np.ndarray
    stderr: np.ndarray
    below: np.ndarray
    above: np.ndarray


def one_at_risk(tail: float, apart: float, dof: float) -> float:
    """Probability below the upper of two limits of a number that lies between their centres.

    The centres are `apart` standard errors from each other. A number at one of them is missed on its own side
    with probability 1 - p, and on the other only by an error of t_p + apart: both together are 2 (1 - tail)
    (Imbens and Manski, doi:10.1111/j.1468-0262.2004.00555.x). `tail` itself where the centres coincide.
    """
    from scipy.special import stdtr, stdtrit

    low, high = 2 * tail - 1, tail
    for _ in range(40):
        p = (low + high) / 2
        missed = 1 - p + stdtr(dof, -(stdtrit(dof, p) + max(apart, 0.0)))
        low, high = (low, p) if missed < 2 * (1 - tail) else (p, high)
    return high


class Law:
    """Means over batches with weights, and their errors.

    With strata, the error of the mean over the data is that within them. That of the data themselves, as
    draws from a distribution, is the variance between examples, within strata and between them, over their
    number (two-phase sampling: Cochran, Sampling Techniques, section 12.2).

    Args:
        weights: (b,), sum one.
        folds: (b,) the part that each batch belongs to.
        tail: probability below an upper limit.
        strata: (b,) what each batch was drawn from; default one for all.
        left: (s,) share of each stratum that was not drawn: the variance of a mean without replacement is
            smaller by it. 1 of a distribution.
        sizes: (b,) examples of each batch, to which the inverse of its variance is taken to be proportional;
            default all alike.
        total: examples of the data, where the mean is that of the distribution they were drawn from and the
            batches are drawn from them; 0 where that is nothing to add.
    """

    def __init__(
        self,
        weights: np.ndarray,
        folds: np.ndarray,
        tail: float,
        strata: np.ndarray | None = None,
        left: np.ndarray | None = None,
        sizes: np.ndarray | None = None,
        total: int = 0,
    ):
        self.weights, self.folds, self.tail, self.total = weights, folds, tail, total
        self.sizes = np.ones(len(weights)) if sizes is None else np.asarray(sizes, float)
        self.strata = np.zeros(len(weights), int) if strata is None else strata
        self.left = np.ones(self.strata.max() + 1) if left is None else left

    def errors(self, values: np.ndarray, *, by_fold: bool = False) -> Errors:
        """Of the weighted mean of (b, ...); `by_fold` if the folds are means of different things."""
        mean, freedom = np.tensordot(self.weights, values, 1), 0.0
        found: list[np.ndarray] = []
        folds = self.folds if by_fold else np.zeros_like(self.folds)
        for stratum in range(self.strata.max() + 1):
            mine = self.strata == stratum
            weights, own, cells, sizes = self.weights[mine], values[mine], folds[mine], self.sizes[mine]
            rest, dof = _residuals(own, weights, cells, sizes)
            each = weights.reshape(-1, *[1] * (values.ndim - 1))
            parts = [math.sqrt(self.left[stratum]) * each * rest]
            if self.total:
                share = sizes.reshape(each.shape) / self.total
                parts.append(np.sqrt(each * share) * rest)
                between = np.average(own, axis=0, weights=weights) - mean
                parts.append(math.sqrt(weights.sum() / self.total) * between[None])
            found.append(np.concatenate(parts))
            freedom += float(np.sum(found[-1] ** 2)) ** 2 / dof
        parts = np.concatenate(found)
        variance = float(np.sum(parts**2))
        # Satterthwaite's degrees of freedom of a sum of variances (doi:10.2307/3002019).
        dof = variance**2 / freedom if freedom > 0 else max(len(values) - 1.0, 1.0)
        return Errors(parts, dof)

    def ends(self, seen: Seen, whole: np.ndarray) -> Ends:
        """Limits of the eigenvalues, from those on vectors held out and from those of the sample, `whole`.

        The truth is between the expectations of the two, and where these are apart it cannot be near both:
        only one end is at risk, and is given more than half of the risk (`one_at_risk`).

        Above, the error is that along the eigenvectors of the whole distribution. Those of the sample lean
        towards examples of large curvature, those held out away from them: the larger error counts.
        """
        held, forms = self._held_out(seen)
        found = Ends(held, *np.zeros((3, len(held))))
        for j, own in enumerate(forms):
            below, above = self.errors(own, by_fold=True), self.errors(seen.in_sample[:, : j + 1, : j + 1])
            size = max(above.stderr, below.stderr)
            apart = self.errors(seen.in_sample[:, j, j] - own, by_fold=True)
            distance = whole[j] - held[j] - apart.stderr  # less what chance makes
            tail = one_at_risk(self.tail, distance / size if size > 0 else 0.0, min(below.dof, above.dof))
            found.stderr[j] = below.stderr
            found.below[j] = below.reach(tail, up=False) * below.stderr
            # Of a length, both tails.
            found.above[j] = (above.t((1 + tail) / 2) if j else above.reach(tail, up=True)) * size
        return found

    def _held_out(self, seen: Seen) -> tuple[np.ndarray, np.ndarray]:
        """λ_min of the leading j x j means (k,), and what each batch has along that vector (k, b)."""
        count, k = seen.held_out.shape[:2]
        value, forms = np.zeros(k), np.zeros((k, count))
        for j in range(k):
            for part in range(self.folds.max() + 1):
                mine = self.folds == part
                share = self.weights[mine].sum()
                matrices = seen.held_out[mine, : j + 1, : j + 1]
                values, vectors = np.linalg.eigh(np.tensordot(self.weights[mine] / share, matrices, 1))
                along = vectors[:, 0]
                value[j] += share * values[0]
                forms[j, mine] = np.einsum("i,bij,j->b", along, matrices, along)
        return value, forms

    def trace(self, traces: np.ndarray) -> tuple[Interval, float, float]:
        """The mean over batches and probes, its error over examples, and that over the probes."""
        each = traces.mean(axis=1)
        mean, errors = float(self.weights @ each), self.errors(each)
        within = np.var(traces, axis=1, ddof=1) / traces.shape[1]
        of_probes = float(np.sqrt(self.weights**2 @ within))
        # The spread between batches has the probes' in it, as far as it counts.
        counted = self.left[self.strata] * self.weights**2
        if self.total:
            counted = counted + self.weights * self.sizes / self.total
        of_examples = math.sqrt(max(errors.stderr**2 - float(counted @ within), 0.0))
        stderr = math.hypot(of_examples, of_probes)
        below, above = (errors.reach(self.tail, up) * stderr for up in (False, True))
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
                parts = self.errors(np.stack([sums[:, j], traces], axis=1)).parts
                t = self.errors(sums[:, j] - top / mean * traces).reach(self.tail, up)
                limits[int(up), j] = fieller(top, mean, parts.T @ parts, t, up=up)
        value = np.cumsum(values) / mean
        return Interval(np.minimum(limits[0], value), value, np.maximum(limits[1], value))


def _residuals(
    values: np.ndarray, weights: np.ndarray, cells: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, float]:
    """Of values from the mean of their cell, lengthened so that the variance of the sum of these means, which
    follows from their squares, has no bias; and the degrees of freedom of that variance."""
    rest = np.zeros_like(values)
    variances, dof = np.zeros(cells.max() + 1), np.ones(cells.max() + 1)
    for cell in np.unique(cells):
        of = cells == cell
        total = weights[of].sum()
        share = weights[of] / total if total > 0 else np.full(of.sum(), 1 / of.sum())
        longer, variance, dof[cell] = _unbiased(share, 1 / sizes[of])
        variances[cell] = total**2 * variance
        rest[of] = longer * (values[of] - np.tensordot(share, values[of], 1))
    return rest, max(float(variances.sum() ** 2 / np.sum(variances**2 / dof)), 1.0)


def _unbiased(share: np.ndarray, variance: np.ndarray) -> tuple[float, float, float]:
    """What lengthens residuals x_i - Σ p x, the variance Σ p² v of that mean, and its degrees of freedom.

    Where the x_i have the variances v_i, up to a factor in common, the residuals have v_i - 2 p_i v_i + Σ p²
    v. Their sum with p² is a quadratic form zᵀMz of normal z, with (tr M)² / |M|²_F degrees of freedom (Bell
    and McCaffrey, Survey Methodology 28, 2002): one less than there are values where all are alike.
    """
    scaled, form = share * variance, share**2
    total = float(share @ scaled)
    left = variance - 2 * scaled + total
    mean = float(form @ left)
    if not mean > 0:
        raise DataError("one batch has all of the weight: a spread takes two batches that have some.")
    # (x_i - Σ p x)(x_j - Σ p x) is Σ p² v - p_i v_i - p_j v_j on average, and v_i more where i = j.
    apart = total - 2 * scaled
    size, middle = form.sum(), form @ apart / form.sum()
    pairs = size**2 * middle**2 + size * (form @ (apart - middle) ** 2) / 2
    return math.sqrt(total / mean), total, mean**2 / float(pairs + form**2 @ (left**2 - apart**2))
