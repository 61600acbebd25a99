"""What a quadrature leaves open of the mean of a hinge, sharply, and with that of the mean of any function.

The mean of a hinge is h(t) = ∫ max(x - t, 0) dμ. Let μ be a measure with the coefficients α_1, β_1, ...,
α_m, β_m of a run. Among all such measures h(t) is smallest and largest for members of the family of
Gauss-Radau rules of m + 1 nodes (see `brackets`):

* It is **smallest** for the member with a node at t. For P = (x - t) R, where R of degree 2m - 1 takes
  the values 0 at the nodes to the left of t and 1 at those to its right, doubly each: R' has its 2m - 2
  zeros at and between these nodes, so that R >= 0 to the left of t and R <= 1 to its right. So P <= max(x -
  t, 0) everywhere, with equality at all nodes.
* It is **largest** for the member at which h(t) is stationary along the family. Then a P of degree 2m touches
  max(x - t, 0) at all m + 1 nodes; its second derivative has all 2m - 2 zeros to the left of the last node
  before t and to the right of the first one behind it, so that P is convex in between and is nowhere below.

Both ways one member serves one t in each of its gaps: its nodes for the least value, and for the largest the
point where the divided difference of the hinge over all nodes, each taken twice, is zero. It is linear in t.
Between such points the largest value lies below its chords, since it is convex in t, and the least one above
the lines whose slopes are the bracket of the distribution.

The error of a rule of m nodes for any f is that for g = f - p, with a polynomial p of degree at most 2m - 1,
which it integrates exactly. Two theorems bound it, whatever p is:

* ∫ g dμ = g(b) - ∫ F dg, and the distribution F lies in its bracket (Chebyshev, Markov, Stieltjes).
* ∫ g dμ = g(a) + g'(a) (∫ x dμ - a) + ∫ g''(t) h(t) dt, and h lies in its own. A kink costs the weight of a
  node times the gap beside it, where the first bound costs the weight times all of the variation. Of g the
  interpolant on the grid is taken, whose second derivative is a mass at each point.

For p the least squares fits of f in the rule itself are tried: of degree zero where f is a few straight
lines, of a few more where it is curved.

References:
    Krein and Nudelman, The Markov Moment Problem and Extremal Problems, 1977, ch. III and IV.
"""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from spectra.base.host import one_thread
from spectra.quadrature import Rule
from spectra.quadrature.brackets import arrowheads, largest_mass, parameter, spread_parameters

FEW = 8
"""Rules of so few nodes have members with a node outside of them as well."""
BESIDE = (1e-9, 1e-6, 1e-3, 0.03, 0.5)
"""Points beside a node, in units of the gap: where it has converged no member has a node in the gap."""
DOUBT = 1e-3
"""Of a gap: where a stationary point is known to this, h is largest there to a millionth of its bracket."""
ROUNDING = 64 * np.finfo(float).eps
"""Of sums over nodes, in units of the interval."""


@dataclasses.dataclass(frozen=True)
class Hinges:
    """How far a measure can be from its Gauss rule, in mass and in h; none is negative."""

    less: np.ndarray  # up to any point of a cell between two of the given points
    more: np.ndarray
    below: np.ndarray  # at the given points
    above: np.ndarray


