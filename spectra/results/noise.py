"""The ratio of gradient noise to gradient, with the law of a ratio."""

import math

from spectra._errors import SpectraError
from spectra._ratios import fieller, skewed_t
from spectra.results._base import Array, Interval, result
from spectra.results.estimates import Estimate


@result("num_matvecs", "method", "status", "reason", "dof", "normals")
class NoiseScale(Estimate):
    """tr Σ / |g|² as an `Estimate`, with numerator and denominator.

    `interval()` is Fieller's: all ratios r at which tr Σ - r |g|² is within its error of zero. Where |g|² is
    within its own error, no ratio is too large: there is a lower end only, and `is_one_sided` is true.

    The [glossary](glossary.md#noise-scale) says what is meant by noise scale.
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
        t = float(stdtrit(self.dof, (1 + level) / 2))
        low, high = (
            fieller(
                self.noise,
                self.signal,
                self.covariance,
                skewed_t(t, self.skewness, self.num_examples, up),
                up=up,
            )
            for up in (False, True)
        )
        return Interval(min(low, self.value), self.value, max(high, self.value))

    def __repr__(self) -> str:
        low, _, high = self.interval()
        upper = "no upper end: |g|² is within its error" if math.isinf(high) else f"{high:.4g}"
        return (
            f"Gradient noise scale {self.value:.4g} [{low:.4g}, {upper}] (95 %): tr Σ = {self.noise:.4g}, "
            f"|g|² = {self.signal:.4g}, {self.num_examples:,} examples"
        )
