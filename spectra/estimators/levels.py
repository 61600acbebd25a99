"""Two levels of samples: many probes of one step for a parabola, few longer ones for what it leaves of f.

One product tells vᵀp(H)v for any p of degree two: p(x) = c_0 + c_1 x + c_2 x² gives
c_0 + c_1 α + c_2 (α² + β²) with the α and β of a single step. So in

    tr f(H) = n (E ∫ p dμ + E ∫ (f - p) dμ)

the first mean is taken over all probes, and the second, which varies far less, over the long ones. p is the
least squares fit of f in the rules of these: the second mean is then zero, and as p and f - p are orthogonal
in the measure of all eigenvalues, quadratic forms with them are uncorrelated. A fit to k probes has seen the
squares of n k normal numbers, and is off by 1 / √(n k) of what it leaves, which is of second order.
Derivatives of order three and more are those of f alone: what brackets ∫ f dμ of a long probe brackets
∫ (f - p) dμ.

References:
    Hallman and Troester, arXiv:2103.10516 (multilevel estimates of traces).
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from numpy.polynomial import Polynomial

from spectra.estimators.bracket import Function, spread
from spectra.results import Quadrature

_ROWS = ("nodes", "weights", "residuals", "lengths", "asymmetry")


class Combined(NamedTuple):
    """What one-step probes change of an estimate from the long ones, and the error of both."""

    moved: float
    stderr: float
    dof: float | None
    rounding: float


def split(q: Quadrature) -> tuple[Quadrature, np.ndarray | None]:
    """The long probes outside of a space, and the first two moments (k, 2) of those that made one step."""
    if q.bulk is None or q.links is None or q.bulk.coefficients is not None:
        return q, None
    short = np.asarray(q.bulk.lengths) == 1
    if short.all() or not short.any():
        return q, None
    nodes, residuals = (np.asarray(x, np.float64)[short, 0] for x in (q.bulk.nodes, q.bulk.residuals))
    bulk = _some(q.bulk, ~short)
    return dataclasses.replace(_some(q, ~short), bulk=bulk), np.stack([nodes, nodes**2 + residuals**2], 1)


def _some(q: Quadrature, keep: np.ndarray) -> Quadrature:
    """Some rows, without what tells resolved eigenvalues: the others have seen those, too."""
    rows = {name: np.asarray(getattr(q, name))[keep] for name in _ROWS}
    return dataclasses.replace(q, **rows, sketches=None)


def combined(q: Quadrature, short: np.ndarray, f: Function, ends: tuple[float, float]) -> Combined:
    """Both levels, from a quadrature of the long probes and the moments of the others."""
    rest, floor = q.parts.rest, q.noise_floor
    n, k, count = rest.size, rest.num_probes, rest.num_probes + len(short)

    def inside(x: np.ndarray) -> np.ndarray:
        return f(np.clip(x, *ends))

    nodes, weights = np.asarray(rest.nodes, np.float64).ravel(), np.asarray(rest.weights, np.float64).ravel()
    nodes, weights = nodes[weights > 0], weights[weights > 0] / weights.sum()
    p = _parabola(nodes, inside(nodes), weights)
    mean = float(weights @ p(nodes))
    c: np.ndarray = np.append(p.convert().coef, np.zeros(2))[:3]
    others = float(np.dot(c, np.append(1.0, np.mean(short, axis=0))))
    first, first_dof = spread(q, p, ends, mean)
    second, second_dof = spread(q, lambda x: inside(x) - p(np.clip(x, *ends)), ends, 0.0)
    parts = [(first * np.sqrt(k / count), first_dof), (second, second_dof)]
    variance = sum(size**2 for size, _ in parts)
    # Satterthwaite's degrees of freedom of a sum of variances (doi:10.2307/3002019).
    freedom = sum(size**4 / dof for size, dof in parts if dof is not None)
    moved = float(
        weights @ np.maximum(np.abs(p(nodes + floor) - p(nodes)), np.abs(p(nodes - floor) - p(nodes)))
    )
    return Combined(
        n * len(short) / count * (others - mean),
        float(np.sqrt(variance)),
        float(variance**2 / freedom) if freedom > 0 else None,
        n * moved,
    )


def _parabola(x: np.ndarray, values: np.ndarray, weights: np.ndarray) -> Polynomial:
    """The least squares fit of degree two."""
    return Polynomial.fit(x, values, min(2, len(np.unique(x)) - 1), w=np.sqrt(weights))
