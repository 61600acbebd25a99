"""What is said of whole matrices: condition numbers, distances between operators, parts by class."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from spectra.base.errors import Status
from spectra.results.base import Array, Interval, Named, Result, flat, plain, result
from spectra.results.estimates import Estimate
from spectra.results.text import (
    agree,
    between,
    directed,
    enclosed,
    html_table,
    measured,
    rounded,
    text_table,
    told,
)

if TYPE_CHECKING:
    from jaxtyping import Float


@result("is_lower_bound", "shift", "rank_tol", "size", "num_matvecs", "method", "status")
class ConditionNumber(Result):
    """What is known about the condition number of A = H + shift I.

    Eigenvalues with |λ| <= rank_tol * largest count as zero, and that threshold is never below the noise
    floor; the other eigenvalues are the *numerical range*. Intervals of a dense matrix follow from Weyl's
    theorem. Those of a Krylov run end at a Rayleigh quotient or residual on one side and, on the other, at
    what the probes exclude up to a probability of 1e-6; see `condition_number`. If `is_lower_bound` is true,
    `effective` is the lower end of its interval, `smallest_nonzero` is the upper end of its own, and `value`,
    if finite, is also a lower bound.

    Returned by `condition_number`, whose page states the cost and the sources.

    The [glossary](glossary.md#noise-floor) defines noise floor, bound and limit.

    Examples:
        >>> import jax, jax.numpy as jnp, spectra
        >>> op = spectra.MatrixOperator(jnp.diag(jnp.array([4.0, -2.0, 0.5, 0.0])))
        >>> found = spectra.condition_number(op, key=jax.random.key(0))
        >>> float(found), found.rank, found.nullity  # singular; 4 / 0.5 over the rest
        (inf, 3, 1)
        >>> round(found.effective, 3), found.method
        (8.0, 'dense')
    """

    value: float  # |λ|max / |λ|min; infinite if some eigenvalue is zero to the noise floor
    effective: float  # |λ|max over the smallest |λ| of the numerical range
    largest: float  # |λ|max
    smallest_nonzero: float
    rank: int
    nullity: int
    nullity_interval: Interval  # 95 %; where they were counted, those that rounding may take across the cut
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
        cut = max(self.rank_tol * self.largest, self.noise_floor)
        value = self.text if self.value == self.effective else f"at least {directed(self.value, up=False)}"
        if not np.isfinite(self.value):
            # An eigenvalue counted in the matrix may be off by the noise, as |λ|max may be.
            away = self.noise_floor if self.method == "dense" else 0.0
            least = max((self.largest - away) / (cut + away), 1.0) if cut else 0.0
            value = "inf" + (f" (to the noise: above {directed(least, up=False, digits=2)})" if cut else "")
        return [
            ("condition number", value),
            ("over the numerical range", self.text),
            ("largest |λ|", self._size(self.largest, self.largest_interval)),
            ("smallest |λ| above zero", self._smallest()),
            ("rank", f"{_counted(self.rank, *self._ranks())} of {self.size:,}"),
            ("nullity", _counted(self.nullity, *self.nullity_interval[::2])),
            ("counted as zero", f"|λ| <= {cut:.2g}"),
            ("noise floor", f"{self.noise_floor:.2g}"),
            ("method", f"{self.method}, {self.num_matvecs:,} products"),
            ("status", str(self.status)),
        ]

    @property
    def _is_zero(self) -> bool:
        """Whether no eigenvalue can be told from zero, so that there is nothing to take a ratio of."""
        return not self.rank and self.largest <= max(self.rank_tol * self.largest, self.noise_floor)

    @property
    def text(self) -> str:
        """`effective` in words: a value with its interval, or a bound; none where all are zero."""
        if self._is_zero:
            return "none"
        if self.effective_interval is None:
            return ("at least " if self.is_lower_bound else "") + f"{self.effective:.6g}"
        low, value, high = map(float, self.effective_interval)
        if self.is_lower_bound:
            above = f", at most {directed(high, up=True, digits=3)}" if np.isfinite(high) else ""
            return f"at least {directed(low, up=False, digits=3)}{above}"
        return between(low, value, high)

    def cells(self) -> list[str]:
        """Order, rank, largest and smallest |λ| and condition numbers for a table, bounds marked as such."""
        count, rank = f"{self.size:,}", _counted(self.rank, *self._ranks())
        if not self.is_lower_bound:
            effective = _cell(self.effective, self.effective_interval) if not self._is_zero else "none"
            value = effective if self.value == self.effective else f"{self.value:.4g}"
            sizes = (
                _cell(self.largest, self.largest_interval),
                _cell(self.smallest_nonzero, self.smallest_interval) if not self._is_zero else "none",
            )
            return [count, rank, *sizes, effective, value]
        ends = self.largest_interval or Interval(self.largest, self.largest, self.largest)
        largest = _cell(self.largest, ends)
        if not agree(float(ends.lower), float(ends.upper), 4):
            largest = f"≥ {directed(float(ends.lower), False, 4)}"
        least = [directed(x, False, 4) for x in (self.effective, self.value)]
        values = [f"≥ {text}" if math.isfinite(float(text)) else text for text in least]
        return [count, rank, largest, f"≤ {directed(self.smallest_nonzero, True, 4)}", *values]

    def _ranks(self) -> tuple[float, float]:
        """The interval of the rank: what the nullity leaves."""
        low, _, high = self.nullity_interval
        return self.size - high, self.size - low

    def _smallest(self) -> str:
        if self._is_zero:
            return "none"
        if self.is_lower_bound and self.smallest_interval is not None:
            return f"at most {directed(self.smallest_nonzero, up=True, digits=3)}"
        return self._size(self.smallest_nonzero, self.smallest_interval)

    @staticmethod
    def _size(value: float, interval: Interval | None) -> str:
        if interval is None:
            return f"{value:.6g}"
        low, _, high = map(float, interval)
        if np.isfinite(high):
            return told(value, max(high - value, value - low))
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
    """Condition numbers of the diagonal blocks, one for each layer; a mapping that prints as a table.

    Returned by `condition_number(op, per_layer=True, key=key)`; `found["hidden"]` is the `ConditionNumber` of
    one layer, and `found.to_dataframe()` the table.

    Examples:
        >>> import jax, jax.numpy as jnp, spectra
        >>> params = {"first": jnp.ones(2), "second": jnp.ones(2)}
        >>> scales = {"first": jnp.array([1.0, 3.0]), "second": jnp.array([2.0, 2.0])}
        >>> def loss_fn(params, _):
        ...     return sum(jnp.sum(scales[name] * params[name] ** 2) for name in params)
        >>> op = spectra.HessianOperator(loss_fn, params, None)
        >>> found = spectra.condition_number(op, per_layer=True, key=jax.random.key(0))
        >>> {name: round(float(part), 3) for name, part in found.layers.items()}
        {'first': 3.0, 'second': 1.0}
    """

    layers: dict[str, ConditionNumber]

    def records(self) -> list[dict[str, Any]]:
        """A row for each layer, with the fields of its `ConditionNumber`."""
        return [{"layer": name, **flat(part.to_dict())} for name, part in self.layers.items()]

    def table(self) -> list[list[str]]:
        """Cells of the table, the head first."""
        head = ["layer", "n", "rank", "largest |λ|", "smallest |λ| > 0", "effective", "condition number"]
        return [head, *([name, *found.cells()] for name, found in self.layers.items())]


def _cell(value: float, interval: Interval | None) -> str:
    """A number in four digits at most, and no more than its interval leaves."""
    width = 0.0 if interval is None else float(interval[2]) - float(interval[0])
    return rounded(value, max(width if math.isfinite(width) else 0.0, 1e-4 * abs(value)))


def _counted(value: int, low: float, high: float) -> str:
    return f"{value:,}" if low == high else f"{value:,} [{low:,.0f}, {high:,.0f}]"


def _shown(interval: Interval) -> str:
    low, value, high = interval
    return enclosed(value, low, high)


@result("size", "num_matvecs", "level", "status")
class OperatorComparison(Result):
    """How wrong an operator A is in place of B, each number with its interval.

    All numbers are relative, independent of the units of the loss and of the parameters.

    Returned by `compare_operators`, whose page has an example, the cost and the sources; `found.layers`
    says which layer's approximation is worst.
    """

    frobenius: Interval  # |A - B|_F / |B|_F
    trace: Interval  # tr A / tr B
    overlap: Interval  # |U_Aᵀ U_B|²_F / k of the k leading eigenvectors: 1 for one eigenspace, k/n by chance
    wasserstein: Interval  # W₁ of the eigenvalues of A and of B, in units of the mean |λ| of B
    eigenvalues: Float[Array, "2 pairs"]  # leading in modulus, of A and of B, descending in modulus
    residuals: Float[Array, "2 pairs"]  # within which, plus rounding, there is an eigenvalue
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
            ("intervals", f"{100 * self.level:g} %"),
            ("products", f"{self.num_matvecs:,}"),
            ("status", str(self.status)),
        ]

    def records(self) -> list[dict[str, Any]]:
        """One row for the whole and one for each layer: its name, the error and the ends of its interval.

        The whole comes first; next to a layer of that name it is "(whole)".
        """
        whole = "whole"
        while whole in self.layers:
            whole = f"({whole})"
        named = [(whole, self.frobenius), *self.layers.items()]
        return [
            plain({"layer": name, "frobenius": float(x), "lower": float(low), "upper": float(high)})
            for name, (low, x, high) in named
        ]

    def __repr__(self) -> str:
        return text_table(f"A in place of B, of order {self.size:,}", self.rows())


@result("num_classes", "num_matvecs", "status")
class ClassSplit(Result):
    """Leading eigenvalues and traces of the parts that sum to a Gauss-Newton matrix, see `class_operators`.

    Eigenvalues are descending. For the class means and the cross part, they are all eigenvalues that are not
    zero by construction; for the whole, within and same, the k largest.

    Returned by `class_split`, whose page has an example, the cost and the source.
    """

    whole: Float[Array, " pairs"]
    class_means: Float[Array, " classes"]
    cross: Float[Array, " classes*(classes-1)"]
    within: Float[Array, " pairs"]
    same: Float[Array, " pairs"]
    class_trace: float
    cross_trace: float
    within_trace: Estimate
    same_trace: Estimate
    weights: Float[Array, "classes classes"]  # [i, j]: probability of class j summed over class i, over N
    num_classes: int
    num_matvecs: int
    status: Status

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each line of the printed result."""

        def some(values):
            return ", ".join(f"{x:.3g}" for x in values[: self.num_classes])

        parts = [("whole", self.whole, None), ("class means", self.class_means, f"{self.class_trace:.4g}")]
        parts.append(("cross", self.cross, f"{self.cross_trace:.4g}"))
        for name, values, trace in (
            ("within", self.within, self.within_trace),
            ("same class", self.same, self.same_trace),
        ):
            parts.append((name, values, measured(trace.value, trace.stderr)))
        rows = [(name, some(values) + (f"; trace {trace}" if trace else "")) for name, values, trace in parts]
        return [*rows, ("classes", f"{self.num_classes}"), ("products", f"{self.num_matvecs}")]

    def __repr__(self) -> str:
        return text_table("Gauss-Newton matrix by classes, largest eigenvalues", self.rows())

    def _repr_html_(self) -> str:
        return html_table("Gauss-Newton matrix by classes, largest eigenvalues", self.rows())
