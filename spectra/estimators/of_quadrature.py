"""The trace of a function from a quadrature: what is known, what is sampled, and the error of either."""

from typing import Any, NamedTuple

import numpy as np

from spectra.base.errors import SpectraError
from spectra.base.reals import RealFunction
from spectra.density.extremes import sampled_ends, sampling_error, shows_fourth_powers
from spectra.estimators import levels
from spectra.estimators.bracket import (
    Bounds,
    Function,
    bracket,
    domain,
    interval_of,
    linked,
    spread,
)
from spectra.quadrature.changes import estimated_error
from spectra.results import Estimate, Quadrature


def from_quadrature(q: Quadrature, f: RealFunction, bounds: Bounds | None, one_signed: bool) -> Estimate:
    """The estimate of `spectra.estimators.functions.trace_of`, whose arguments these are."""
    q, short = levels.split(q)
    sampled_between = sampled_ends(q)
    (a, b), excludes = interval_of(q, bounds, sampled_between)

    def at(x: np.ndarray) -> np.ndarray:
        return f(np.clip(x, a, b))

    _check_finite(q, at)
    parts, known = q.parts, _known(q, at, f.rounding)
    fields: dict[str, Any] = {"num_matvecs": q.num_matvecs, "method": "slq", "status": q.judged}
    if parts.rest is None:
        return Estimate(known.value, known.rounding, **fields, reason="all eigenvalues are known")
    ends, rests = domain(q, f, (a, b), excludes, bounds, one_signed)
    inner = _within(q, ends, sampled_between)
    rest = _sampled(q, short, f, at, inner)
    rounding = known.rounding + rest.rounding
    lower, upper, reach, reason = bracket(q, f, inner, rests, one_signed)
    total, elsewhere = rest.total, known.value + rest.moved
    below, above = 0.0, 0.0
    if parts.links is not None:
        known_ends = ends or (float(np.min(q.nodes)), float(np.max(q.nodes)))
        below, above = linked(f, parts.links, known_ends, one_signed)
    if lower is not None and upper is not None:  # sums in another order
        lower, upper = elsewhere + below + min(lower, total), elsewhere + above + max(upper, total)
    else:
        rounding += above - below + parts.rest.size * estimated_error(parts.rest, at)
    least, most = (
        None if end is None or not excludes else elsewhere + off + more + pick(end, total)
        for end, off, more, pick in zip(reach, known.slack, (below, above), (min, max), strict=True)
    )
    return Estimate(
        value=elsewhere + total,
        stderr=float(np.hypot(rest.stderr, rounding)),
        **fields,
        reason=_told(q, None if inner is None else short, reason),
        dof=rest.dof,
        lower=lower,
        upper=upper,
        least=least,
        most=most,
    )


class _Known(NamedTuple):
    """The sum of f over eigenvalues that are known, and what rounding makes of it: its size, down and up."""

    value: float
    rounding: float
    slack: np.ndarray


def _known(q: Quadrature, f: Function, rounding: float) -> _Known:
    parts = q.parts
    off = _changes(f, parts.atoms, q.noise_floor + parts.coupling, rounding)
    return _Known(parts.total(f), float(np.sum(np.abs(off).max(axis=0))), off.sum(axis=1))


class _Sampled(NamedTuple):
    """The trace over what is sampled: its order times the mean, and what shorter probes move it by."""

    total: float
    moved: float
    stderr: float
    dof: float | None
    rounding: float


def _sampled(
    q: Quadrature, short: np.ndarray | None, f: RealFunction, at: Function, ends: tuple[float, float] | None
) -> _Sampled:
    """`at` is f inside of the limits of the spectrum, and `ends` are those of the domain, None at a pole."""
    parts, rest = q.parts, q.parts.rest
    n, k = rest.size, rest.num_probes
    nodes, weights = np.asarray(rest.nodes, np.float64), np.asarray(rest.weights, np.float64)
    weights = weights / weights.sum(axis=1, keepdims=True)
    values = np.where(weights > 0, at(nodes), 0.0)
    mean = float(np.sum(weights * values) / k)
    stderr, dof = sampling_error(weights, values, n)
    moved = rounding = 0.0
    if ends is not None and short is not None:
        moved, stderr, dof, rounding = levels.combined(q, short, f, ends)
    elif ends is not None:
        stderr, dof = spread(q, f, ends, mean)
    if dof is not None and not shows_fourth_powers(q):
        dof = float(k)
    moves = np.abs(_changes(at, nodes, q.noise_floor, f.rounding)).max(axis=0)
    rounding += n * float(np.sum(np.where(weights > 0, weights * moves, 0.0)) / k)
    return _Sampled(n * mean, moved, stderr, dof, rounding + parts.spill(at, mean))


