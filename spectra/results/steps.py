"""What curvature says about one update of the parameters, and about how large a step may be."""

import math

import numpy as np

from spectra._status import Status
from spectra.results._base import Array, Result, html_table, result, text_table


@result("num_matvecs", "status")
class StepQuality(Result):
    """The change of a loss along one update: predicted by slope and curvature, and measured.

    `sharpness` is the curvature along the update relative to the slope: a quadratic loss is back at its value
    after `largest_step` = 2 / sharpness updates.
    """

    slope: float  # g·d
    curvature: float  # dᵀHd
    length: float  # |d|
    loss: float  # at the parameters
    measured: float  # L(θ + d) - L(θ); NaN if it was not measured
    num_matvecs: int = 1
    status: Status = Status.COMPLETE

    @property
    def predicted(self) -> float:
        """g·d + ½ dᵀHd."""
        return self.slope + self.curvature / 2

    @property
    def ratio(self) -> float:
        """Measured over predicted change: 1 where the loss is quadratic over the step."""
        return self.measured / self.predicted if self.predicted else math.nan

    @property
    def sharpness(self) -> float:
        """dᵀHd / |g·d|: relative sharpness, where the update is that of another task."""
        return self.curvature / abs(self.slope) if self.slope else math.copysign(math.inf, self.curvature)

    @property
    def largest_step(self) -> float:
        """Multiple of the update at which a quadratic is back at its value; 0 if it rises at once."""
        if self.slope >= 0:
            return 0.0
        return -2 * self.slope / self.curvature if self.curvature > 0 else math.inf

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each line of the printed result."""
        rows = [
            ("predicted", f"{self.predicted:+.4g} = {self.slope:+.3g} {self.curvature / 2:+.3g}"),
            ("sharpness along it", f"{self.sharpness:.4g}; largest step {self.largest_step:.4g} updates"),
            ("length", f"{self.length:.4g}"),
        ]
        if math.isfinite(self.measured):
            rows.insert(1, ("measured", f"{self.measured:+.4g}; ratio {self.ratio:.3g}"))
        return rows

    def __repr__(self) -> str:
        return text_table("Change of the loss along an update", self.rows())

    def _repr_html_(self) -> str:
        return html_table("Change of the loss along an update", self.rows())


@result("status")
class GradientOverlap(Result):
    """The part of the gradient that lies in the span of eigenvectors."""

    shares: Array  # (k,) (v_j·g)² / |g|², in the order of the pairs
    length: float  # |g|
    status: Status = Status.COMPLETE

    @property
    def total(self) -> float:
        """Share of |g|² in the span of all k: 1 if the gradient lies in it."""
        return float(np.sum(self.shares))

    def __float__(self) -> float:
        return self.total

    def __format__(self, spec: str) -> str:
        return format(self.total, spec)

    def __repr__(self) -> str:
        rows = [("in the span", f"{100 * self.total:.4g} % of |g|²"), ("|g|", f"{self.length:.4g}")]
        rows.append(("each", ", ".join(f"{100 * x:.3g} %" for x in self.shares)))
        return text_table(f"Gradient and {len(self.shares)} eigenvectors", rows)


@result("num_matvecs", "status")
class StableStep(Result):
    """The multiple of an optimizer's updates up to which they do not oscillate with growing size.

    Above one training is stable in the linearisation at these parameters; `learning_rate` is the multiple of
    the one given.
    """

    multiple: float
    lower: float  # the multiple is between these as far as the iteration has converged
    upper: float
    learning_rate: float
    num_matvecs: int
    status: Status

    def __float__(self) -> float:
        return self.multiple

    def __format__(self, spec: str) -> str:
        return format(self.multiple, spec)

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each line of the printed result."""
        return [
            ("stable up to", f"{self.multiple:.4g} times the update [{self.lower:.4g}, {self.upper:.4g}]"),
            ("learning rate", f"{self.learning_rate:.4g}"),
            ("products", f"{self.num_matvecs}"),
            ("status", str(self.status)),
        ]

    def __repr__(self) -> str:
        return text_table("Largest stable step", self.rows())

    def _repr_html_(self) -> str:
        return html_table("Largest stable step", self.rows())
