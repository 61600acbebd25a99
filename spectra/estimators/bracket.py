"""Bounds of tr f(H) from a quadrature: an interval that holds the spectrum, and the rules on both sides."""

import numpy as np

from spectra import _quadrature
from spectra._errors import SpectraError
from spectra.results import Quadrature

Bounds = tuple[float | None, float | None]


def evaluate(f, x: np.ndarray) -> np.ndarray:
    """f without warnings, in float64; a scalar result is broadcast."""
    with np.errstate(all="ignore"):
        return np.broadcast_to(np.asarray(f(x), np.float64), x.shape)


def interval_of(q: Quadrature, bounds: Bounds | None) -> tuple[float, float]:
    """[a, b] as given, or the Ritz values of the ends widened by residual and noise floor."""
    floor, (low, high) = q.noise_floor, q.range
    a, b = bounds or (None, None)
    if (a is not None and low < a - floor) or (b is not None and high > b + floor):
        raise SpectraError(
            f"bounds=({a}, {b}) do not hold the spectrum: Ritz values reach from {low:.6g} to {high:.6g}, "
            f"and the noise floor is {floor:.1e}."
        )
    residuals = np.asarray(q.residuals, np.float64)
    last = (np.arange(q.num_probes), np.asarray(q.lengths) - 1)
    if a is None:
        a = float(np.min(q.nodes[:, 0] - residuals[:, 0])) - floor
    if b is None:
        b = float(np.max(np.asarray(q.nodes)[last] + residuals[last])) + floor
    return float(a), float(b)


def bracket(q: Quadrature, f, nodes, weights, values, interval, bounds):
    """(lower, upper, what they rest on): n times the means of the smallest and largest rule a probe."""
    floor, smallest = q.noise_floor, float(nodes.min())
    a, b = min(interval[0], smallest - floor), max(interval[1], float(nodes.max()) + floor)
    rests = "the given bounds"
    if bounds is None or None in bounds:
        rests = "Ritz values and residuals as bounds, likely but not certain"
    low, high = 0.0, 0.0
    if np.any(q.residuals):
        # A pole or the end of the domain of f above a: the nearest to a where f still is what it must be.
        nearer = [a, *(smallest - (smallest - a) / 2**i for i in range(1, 40))]
        good = [x for x in nearer if _of_one_curvature(f, x, b, smallest)]
        if not good:
            return None, None, "no bracket: f is neither convex nor concave between the Ritz values"
        if good[0] > a:
            a = good[0]
            rests = f"{a:.3g} as lower bound, below which f is not defined: likely, not certain"
    for theta, w, fv, r, length in zip(nodes, weights, values, q.residuals, q.lengths, strict=True):
        rules = [float(np.sum(w * fv))]
        if np.any(r):
            for end in (a, b):
                points, masses = _quadrature.gauss_radau(theta[:length], w[:length], r[:length], end)
                rules.append(float(np.sum(masses * evaluate(f, np.clip(points, a, b)))))
        low, high = low + min(rules), high + max(rules)
    scale = q.size / q.num_probes
    return scale * low, scale * high, f"the bracket rests on {rests}"


def _of_one_curvature(f, a: float, b: float, smallest: float) -> bool:
    """Whether f is finite and convex, or concave, as far as samples show: finds poles and steps."""
    signs = set()
    for left, right in ((a, b), (a, smallest)):
        x = evaluate(f, np.linspace(left, max(left, right), 65))
        if not np.isfinite(x).all():
            return False
        bend = x[2:] + x[:-2] - 2 * x[1:-1]
        signs |= set(np.sign(bend[np.abs(bend) > 16 * np.finfo(float).eps * np.abs(x).max()]))
    return len(signs) < 2
