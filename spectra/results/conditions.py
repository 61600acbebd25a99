"""Condition numbers, of one operator and of every layer."""

from typing import Any

import numpy as np

from spectra._status import Status
from spectra.results._base import (
    Interval,
    Named,
    Result,
    html_table,
    result,
    text_table,
)
from spectra.results._digits import directed, rounded
from spectra.results._plain import flat


@result("is_lower_bound", "shift", "rank_tol", "size", "num_matvecs", "method", "status")
class ConditionNumber(Result):
    """What is known of the condition number of A = H + shift I.

    Eigenvalues with |λ| <= rank_tol * largest count as zero, which is never below the noise floor: the
    *numerical range* is what is left. Intervals say where the numbers lie: by Weyl's theorem (dense), or
    between a Rayleigh quotient or residual and what the probes exclude up to a probability of 1e-6 (Krylov),
    see `condition_number`. Where `is_lower_bound` is true, `effective` is the lower end of its interval
    and `smallest_nonzero` the upper end of its own, and `value`, if finite, is a lower bound, too.

    The [glossary](glossary.md#noise-floor) says what is meant by noise floor, bound and limit.
    """

    value: float  # |λ|max / |λ|min; infinite if some eigenvalue is zero to the noise floor
    effective: float  # |λ|max over the smallest |λ| of the numerical range
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
    largest_interval: Interval | None = None  # None in files of versions that did not state these
    smallest_interval: Interval | None = None  # of the smallest |λ| of the numerical range
    effective_interval: Interval | None = None  # its upper end is infinite where nothing is known of it

    def __float__(self) -> float:
        return float(self.value)

    def __format__(self, spec: str) -> str:
        return format(float(self), spec) if spec else str(self)

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each line of the printed result."""
        low, _, high = self.nullity_interval
        counted = f"{self.nullity:,}" + ("" if low == high else f" [{low:,.0f}, {high:,.0f}]")
        cut = max(self.rank_tol * self.largest, self.noise_floor)
        value = self.text if self.value == self.effective else f"at least {directed(self.value, up=False)}"
        if not np.isfinite(self.value):
            value = "inf" + (f" (to the noise: above {self.largest / cut:.2g})" if cut else "")
        return [
            ("condition number", value),
            ("over the numerical range", self.text),
            ("largest |λ|", self._size(self.largest, self.largest_interval)),
            ("smallest |λ| above zero", self._smallest()),
            ("rank", f"{self.rank:,} of {self.size:,}"),
            ("nullity", counted),
            ("counted as zero", f"|λ| <= {cut:.2g}"),
            ("noise floor", f"{self.noise_floor:.2g}"),
            ("method", f"{self.method}, {self.num_matvecs:,} products"),
            ("status", str(self.status)),
        ]

    @property
    def text(self) -> str:
        """`effective` in words: a value with its interval, or a bound."""
        if self.effective_interval is None:
            return ("at least " if self.is_lower_bound else "") + f"{self.effective:.6g}"
        low, value, high = map(float, self.effective_interval)
        if self.is_lower_bound:
            above = f", at most {directed(high, up=True, digits=3)}" if np.isfinite(high) else ""
            return f"at least {directed(low, up=False, digits=3)}{above}"
        if high == low:
            return f"{value:.6g}"
        return f"{rounded(value, high - low)} [{directed(low, False, 4)}, {directed(high, True, 4)}]"

    def _smallest(self) -> str:
        if self.is_lower_bound and self.smallest_interval is not None:
            return f"at most {directed(self.smallest_nonzero, up=True, digits=3)}"
        return self._size(self.smallest_nonzero, self.smallest_interval)

    @staticmethod
    def _size(value: float, interval: Interval | None) -> str:
        if interval is None:
            return f"{value:.6g}"
        low, _, high = map(float, interval)
        if np.isfinite(high):
            return rounded(value, max(high - value, value - low))
        return f"at least {directed(low, up=False, digits=3)}"

    def __repr__(self) -> str:
        return text_table(
            "Condition number" + (f" of H + {self.shift:g} I" if self.shift else ""), self.rows()
        )

    def _repr_html_(self) -> str:
        return html_table(
            "Condition number" + (f" of H + {self.shift:g} I" if self.shift else ""), self.rows()
        )


@result()
class LayerConditions(Named):
    """Condition numbers of the diagonal blocks, one for each layer; a mapping that prints as a table."""

    layers: dict[str, ConditionNumber]

    def records(self) -> list[dict[str, Any]]:
        """A row for each layer, with the fields of its `ConditionNumber`."""
        return [{"layer": name, **flat(part.to_dict())} for name, part in self.layers.items()]

    def table(self) -> list[list[str]]:
        """Cells of the table, the head first."""
        head = ["layer", "n", "rank", "largest |λ|", "smallest |λ| > 0", "effective", "condition number"]
        body = [
            [
                name,
                f"{c.size:,}",
                f"{c.rank:,}",
                f"{c.largest:.4g}",
                ("≤ " if c.is_lower_bound else "") + f"{c.smallest_nonzero:.4g}",
                ("≥ " if c.is_lower_bound else "") + f"{c.effective:.4g}",
                ("≥ " if c.is_lower_bound and np.isfinite(c.value) else "") + f"{c.value:.4g}",
            ]
            for name, c in self.layers.items()
        ]
        return [head, *body]
