"""Bounds of tr f(H) from a quadrature: for functions with derivatives of one sign, and for any other.

With μ the measure of a probe, and θ_j, w_j its Gauss rule of m nodes, three theorems bound ∫ f dμ on an
interval [a, b] that holds the spectrum:

* Where the derivatives of f of orders 2m and 2m + 1 each keep one sign there, ∫ f dμ lies between the Gauss
  rule and the Gauss-Radau rules with a node at a and at b (`of_one_sign`).
* The distribution of μ lies in a bracket (Chebyshev, Markov, Stieltjes), and so do the means of
  max(x - t, 0); f is a sum of such steps and hinges (`spectra.quadrature.hinges`).
* For a polynomial p of degree 2m - 1, ∫ p dμ = Σ w_j p(θ_j), and ∫ (f - p) dμ lies between the least and the
  largest of f - p (`_by_polynomial`).

The first is by far the sharpest, and it is no bound at all where a derivative changes its sign. The other
two hold for any f, as far as samples show its variation and its least and largest values. What a trace of f
may be off by where Ritz vectors were taken out is bounded by `linked`.
"""

from collections.abc import Callable, Iterable

import numpy as np

from spectra.base.errors import SpectraError
from spectra.density.extremes import LEVEL, error_of_powers, extreme
from spectra.quadrature import Rule
from spectra.quadrature.brackets import alike, gauss_radau, rules
from spectra.quadrature.hinges import deviation, kinks
from spectra.quadrature.links import Links
from spectra.results import Quadrature

Function = Callable[[np.ndarray], np.ndarray]
Bounds = tuple[float | None, float | None]
ROUNDING = 256 * np.finfo(float).eps
"""Of the larger |f| at the ends: where a Chebyshev series leaves no more, it is f but for rounding."""
_CELLS = 64
"""Between two points, at once, in which the end of a domain is looked for: twelve times, 64^12 = 2^72."""
COUPLING_SAMPLES = 1025
"""Of f between the ends, of which its variation and its slope are read where Ritz vectors were taken out."""
_SHARES = np.linspace(0.0, 1.0, 65)
_SAMPLES = 16
"""Of f between neighbouring nodes, and for each degree of the polynomial."""


def interval_of(
    q: Quadrature, bounds: Bounds | None, sampled: tuple[float, float]
) -> tuple[tuple[float, float], bool]:
    """[a, b] as given, or what the probes leave to the extreme eigenvalues with the probability `LEVEL`.

    `sampled` is what they leave to what is sampled. Where there are too few probes and steps to exclude
    anything, the Ritz value widened by its residual, and False: eigenvalues further out are possible.
    """
    floor, (low, high) = q.noise_floor, q.range
    a, b = bounds or (None, None)
    if (a is not None and low < a - floor) or (b is not None and high > b + floor):
        raise SpectraError(
            f"bounds=({a}, {b}) do not contain the spectrum: Ritz values reach from {low:.6g} to {high:.6g}, "
            f"and the noise floor is {floor:.1e}."
        )
    residuals = np.asarray(q.residuals, np.float64)
    last = (np.arange(q.num_probes), np.asarray(q.lengths) - 1)
    a = extreme(q, 0, far=sampled[0]).lower if a is None else a
    b = extreme(q, -1, far=sampled[1]).upper if b is None else b
    known = bool(np.isfinite([a, b]).all())
    a = a if np.isfinite(a) else float(np.min(q.nodes[:, 0] - residuals[:, 0])) - floor
    b = b if np.isfinite(b) else float(np.max(np.asarray(q.nodes)[last] + residuals[last])) + floor
    return (float(a), float(b)), known


