"""The whole answer in one object: density, extremes, trace and shares, each with its uncertainty."""

import dataclasses
import functools
import math
import os
import time
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from spectra.base import trees
from spectra.base.calls import automatic
from spectra.base.errors import SpectraError, Status
from spectra.density import deflation as dense
from spectra.density.extremes import (
    LEVEL,
    condition,
    condition_lower_bound,
    extreme,
    norm,
    sampling_error,
    shows_fourth_powers,
)
from spectra.density.slq import slq
from spectra.density.smoothing import spectral_density
from spectra.estimators.counts import count_above
from spectra.estimators.functions import trace_of
from spectra.krylov.floors import relative_change
from spectra.krylov.plan import check_probe_batch
from spectra.krylov.product_rounding import vanished
from spectra.operators.base import LinearOperator, require_operator
from spectra.report.provenance import provenance_of
from spectra.results import Density, Estimate, Interval, Quadrature, Result, notebook_view, result, text_table
from spectra.results.base import extreme_text
from spectra.results.text import agree, between, directed, enclosed, measured, span
from spectra.runs.checkpoint import Checkpoint

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["SpectrumReport", "spectrum"]
COUNTED = (0.5, 0.1, 0.01)
"""Of |H|: the report counts the eigenvalues above."""
ZERO_TOL = 1e-3
"""Of |H|: what counts as near zero by default."""
FAR = 1e-3
"""Of |H|: the share of eigenvalues further from zero is known better than that of negative ones."""


