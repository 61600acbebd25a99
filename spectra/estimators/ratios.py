"""Ratios of two traces, tr M / tr N, from the same probes of signs, and the interval of each.

Where r is the ratio, G = M - r N has no trace, so that the mean of zᵀGz over k probes is all error. What its
law depends on is in the products that are there anyway, since for i ≠ j

    E (z_iᵀ G z_j)² = |G|²_F,    E z_iᵀ G z_j z_jᵀ G z_l z_lᵀ G z_i = tr G³,

and its variance is at most 2 |G|²_F / k. The interval holds all r that this does not exclude (Fieller).
The spread of the k forms alone says too little: for an error of rank one, (uᵀz)² has the law χ²_1, and 16
probes that happen to miss u show a small mean with a small spread. So tr G³ tells on which side such a
direction stands out. As if zᵀGz had the law χ² of that skewness, with ν = |G|⁶ / (tr G³)² >= 1 degrees of
freedom, a mean m that is expected to be 1 and shows its own scale is excluded from below where it is less
than the quantile of χ²_{kν} / (kν): in units of its error (1 / m - 1) (kν / 2)^½.

Of a G that is mostly diagonal, as that of operators which differ in a few parameters is, signs see little:
there the interval is that of Student's t, from the spread of the forms at r and their skewness (Johnson).
"""

import math

import numpy as np

from spectra.results import Interval
from spectra.results.estimates import skewed_t, skewness

DOUBT = 3.0
"""What k probes show of the skewness may be off by this over k: 4 of them say next to nothing of it."""
AGREE = 16
"""Probes of signs from which no spread means no error: all of them agree by chance on a pair of entries with
a probability of 2^(1 - 16), and on three rows of ones with (3/4)^16 = 1 %. Of eight it was 10 %."""
SMALL = 0.05
"""Variance of the forms, in units of its bound, of a G that is mostly diagonal: signs see none of that.
Without a diagonal so small a spread is chance: that of 16 forms with the law χ²_1, as for an error of rank
one, is so small for 0.2 % of the keys."""
ROUNDING = 32.0
"""Of products and of their differences, in units of `precision`."""
REACH = np.geomspace(1e-2, 1e9, 441)
"""Distances from the estimate that are tried, in standard errors there."""


def ratio(
    first: np.ndarray, second: np.ndarray, level: float, *, precision: float, positive: bool
) -> Interval:
    """The interval of tr M / tr N from z_iᵀ M z_j and z_iᵀ N z_j, (k, k) each; `positive` if M and N are."""
    x, y = np.diagonal(first), np.diagonal(second)
    if y.mean() == 0:
        value = 0.0 if x.mean() == 0 else math.inf
        return Interval(0.0 if positive else -math.inf, value, math.inf)
    k, value = len(x), float(x.mean() / y.mean())
    moments = _Moments(first - value * second, second)
    square = float(moments.square(np.zeros(())))
    if square <= (ROUNDING * precision) ** 2 * np.mean(first**2):  # M is a multiple of N, on all that is seen
        return Interval(value, value, value)
    if k >= AGREE and float(np.var(x - value * y, ddof=1)) <= SMALL * 2 * square:
        low, high = _of_spread(x, y, value, level)
    else:
        low, high = (value + sign * moments.reach(sign, level) for sign in (-1, 1))
    return Interval(max(low, 0.0) if positive else low, value, high)


def _of_spread(x: np.ndarray, y: np.ndarray, value: float, level: float) -> tuple[float, float]:
    """The ratios r at which the mean of x - r y is within its error, as their spread tells; may be infinite.

    At r = value + d that mean is -d times that of y, and its variance a quadratic function of d.
    """
    forms, k, square = x - value * y, len(x), float(y.mean()) ** 2
    skew, t = math.copysign(1, y.mean()) * skewness(forms), _student(k - 1, level)
    own, both, other = (np.cov(forms, y)[i] for i in ((0, 0), (0, 1), (1, 1)))
    ends: list[float] = []
    for sign in (-1, 1):
        # As if the spread were about the truth, two standard errors off: see `hutchinson`.
        unit = skewed_t(t, skew, k, sign > 0) ** 2 * (k - 1) / (k - 4) * _few(k) / k
        left, along = square - unit * other, unit * both
        root = math.sqrt(max(along**2 + left * unit * own, 0.0))
        ends.append(value + (sign * root - along) / left if left > 0 else sign * math.inf)
    return ends[0], ends[1]


class _Moments:
    """|G|² and tr G³ for G = M - (r + d) N as functions of d, from inner products of different probes."""

    def __init__(self, difference: np.ndarray, second: np.ndarray):
        k = self.count = len(second)
        self.mean = float(np.trace(second)) / k
        g, n = (x - np.diag(np.diagonal(x)) for x in (difference, second))
        pairs, triples = k * (k - 1), k * (k - 1) * (k - 2)
        gg, gn, nn = g @ g, g @ n, n @ n
        self._square = np.array([np.trace(x) for x in (nn, gn, gg)]) * [1, -2, 1] / pairs
        cubes = [np.sum(a * b.T) for a, b in ((nn, n), (nn, g), (gg, n), (gg, g))]
        self._cube = np.array(cubes) * [-1, 3, -3, 1] / triples

    def square(self, d: np.ndarray) -> np.ndarray:
        """|G|²."""
        return np.maximum(np.polyval(self._square, d), 0.0)

    def reach(self, sign: int, level: float) -> float:
        """The largest distance from the estimate, on one side, that is not excluded; may be infinite."""
        unit = math.sqrt(2 * float(self._square[-1]) / self.count) / abs(self.mean)
        low, d = 0.0, REACH
        for _ in range(3):  # 440 times closer each time
            possible = np.flatnonzero(self._possible(sign * unit * d, level))
            last = int(possible[-1]) if len(possible) else -1
            if last == len(d) - 1:
                return math.inf
            low, high = float(d[last]) if last >= 0 else low, float(d[last + 1])
            d = np.linspace(low, high, len(REACH))
        return unit * float(d[-1])

    def _possible(self, d: np.ndarray, level: float) -> np.ndarray:
        """Whether the mean of zᵀGz, which is -d times that of zᵀNz, may be an error of zero."""
        square, mean = self.square(d), -d * self.mean
        with np.errstate(divide="ignore", invalid="ignore"):
            skewness = np.nan_to_num(np.clip(np.polyval(self._cube, d) / square**1.5, -1, 1))
        missed = -np.sign(mean) * skewness  # by a mean that is too low: a direction where G is positive
        return np.abs(mean) <= self._quantile(missed, level) * np.sqrt(
            2 * square * _few(self.count) / self.count
        )

    def _quantile(self, skewness: np.ndarray, level: float) -> np.ndarray:
        """Of the mean over its standard error, on the side that `skewness` is counted to."""
        from scipy.special import chdtri

        likely = np.clip(skewness + DOUBT / self.count, 1e-3, 1)
        freedom = self.count / likely**2
        least = chdtri(freedom, (1 + level) / 2)
        return np.maximum((freedom / least - 1) * np.sqrt(freedom / 2), _student(self.count, level))


def _few(count: int) -> float:
    """What a variance is raised by: forms of few signs take few values, and where all of them are the least,
    as for one in ten keys of 8 signs on three rows of ones, the limit would end just short of the truth."""
    return (count + 1) / count


def _student(dof: int, level: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(dof, (1 + level) / 2))
