"""What bounds the error of f(H) v: where f is defined, what holds the spectrum, how far Lanczos can be off.

With v = Q a in the span of a basis, H Q = Q T + P L where P = (p_1 ... p_p) are orthonormal and orthogonal to
Q, T = S diag(θ) Sᵀ and f any function that is defined on the spectrum,

    f(H) v - Q f(T) a = Σ_i g_i(H) p_i,    g_i(λ) = Σ_j (Sᵀa)_j (L S)_ij (f(λ) - f(θ_j)) / (λ - θ_j):

for f(x) = 1/(x - z) that is the residual of the shifted system, and both sides are linear in f (Ilić, Turner
and Simpson, doi:10.1093/imanum/drp003; Chen, Greenbaum, Musco and Musco, arXiv:2106.09806, bound the same by
contour integrals). So max |g| over a set that holds the spectrum bounds the error, without a gap, a contour
or a derivative of f. One vector has one p, the next of its Lanczos run; a block of s vectors has s at most.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import draws
from spectra.base.errors import SpectraError, Status
from spectra.base.host import one_thread
from spectra.base.reals import RealFunction
from spectra.krylov.lanczos import lanczos
from spectra.operators.base import LinearOperator
from spectra.quadrature.hinges import kinks
from spectra.quadrature.rules import breakdown_noise

Intervals = Sequence[tuple[float, float]]
SAMPLES = 1500
"""Of g over the intervals, denser towards their ends, and between the Ritz values."""
FEWEST = 17
"""Of these for one interval of many."""
FEW = 4
"""Up to so many intervals are looked at closely: where they hold single eigenvalues there are hundreds."""
NARROWEST, LADDER = 1e-10, 8.0 ** np.arange(12)
"""Samples go from a Ritz value into a wide gap by steps that grow like this, from the gap on its other side
or from this part of the interval."""
BLURRED = 1e-12
"""Of f: what rounding of a difference of f may make of a sample of the error."""
NEAR = np.concatenate([s * 0.25 ** np.arange(12) for s in (-1, 1)])
"""Where f is sampled beside a Ritz value, in units of what that may be off by: a pole may be anywhere."""
TOGETHER = 2**22
"""Quotients of f in memory at a time."""
REFINEMENTS, GROWTH = 6, 1.2
"""How often samples are added beside the largest, and by how much that may grow before more are."""
FAILS = 1e-6
"""Probability with which an extreme eigenvalue lies beyond what a random run leaves for it."""


Function = Callable[[np.ndarray], np.ndarray]
Sampled = tuple[np.ndarray, np.ndarray]
"""Points, and values at them."""


def truncation(
    f: Function, theta: np.ndarray, first: np.ndarray, last: np.ndarray, intervals: Intervals
) -> np.ndarray:
    """Bounds on the error of each vector; infinite where f is not finite on the intervals.

    For any orthonormal p_i, |Σ_i g_i(H) p_i| <= Σ_i max |g_i|: the axes of the p_i are turned so that most of
    g lies along one of them. Between samples g_i is taken to move by no more than half of what it does from
    one to the next.

    Args:
        f: the function, finite on `theta`.
        theta: (m,) eigenvalues of T.
        first: (m, s) coefficients of the vectors on the eigenvectors of T.
        last: (p, m) coefficients of H on the eigenvectors outside of the basis, along the p_i.
        intervals: contain the spectrum.
    """
    if not last.any():
        return np.zeros(len(first.T))
    at_nodes = f(theta)
    # So close to a Ritz value what a difference of f is rounded by would count.
    apart = np.abs(first).max(axis=1) * np.abs(last).max(axis=0) * (np.finfo(float).eps / BLURRED)

    def quotients(x: np.ndarray, apart: np.ndarray) -> Sampled:
        """The points that are far enough from all Ritz values, and f[x, θ_j]."""
        gaps = x[:, None] - theta
        kept = (np.abs(gaps) > apart).all(axis=1)
        with np.errstate(invalid="ignore"):
            return x[kept], (f(x[kept])[:, None] - at_nodes) / gaps[kept]

    sampled: list[Sampled] = []
    for low, high in intervals:
        found = quotients(_samples(f, low, high, theta, len(intervals)), apart)
        beyond = low - 2 * max(apart.max(), 1e-6 * (high - low), np.finfo(float).tiny)
        sampled.append(found if len(found[0]) else quotients(np.array([beyond]), 0 * apart))
    if not all(np.isfinite(values).all() for _, values in sampled):
        return np.full(len(first.T), np.inf)
    bounds: list[float] = []
    noise = BLURRED * len(theta) * len(last) ** 0.5 * float(np.abs(at_nodes).max())
    for column in first.T:
        weights = column[:, None] * last.T
        weights = weights @ _main_axes([values @ weights for _, values in sampled])
        largest = np.zeros(len(last))
        for x, values in sampled:
            found = [
                _largest(partial(_along, one, quotients, apart), x, values @ one, noise) if one.any() else 0.0
                for one in weights.T
            ]
            largest = np.maximum(largest, found)
        bounds.append(float(largest.sum()))
    return np.array(bounds)


def _along(one: np.ndarray, quotients: Any, apart: np.ndarray, x: np.ndarray) -> Sampled:
    x, values = quotients(x, apart)
    with np.errstate(invalid="ignore"):  # beside a pole
        return x, values @ one


def _main_axes(samples: list[np.ndarray]) -> np.ndarray:
    """Orthonormal columns: the principal axes of samples (k, p)."""
    if samples[0].shape[1] == 1:
        return np.ones((1, 1))
    scale = max(float(np.abs(x).max()) for x in samples) or 1.0
    return np.linalg.eigh(sum((x / scale).T @ (x / scale) for x in samples))[1]


def _largest(
    g: Callable[[np.ndarray], Sampled], x: np.ndarray, found: np.ndarray, noise: float = 0.0
) -> float:
    """max |g| on one interval: of the samples `found` at x, and of more beside the largest until they are as
    large. Beside a pole of f they grow to the end: there is no bound then. So does rounding, up to `noise`.
    """
    between = np.max(np.abs(np.diff(found)), initial=0.0) / 2
    sizes, growing = np.abs(found), False
    for _ in range(REFINEMENTS):
        best = int(np.argmax(sizes))
        largest, edges = float(sizes[best]), x[[max(best - 1, 0), best, min(best + 1, len(x) - 1)]]
        inner, values = g(np.linspace(float(edges[0]), float(edges[-1]), 42)[1:-1])
        finer = np.abs(values) if len(inner) else np.full(1, largest)
        if not np.isfinite(finer).all():
            return np.inf
        if largest / GROWTH <= finer.max() <= GROWTH * largest:
            return max(largest, float(finer.max())) + float(between)
        growing = bool(finer.max() > largest)
        # The largest stays: a sample may be beside a pole by chance, closer than those that are added.
        x, first = np.unique(np.append(inner, edges[1]), return_index=True)
        sizes = np.append(finer, largest)[first]
    return np.inf if growing and sizes.max() > noise else float(sizes.max() + between)


def _samples(f: Function, low: float, high: float, theta: np.ndarray, of: int) -> np.ndarray:
    """Points of one of so many intervals.

    Most of a spectrum may be a millionth of the interval, below a few large eigenvalues, and f may be about
    that part alone: so some are between the Ritz values, more where these begin to be far apart, beside zero,
    where f often has a pole or a branch point, and where f bends most.
    """
    middle, half = (low + high) / 2, (high - low) / 2
    inside = theta[(theta > low) & (theta < high)]
    edges = np.concatenate([[low], inside, [high]])
    gaps = np.diff(edges)
    parts: list[Any] = [
        middle - half * np.cos(np.pi * np.linspace(0, 1, max(SAMPLES // of, FEWEST))),
        (edges[:-1, None] + gaps[:, None] * np.linspace(0.05, 0.95, 7)).ravel(),
    ]
    if of <= FEW and high > low:
        least = np.maximum(gaps, NARROWEST * (high - low))
        for ends, beside, sign in ((edges[1:-1], least[:-1], 1), (edges[1:-1], least[1:], -1)):
            wide = gaps[1:] if sign > 0 else gaps[:-1]
            steps = beside[:, None] * LADDER
            parts.append((ends[:, None] + sign * steps)[steps < wide[:, None] / 20])
        zero = max(low, 0.0) if high > 0 else high
        near = (high - low) * np.geomspace(1e-12, 1, 200)
        parts += [zero + near, zero - near]
        parts.append(_bends(f, np.concatenate([edges, *parts[2:]]), low, high))
    x = np.concatenate(parts)
    return np.unique(x[(x >= low) & (x <= high)])


def _bends(f: Function, x: np.ndarray, low: float, high: float) -> np.ndarray:
    """Where f bends most, with as much of the search in each cell of x, however narrow."""
    x = np.unique(x[(x >= low) & (x <= high)])
    ranks = np.arange(len(x), dtype=float)

    def at(rank: np.ndarray) -> np.ndarray:
        return np.interp(rank, ranks, x)

    with np.errstate(all="ignore"):
        found = at(kinks(lambda rank: f(at(rank)), 0.0, ranks[-1], ranks))
        return found[np.isfinite(f(found))]


def rounding(
    f: Function, theta: np.ndarray, first: np.ndarray, intervals: Intervals, noise: float
) -> tuple[np.ndarray, float]:
    """Bounds on what rounding moves f(H) of each vector by, and the largest |f|.

    Of Ritz pairs with H y_j = θ_j y_j + r_j the vector Σ_j a_j y_j has

        f(H) Σ_j a_j y_j - Σ_j a_j f(θ_j) y_j = Σ_j a_j f[H, θ_j] r_j,

    which along an eigenvector of λ is at most (Σ_j a_j² f[λ, θ_j]²)^½ |R|, where |R| is `noise`. A part of
    r_j along it is no larger than |λ - θ_j|: a step of f counts once, however close to it a Ritz value is.
    """
    at_nodes = f(theta)

    def some(x: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", over="ignore"):
            change = np.abs(f(x)[:, None] - at_nodes)
            change = change / np.maximum(1, np.abs(x[:, None] - theta) / noise)
            return np.sqrt(change**2 @ first**2)

    def moved(x: np.ndarray) -> np.ndarray:
        return np.concatenate([some(part) for part in np.array_split(x, 1 + len(x) * len(theta) // TOGETHER)])

    bounds, largest = np.zeros(len(first.T)), float(np.abs(at_nodes).max())
    if not noise:
        return bounds, largest
    for low, high in intervals:
        near = theta[(theta > low - noise) & (theta < high + noise), None] + noise * NEAR
        x = np.concatenate([_samples(f, low, high, theta, len(intervals)), near.ravel()])
        x = np.unique(np.clip(x, low, high))
        found, values = moved(x), f(x)
        if not np.isfinite(found).all() or np.isinf(_largest(lambda x: (x, f(x)), x, values)):
            return np.full(len(bounds), np.inf), np.inf
        largest = max(largest, float(np.abs(values).max()))
        for i, column in enumerate(found.T):
            here = _largest(lambda x, i=i: (x, moved(x)[:, i]), x, column)
            bounds[i] = max(bounds[i], here)
    return np.minimum(bounds, 2 * largest * np.linalg.norm(first, axis=0)), largest


def margin(size: int, steps: int) -> float:
    """What a random run of some steps leaves beyond each extreme Ritz value, in units of their distance.

    (λ_1 - θ_1) / (λ_1 - λ_n) > ε has probability 1.648 √n exp(-√ε (2 m - 1)) at most, for a start drawn
    uniformly (Kuczynski and Wozniakowski, doi:10.1137/0613066, theorem 4.2).
    """
    share = (np.log(1.648 * np.sqrt(size) / FAILS) / (2 * steps - 1)) ** 2
    return float(share / (1 - 2 * share)) if share < 0.45 else np.inf


def around(theta: np.ndarray, noise: float, low: float, high: float) -> list[tuple[float, float]]:
    """What holds all eigenvalues, of which these are right to `noise`, within an interval."""
    apart = np.flatnonzero(np.diff(theta) > 2 * noise)
    starts, ends = theta[np.r_[0, apart + 1]] - noise, theta[np.r_[apart, len(theta) - 1]] + noise
    return [(float(a), float(b)) for a, b in np.clip(np.stack([starts, ends], 1), low, high)]


RANGE_STEPS = 40
"""Of the random run for the ends of the spectrum: they are then known to 8 % of it at n = 1e6."""


@dataclasses.dataclass(frozen=True)
class Named:
    """A function by name: of real numbers and of arrays of JAX, and where it is defined."""

    real: RealFunction
    jax: Callable[[Any], Any]
    least: float = -np.inf  # defined above
    closed: bool = False  # and at `least` itself


NAMED = {
    "exp": Named(RealFunction(np.exp), jnp.exp),
    "log": Named(RealFunction(np.log), jnp.log, 0.0),
    "sqrt": Named(RealFunction(np.sqrt), jnp.sqrt, 0.0, closed=True),
    "inv_sqrt": Named(RealFunction(lambda x: 1 / np.sqrt(x)), lambda x: 1 / jnp.sqrt(x), 0.0),
    "inv": Named(RealFunction(lambda x: 1 / x), lambda x: 1 / x),
    "sign": Named(RealFunction(np.sign), jnp.sign),
    "abs": Named(RealFunction(np.abs), jnp.abs),
}


def named_function(f: Any) -> tuple[Named, str]:
    """A function that a user passes, or named, with its name."""
    if isinstance(f, str):
        if f not in NAMED:
            raise SpectraError(f"f={f!r}: use one of {tuple(NAMED)}, or a function of real numbers.")
        return NAMED[f], f
    if not callable(f):
        raise SpectraError(f"f is a {type(f).__name__}: pass a function of real numbers, or its name.")
    return Named(RealFunction(f), f), getattr(f, "__name__", type(f).__name__)


@dataclasses.dataclass(frozen=True)
class Range:
    """Intervals that hold the spectrum, and what they rest on."""

    intervals: tuple[tuple[float, float], ...]
    low: float  # given ends; Ritz values beyond them are an error
    high: float
    norm: float
    reason: str
    products: int

    @classmethod
    def of(
        cls,
        op: LinearOperator,
        given: list[tuple[float, float]],
        key: jax.Array | None,
        before: float,
        measured: float,
    ) -> "Range":
        """The given ends, and for those not given a random run of Lanczos; `before` as of `size_before`, and
        `measured` is what rounding does to products, in units of |H|."""
        low, high = given[0][0], given[-1][1]
        if op.semidefinite:
            low = max(low, 0.0)
        if np.isfinite([low, high]).all():
            intervals = ((max(given[0][0], low), given[0][1]), *given[1:])
            norm = max(abs(low), abs(high))
            return cls(intervals, low, high, norm, "the given bounds of the spectrum", 0)
        key = jax.random.key(0) if key is None else key
        count = min(RANGE_STEPS, op.size)
        found = lanczos(op, draws.unit_vector(key, op), count)
        theta = eigh(found.alpha, found.beta, int(found.length))[0]
        exact = found.status is Status.INVARIANT or count == op.size
        whole = int(found.length) == op.size and len(given) == 1
        beyond = 0.0 if exact else margin(op.size, count) * (theta[-1] - theta[0])
        largest = float(np.abs(theta).max())
        noise = max(breakdown_noise(op.size, op.precision) * max(largest, before), measured * largest)
        a = low if np.isfinite(low) else theta[0] - beyond - noise
        b = high if np.isfinite(high) else theta[-1] + beyond + noise
        edges = [(x if np.isfinite(x) else a, y if np.isfinite(y) else b) for x, y in given]
        edges[0], edges[-1] = (a, edges[0][1]), (edges[-1][0], b)
        if whole:
            edges = around(theta, noise, a, b)
        reason = "the ends of the spectrum, which a random run leaves out with probability 1e-6"
        return cls(tuple(edges), low, high, max(abs(a), abs(b)), reason, int(found.length))


def given_intervals(bounds: Any) -> list[tuple[float, float]]:
    """Intervals in ascending order, with infinite ends where nothing is known."""
    if bounds is None:
        return [(-np.inf, np.inf)]
    try:
        pairs = [bounds] if bounds[0] is None or np.ndim(bounds[0]) == 0 else list(bounds)
        made = [(-np.inf if a is None else float(a), np.inf if b is None else float(b)) for a, b in pairs]
    except (TypeError, ValueError, LookupError):
        made = [(np.nan, np.nan)]
    ends = [end for pair in made for end in pair]
    if np.isnan(ends).any() or ends != sorted(ends):
        raise SpectraError(f"bounds={bounds!r}: use (a, b) with a <= b, or several such pairs, ascending.")
    return made


def inside(theta: Any, named: Named, name: str, known: Range, noise: float, op: LinearOperator) -> np.ndarray:
    """Ritz values within the given bounds, and where f is defined, up to rounding."""
    low, high = max(known.low, named.least if named.closed else -np.inf), known.high
    beyond = theta[(theta < known.low - noise) | (theta > known.high + noise)]
    if len(beyond):
        raise SpectraError(
            f"the Ritz value {beyond[0]:.6g} lies outside of the bounds given, [{known.low:g}, "
            f"{known.high:g}]: H has an eigenvalue there or beyond."
        )
    if theta[0] < named.least - noise:
        raise undefined(name, float(theta[0]), noise)
    return np.clip(theta, low, high)


def undefined(name: str, at: float, noise: float) -> SpectraError:
    """The error for a function that is not finite at a Ritz value."""
    what = f"an eigenvalue at or below {at:.6g}" if at < -noise else f"an eigenvalue near {at:.6g}"
    return SpectraError(
        f"{name} is not finite at the Ritz value {at:.6g}: H has {what} (the noise floor is {noise:.1e}). "
        "Shift the operator, op.shift(delta), by more than its most negative eigenvalue and the noise floor."
    )


def extended(intervals: Any, theta: np.ndarray) -> list[tuple[float, float]]:
    """The intervals, the outer ends no further in than the Ritz values."""
    pairs = list(intervals)
    pairs[0] = (min(pairs[0][0], float(theta[0])), pairs[0][1])
    pairs[-1] = (pairs[-1][0], max(pairs[-1][1], float(theta[-1])))
    return pairs


@one_thread()
def eigh(alpha: Any, beta: Any, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Ritz values and the eigenvectors of T, in float64."""
    alpha, beta = np.asarray(alpha, np.float64)[:length], np.asarray(beta, np.float64)[: length - 1]
    from scipy.linalg import eigh_tridiagonal

    values, vectors = eigh_tridiagonal(alpha, beta)
    return values, vectors
