"""Numbers with their errors."""

from typing import Any

import jax
from jax.core import Tracer

from spectra._errors import SpectraError
from spectra._status import Status
from spectra.results._base import Interval, result, text_table


@result("num_matvecs", "method", "status", "reason", "dof")
class Estimate:
    """A number, or a pytree of them, with its standard error, what the error rests on, and what it cost.

    `stderr` takes in the spread over probes and the rounding of products, not the bracket. Fields are
    floats for one number, pytrees like the parameters for a diagonal, and dicts {group: number} where
    groups were asked for.
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
    total: "Estimate | None" = None  # the sum over groups, from the same products

    def interval(self, level: float = 0.95) -> Interval:
        """The interval that holds the truth with probability `level`: bracket plus t times stderr.

        Examples:
            >>> from spectra import Estimate
            >>> lower, value, upper = Estimate(10.0, 1.0, 64, "hutchinson", dof=63).interval()
            >>> round(lower, 2), round(upper, 2)
            (8.0, 12.0)
        """
        from scipy.special import ndtri, stdtrit

        if not 0 < level < 1:
            raise SpectraError(f"level={level} is not between 0 and 1.")
        tail = (1 + level) / 2
        t = float(ndtri(tail) if self.dof is None else stdtrit(self.dof, tail))
        low = self.value if self.lower is None else self.lower
        high = self.value if self.upper is None else self.upper
        return Interval(
            jax.tree.map(lambda x, s: x - t * s, low, self.stderr),
            self.value,
            jax.tree.map(lambda x, s: x + t * s, high, self.stderr),
        )

    def __repr__(self) -> str:
        tail = f"({self.method}, {self.num_matvecs} products" + (
            ")" if self.status is Status.COMPLETE else f", {self.status.code})"
        )
        if isinstance(self.value, Tracer):
            return f"Estimate {tail}"
        if isinstance(self.value, (int, float)) or getattr(self.value, "ndim", 1) == 0:
            return f"{float(self.value):.6g} ± {float(self.stderr):.2g} {tail}"
        if isinstance(self.value, dict) and all(isinstance(x, float) for x in self.value.values()):
            rows = [(name, f"{v:.6g} ± {self.stderr[name]:.2g}") for name, v in self.value.items()]
            return text_table(f"Estimate {tail}", rows)
        return f"Estimate of {len(jax.tree.leaves(self.value))} arrays {tail}"