def domain(
    q: Quadrature,
    f: Function,
    interval: tuple[float, float],
    known: bool,
    bounds: Bounds | None,
    one_signed: bool,
) -> tuple[tuple[float, float] | None, str]:
    """The interval [a, b] on which f is used, None where it has a pole, and what that rests on."""
    floor, smallest, largest = q.noise_floor, float(np.min(q.nodes)), float(np.max(q.nodes))
    a, b = min(interval[0], smallest - floor), max(interval[1], largest + floor)
    rests = "the given bounds"
    if bounds is None or None in bounds:
        rests = f"bounds of the spectrum that hold with {100 * LEVEL:g} %"
        rests = rests if known else "the Ritz values: too few products to exclude others further out"

    def is_good(x: float) -> bool:
        return _is_finite(f, x, b, smallest) and (not one_signed or _bends_once(f, x, b))

    if is_good(a):
        return (a, b), rests
    zero = min(0.0, smallest)
    if q.num_steps > 1 and smallest >= -floor and is_good(zero):  # as sqrt or log(x + δ)
        return (zero, b), f"{zero:.3g} as lower bound: no Ritz value is negative; likely, not certain"
    if not is_good(smallest):
        if not _is_finite(f, smallest, largest, smallest):
            return None, "no bracket: f is not finite between the Ritz values"
        bent = one_signed and _is_finite(f, smallest, b, smallest)
        why = "does not bend one way" if bent else "has a pole"
        return None, f"no bracket: f {why} between the smallest Ritz value and {b:.6g}, the upper limit"
    end = _first_good(f, is_good, a, smallest)
    beyond = f(np.linspace(a, end, _CELLS, endpoint=False))
    if not one_signed and np.isfinite(beyond).any():
        return None, f"no bracket: f has a pole near {end:.6g}, where an eigenvalue may be"
    # Of an eigenvalue that is closer to the end a product does not tell on which side it is.
    lower = min(smallest, end + q.precision * max(map(abs, q.range)))
    return (lower, b), f"{lower:.3g} as lower bound, since f ends or has a pole there: likely, not certain"


def _first_good(f: Function, is_good: Callable[[float], bool], bad: float, good: float) -> float:
    """The end of the domain of f, or a pole: between a bad point and a good one.

    Where f stops to be finite many points at once tell, to 2^-72 of the distance: an end at zero is found to
    far less than a noise floor. What else is bad is found by halving, to 2^-40.
    """
    first = good
    for _ in range(12):
        x = np.linspace(bad, first, _CELLS + 1)
        infinite = np.append(0, 1 + np.flatnonzero(~np.isfinite(f(x[1:-1]))))[-1]
        bad, first = float(x[infinite]), float(x[infinite + 1])
    if is_good(first):
        return first
    bad = first
    for _ in range(40):
        middle = (bad + good) / 2
        bad, good = (bad, middle) if is_good(middle) else (middle, good)
    return good


def bracket(
    q: Quadrature, f: Function, ends: tuple[float, float] | None, rests: str, one_signed: bool
) -> tuple[float | None, float | None, tuple[float | None, float | None], str]:
    """(lower, upper, range of f, what they rest on) of what is sampled: its order times means over probes.

    `ends` and `rests` are those of `domain`; the bounds are None where f has a pole.
    """
    if ends is None:
        return None, None, (None, None), rests
    rest, (a, b) = q.parts.rest, ends
    kind, extra = "that of Gauss and Radau", None
    if not one_signed:
        kind = "from the variation of f"
        extra = kinks(f, a, b, np.ravel(np.asarray(q.nodes[0], np.float64)))
    low, high = np.mean(_each(q, f, (a, b), extra), axis=0) * rest.size
    reach = -_largest(lambda x: -f(x), q, a, b), _largest(f, q, a, b)
    reason = f"the bracket is {kind} and rests on {rests}"
    return float(low), float(high), (rest.size * reach[0], rest.size * reach[1]), reason


def _largest(f: Function, q: Quadrature, a: float, b: float) -> float:
    """The largest value of f on [a, b]: of samples, and of ever closer ones about the largest of them."""
    places = np.append(np.ravel(q.nodes), 0.0)  # a cusp at zero, as that of |x|^(1/2), to the bit
    x = np.sort(np.concatenate([np.linspace(a, b, 257), np.clip(places, a, b)]))
    largest = -np.inf
    for _ in range(11):  # 16^11 times closer: a kink between samples is found to rounding
        values = np.where(np.isfinite(values := f(x)), values, -np.inf)
        i = int(np.argmax(values))
        largest = max(largest, float(values[i]))
        x = np.linspace(float(x[max(i - 1, 0)]), float(x[min(i + 1, len(x) - 1)]), 33)
    return largest