@one_thread()
def hinges(rule: Rule, points: np.ndarray, kinks: np.ndarray) -> Hinges:
    """How far the distribution and h of a measure can be from those of its Gauss rule.

    Args:
        rule: nodes, weights that sum to one, residuals with their signs.
        points: sorted; the first and the last enclose the measure.
        kinks: a few of them, where h is bracketed best.
    """
    theta, w, r = rule[:3]
    a, b = points[0], points[-1]
    if len(theta) <= FEW:  # there are few gaps to spread members over, or none
        shares = np.arange(1, FEW) / FEW
        kinks = np.concatenate([kinks, a + (theta[0] - a) * shares, b + (theta[-1] - b) * shares])
    with np.errstate(divide="ignore", invalid="ignore"):
        own = parameter(theta, r, kinks)
    parameters = np.concatenate([spread_parameters(theta, w, r), own[np.isfinite(own)]])
    nodes, vectors = arrowheads(theta, r, parameters)
    masses = (np.sqrt(w) @ vectors[:, :-1]) ** 2
    mean = float(w @ theta)
    low, left, upto, least = _least(nodes, masses, rule)
    high, most = _largest(nodes, masses)
    low, left, upto, least = _within(a, b, low, (left, 0, 1), (upto, 0, 1), (least, mean - a, 0))
    high, most = _within(a, b, high, (most, mean - a, 0))
    left, upto = np.maximum.accumulate(left), np.minimum.accumulate(upto[::-1])[::-1]
    # Where nodes have converged stationary points are lost in rounding, but the distribution is known.
    cells = np.diff(low)
    integrals = [
        np.append(np.cumsum(((1 - share) * cells)[::-1])[::-1], 0.0) for share in (upto[1:], left[:-1])
    ]
    others = [mean - low + np.append(0.0, np.cumsum(share * cells)) for share in (left[:-1], upto[1:])]
    least = np.fmax(least, np.maximum(integrals[0], others[0]))
    i = np.clip(np.searchsorted(low, points, side="right") - 1, 0, len(low) - 2)
    first = least[i] - (1 - left[i]) * (points - low[i])
    second = least[i + 1] + (1 - upto[i + 1]) * (low[i + 1] - points)
    above = [np.interp(points, x, y) for x, y in ((high, most), (low, integrals[1]), (low, others[1]))]
    gauss = _means(theta, w, points)
    mass = np.append(0.0, np.cumsum(w))[np.searchsorted(theta, points[:-1], side="right")]
    slack = ROUNDING * (b - a)
    return Hinges(
        np.clip(mass - left[i[:-1]], 0, 1),
        np.clip(upto[np.searchsorted(low, points[1:], side="left")] - mass, 0, 1),
        np.maximum(gauss - np.maximum(first, second), 0) + slack,
        np.maximum(np.minimum.reduce(above) - gauss, 0) * (1 + DOUBT) + slack,
    )


def _within(a: float, b: float, x: np.ndarray, *columns: tuple[np.ndarray, float, float]):
    """The rows between a and b, and what is known there of a measure on [a, b]."""
    inside = (x > a) & (x < b)
    return [np.concatenate([[at_a], y[inside], [at_b]]) for y, at_a, at_b in ((x, a, b), *columns)]


def _means(nodes: np.ndarray, masses: np.ndarray, t: np.ndarray) -> np.ndarray:
    """h of a rule at each t."""
    mass, moment = _behind(masses), _behind(masses * nodes)
    i = np.searchsorted(nodes, t, side="right")
    return moment[i] - t * mass[i]


def _behind(terms: np.ndarray) -> np.ndarray:
    """Sums of the last terms, of all to none."""
    sums = np.cumsum(terms[..., ::-1], axis=-1)[..., ::-1]
    return np.concatenate([sums, np.zeros_like(sums[..., :1])], axis=-1)


def _own(nodes: np.ndarray, masses: np.ndarray) -> tuple[np.ndarray, ...]:
    """Nodes of rules, the mass left of each and up to it, and h there."""
    sums = np.cumsum(masses, axis=-1)
    h = _behind(masses * nodes)[..., 1:] - nodes * _behind(masses)[..., 1:]
    return nodes, sums - masses, sums, h


