"""Sharpness along one direction."""

import math

from spectra._status import Status
from spectra.results._base import Result, result, text_table


@result("descends", "num_evaluations", "status")
class Sharpness(Result):
    """2 / s for the first step s along a direction at which the loss is back at its value.

    `lower` and `upper` bracket it: at the step 2 / upper the loss was not above its value, at 2 / lower it
    was. That it is the *first* such step holds where the loss falls and then rises, as a quadratic does.

    The [glossary](glossary.md#sharpness) says what is meant by sharpness.
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
            ("critical sharpness", f"{self.value:.4g} [{self.lower:.4g}, {self.upper:.4g}]"),
            ("largest step", f"{self.step:.4g} {'along' if self.descends else 'against'} the direction"),
            ("evaluations", f"{self.num_evaluations}"),
            ("status", str(self.status)),
        ]

    def __repr__(self) -> str:
        return text_table("Sharpness along a direction", self.rows())
