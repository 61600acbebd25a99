"""Numbers with their errors."""

from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from spectra._errors import SpectraError
from spectra._quadrature import share_interval
from spectra._status import Status
from spectra.results._base import Interval, Result, result, text_table


@result("num_matvecs", "method", "status", "reason", "dof", "normals", "num_sampled")
class Estimate(Result):
    """A number, or a pytree of them, with its standard error, what the error rests on, and what it cost.

    `stderr` takes in the spread over probes and the rounding of products, not the bracket. Fields are
    floats for one number, pytrees like the parameters for a diagonal, and dicts {group: number} where
    groups were asked for.

    The [glossary](glossary.md#standard-error) says what is meant by value, interval, bound, limit
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
    total: "Estimate | None" = None  # the sum over groups, from the same products
    least: Any = None  # what the truth cannot be below: no interval reaches further
    most: Any = None
    normals: float | None = None  # of a share of eigenvalues, k n: interval from the law Beta, not Student's
    num_sampled: int | None = None  # eigenvalues that the share is of: a whole number of them

    def interval(self, level: float = 0.95) -> Interval:
        """The interval that holds the truth with probability `level`: bracket plus t times stderr.

        That of a share of eigenvalues is from the law of the share that a probe sees, and no interval leaves
        what is possible.

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
        if isinstance(self.value, Tracer):
            return f"Estimate {tail}"
        if isinstance(self.value, (int, float)) or getattr(self.value, "ndim", 1) == 0:
            return f"{float(self.value):.6g} ± {float(self.stderr):.2g} {tail}"
        if isinstance(self.value, dict) and all(isinstance(x, float) for x in self.value.values()):
            rows = [(name, f"{v:.6g} ± {self.stderr[name]:.2g}") for name, v in self.value.items()]
            return text_table(f"Estimate {tail}", rows)
        return f"Estimate of {len(jax.tree.leaves(self.value))} arrays {tail}"