@result("name", "zero_tol", "provenance", "level")
class SpectrumReport(Result):
    """The result of `spectrum`: everything that one run says about an operator.

    Print it, `.plot()` it, `.save(path)` it; `spectra.load(path)` restores it. The intervals of the two
    extreme eigenvalues have a bound on the inner side (a Rayleigh quotient) and a limit that holds with
    probability `level` on the outer side, see `spectra.density.extremes`. All other intervals are at 95 %,
    or 94 % where they depend on |H|: ranks, and shares beyond or within a part of it.

    The [glossary](glossary.md) defines density, outlier, bulk, band and noise floor.
    """

    name: str
    quadrature: Quadrature
    density: Density
    largest: Interval  # scalars: λmax >= lower always, and <= upper with probability `level`
    smallest: Interval  # λmin <= upper always, and >= lower with probability `level`
    trace: Estimate
    negative: Interval  # share of eigenvalues below minus the noise floor
    near_zero: Interval  # share within zero_tol * |H| of zero
    zero_tol: float
    condition_lower_bound: float  # of |λ|max over the smallest |λ| that is not zero
    noise_floor: float  # |eigenvalue| below which products do not resolve
    provenance: dict[str, Any]  # versions, device, key, time, settings
    level: float | None = None  # None in older files: `largest` and `smallest` hold an eigenvalue, then

    @property
    def status(self) -> Status:
        """The status of the quadrature, or NOISY where rounding leaves no digit of |H|."""
        return self.quadrature.judged

    @property
    def eigenvalues(self) -> "Float[np.ndarray, ' resolved']":
        """Eigenvalues that are known to within the noise floor, ascending.

        All n where the status is `EXACT`; otherwise those that are simple and that every probe resolves,
        which may be none. For chosen ones with their vectors see `eigsh`.
        """
        return self.quadrature.resolved

    @property
    def outliers(self) -> "Float[np.ndarray, ' outliers']":
        """Mean positions of the eigenvalues that stand alone in the density, ascending; not all are known."""
        return np.asarray(self.density.outliers, float)

    @functools.cached_property
    def effective_rank(self) -> Interval:
        """Σ|λ| / |λ|max: how many eigenvalues of the largest magnitude would have the same sum."""
        return rank(self.quadrature, 1)

    @functools.cached_property
    def stable_rank(self) -> Interval:
        """|H|_F² / |H|²: the same for squares."""
        return rank(self.quadrature, 2)

    @functools.cached_property
    def condition(self) -> Interval:
        """|λ|max over the smallest |λ| that is not zero; the upper end is finite where all λ are known."""
        return condition(self.quadrature)

    def beyond(self, share: float) -> tuple[Interval, Interval]:
        """Shares of eigenvalues below -share |H| and above share |H|."""
        return beyond(self.quadrature, share)

    def count_above(self, threshold: float) -> Interval:
        """The number of eigenvalues above a threshold."""
        return count_above(self.quadrature, threshold).interval()

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each line of the printed report."""
        q = self.quadrature
        settings = q.settings
        seconds = self.provenance.get("seconds")
        if seconds is not None:
            settings += f", {seconds:.1f} s"
        below, floor = "0", "0: all products are zero, which has nothing to round"
        if self.noise_floor:
            below = f"-{self.noise_floor:.1e}"
            floor = f"{self.noise_floor:.1e}: smaller |λ| are not resolved by {self._precision()} products"
        return [
            ("parameters", f"{q.size:,}"),
            ("Lanczos", settings),
            ("largest eigenvalue", extreme_text(self.largest, -1, self.level)),
            ("smallest eigenvalue", extreme_text(self.smallest, 0, self.level)),
            ("trace", measured(self.trace.value, self.trace.stderr)),
            *self._sharp_rows(),
            ("negative eigenvalues", share_text(self.negative) + f" of all (λ < {below})"),
            ("near zero", share_text(self.near_zero) + f" of all (|λ| <= {self.zero_tol:g} |H|)"),
            ("effective condition number", condition_text(self.quadrature, "at least ")),
            ("noise floor", floor),
            ("CDF in doubt", f"{100 * q.band_width():.2g} % on average over the range (95 % band)"),
            ("status", str(self.status)),
        ]

    def _sharp_rows(self) -> list[tuple[str, str]]:
        """What is known best: single eigenvalues and their numbers, shares well away from zero, ranks."""
        resolved = self.quadrature.resolved
        text = f"{len(resolved):,} eigenvalues, one by one"
        if len(resolved) == 1:
            text = f"1 eigenvalue: {resolved[0]:.4g}"
        elif len(resolved):
            text += f": {resolved[0]:.4g} to {resolved[-1]:.4g}"
        scale = max(map(abs, self.quadrature.range))
        printed = [f"{share * scale:.2g}" for share in COUNTED]  # these digits are what is counted above
        counts = ", ".join(f"{_count(self.count_above(float(x)))} above {x}" for x in printed)
        below, above = self.beyond(FAR)
        ranks = (("effective", self.effective_rank), ("stable", self.stable_rank))
        return [
            ("resolved", text),
            ("counts", counts),
            (f"beyond {FAR:g} |H|", f"{share_text(above)} above, {share_text(below)} below"),
            ("rank", ", ".join(f"{kind} {enclosed(rank[1], *rank[::2])}" for kind, rank in ranks)),
        ]

    def _precision(self) -> str:
        return str(self.provenance.get("computes_in") or self.provenance.get("dtype", "these"))

    def __repr__(self) -> str:
        return text_table(f"Spectrum of {self.name}", self.rows())

    def _repr_html_(self) -> str:
        return notebook_view(self, f"Spectrum of {self.name}", self.rows())


def _count(found: Interval) -> str:
    """`14` where both ends agree, or `14.5 [11, 18]`; of whole numbers, all digits."""
    low, value, high = map(float, found)
    first, last = math.floor(low), math.ceil(high)
    if first == last:
        return f"{first:,}"
    return f"{value:,.0f} [{first:,}, {last:,}]" if value >= 100 else f"{value:.3g} [{first:,}, {last:,}]"


def condition_text(quadrature: Quadrature, least: str) -> str:
    """The value between its bounds, or after `least` the lower bound alone; none of a matrix of zeros."""
    if not any(quadrature.range):
        return "none"
    found = condition(quadrature)
    if np.isfinite(found.upper):
        return between(*map(float, found))
    return least + directed(float(found.lower), up=False, digits=3)


def share_text(share: Interval) -> str:
    """`76.6 %` where that is certain, or `77 % [72.3, 84.2]`."""
    low, value, high = (100 * float(end) for end in share)
    return f"{value:.3g} %" + ("" if agree(low, high) else f" {span(low, high)}")


@automatic
def spectrum(
    op: LinearOperator,
    *,
    key: jax.Array,
    num_steps: int | None = None,
    num_probes: int = 8,
    tol: float | None = None,
    zero_tol: float = ZERO_TOL,
    probe_batch: int | None = None,
    progress: bool = False,
    checkpoint: Checkpoint | str | os.PathLike | None = None,
    basis: str = "inherit",
    basis_dtype: Any = None,
    exact: bool | None = None,
    name: str = "H",
) -> SpectrumReport:
    """Compute the spectral density of an operator and everything else that the same products determine.

    If num_steps x num_probes reaches the order n, the n products of the dense matrix cost no more and leave
    no sampling error. So up to n = 2000, and if the matrix fits into memory, all eigenvalues are then
    computed; the status is EXACT, and `quadrature.resolved` holds them.

    Args:
        op: symmetric operator.
        key: JAX random key.
        num_steps: Lanczos steps per probe; default 100, or n for smaller operators.
        num_probes: number of random probes.
        tol: see `slq`.
        zero_tol: eigenvalues with |λ| <= zero_tol |H| count as near zero; 0 or more.
        probe_batch: see `slq`.
        progress: show a progress bar.
        checkpoint: see `slq`.
        basis: see `slq`.
        basis_dtype: see `slq`.
        exact: True computes all eigenvalues from the dense matrix, whatever it costs; False always uses
            Lanczos; None uses the cheaper of the two, but Lanczos if `checkpoint`, `basis` or `basis_dtype`
            is given. The dense matrix ignores `checkpoint`, `tol` and `progress`.
        name: name of the operator in the report.

    Returns:
        `SpectrumReport`.

    Raises:
        SpectraError: zero_tol is negative or NaN, and as `slq`.

    Cost: as `slq`, or n products. For a loss, up to eight more products measure its rounding, three of them
    in float64 or four at other parameters (see `spectra.estimators.exact`). Everything else is arithmetic on
    the nodes.

    Examples:
        >>> import jax, jax.numpy as jnp, spectra
        >>> op = spectra.MatrixOperator(jnp.diag(jnp.linspace(-1.0, 3.0, 400)))
        >>> report = spectra.spectrum(op, key=jax.random.key(0), num_steps=60)
        >>> round(float(report.largest.estimate), 4)
        3.0
    """
    start = time.perf_counter()
    require_operator(op)
    trees.require_values("spectrum", (op, key))
    if not zero_tol >= 0:
        raise SpectraError(f"zero_tol={zero_tol} is a share of |H|: use 0 or a positive number.")
    if num_probes < 1 or not (tol is None or tol > 0):
        raise SpectraError(f"num_probes={num_probes}, tol={tol}: use one probe at least, and a positive tol.")
    check_probe_batch(probe_batch, num_probes)
    steps = min(100, op.size) if num_steps is None else num_steps
    plain = checkpoint is None and basis == "inherit" and basis_dtype is None
    if dense.choose(op, exact, steps, num_probes, tol, plain):
        quadrature = dense.eigenvalues(op)  # whose rounding is measured
    else:
        quadrature = slq(
            op,
            key=key,
            num_steps=steps,
            num_probes=num_probes,
            tol=tol,
            probe_batch=probe_batch,
            progress=progress,
            checkpoint=checkpoint,
            basis=basis,
            basis_dtype=basis_dtype,
        )
        measured = relative_change(op) if any(quadrature.range) else quadrature.rounding or vanished(op)
        quadrature = dataclasses.replace(quadrature, rounding=measured)
    seconds = time.perf_counter() - start
    floor = quadrature.noise_floor
    return SpectrumReport(
        name=name,
        quadrature=quadrature,
        density=spectral_density(quadrature),
        largest=extreme(quadrature, -1),
        smallest=extreme(quadrature, 0),
        trace=trace_estimate(quadrature),
        negative=quadrature.cdf(np.nextafter(-floor, -np.inf)),  # H = 0 has no floor, and none is negative
        near_zero=share_near_zero(quadrature, zero_tol),
        zero_tol=zero_tol,
        condition_lower_bound=condition_lower_bound(quadrature),
        noise_floor=floor,
        provenance=provenance_of(op, key, seconds),
        level=LEVEL,
    )


def trace_estimate(quadrature: Quadrature) -> Estimate:
    """tr H: the sum of the eigenvalues that are known, and n - r times the mean of vᵀHv for the others.

    That mean is exact in the quadrature for any number of steps. The error is that of the probes, see
    `sampling_error`, of weights that have not converged, see `Parts.spill`, and of rounding: a step rounds
    v · Hv four times (see `Quadrature.noise_floor`), by eps |Hv| each, and an eigenvalue by the noise floor.
    A run of n steps has no other: its T is H itself in another basis, and the sum of its nodes is the trace.
    After a single step the residual takes the place of the spread of the nodes.
    """
    parts = quadrature.parts
    known, rest = parts.total(np.asarray), parts.rest
    atomic = len(parts.atoms) * quadrature.noise_floor + parts.coupling
    reason = f"{len(parts.atoms)} eigenvalues are resolved" if len(parts.atoms) else ""
    if rest is None:
        fields = {"num_matvecs": quadrature.num_matvecs, "method": "slq"}
        if quadrature.status is Status.EXACT:  # the diagonal of the matrix has the same sum
            size = _root_mean_square(parts.atoms[None], np.full((1, len(parts.atoms)), 1 / len(parts.atoms)))
            atomic, fields["method"] = _rounding(quadrature, quadrature.size, size), "exact"
        return Estimate(known, atomic, **fields, reason="all eigenvalues are known")
    nodes, weights, residuals = (
        np.asarray(x, np.float64) for x in (rest.nodes, rest.weights, rest.residuals)
    )
    lengths = np.asarray(rest.lengths)
    rounding = _rounding(quadrature, rest.size, _root_mean_square(nodes, weights)) + atomic
    fields = {"num_matvecs": quadrature.num_matvecs, "method": "slq"}
    if rest.coefficients is None and (whole := lengths == rest.size).any():
        value = known + float(np.mean(np.sum(nodes[whole], axis=1)))
        return Estimate(value, rounding, **fields, reason="n steps leave nothing to sampling")
    weights = weights / weights.sum(axis=1, keepdims=True)
    if (single := lengths == 1).any():  # θ ± r with half the weight each has the moments 1 and 2 of the probe
        pairs = nodes[:, :1] + residuals[:, :1] * np.array([-1.0, 1.0])
        nodes = np.hstack([np.where(single[:, None], pairs, nodes[:, :1]), nodes])
        weights = np.hstack([np.where(single[:, None], 0.5, 0.0) * np.ones(2), weights * ~single[:, None]])
    stderr, dof = sampling_error(weights, nodes, rest.size)
    if dof is not None and not shows_fourth_powers(quadrature):
        dof = float(rest.num_probes)
    mean = float(np.sum(weights * nodes) / len(weights))
    error = float(np.hypot(stderr, rounding + parts.spill(np.asarray, mean)))
    return Estimate(known + rest.size * mean, error, **fields, dof=dof, reason=reason)


def _rounding(quadrature: Quadrature, size: int, mean: float) -> float:
    """What rounding moves a trace by: that of each of `size` entries, independently, if it was measured."""
    return max(4 * size * quadrature.precision * mean, np.sqrt(size) * quadrature.noise_floor)


def _root_mean_square(nodes: np.ndarray, weights: np.ndarray) -> float:
    scale = float(np.max(np.abs(nodes), initial=0.0))
    return scale * float(np.sqrt(np.mean(np.sum(weights * (nodes / (scale or 1.0)) ** 2, axis=1))))


def rank(quadrature: Quadrature, power: int) -> Interval:
    """Σ |λ|^p / |H|^p: the interval of 95 % of the numerator and that of 99 % of the denominator."""
    size = norm(quadrature)
    if not size.estimate:
        return Interval(0.0, 0.0, 0.0)
    low, value, high = trace_of(
        quadrature, lambda x: np.abs(x / size.estimate) ** power, one_signed=power == 2
    ).interval()
    low *= (size.estimate / size.upper) ** power
    high = high * (size.estimate / size.lower) ** power if size.lower else np.inf
    # The largest is one of those that are summed. Where the probes see so little of it that the interval ends
    # below 1, they do not tell the others either: it keeps its width.
    high = 1 + high - low if high < 1 else high
    return Interval(*(min(max(float(x), 1.0), float(quadrature.size)) for x in (low, value, high)))


def beyond(quadrature: Quadrature, share: float) -> tuple[Interval, Interval]:
    """Shares of eigenvalues below -share |H| and above share |H|, wherever |H| is within its limits."""
    x = share * np.array(norm(quadrature)) if share else np.zeros(3)
    points = np.stack([np.nextafter(-x, -np.inf), x])
    lower, value, upper = (np.asarray(end) for end in quadrature.cdf(points))  # (2, 3)
    below = Interval(float(lower[0, 2]), float(value[0, 1]), float(upper[0, 0]))
    return below, Interval(1 - float(upper[1, 2]), 1 - float(value[1, 1]), 1 - float(lower[1, 0]))


def share_near_zero(quadrature: Quadrature, share: float) -> Interval:
    """The share of eigenvalues with |λ| <= share |H|: what is not beyond."""
    below, above = beyond(quadrature, share)
    ends = (1 - x - y for x, y in zip(below[::-1], above[::-1], strict=True))
    n = quadrature.size
    counts = [n * max(float(end), 0.0) for end in ends]  # whole ones where all is known, but for rounding
    return Interval(*(round(c) / n if abs(c - round(c)) <= 1e-9 * n else c / n for c in counts))
