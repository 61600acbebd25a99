"""Condition numbers, of one operator and of every layer."""

import numpy as np

from spectra._status import Status
from spectra.results._base import Interval, html_table, result, text_table


@result("is_lower_bound", "shift", "rank_tol", "size", "num_matvecs", "method", "status")
class ConditionNumber:
    """What can be said of the condition number of A = H + shift I.

    Eigenvalues with |λ| <= rank_tol * largest, or below the noise floor, count as zero: the *numerical
    range* is what is left. Where `is_lower_bound` is true the products leave it open whether smaller
    eigenvalues exist, and `effective` (and `value`, if finite) is at least what is stated.
    """

    value: float  # |λ|max / |λ|min; infinite if some eigenvalue is zero
    effective: float  # |λ|max / smallest_nonzero
    largest: float  # |λ|max
    smallest_nonzero: float
    rank: int
    nullity: int
    nullity_interval: Interval  # 95 %; all three equal where eigenvalues were counted
    noise_floor: float  # |λ| below which products do not resolve an eigenvalue from zero
    is_lower_bound: bool
    shift: float
    rank_tol: float
    size: int  # n
    num_matvecs: int
    method: str  # "dense" or "krylov"
    status: Status

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each line of the printed result."""
        least = "at least " if self.is_lower_bound else ""
        low, _, high = self.nullity_interval
        counted = f"{self.nullity:,}" + ("" if low == high else f" [{low:.0f}, {high:.0f}]")
        return [
            ("condition number", (least if np.isfinite(self.value) else "") + f"{self.value:.6g}"),
            ("over the numerical range", f"{least}{self.effective:.6g}"),
            ("largest |λ|", f"{self.largest:.6g}"),
            ("smallest |λ| above zero", f"{self.smallest_nonzero:.6g}"),
            ("rank", f"{self.rank:,} of {self.size:,}"),
            ("nullity", counted),
            ("counted as zero", f"|λ| <= {max(self.rank_tol * self.largest, self.noise_floor):.2g}"),
            ("noise floor", f"{self.noise_floor:.2g}"),
            ("method", f"{self.method}, {self.num_matvecs:,} products"),
            ("status", str(self.status)),
        ]

    def __repr__(self) -> str:
        return text_table(
            "Condition number" + (f" of H + {self.shift:g} I" if self.shift else ""), self.rows()
        )

    def _repr_html_(self) -> str:
        return html_table(
            "Condition number" + (f" of H + {self.shift:g} I" if self.shift else ""), self.rows()
        )


@result()
class LayerConditions:
    """Condition numbers of the diagonal blocks, one for each layer; prints as a table."""

    layers: dict[str, ConditionNumber]

    def __getitem__(self, name: str) -> ConditionNumber:
        return self.layers[name]

    def __iter__(self):
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def table(self) -> list[list[str]]:
        """Cells of the table, the head first."""
        head = ["layer", "n", "rank", "largest |λ|", "smallest |λ| > 0", "effective", "condition number"]
        body = [
            [
                name,
                f"{c.size:,}",
                f"{c.rank:,}",
                f"{c.largest:.4g}",
                f"{c.smallest_nonzero:.4g}",
                ("≥ " if c.is_lower_bound else "") + f"{c.effective:.4g}",
                f"{c.value:.4g}",
            ]
            for name, c in self.layers.items()
        ]
        return [head, *body]

    def __repr__(self) -> str:
        table = self.table()
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        return "\n".join(
            "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in table
        )

    def _repr_html_(self) -> str:
        import html

        rows = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in self.table()]
        return "<table>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"
