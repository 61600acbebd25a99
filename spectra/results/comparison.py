"""How far one operator is from another."""

from typing import Any

from spectra._status import Status
from spectra.results._base import Array, Interval, Result, result, text_table


def _shown(interval: Interval) -> str:
    low, value, high = interval
    return f"{value:.3g}" if low == high else f"{value:.3g} [{low:.3g}, {high:.3g}]"


@result("size", "num_matvecs", "level", "status")
class OperatorComparison(Result):
    """How wrong an operator A is in the place of B, each number with its interval.

    All are relative: no unit of the loss or of the parameters is in them.
    """

    frobenius: Interval  # |A - B|_F / |B|_F
    trace: Interval  # tr A / tr B
    overlap: Interval  # |U_Aᵀ U_B|²_F / k of the k leading eigenvectors: 1 for one eigenspace, k/n by chance
    wasserstein: Interval  # W₁ of the eigenvalues of A and of B, in units of the mean |λ| of B
    eigenvalues: Array  # (2, k) leading in modulus, of A and of B, descending in modulus
    residuals: Array  # (2, k) within which, plus rounding, there is an eigenvalue
    layers: dict[str, Interval]  # |A - B|_F / |B|_F of the diagonal block of each layer
    size: int  # n
    num_matvecs: int  # products with A and with B, those with blocks among them
    level: float  # of the intervals
    status: Status

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each line of the printed result."""
        k = self.eigenvalues.shape[1]
        values = ", ".join(f"{a:.3g} for {b:.3g}" for a, b in self.eigenvalues.T)
        return [
            ("|A - B| / |B| (Frobenius)", _shown(self.frobenius)),
            ("tr A / tr B", _shown(self.trace)),
            (f"eigenvalues, the leading {k}", values),
            (f"overlap of their {k} eigenvectors", _shown(self.overlap)),
            ("W₁ of the densities / mean |λ|", _shown(self.wasserstein)),
            *[(f"  |A - B| / |B|, {name}", _shown(interval)) for name, interval in self.layers.items()],
            ("intervals", f"{self.level:.0%}"),
            ("products", f"{self.num_matvecs:,}"),
            ("status", str(self.status)),
        ]

    def records(self) -> list[dict[str, Any]]:
        """One row for the whole and one for each layer: its name, the error and the ends of its interval."""
        named = {"whole": self.frobenius, **self.layers}
        return [
            {"layer": name, "frobenius": float(x), "lower": float(low), "upper": float(high)}
            for name, (low, x, high) in named.items()
        ]

    def __repr__(self) -> str:
        return text_table(f"A in the place of B, of order {self.size:,}", self.rows())
