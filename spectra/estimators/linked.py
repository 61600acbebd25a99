"""What a trace of f may be off by where Ritz vectors were taken out: see `spectra.quadrature.links`."""

import numpy as np

from spectra.estimators.bracket import Function, evaluate
from spectra.quadrature.links import Links

SAMPLES = 1025
"""Of f between the ends, of which its variation and its slope are read."""


def linked(f: Function, links: Links, ends: tuple[float, float], one_signed: bool) -> tuple[float, float]:
    """The least and the largest of tr f(H) - tr f(T) - tr f(B), for spectra between the ends.

    The three bounds of `spectra.quadrature.links`, the least of them. Where every derivative of order two
    and more keeps one sign, |f'| and |f''| are largest at an end, and there no more than the differences
    about it, since both are convex; elsewhere f is sampled.
    """
    a, b, beta = *ends, links.beta
    if beta == 0 or b <= a:
        return 0.0, 0.0
    x = np.linspace(a, b, SAMPLES)
    values, step = evaluate(f, x), float(x[1] - x[0])
    bound = _least(np.sum(np.abs(np.diff(values))), 2 * beta * np.max(np.abs(np.diff(values))) / step)
    if not one_signed:
        return -bound, bound
    first, second = _at_ends(f, ends, step)
    bound = _least(np.sum(np.abs(np.diff(values))), 2 * beta * first, beta**2 * second)
    convex = values[0] + values[-1] >= 2 * values[SAMPLES // 2]
    return (0.0, bound) if convex else (-bound, 0.0)


def _at_ends(f: Function, ends: tuple[float, float], step: float) -> tuple[float, float]:
    """The largest |f'| and |f''| at the ends; infinite where f is not defined beyond one."""
    around = np.asarray(ends)[:, None] + step * np.array([-1.0, 0.0, 1.0])
    values = evaluate(f, around)
    first = np.max(np.abs(np.diff(values, axis=1))) / step
    second = np.max(np.abs(np.diff(values, n=2, axis=1))) / step**2
    return _finite(first), _finite(second)


def _finite(x: float) -> float:
    return float(x) if np.isfinite(x) else np.inf


def _least(*bounds: float) -> float:
    return min(map(_finite, bounds))
