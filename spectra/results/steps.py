"""What curvature says about steps of an optimizer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from spectra.base.errors import Status
from spectra.results.base import Array, Result, result
from spectra.results.text import html_table, span, text_table

if TYPE_CHECKING:
    from jaxtyping import Float


@result("descends", "num_evaluations", "status")
class Sharpness(Result):
    """2 / s for the first step s along a direction at which the loss is back at its initial value.

    `lower` and `upper` bracket it: at the step 2 / upper the loss was below its initial value by more than
    its rounding, and at 2 / lower it was above. The step is the *first* such one if the loss falls and then
    rises, as a quadratic does.

    Returned by `critical_sharpness`, whose page has an example, the cost and the source.

    The [glossary](glossary.md#sharpness) defines sharpness.
    """

    value: float
    lower: float
    upper: float
    descends: bool  # whether the loss falls along the direction; otherwise against it
    loss: float  # at the parameters
    num_evaluations: int
    status: Status

    def __float__(self) -> float:
        return self.value

    def __format__(self, spec: str) -> str:
        return format(self.value, spec) if spec else str(self)

    @property
    def step(self) -> float:
        """s: in units of the direction, the largest step that does not raise the loss."""
        return 2 / self.value if self.value else math.inf

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each line of the printed result."""
        return [
            ("critical sharpness", f"{self.value:.4g} {span(self.lower, self.upper, 4)}"),
            ("largest step", f"{self.step:.4g} {'along' if self.descends else 'against'} the direction"),
            ("evaluations", f"{self.num_evaluations}"),
            ("status", str(self.status)),
        ]

    def __repr__(self) -> str:
        return text_table("Sharpness along a direction", self.rows())


@result("num_matvecs", "status")
class StepQuality(Result):
    """The change of a loss along one update: predicted by slope and curvature, and measured.

    `sharpness` is the curvature along the update relative to the slope: a quadratic loss is back at its value
    after `largest_step` = 2 / sharpness updates.

    Returned by `step_quality`, at the cost of one product and one gradient.

    Examples:
        >>> from spectra import StepQuality
        >>> found = StepQuality(slope=-0.4, curvature=0.2, length=1.0, loss=2.0, measured=-0.27)
        >>> round(found.predicted, 3), round(found.ratio, 3), round(found.largest_step, 3)
        (-0.3, 0.9, 4.0)
    """

    slope: float  # g·d
    curvature: float  # dᵀHd
    length: float  # |d|
    loss: float  # at the parameters
    measured: float  # L(θ + d) - L(θ); NaN if it was not measured
    num_matvecs: int = 1
    status: Status = Status.COMPLETE
    rounding: float = 0.0  # of `measured`: smaller changes are not resolved

    @property
    def predicted(self) -> float:
        """g·d + ½ dᵀHd."""
        return self.slope + self.curvature / 2

    @property
    def ratio(self) -> float:
        """Measured over predicted change: 1 where the loss is quadratic over the step.

        NaN where the predicted change is no larger than the rounding of the loss: a step too short to tell.
        """
        return self.measured / self.predicted if abs(self.predicted) > self.rounding else math.nan

    @property
    def sharpness(self) -> float:
        """dᵀHd / |g·d|; if the update is that of another task, this is the relative sharpness.

        NaN where the loss has neither slope nor curvature along the update.
        """
        if self.slope:
            return self.curvature / abs(self.slope)
        return math.copysign(math.inf, self.curvature) if self.curvature else math.nan

    @property
    def largest_step(self) -> float:
        """Multiple of the update at which a quadratic is back at its value.

        0 if it rises at once, and infinity if it never does.
        """
        if self.slope > 0 or (self.slope == 0 and self.curvature > 0):
            return 0.0
        return -2 * self.slope / self.curvature if self.curvature > 0 else math.inf

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each line of the printed result."""
        flat = self.slope == self.curvature == 0
        edge = f"{self.sharpness:.4g}; largest step {self.largest_step:.4g} updates"
        rows = [
            ("predicted", f"{self.predicted:+.4g} = {self.slope:+.3g} {self.curvature / 2:+.3g}"),
            ("sharpness along it", "none: the loss is flat along the update" if flat else edge),
            ("length", f"{self.length:.4g}"),
        ]
        if math.isfinite(self.measured):
            told = f"{self.measured:+.4g}; ratio {self.ratio:.3g}"
            if math.isnan(self.ratio):
                told = f"{self.measured:+.4g} ± {self.rounding:.2g}; the loss does not resolve this step"
            rows.insert(1, ("measured", told))
        return rows

    def __repr__(self) -> str:
        return text_table("Change of the loss along an update", self.rows())

    def _repr_html_(self) -> str:
        return html_table("Change of the loss along an update", self.rows())


@result("status")
class GradientOverlap(Result):
    """The part of the gradient that lies in the span of eigenvectors.

    Returned by `gradient_overlap`, at the cost of one gradient (Gur-Ari, Roberts and Dyer, arXiv:1812.04754).

    Examples:
        >>> import numpy as np
        >>> from spectra import GradientOverlap
        >>> found = GradientOverlap(np.array([0.5, 0.3]), length=2.0)
        >>> round(float(found), 2)
        0.8
    """

    shares: Float[Array, " pairs"]  # (v_j·g)² / |g|², in the order of the pairs
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
    """The largest multiple of an optimizer's updates at which they do not oscillate with growing amplitude.

    If it is above one, training is stable in the linearisation at these parameters. `learning_rate` is this
    multiple of the learning rate that was given.

    Returned by `stable_step`, whose page has an example, the cost and the sources.
    """

    multiple: float
    lower: float  # limits where the update map is symmetric, else what the residual of its eigenvalue leaves
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
            ("stable up to", f"{self.multiple:.4g} times the update {span(self.lower, self.upper, 4)}"),
            ("learning rate", f"{self.learning_rate:.4g}"),
            ("products", f"{self.num_matvecs}"),
            ("status", str(self.status)),
        ]

    def __repr__(self) -> str:
        return text_table("Largest stable step", self.rows())

    def _repr_html_(self) -> str:
        return html_table("Largest stable step", self.rows())