def _told(q: Quadrature, short: np.ndarray | None, reason: str) -> str:
    """The reason of the bracket, after what else is in the estimate."""
    if short is not None:
        reason = f"{len(short)} more probes of one step each see a parabola; {reason}"
    if (links := q.parts.links) is not None:
        return f"{len(links.theta)} Ritz vectors are taken out; {reason}"
    if len(q.parts.atoms):
        return f"{len(q.parts.atoms)} eigenvalues are resolved; {reason}"
    return reason


def _within(
    q: Quadrature, ends: tuple[float, float] | None, sampled: tuple[float, float]
) -> tuple[float, float] | None:
    """The ends of what is sampled, where eigenpairs or a space were taken out, within those of all."""
    if ends is None or q.bulk is None:
        return ends
    floor, nodes = q.noise_floor, np.asarray(q.bulk.nodes)
    low = min(sampled[0], float(nodes.min()) - floor)
    high = max(sampled[1], float(nodes.max()) + floor)
    return max(ends[0], low), min(ends[1], high)


def _changes(f: Function, x: np.ndarray, shift: float, rounding: float) -> np.ndarray:
    """How far f falls (at most 0) and rises where x moves by `shift`, as far as it is defined there.

    `rounding` is that of f's own numbers and values, relative to them.
    """
    shifts, values = shift + rounding * np.abs(x), f(x)
    changes = np.asarray([f(x - shifts), f(x + shifts)]) - values
    changes = np.where(np.isfinite(changes), changes, 0.0)
    off = rounding * np.abs(values)
    return np.array([np.minimum(changes, 0.0).min(axis=0) - off, np.maximum(changes, 0.0).max(axis=0) + off])


def _check_finite(q: Quadrature, f: Function) -> None:
    """Raise unless f is finite at the Ritz values, and has a limit at all numbers that they may stand for."""
    nodes, floor = np.asarray(q.nodes, np.float64)[np.asarray(q.weights) > 0], q.noise_floor
    if (bad := ~np.isfinite(f(nodes))).any():
        raise SpectraError(
            f"f is not finite at the Ritz value {nodes[bad][0]:.6g} (the noise floor is {floor:.1e}): for "
            "log, inverse and powers shift the operator, op.shift(delta), by more than its most negative "
            "eigenvalue and the noise floor, or pass bounds=(0, None) if it is positive semi-definite. Where "
            "f overflows, as exp does, scale the operator or f."
        )
    if (bad := _has_pole_within(f, nodes, floor)).any():
        raise SpectraError(
            f"f has a pole closer to the Ritz value {nodes[bad][0]:.6g} than the noise floor, {floor:.1e}: "
            "where the eigenvalue lies f may be any number. Shift the operator, op.shift(delta), by more "
            "than its most negative eigenvalue and the noise floor, or pass bounds= that exclude the pole."
        )


def _has_pole_within(f: Function, x: np.ndarray, reach: float) -> np.ndarray:
    """Whether |f| has no limit within `reach` of each x: no less is added as its largest place is magnified.

    A logarithm adds as much with each of equal steps towards its pole, an inverse more; what is finite at the
    end of its domain, as a square root is, or at a kink, adds ever less.
    """
    at, half, largest = x, reach, list[np.ndarray]()
    for _ in range(_LEVELS):
        points = at[:, None] + half * _SHARES
        values = np.abs(f(points))
        values = np.where(np.isfinite(values) & (np.abs(points - x[:, None]) <= reach), values, -1.0)
        best = np.argmax(values, axis=1)[:, None]
        at = np.take_along_axis(points, best, axis=1)[:, 0]
        largest.append(np.take_along_axis(values, best, axis=1)[:, 0])
        half = half / (len(_SHARES) // 4)  # two steps to each side
    first, last = largest[3] - largest[0], largest[-1] - largest[-4]
    return (last > _LITTLE * largest[-1]) & (last > first / 4)


_LEVELS, _SHARES = 8, np.linspace(-1.0, 1.0, 33)
_LITTLE = 1e-6  # of |f|, above its rounding in float32
