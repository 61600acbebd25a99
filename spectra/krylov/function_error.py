"""How far a Lanczos approximation of f(H) v can be from the exact one.

With H Q = Q T + β q eᵀ after m steps, q the next vector of the basis, T = S diag(θ) Sᵀ and f any function
that is defined on the spectrum,

    f(H) v - |v| Q f(T) e_1 = |v| β g(H) q,    g(λ) = Σ_j s_1j s_mj (f(λ) - f(θ_j)) / (λ - θ_j):

for f(x) = 1/(x - z) that is the residual of the shifted system, and both sides are linear in f (Ilić, Turner
and Simpson, doi:10.1093/imanum/drp003; Chen, Greenbaum, Musco and Musco, arXiv:2106.09806, bound the same by
contour integrals). So max |g| over a set that holds the spectrum bounds the error, without a gap, a contour
or a derivative of f.
"""

from collections.abc import Callable, Sequence

import numpy as np

Intervals = Sequence[tuple[float, float]]
SAMPLES = 1500
"""Of g over the intervals, denser towards their ends, and between the Ritz values."""
REFINEMENTS, GROWTH = 6, 1.2
"""How often samples are added beside the largest, and by how much that may grow before more are."""
FAILS = 1e-6
"""Probability with which an extreme eigenvalue lies beyond what a random run leaves for it."""


Function = Callable[[np.ndarray], np.ndarray]


def truncation(
    f: Function,
    theta: np.ndarray,
    vectors: np.ndarray,
    beta: float,
    intervals: Intervals,
) -> float:
    """β max |g| over the intervals, for v of norm one; infinite where f is not finite on them.

    Between samples g is taken to move by no more than half of what it does from one to the next.
    """
    if beta == 0:
        return 0.0
    weights = vectors[0] * vectors[-1]
    return beta * max(_largest(f, theta, weights, low, high) for low, high in intervals)


def _largest(f: Function, theta: np.ndarray, weights: np.ndarray, low: float, high: float) -> float:
    """max |g| on one interval: of samples, and of more beside the largest while they find more.

    Beside a pole of f they always do: there is no bound then.
    """
    at_nodes = f(theta)

    def g(x: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return ((f(x)[:, None] - at_nodes) / (x[:, None] - theta)) @ weights

    x = _samples(low, high, theta)
    found = g(x)
    if not np.isfinite(found).all():
        return np.inf
    between = np.max(np.abs(np.diff(found)), initial=0.0) / 2
    largest, best = float(np.abs(found).max()), int(np.argmax(np.abs(found)))
    left, right = x[max(best - 1, 0)], x[min(best + 1, len(x) - 1)]
    for _ in range(REFINEMENTS):
        x = np.linspace(float(left), float(right), 42)[1:-1]
        x = x[np.abs(x[:, None] - theta).min(axis=1) > 1e-7 * (high - low)]
        finer = np.abs(g(x)) if len(x) else np.zeros(1)
        if not np.isfinite(finer).all():
            return np.inf
        if finer.max() <= GROWTH * largest:
            return max(largest, float(finer.max())) + float(between)
        largest, best = float(finer.max()), int(np.argmax(finer))
        left, right = x[max(best - 1, 0)], x[min(best + 1, len(x) - 1)]
    return np.inf


def _samples(low: float, high: float, theta: np.ndarray) -> np.ndarray:
    """Points of an interval, none within a millionth of it of a Ritz value, where f(λ) - f(θ) cancels."""
    middle, half = (low + high) / 2, (high - low) / 2
    inside = theta[(theta > low) & (theta < high)]
    edges = np.concatenate([[low], inside, [high]])
    between = edges[:-1, None] + np.diff(edges)[:, None] * np.linspace(0.05, 0.95, 7)
    x = middle - half * np.cos(np.pi * np.linspace(0, 1, SAMPLES))
    # Functions with a pole or a branch point at zero move fast beside it.
    near = low + (high - low) * np.geomspace(1e-12, 1, 200) if low >= 0 else np.zeros(0)
    x = np.unique(np.clip(np.concatenate([x, between.ravel(), near]), low, high))
    apart = 1e-6 * max(high - low, np.finfo(float).tiny)
    gaps = np.abs(x[:, None] - theta).min(axis=1)
    kept = x[gaps > apart]
    return kept if len(kept) else np.asarray([low - 2 * apart])


def rounding(f: Function, intervals: Intervals, moved: float) -> float:
    """How far f moves on the intervals where eigenvalues are moved by `moved`."""
    largest = 0.0
    for low, high in intervals:
        x = np.linspace(low, high, SAMPLES)
        change = np.abs(f(np.clip(x + moved, low, high)) - f(x))
        largest = max(largest, float(np.max(change[np.isfinite(change)], initial=0.0)))
    return largest


def margin(size: int, steps: int) -> float:
    """What a random run of some steps leaves beyond each extreme Ritz value, in units of their distance.

    (λ_1 - θ_1) / (λ_1 - λ_n) > ε has probability 1.648 √n exp(-√ε (2 m - 1)) at most, for a start drawn
    uniformly (Kuczynski and Wozniakowski, doi:10.1137/0613066, theorem 4.2).
    """
    share = (np.log(1.648 * np.sqrt(size) / FAILS) / (2 * steps - 1)) ** 2
    return float(share / (1 - 2 * share)) if share < 0.45 else np.inf