def _least(nodes, masses, rule: Rule) -> tuple[np.ndarray, ...]:
    """Sorted points, the mass left of them at least and up to them at most, and the least h or NaN.

    The Gauss rule is a member, too; about its nodes the largest mass at a point brackets the distribution.
    """
    theta, w, r = rule[:3]
    rows = [_own(nodes, masses), _own(theta, w)]
    if len(theta) > 1:
        shares = np.array(BESIDE)[:, None]
        x = np.ravel([theta[:-1] + shares * np.diff(theta), theta[1:] - shares * np.diff(theta)])
        sums = np.append(0.0, np.cumsum(w))[np.searchsorted(theta, x, side="right")]
        mass = largest_mass(theta, w, r, x)
        rows.append((x, sums - mass, sums + mass, np.full(len(x), np.nan)))
    columns = [np.concatenate([np.ravel(part) for part in column]) for column in zip(*rows, strict=True)]
    order = np.argsort(columns[0], kind="stable")
    return tuple(column[order] for column in columns)


def _largest(nodes, masses) -> tuple[np.ndarray, np.ndarray]:
    """Sorted points, one in each gap of each member, and the largest h there.

    The divided difference of f over nodes x_i taken twice is Σ c_i (f'(x_i) - d_i f(x_i)), where d_i =
    2 Σ_k 1 / (x_i - x_k) and c_i = Π_k (x_i - x_k)^-2. Those of a constant and of x vanish, so that either
    side of the gap will do: the one with the smaller terms is exact.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        t = _touched(nodes)
    mass, moment = _behind(masses)[:, 1:-1], _behind(masses * nodes)[:, 1:-1]
    found = np.isfinite(t)
    points, values = t[found], (moment - t * mass)[found]
    order = np.argsort(points)
    return points[order], values[order]


def _touched(x: np.ndarray) -> np.ndarray:
    """In each gap of each member the t for which h is stationary; NaN where rounding hides it."""
    apart = x[..., :, None] - x[..., None, :]
    own = np.arange(x.shape[-1])
    apart[..., own, own] = np.inf
    logs = np.log(np.abs(apart), where=np.isfinite(apart), out=np.zeros_like(apart))
    c = -2 * np.sum(logs, axis=-1)
    c = np.exp(c - c.max(axis=-1, keepdims=True))
    d, noise = 2 * np.sum(1 / apart, axis=-1), np.finfo(float).eps * np.abs(x).max(axis=-1, keepdims=True)
    off = noise * 2 * np.sum(1 / np.abs(apart), axis=-1)  # relative error of c, and of d in units of it
    far = noise * 2 * np.sum(1 / apart**2, axis=-1)
    middle = (x[..., 1:] + x[..., :-1]) / 2
    slopes, unsure = c * d, c * (np.abs(d) * off + far)
    reach = x[..., None, :] - middle[..., None]  # (..., gaps, nodes)
    terms = c[..., None, :] - slopes[..., None, :] * reach
    errors = (c * off)[..., None, :] + unsure[..., None, :] * np.abs(reach)
    behind = np.tri(x.shape[-1], k=-1, dtype=bool).T[:-1]  # of gap g the nodes behind g
    right_is_smaller = (np.abs(slopes) @ behind.T) < (np.abs(slopes) @ ~behind.T)
    side = np.where(right_is_smaller[..., None], behind, ~behind)
    slope = np.einsum("...gk,...k->...g", side, slopes)
    t = -np.sum(side * terms, axis=-1) / slope
    hidden = np.sum(side * errors, axis=-1) + np.abs(t) * np.einsum("...gk,...k->...g", side, unsure)
    doubt, gaps = hidden / np.abs(slope), np.diff(x)
    return np.where((np.abs(t) < gaps / 2) & (doubt < DOUBT * gaps), middle + t, np.nan)


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
    """Points where f bends most, from halving the cells in which it is furthest from straight.

    The ends are among them, and zero: a cusp there, as that of |x|^(1/2), to the bit.
    """
    known = np.unique([a, np.clip(0.0, a, b), b])
    x = np.sort(np.concatenate([np.linspace(a, b, 257), np.clip(nodes, a, b), known]))
    left, right, values = x[:-1], x[1:].copy(), f(x)
    low, high, middle = values[:-1], values[1:].copy(), np.array(f((left + right) / 2))
    found = [known]
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
