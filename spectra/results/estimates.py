"""Numbers with their errors, and the limits of ratios of means."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.core import Tracer

from spectra.base.errors import SpectraError, Status
from spectra.quadrature.distribution import share_interval
from spectra.results.base import Array, Interval, Result, result
from spectra.results.text import directed, html_table, measured, span, text_table

if TYPE_CHECKING:
    from jaxtyping import Float


FARTHEST = 1e9
"""Of Student's quantiles: that of 0.01 degrees of freedom, where one example has almost all of the weight, is
1e130, and that of fewer has no square. Neither excludes anything."""


def skewed_t(t: float, skewness: float, count: float, up: bool) -> float:
    """Student's t with what skewness adds to one side (Johnson, doi:10.1080/01621459.1978.10480051).

    The mean of numbers skewed upwards lies too low more often than Student's law says, and its error is then
    estimated too small: the upper limit needs more. What the other one needs less is not taken off.
    """
    longer = max(skewness if up else -skewness, 0.0)
    return t + longer * (1 + 2 * t**2) / (6 * math.sqrt(count)) if longer else t


def skewness(values: np.ndarray) -> float:
    """Of values with mean zero; 0 where there is no spread."""
    spread = float(np.sqrt(np.mean(values**2)))
    return float(np.mean((values / spread) ** 3)) if spread > 0 else 0.0


def fieller(top: float, bottom: float, covariance: np.ndarray, t: float, *, up: bool) -> float:
    """The smaller or the larger r >= 0 with (top - r bottom)² = t² Var(top - r bottom).

    Infinite above where `bottom` is within its error, 0 below where `top` is (Fieller,
    doi:10.1111/j.2517-6161.1954.tb00159.x).
    """
    (tt, tb), (_, bb) = np.asarray(covariance, float) * t**2
    a, b, c = bottom**2 - bb, top * bottom - tb, top**2 - tt
    if up:
        return (b + math.sqrt(max(b * b - a * c, 0.0))) / a if a > 0 and bottom > 0 else math.inf
    return _smaller_ratio(a, b, c) if top > 0 else 0.0


def _smaller_ratio(a: float, b: float, c: float) -> float:
    """The smaller r with a r² - 2 b r + c = 0; 0 where zero itself is not excluded."""
    if c <= 0 or b * b < a * c:
        return 0.0
    root = math.sqrt(b * b - a * c)
    return c / (b + root) if b + root > 0 else 0.0


def fieller_of_length(top: float, bottom: float, covariance: np.ndarray, t: float, share: float) -> float:
    """The smaller end of `fieller` where `bottom` is |ḡ|² - share top, the squared length of a mean unbiased.

    The error of |ḡ|² grows with |g|, so that of a ḡ which is short by chance is too small. A ratio r says
    what |g|² is, top / r, and its error is taken there: Var bottom (top / r + share top) / |ḡ|².
    """
    (tt, tb), (_, bb) = np.asarray(covariance, float) * t**2
    square = bottom + share * top
    slope = bb * top / square if square > 0 else 0.0
    a, b, c = bottom**2 - share * slope, top * bottom - tb + slope / 2, top**2 - tt
    return _smaller_ratio(a, b, c) if top > 0 else 0.0


def longest_ratio(
    top: float, bottom: float, covariance: np.ndarray, t_top: float, t: float, points: int = 721
) -> float:
    """The larger end of `fieller` where `top` is a variance, whose error grows with it: it is t_top standard
    errors away on a logarithmic scale.

    A variance that is short by chance has too small an error. With n degrees of freedom it is above its 2.5 %
    quantile by the factor n / χ², 13.9 for three, where exp(t sqrt(2 / n)) is 13.4 and 1 + t sqrt(2 / n) is
    3.6. What of its error is more than `top` itself is rounding, and added. `bottom` is t of its own away.
    """
    (tt, tb), (_, bb) = np.asarray(covariance, float)
    if bottom**2 <= t**2 * bb or bottom <= 0:
        return math.inf
    above, below = math.sqrt(tt), math.sqrt(bb)
    both = tb / (above * below) if above > 0 and below > 0 else 0.0
    alone = math.sqrt(max(1 - both**2, 0.0))
    relative = min(above / top, 1.0) if top > 0 else 0.0

    def ratio(angles: np.ndarray) -> np.ndarray:
        x = t_top * np.cos(angles)
        found = top * np.exp(relative * x) + (above - relative * top) * x
        return found / (bottom + t * below * (both * np.cos(angles) + alone * np.sin(angles)))

    angles = np.linspace(-math.pi, math.pi, points)
    best = angles[np.argmax(ratio(angles))]
    return float(np.max(ratio(np.linspace(best - angles[-1] / points, best + angles[-1] / points, points))))


@result("num_matvecs", "method", "status", "reason", "dof", "normals", "num_sampled")
class Estimate(Result):
    """A number, or a pytree of them, with its standard error, what the error rests on, and what it cost.

    `stderr` includes the spread over probes and the rounding of products, but not the bracket. Fields are
    floats for one number, pytrees like the parameters for a diagonal, and dicts {group: number} if
    groups were requested.

    The [glossary](glossary.md#standard-error) defines value, interval, bound, limit
    and standard error.
    """

    value: Any
    stderr: Any  # like value; 0 where nothing was sampled
    num_matvecs: int
    method: str
    status: Status = Status.COMPLETE
    reason: str = ""  # why this method, where it was chosen; what `lower` and `upper` rest on
    dof: float | None = None  # degrees of freedom of Student's t for the interval; None: normal law
    lower: Any = None  # bracket of `value` for the probes drawn, deterministic; None where there is none
    upper: Any = None
    total: Estimate | None = None  # the sum over groups, from the same products
    least: Any = None  # what the truth cannot be below: no interval reaches further
    most: Any = None
    normals: float | None = None  # of a share of eigenvalues, k n: interval from the law Beta, not Student's
    num_sampled: int | None = None  # eigenvalues that the share is of: a whole number of them

    def interval(self, level: float = 0.95) -> Interval:
        """The interval that holds the truth with probability `level`: bracket plus t times stderr.

        For a share of eigenvalues, the interval follows from the distribution of the share that a probe sees.
        Intervals stay within the possible values.

        Examples:
            >>> from spectra import Estimate
            >>> lower, value, upper = Estimate(10.0, 1.0, 64, "hutchinson", dof=63).interval()
            >>> round(lower, 2), round(upper, 2)
            (8.0, 12.0)
        """
        from scipy.special import ndtri, stdtrit

        if not 0 < level < 1:
            raise SpectraError(f"level={level} is not between 0 and 1.")
        low = self.value if self.lower is None else self.lower
        high = self.value if self.upper is None else self.upper
        if self.normals is not None:
            return self._of_a_share(low, high, (1 - level) / 2, self.normals)
        tail = (1 + level) / 2
        t = float(ndtri(tail) if self.dof is None else stdtrit(self.dof, tail))
        low = jax.tree.map(lambda x, s: x - t * s, low, self.stderr)
        high = jax.tree.map(lambda x, s: x + t * s, high, self.stderr)
        if self.least is not None:
            low = max(low, self.least)
        if self.most is not None:
            high = min(high, self.most)
        return Interval(low, self.value, high)

    def _of_a_share(self, low: float, high: float, tail: float, normals: float) -> Interval:
        """Shares of [least, most] that a seen share leaves possible: see `share_upper_bound`."""
        if self.most <= self.least:
            return Interval(self.value, self.value, self.value)
        first, last = share_interval(low, high, (self.least, self.most), normals, tail, self.num_sampled)
        return Interval(min(first, low, self.value), self.value, max(last, high, self.value))

    def __float__(self) -> float:
        if jax.tree.structure(self.value) != jax.tree.structure(0.0) or np.ndim(self.value):
            raise TypeError("an estimate of several numbers is not one: see its `value`.")
        return float(self.value)

    def __format__(self, spec: str) -> str:
        return format(float(self), spec) if spec else str(self)

    def __repr__(self) -> str:
        tail = f"({self.method}, {self.num_matvecs} products" + (
            ")" if self.status is Status.COMPLETE else f", {self.status.code})"
        )
        if isinstance(self.value, (Tracer, jax.ShapeDtypeStruct)):
            return f"Estimate {tail}"
        if isinstance(self.value, (int, float)) or getattr(self.value, "ndim", 1) == 0:
            return f"{measured(float(self.value), float(self.stderr))} {tail}"
        if isinstance(self.value, dict) and all(isinstance(x, float) for x in self.value.values()):
            rows = [(name, measured(v, self.stderr[name])) for name, v in self.value.items()]
            return text_table(f"Estimate {tail}", rows)
        return f"Estimate of {len(jax.tree.leaves(self.value))} arrays {tail}"


@result("num_matvecs", "method", "status", "reason", "dof", "normals")
class NoiseScale(Estimate):
    """tr Σ / |g|² as an `Estimate`, with numerator and denominator.

    `interval()` is Fieller's: all ratios r at which tr Σ - r |g|² is within its error of zero. If |g|² is
    within its own error of zero, no ratio can be excluded as too large; there is only a lower end, and
    `is_one_sided` is True, and it takes the whole risk. For the lower end the error of |g|² is that at the
    |g|² which r says, and for the upper one that of tr Σ grows with it, as that of a variance does.

    The [glossary](glossary.md#noise-scale) defines noise scale.
    """

    noise: float = math.nan  # tr Σ of single examples, unbiased
    signal: float = math.nan  # |g|² without the part of the noise, unbiased; may be negative
    covariance: Float[Array, "2 2"] = None  # of (noise, signal), by the jackknife over examples
    skewness: float = 0.0  # of what single examples add to noise - value · signal
    num_examples: int = 0
    noise_dof: float | None = None  # of the error of `noise`, which a heavy tail makes few; None: `dof`

    @property
    def is_one_sided(self) -> bool:
        """Whether the 95 % interval has no upper end."""
        return math.isinf(self.interval().upper)

    def interval(self, level: float = 0.95) -> Interval:
        """The ratios that the data do not contradict; the upper end may be infinite."""
        from scipy.special import ndtri, stdtrit

        if not 0 < level < 1:
            raise SpectraError(f"level={level} is not between 0 and 1.")

        def t(side: float, up: bool, dof: float | None = self.dof) -> float:
            own = float(ndtri(side) if dof is None else stdtrit(dof, side))
            return skewed_t(min(own, FARTHEST), self.skewness, self.num_examples, up)

        unit = abs(self.noise) + abs(self.signal) or 1.0  # products of four of them would leave float64
        parts = self.noise / unit, self.signal / unit, np.asarray(self.covariance, float) / unit / unit
        share = 1 / (1 + (self.dof or math.inf))
        side = (1 + level) / 2
        high = longest_ratio(*parts, t(side, True, self.noise_dof or self.dof), t(side, True))
        below = t(level if math.isinf(high) else side, False)  # of one end the whole risk
        low = fieller_of_length(*parts, below, share)
        return Interval(min(low, self.value), self.value, max(high, self.value))

    def __repr__(self) -> str:
        low, _, high = self.interval()
        upper = "no upper end: |g|² is within its error" if math.isinf(high) else directed(high, True, 4)
        return (
            f"Gradient noise scale {self.value:.4g} [{directed(low, False, 4)}, {upper}] (95 %): "
            f"tr Σ = {self.noise:.4g}, |g|² = {self.signal:.4g}, {self.num_examples:,} examples"
        )


@result("size", "num_examples", "num_batches", "num_to_halve", "num_matvecs", "level", "status")
class Population(Result):
    """Leading eigenvalues and trace of the whole distribution, estimated from the examples drawn from it.

    `lower` and `upper` enclose each eigenvalue with probability `level`. The interval has two parts: the
    bias, between `held_out` (the curvature of a vector on examples that it was not fitted to, never too large
    on average) and `in_sample` (never too small on average), and `stderr`, the spread between batches. The
    bias falls like the inverse of the number of examples, the error like the inverse of its square root.

    The [glossary](glossary.md#population) defines population and interval.
    """

    eigenvalues: Float[Array, " pairs"]  # debiased estimates, descending
    lower: Float[Array, " pairs"]
    upper: Float[Array, " pairs"]
    held_out: Float[Array, " pairs"]
    in_sample: Float[Array, " pairs"]  # of the mean over all examples drawn
    stderr: Float[Array, " pairs"]  # of the curvature along the eigenvector, over examples
    trace: Interval
    trace_stderr: float  # over examples
    trace_probe_stderr: float  # over probes, beside it
    shares: Interval  # (k,) each: part of the trace that the j largest eigenvalues make up; NaN if trace <= 0
    size: int
    num_examples: int
    num_batches: int
    num_to_halve: int  # examples with which the interval of the largest eigenvalue is half as wide
    num_matvecs: int
    num_passes: float  # the same in products with all examples drawn
    level: float
    status: Status

    def __len__(self) -> int:
        return len(self.eigenvalues)

    def interval(self, index: int = 0) -> Interval:
        """The interval of one eigenvalue, by default the largest."""
        values = (float(x[index]) for x in (self.lower, self.eigenvalues, self.upper))
        return Interval(*values)

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each line of the printed result."""
        rows = []
        for i in range(len(self)):
            low, value, high = self.interval(i)
            text = f"{value:.4g} {span(low, high, 2)}"
            rows.append(("largest eigenvalue" if i == 0 else f"  no. {i + 1}", text))
        low, value, high = self.trace
        rows.append(("trace", f"{value:.4g} {span(low, high, 2)}"))
        rows.append(
            ("  its errors", f"examples ± {self.trace_stderr:.2g}, probes ± {self.trace_probe_stderr:.2g}")
        )
        low, value, high = (float(x[-1]) for x in self.shares)
        if math.isfinite(value):
            text = f"{100 * value:.3g} % {span(100 * low, 100 * high)}"
            rows.append((f"share of the largest {len(self)}" if len(self) > 1 else "its share of it", text))
        rows += [
            ("drawn", f"{self.num_examples:,} examples in {self.num_batches} batches"),
            ("for half the width", f"{self.num_to_halve:,} examples"),
            ("cost", f"{self.num_passes:.1f} products with all of them"),
        ]
        return rows

    @property
    def _title(self) -> str:
        return f"Population, intervals of {100 * self.level:g} %"

    def __repr__(self) -> str:
        return text_table(self._title, self.rows())

    def _repr_html_(self) -> str:
        return html_table(self._title, self.rows())
