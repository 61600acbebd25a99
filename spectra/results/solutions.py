"""Results of linear systems and of functions of an operator applied to vectors."""

from typing import Any, ClassVar

import numpy as np

from spectra._status import Status
from spectra.results._base import Array, Interval, PyTree, Result, html_table, result, text_table


@result("num_matvecs", "preconditioner_matvecs", "method", "bound", "status")
class Solution(Result):
    """x with (H + shift I) x = b, and how far it can be from the exact one.

    For several right-hand sides x is stacked as they were, and the arrays have shape (k,). `x` is NaN where
    there is no solution: `status` is SINGULAR then.

    The [glossary](glossary.md#residual) says what is meant by residual, bound and product.
    """

    _BULKY: ClassVar = ("x",)

    x: PyTree  # in the form of b
    residual_norm: Array  # (), |b - (H + shift I) x|, computed from x at the end
    rounding: Array  # (), how far rounding can have moved that norm
    error_bound: (
        Array  # (), |x - x*| is not above this; infinite where nothing bounds the spectrum away from 0
    )
    quadratic_form: Interval  # bᵀ(H + shift I)⁻¹b: lower, estimate, upper; where definite with a known bound
    converged: Array  # (), bool
    num_matvecs: int  # of all right-hand sides, checks included
    preconditioner_matvecs: int  # products that built the preconditioner
    method: str  # "cg", "minres", or "dense"
    bound: str  # what error_bound rests on
    status: Status

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each line of the printed result."""
        error = _largest(self.error_bound)
        built = f" and {self.preconditioner_matvecs:,} of the preconditioner" * bool(
            self.preconditioner_matvecs
        )
        return [
            ("|b - A x|", f"{_largest(self.residual_norm):.2g} ± {_largest(self.rounding):.1g}"),
            ("|x - x*|", f"at most {error:.2g} ({self.bound})" if np.isfinite(error) else "not bounded"),
            ("method", f"{self.method}, {self.num_matvecs:,} products{built}"),
            ("status", str(self.status)),
        ]

    def __repr__(self) -> str:
        if not isinstance(self.residual_norm, (float, np.ndarray)):
            return f"Solution({self.method}, {self.status.code})"
        return text_table(self._title(), self.rows())

    def _repr_html_(self) -> str:
        return html_table(self._title(), self.rows())

    def _title(self) -> str:
        count = np.size(self.residual_norm)
        return "Solution" + f" of {count} right-hand sides, the worst of them" * (count > 1)


@result("num_matvecs", "num_steps", "function", "bound", "status")
class FunctionProduct(Result):
    """f(H) v, and how far it can be from the exact one."""

    _BULKY: ClassVar = ("value",)

    value: PyTree  # in the form of v
    error_bound: Array  # (), |value - f(H) v| is not above this; see `bound` for what it rests on
    num_matvecs: int
    num_steps: int  # Lanczos steps of the longest run
    function: str
    bound: str
    status: Status

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each line of the printed result."""
        error = _largest(self.error_bound)
        return [
            ("|value - f(H) v|", f"at most {error:.2g}" if np.isfinite(error) else "not bounded"),
            ("rests on", self.bound),
            ("products", f"{self.num_matvecs:,} ({self.num_steps} steps)"),
            ("status", str(self.status)),
        ]

    def __repr__(self) -> str:
        if not isinstance(self.error_bound, (float, np.ndarray)):
            return f"FunctionProduct({self.function}, {self.status.code})"
        return text_table(f"FunctionProduct ({self.function})", self.rows())

    def _repr_html_(self) -> str:
        return html_table(f"FunctionProduct ({self.function})", self.rows())


def _largest(x: Any) -> float:
    return float(np.max(x))
