"""The ratio of gradient noise to gradient, with the law of a ratio."""

import math

import numpy as np

from spectra._errors import SpectraError
from spectra.results._base import Array, Interval, result
from spectra.results.estimates import Estimate


@result("num_matvecs", "method", "status", "reason", "dof", "normals")
class NoiseScale(Estimate):
    """tr Σ / |g|² as an `Estimate`, with numerator and denominator.

    `interval()` is Fieller's: all ratios r at which tr Σ - r |g|² is within its error of zero. Where |g|² is
    within its own error, no ratio is too large: there is a lower end only, and `is_one_sided` is true.
    """

    noise: float = math.nan  # tr Σ of single examples, unbiased
    signal: float = math.nan  # |g|² without the part of the noise, unbiased; may be negative
    covariance: Array = None  # (2, 2) of (noise, signal), by the jackknife over examples
    skewness: float = 0.0  # of what single examples add to noise - value · signal
    num_examples: int = 0

    @property
    def is_one_sided(self) -> bool:
        """Whether the 95 % interval has no upper end."""
        return math.isinf(self.interval().upper)

    def interval(self, level: float = 0.95) -> Interval:
        """The ratios that the data do not contradict; the upper end may be infinite."""
        from scipy.special import stdtrit

        if not 0 < level < 1:
            raise SpectraError(f"level={level} is not between 0 and 1.")
        t, count = float(stdtrit(self.dof, (1 + level) / 2)), self.num_examples
        # The mean of skewed numbers lies on the short side of its law more often (Johnson 1978).
        skewed = abs(self.skewness) * (1 + 2 * t**2) / (6 * math.sqrt(count))
        ends = [self._root(t + (skewed if (self.skewness > 0) == up else 0.0), up) for up in (False, True)]
        return Interval(min(ends[0], self.value), self.value, max(ends[1], self.value))

    def _root(self, t: float, up: bool) -> float:
        """Where (noise - r signal)² = t² Var(noise - r signal): the smaller or the larger such r > 0."""
        (nn, ns), (_, ss) = np.asarray(self.covariance, float) * t**2
        a, b, c = self.signal**2 - ss, self.noise * self.signal - ns, self.noise**2 - nn
        if up:
            root = math.sqrt(max(b * b - a * c, 0.0))
            return (b + root) / a if a > 0 else math.inf
        if c <= 0 or b * b < a * c:  # noise itself is within its error
            return 0.0
        divisor = b + math.sqrt(b * b - a * c)
        return c / divisor if divisor > 0 else 0.0

    def __repr__(self) -> str:
        low, _, high = self.interval()
        upper = "no upper end: |g|² is within its error" if math.isinf(high) else f"{high:.4g}"
        return (
            f"Gradient noise scale {self.value:.4g} [{low:.4g}, {upper}] (95 %): tr Σ = {self.noise:.4g}, "
            f"|g|² = {self.signal:.4g}, {self.num_examples:,} examples"
        )