def power_means(q: Quadrature, g: Function, ends: tuple[float, float]) -> tuple[float, float]:
    """Means of g² and g⁴ over what is sampled: the largest that the Gauss and both Gauss-Radau rules give.

    The Gauss rule of m nodes knows polynomials of degree 2m - 1, so that after few steps it shows less of g²
    than of g, and nothing after one. The Gauss-Radau rules know one degree more.
    """
    found: list[np.ndarray] = []
    for rule, taken, count in _measures(q):
        nodes, w, _ = rule
        rest = np.delete(np.arange(len(nodes)), taken)
        known, seen = ([w[part] @ g(nodes[part]) ** p for p in (2, 4)] for part in (taken, rest))
        some = [[masses @ g(points) ** p for p in (2, 4)] for points, masses in _three_rules(rule, *ends)]
        # What is left of a difference that cancels may be below what the Gauss rule itself sees of the rest.
        found += count * [np.maximum(np.max(some, axis=0) - known, seen) / (1 - w[taken].sum())]
    square, fourth = np.mean(found, axis=0)
    return float(square), float(fourth)


def spread(q: Quadrature, f: Function, ends: tuple[float, float], mean: float) -> tuple[float, float | None]:
    """Standard error of the sampled part of tr f(H), and its degrees of freedom; `ends` are of the domain."""
    rest = q.parts.rest

    def deviation(x: np.ndarray) -> np.ndarray:
        return f(np.clip(x, *ends)) - mean

    reached = np.append(np.ravel(q.nodes), ends)
    scale = float(np.abs(deviation(reached)).max())
    square, fourth = power_means(q, lambda x: deviation(x) / (scale or 1.0), ends)
    return error_of_powers(scale, square, fourth, rest.size, rest.num_probes)


def _measures(q: Quadrature) -> Iterable[tuple[Rule, np.ndarray, int]]:
    """The rule of each probe, the numbers of the nodes in it that are resolved, and how many probes agree."""
    if q.parts.origin is None:
        return [(rule, np.zeros(0, int), count) for rule, count in alike(rules(q.parts.rest))]
    return [(rule, taken, 1) for rule, taken in q.parts.origin.rules()]


def _each(q: Quadrature, f: Function, ends: tuple[float, float], extra: np.ndarray | None) -> np.ndarray:
    """(k, 2): bounds of what each probe samples: of its whole measure, less the nodes taken out."""
    found: list[np.ndarray] = []
    a, b = ends
    for rule, taken, count in _measures(q):
        nodes, w, _ = rule
        known = float(w[taken] @ f(np.clip(nodes[taken], a, b)))
        bounds = of_one_sign(f, rule, a, b) if extra is None else _of_any(f, rule, a, b, extra)
        found += count * [(np.array(bounds) - known) / (1 - w[taken].sum())]
    return np.array(found)


def _is_finite(f: Function, a: float, b: float, smallest: float) -> bool:
    """Whether f is finite on [a, b], as far as samples show, more of them below the smallest node."""
    if not np.isfinite(f(np.clip(np.zeros(1), a, b))).all():
        return False
    for end in (b, smallest):
        x = np.linspace(a, max(a, end), 65)
        values = f(x)
        if not np.isfinite(values).all() or _has_pole(f, x, values):
            return False
    return True


def _has_pole(f: Function, x: np.ndarray, values: np.ndarray) -> bool:
    """Whether f still grows where it bends most after that place has been magnified a billion times.

    From the third level on: one sample may be far closer to a pole than the others of its level.
    """
    largest = [np.abs(values).max()]
    for _ in range(6):
        i = int(np.argmax(np.abs(values[2:] + values[:-2] - 2 * values[1:-1]))) + 1
        x = x[i - 1] + (x[i + 1] - x[i - 1]) * _SHARES
        values = f(x)
        largest.append(np.abs(values).max())
        if not np.isfinite(largest[-1]):
            return True
    return bool(largest[-1] > 2 * largest[-4])


def _bends_once(f: Function, a: float, b: float) -> bool:
    """Whether f is convex, or concave, as far as samples show: finds poles."""
    x = f(np.linspace(a, b, 65))
    bend = x[2:] + x[:-2] - 2 * x[1:-1]
    return len(set(np.sign(bend[np.abs(bend) > 16 * np.finfo(float).eps * np.abs(x).max()]))) < 2


