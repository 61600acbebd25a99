"""How far the mean of any function can be from its Gauss rule, from values on a grid.

With a polynomial p of degree at most 2m - 1, which the rule of m nodes integrates exactly, the error of the
rule for f is that for g = f - p. Two theorems bound it, whatever p is:

* ∫ g dμ = g(b) - ∫ F dg, and the distribution F lies in its bracket (Chebyshev, Markov, Stieltjes).
* ∫ g dμ = g(a) + g'(a) (∫ x dμ - a) + ∫ g''(t) h(t) dt, and h lies in its own, see `hinges`. A kink costs
  the weight of a node times the gap beside it, where the first bound costs the weight times all of the
  variation. Of g the interpolant on the grid is taken, whose second derivative is a mass at each point.

For p the least squares fits of f in the rule itself are tried: of degree zero where f is a few straight
lines, of a few more where it is curved.
"""

from collections.abc import Callable, Iterator

import numpy as np

from spectra.quadrature.copies import Rule
from spectra.quadrature.hinges import Hinges, hinges

Function = Callable[[np.ndarray], np.ndarray]
DEGREES = (0, 2, 3, 4, 6, 8, 12, 16)
SAMPLES = 16
"""Of f in each gap between nodes."""
SPLITS = 16
ROUNDS = 34
"""So many cells are halved at a time, and so often: a kink is found to 1e-10 of the interval."""
NARROW = 1e-11
"""Of the interval: narrower cells are not halved, since differences in them are rounding."""
MISSED = 2.0
"""Times what g is off its chord in the middle of a cell is what it may be off elsewhere in it."""
EXACT = 6
"""So many points where f bends most have the sharp bracket of h, the others one from their neighbours."""


def kinks(f: Function, a: float, b: float, nodes: np.ndarray) -> np.ndarray:
    """Points where f bends most, from halving the cells in which it is furthest from straight."""
    x = np.sort(np.concatenate([np.linspace(a, b, 257), np.clip(nodes, a, b)]))
    left, right, values = x[:-1], x[1:].copy(), f(x)
    low, high, middle = values[:-1], values[1:].copy(), np.array(f((left + right) / 2))
    found = []
    for _ in range(ROUNDS):  # calls of one shape: a compiled f is compiled once
        bent = np.where(right - left > NARROW * (b - a), np.abs(middle - (low + high) / 2), -1.0)
        worst = np.argsort(bent)[-SPLITS:]
        l, r, m = left[worst], right[worst], (left[worst] + right[worst]) / 2
        inner = f(np.concatenate([(l + m) / 2, (m + r) / 2]))
        found.append(m)
        y = middle[worst]
        left, low = np.append(left, m), np.append(low, y)
        right, high = np.append(right, r), np.append(high, high[worst])
        right[worst], high[worst], middle[worst] = m, y, inner[: len(m)]
        middle = np.append(middle, inner[len(m) :])
    return np.concatenate(found)


def deviation(f: Function, rule: Rule, a: float, b: float, extra: np.ndarray) -> tuple[float, float]:
    """How far ∫ f dμ can be below and above the Gauss rule on [a, b]; `extra` are points of the grid."""
    theta, w = np.clip(rule[0], a, b), rule[1]
    ends = np.concatenate([[a], theta, [b]])
    inner = ends[:-1] + np.diff(ends) * (np.arange(SAMPLES) / SAMPLES)[:, None]
    x = np.sort(np.concatenate([inner.ravel(), [b], extra]))
    y, middles = f(x), f((x[1:] + x[:-1]) / 2)
    cells = np.diff(x) > 0
    points = np.append(True, cells)
    x, y, middles = x[points], y[points], middles[cells]
    bends = np.abs(np.diff(np.diff(y) / np.diff(x)))
    sharp = x[1:-1][np.argsort(bends)[-EXACT:]]
    open_ = hinges((theta, w, rule[2]), x, sharp)
    both = np.concatenate([x, (x[1:] + x[:-1]) / 2])
    down = up = np.inf
    for p in _fits(f(theta), theta, w, both):
        less, more = _error(np.split(np.concatenate([y, middles]) - p, [len(x)]), x, theta, w, open_)
        down, up = min(down, less), min(up, more)
    return down, up


def _error(values, x: np.ndarray, theta: np.ndarray, w: np.ndarray, open_: Hinges) -> tuple[float, float]:
    """The smaller of both bounds for g, given on the grid and in the middle of its cells."""
    g, middles = values
    change = np.diff(g)
    rise, fall = np.maximum(change, 0), np.maximum(-change, 0)
    first = rise @ open_.more + fall @ open_.less, rise @ open_.less + fall @ open_.more
    bends = np.diff(change / np.diff(x))
    convex, concave = np.maximum(bends, 0), np.maximum(-bends, 0)
    below, above = open_.below[1:-1], open_.above[1:-1]
    missed = _missed(MISSED * np.abs(middles - (g[1:] + g[:-1]) / 2), x, theta, w, open_)
    second = convex @ below + concave @ above + missed, convex @ above + concave @ below + missed
    return min(first[0], second[0]), min(first[1], second[1])


def _missed(error: np.ndarray, x, theta, w, open_: Hinges) -> float:
    """∫ |error| dμ from above: of each cell, or of each gap, which has the weights beside it at most."""
    gap = np.searchsorted(theta, x[:-1], side="right")
    single, largest = np.zeros(len(w) + 1), np.zeros(len(w) + 1)
    np.add.at(single, gap, error * (open_.less + open_.more))
    np.maximum.at(largest, gap, error)
    return float(np.sum(np.minimum(single, largest * (np.append(0.0, w) + np.append(w, 0.0)))))


def _fits(values: np.ndarray, theta: np.ndarray, w: np.ndarray, x: np.ndarray) -> Iterator[np.ndarray]:
    """Least squares fits of f in the Gauss rule, at x, for `DEGREES` below its number of nodes."""
    last, now = (np.zeros_like(theta), np.zeros_like(x)), (np.ones_like(theta), np.ones_like(x))
    beta = 0.0
    fit = np.zeros_like(x)
    for degree in range(min(DEGREES[-1], len(theta) - 1) + 1):
        fit = fit + (w @ (values * now[0])) * now[1]
        if degree in DEGREES:
            yield fit
        alpha = w @ (theta * now[0] ** 2)
        following = [(t - alpha) * n - beta * b for t, n, b in zip((theta, x), now, last, strict=True)]
        beta = float(np.sqrt(w @ following[0] ** 2))
        if not beta > np.finfo(float).eps * np.abs(x).max():  # where all nodes are rounding, x is far away
            return
        last, now = now, (following[0] / beta, following[1] / beta)
