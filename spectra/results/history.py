"""Spectra along training."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from spectra.base.errors import Status
from spectra.results.base import (
    Array,
    Interval,
    Result,
    extreme_cell,
    extreme_text,
    is_converged,
    notebook_view,
    plain,
    result,
    worst,
)
from spectra.results.estimates import Estimate
from spectra.results.quadrature import Quadrature
from spectra.results.text import DIGITS, directed, html_table, measured, text_table

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped


@result("step", "num_matvecs", "level")
class Snapshot(Result):
    """The spectrum at one step of training.

    Made by `SpectrumTracker`, whose history consists of snapshots. `largest` is bounded on the inside by a
    Rayleigh quotient and on the outside with probability `level`, as in `spectrum`; see `SpectrumTracker` for
    the cost. Snapshots of one run see the same probes, so that their intervals hold or miss together where
    the spectrum hardly changes.

    The [glossary](glossary.md#snapshot) defines snapshot.
    """

    step: int
    eigenvalues: Float[Array, " eigenvalues"]  # the largest, descending
    residuals: Float[Array, " eigenvalues"]  # an eigenvalue lies within this distance, but for rounding
    largest: Interval  # scalars: λmax, the sharpness, >= lower always, and <= upper with probability `level`
    smallest: Interval  # λmin <= upper always, and >= lower with probability `level`
    trace: Estimate
    quadrature: Quadrature  # the density: `spectra.spectral_density(snapshot.quadrature)`
    scalars: dict[str, float]  # what the training loop passed along: loss, learning_rate, ...
    num_matvecs: int
    seconds: float  # what the snapshot cost
    trained: float  # seconds of training before it, without snapshots
    level: float | None = None  # None in older files: `largest` and `smallest` hold an eigenvalue, then

    @property
    def status(self) -> Status:
        """That of the quadrature, or NOISY where rounding leaves no digit of |H|."""
        return self.quadrature.judged

    @property
    def sharpness(self) -> float:
        """λmax: the largest Ritz value seen, converged to the tolerance of the tracker."""
        return float(self.largest.estimate)

    @property
    def smallest_kind(self) -> str:
        """What `smallest` is: "value", "upper bound" if it has not converged, "residual" in older files."""
        if self.level is None:
            return "residual"
        return "value" if is_converged(self.smallest, 0) else "upper bound"

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each line of the printed snapshot."""
        return [
            ("largest eigenvalue", self._largest()),
            ("smallest eigenvalue", extreme_text(self.smallest, 0, self.level)),
            ("trace", measured(self.trace.value, self.trace.stderr)),
            *((name, f"{value:.5g}") for name, value in self.scalars.items()),
            ("cost", f"{self.num_matvecs} products, {self.seconds:.3g} s"),
        ]

    def records(self) -> list[dict[str, Any]]:
        """One row, as those of a history."""
        return [plain(_record(self))]

    @property
    def largest_cell(self) -> str:
        """`largest` for a table: a number, or a bound with as many digits as the residual leaves."""
        return extreme_cell(self.largest, -1, self.level, self._digits)

    @property
    def _digits(self) -> int:
        """Of the leading eigenvalue: those that its residual leaves, three at least."""
        value, residual = abs(float(self.eigenvalues[0])), float(self.residuals[0])
        if not 0 < residual < value:
            return 3 if residual else DIGITS
        known = min(math.log10(value) - math.log10(residual), DIGITS)  # their quotient may overflow
        return min(max(math.ceil(known) + 1, 3), DIGITS)

    def _largest(self) -> str:
        """The leading pair with its residual, where the probes say less than it."""
        value, residual = float(self.eigenvalues[0]), float(self.residuals[0])
        if self.level is None or is_converged(self.largest, -1) or value < self.sharpness:
            return extreme_text(self.largest, -1, self.level)
        least, above = float(self.largest.lower), float(self.largest.upper)
        most = f"; at most {directed(above, up=True)} ({100 * self.level:g} %)" if np.isfinite(above) else ""
        text = f"at least {directed(least, up=False, digits=self._digits)}"
        return f"{text} (residual {directed(residual, up=True, digits=1)}){most}"

    def __repr__(self) -> str:
        return text_table(f"Snapshot of step {self.step}", self.rows())

    def _repr_html_(self) -> str:
        return html_table(f"Snapshot of step {self.step}", self.rows())


def _record(s: Snapshot) -> dict[str, Any]:
    """What a row of a table says of a snapshot."""
    ends = {
        f"{name}{suffix}": value
        for name, interval in (("largest", s.largest), ("smallest", s.smallest))
        for suffix, value in zip(("", "_lower", "_upper"), (interval[1], *interval[::2]), strict=True)
    }
    first = {"step": s.step, **ends, "trace": s.trace.value, "trace_stderr": s.trace.stderr}
    last = {"num_matvecs": s.num_matvecs, "seconds": s.seconds, "status": s.status}
    scalars = {_free(name, first | last): value for name, value in s.scalars.items()}
    return {**first, **scalars, **last}


def _free(name: str, taken: Container[str]) -> str:
    """The name of a number that the training loop passed along, which replaces no other."""
    return f"scalar_{name}" if name in taken else name


def _padded(arrays: list[Array], value: float) -> np.ndarray:
    """(s, k, m) of arrays (k, m), filled up to the longest."""
    arrays = [np.asarray(x, float) for x in arrays]
    shape = [max((x.shape[axis] for x in arrays), default=0) for axis in (0, 1)]
    full = np.full((len(arrays), *shape), value)
    for row, x in zip(full, arrays, strict=True):
        row[: x.shape[0], : x.shape[1]] = x
    return full


@result("provenance", "skipped")
class SpectrumHistory(Result):
    """Snapshots in the order of training, as a `SpectrumTracker` records and `spectra.load` reads them.

    A sequence of `Snapshot`; `history.plot()` draws the density over time, `history.to_dataframe()` and
    `history.to_xarray()` are its tables.

    Examples:
        >>> import jax, jax.numpy as jnp, spectra
        >>> w, scales = jnp.ones(4), jnp.arange(1.0, 5.0)
        >>> tracker = spectra.SpectrumTracker(
        ...     lambda w: spectra.HessianOperator(lambda w, _: jnp.sum(scales * w**2), w, None), every=1)
        >>> for step in range(2):
        ...     snapshot = tracker(step, w)
        >>> len(tracker.history), round(tracker.history[-1].sharpness, 3)
        (2, 8.0)
    """

    snapshots: tuple[Snapshot, ...]
    provenance: dict[str, Any]
    skipped: tuple[int, ...] = ()  # steps left out to stay within the budget

    @classmethod
    def of(
        cls, snapshots: Iterable[Snapshot], provenance: dict[str, Any], skipped: Iterable[int] = ()
    ) -> SpectrumHistory:
        """The history of what was recorded in any order: a run that goes on from an earlier step may record
        steps between those that are there, and some that were left out before."""
        taken = tuple(sorted(snapshots, key=lambda snapshot: snapshot.step))
        return cls(taken, provenance, tuple(sorted({*skipped} - {s.step for s in taken})))

    def __len__(self) -> int:
        return len(self.snapshots)

    def __iter__(self):
        return iter(self.snapshots)

    def __getitem__(self, index: int) -> Snapshot:
        return self.snapshots[index]

    @property
    def status(self) -> Status:
        """The first status among the snapshots that is not ok."""
        return worst(snapshot.status for snapshot in self.snapshots)

    @property
    def steps(self) -> Int[np.ndarray, " snapshots"]:
        """Step of each snapshot."""
        return np.array([s.step for s in self.snapshots], int)

    @property
    def sharpness(self) -> Float[np.ndarray, " snapshots"]:
        """λmax."""
        return np.array([s.sharpness for s in self.snapshots], float)

    @property
    def smallest(self) -> Float[np.ndarray, " snapshots"]:
        """Smallest Ritz values: λmin where `smallest_kind` is "value", else upper bounds on it."""
        return np.array([s.smallest.estimate for s in self.snapshots], float)

    @property
    def smallest_kind(self) -> Shaped[np.ndarray, " snapshots"]:
        """What each entry of `smallest` is, see `Snapshot`."""
        return np.array([s.smallest_kind for s in self.snapshots], str)

    @property
    def smallest_interval(self) -> Interval:
        """Of each snapshot: λmin lies below `upper` always, and above `lower` with probability `level`."""
        return Interval(*np.array([s.smallest for s in self.snapshots], float).reshape(-1, 3).T)

    @property
    def eigenvalues(self) -> Float[np.ndarray, "snapshots eigenvalues"]:
        """Largest eigenvalues, descending; NaN where a snapshot has fewer than others."""
        found = _padded([np.atleast_2d(s.eigenvalues) for s in self.snapshots], np.nan)
        return found.reshape(len(self), found.shape[-1])

    @property
    def trace(self) -> Float[np.ndarray, " snapshots"]:
        """Trace."""
        return np.array([s.trace.value for s in self.snapshots], float)

    @property
    def trace_stderr(self) -> Float[np.ndarray, " snapshots"]:
        """Standard error of the trace."""
        return np.array([s.trace.stderr for s in self.snapshots], float)

    def records(self) -> list[dict[str, Any]]:
        """A row for each snapshot: step, extremes and trace with their errors, recorded numbers, cost.

        A recorded number is a column of its own name, or `scalar_NAME` where that is taken.
        """
        return [row for snapshot in self.snapshots for row in snapshot.records()]

    def scalar(self, name: str) -> Float[np.ndarray, " snapshots"]:
        """A number that the training loop passed along; NaN at steps where it did not."""
        return np.array([s.scalars.get(name, np.nan) for s in self.snapshots], float)

    def to_xarray(self) -> Any:
        """The history as an `xarray.Dataset`, which needs xarray.

        Dimensions: `step`; `rank` of the largest eigenvalues, from 1; `end` of an interval ("lower",
        "estimate", "upper"); `probe` and `node` of the quadratures, where NaN with weight zero pads the
        shorter ones. What the training loop passed along is a variable of its own name, or `scalar_NAME`
        where that is taken.

        Raises:
            ImportError: xarray is not installed.
        """
        import xarray  # pyright: ignore[reportMissingImports]

        taken = [s.quadrature for s in self.snapshots]
        data: dict[str, Any] = {
            "eigenvalues": (("step", "rank"), self.eigenvalues),
            "trace": ("step", self.trace),
            "trace_stderr": ("step", self.trace_stderr),
            "nodes": (("step", "probe", "node"), _padded([q.nodes for q in taken], np.nan)),
            "weights": (("step", "probe", "node"), _padded([q.weights for q in taken], 0.0)),
            "seconds": ("step", np.array([s.seconds for s in self.snapshots], float)),
            "num_matvecs": ("step", np.array([s.num_matvecs for s in self.snapshots], int)),
        }
        for name in ("largest", "smallest"):
            ends = np.array([getattr(s, name) for s in self.snapshots], float).reshape(-1, 3)
            data[name] = (("step", "end"), ends)
        coords = {"step": self.steps, "end": list(Interval._fields)}
        coords["rank"] = 1 + np.arange(self.eigenvalues.shape[1])
        for name in dict.fromkeys(name for s in self.snapshots for name in s.scalars):
            data[_free(name, {*data, *coords, "probe", "node"})] = ("step", self.scalar(name))
        return xarray.Dataset(data, coords, {name: str(fact) for name, fact in self.provenance.items()})

    @property
    def cost(self) -> float:
        """Time of all snapshots except the first, which compiles, as a share of training time."""
        taken = sorted(self.snapshots, key=lambda s: s.trained)  # as they were recorded
        trained = taken[-1].trained - taken[0].trained if taken else 0.0
        return sum(s.seconds for s in taken[1:]) / trained if trained > 0 else float("nan")

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each line of the printed history."""
        if not self.snapshots:
            return [("snapshots", "none yet")]
        top = int(np.argmax(self.sharpness))
        first, last = (
            measured(s.trace.value, s.trace.stderr) for s in (self.snapshots[0], self.snapshots[-1])
        )
        rows = [
            ("snapshots", f"{len(self):,}, steps {self.steps[0]:,} to {self.steps[-1]:,}"),
            ("largest eigenvalue", f"{self[0].largest_cell} at first, {self[-1].largest_cell} at last"),
            ("at its largest", f"{self[top].largest_cell} in step {self.steps[top]:,}"),
            ("smallest eigenvalue", self._ends()),
            ("trace", f"{first} at first, {last} at last"),
            ("products", f"{sum(s.num_matvecs for s in self.snapshots):,}"),
        ]
        if np.isfinite(self.cost):
            rows.append(("cost", f"{100 * self.cost:.0f} % of training time, without the first snapshot"))
        if self.skipped:
            rows.append(("left out for the budget", f"{len(self.skipped):,} snapshots"))
        return rows

    def __repr__(self) -> str:
        return text_table(f"Spectrum along training, {self._name}", self.rows())

    def _repr_html_(self) -> str:
        return notebook_view(self, f"Spectrum along training, {self._name}", self.rows())

    def _ends(self) -> str:
        first, last = (extreme_cell(s.smallest, 0, s.level) for s in (self[0], self[-1]))
        known = np.isin(self.smallest_kind, ("value", "residual"))
        note = "" if known.all() else f"; not converged in {np.sum(~known):,} of {len(self):,}"
        return f"{first} at first, {last} at last{note}"

    @property
    def _name(self) -> str:
        return str(self.provenance.get("name", "H"))