def of_one_sign(f: Function, rule: Rule, a: float, b: float) -> tuple[float, float]:
    """Least and largest of the Gauss rule and both Gauss-Radau rules."""
    found = [float(masses @ f(np.clip(points, a, b))) for points, masses in _three_rules(rule, a, b)]
    return min(found), max(found)


def _three_rules(rule: Rule, a: float, b: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """Nodes and weights of the Gauss rule and of the Gauss-Radau rules with a node at a and at b."""
    theta, w, r = rule
    return [(theta, w), *(gauss_radau(theta, w, r, end) for end in (a, b) if r.any())]


def _of_any(f: Function, rule: Rule, a: float, b: float, extra: np.ndarray) -> tuple[float, float]:
    """What the theorems for any f leave, with the Gauss rule inside; `extra` are points where f bends."""
    theta, w, r = rule
    gauss = float(w @ f(np.clip(theta, a, b)))
    if not r.any():
        return gauss, gauss
    low, high = _by_polynomial(f, rule, a, b, extra)
    if high - low <= ROUNDING * np.abs(f(np.array([a, b]))).max():
        return min(low, gauss), max(high, gauss)  # f is a polynomial: steps and hinges cost more, for nothing
    down, up = deviation(f, rule, a, b, extra)
    return gauss - max(min(down, gauss - low), 0.0), gauss + max(min(up, high - gauss), 0.0)


def _by_polynomial(f: Function, rule: Rule, a: float, b: float, extra: np.ndarray) -> tuple[float, float]:
    """p is the Chebyshev series of f up to degree 2m - 1; samples of f - p are half their steps off.

    At a kink or a cusp two samples may agree, and f be far from both between them: `extra` is where f bends.
    """
    from numpy.polynomial import chebyshev

    theta, w, _ = rule
    degree = 2 * len(theta) - 1
    count = _SAMPLES * (degree + 1)
    x = np.cos(np.pi * (np.arange(count) + 0.5) / count)
    middle, half = (a + b) / 2, (b - a) / 2
    values = f(middle + half * x)
    series = 2 / count * np.cos(np.outer(np.arange(degree + 1), np.arccos(x))) @ values
    series[0] /= 2
    places = np.sort(np.concatenate([middle + half * x, extra]))
    rest = f(places) - chebyshev.chebval((places - middle) / half, series)
    exact = float(w @ chebyshev.chebval(np.clip((theta - middle) / half, -1, 1), series))
    between = np.max(np.abs(np.diff(rest))) / 2
    return exact + float(rest.min() - between), exact + float(rest.max() + between)


def linked(f: Function, links: Links, ends: tuple[float, float], one_signed: bool) -> tuple[float, float]:
    """The least and the largest of tr f(H) - tr f(T) - tr f(B), for spectra between the ends.

    The three bounds of `spectra.quadrature.links`, the least of them. Where every derivative of order two
    and more keeps one sign, |f'| and |f''| are largest at an end, and there no more than the differences
    about it, since both are convex; elsewhere f is sampled.
    """
    a, b, beta = *ends, links.beta
    if beta == 0 or b <= a:
        return 0.0, 0.0
    x = np.linspace(a, b, COUPLING_SAMPLES)
    values, step = f(x), float(x[1] - x[0])
    bound = _least(np.sum(np.abs(np.diff(values))), 2 * beta * np.max(np.abs(np.diff(values))) / step)
    if not one_signed:
        return -bound, bound
    first, second = _at_ends(f, ends, step)
    bound = _least(np.sum(np.abs(np.diff(values))), 2 * beta * first, beta**2 * second)
    convex = values[0] + values[-1] >= 2 * values[COUPLING_SAMPLES // 2]
    return (0.0, bound) if convex else (-bound, 0.0)


def _at_ends(f: Function, ends: tuple[float, float], step: float) -> tuple[float, float]:
    """The largest |f'| and |f''| at the ends; infinite where f is not defined beyond one."""
    around = np.asarray(ends)[:, None] + step * np.array([-1.0, 0.0, 1.0])
    values = f(around)
    first = np.max(np.abs(np.diff(values, axis=1))) / step
    second = np.max(np.abs(np.diff(values, n=2, axis=1))) / step**2
    return _finite(first), _finite(second)


def _finite(x: float) -> float:
    return float(x) if np.isfinite(x) else np.inf


def _least(*bounds: float) -> float:
    return min(map(_finite, bounds))
