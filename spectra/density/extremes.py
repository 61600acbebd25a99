"""What quadratures say of a spectrum: its ends and smallest magnitudes, and means with sampling error."""

from collections.abc import Iterable

import numpy as np

from spectra.base.errors import Status
from spectra.quadrature.christoffel import Openness, shift
from spectra.results import Interval, Quadrature

LEVEL = 0.99
"""Probability of the outer end of an extreme eigenvalue: the inner end holds always."""
ZERO = 2.0
"""|λ| up to this many shifts by rounding counts as zero: a computed zero may be one shift away from it, and
what is known of an eigenvalue is known to one shift."""


def extreme(quadrature: Quadrature, end: int, *, level: float = LEVEL, far: float | None = None) -> Interval:
    """The smallest (end=0) or the largest (end=-1) eigenvalue, between a bound and a limit.

    The outermost Ritz value is a Rayleigh quotient: the smallest eigenvalue is not above it and the largest
    not below, but for rounding, which is added. That side is a **bound**. The other side is a **limit that
    holds with probability `level`**: an eigenvalue further out would have shown in the probes, see
    `spectra.quadrature.christoffel`. It is infinite where there are too few probes and steps to exclude
    anything. The estimate is the Ritz value. `far` is that end of `sampled_ends`, where it is known already.
    """
    sign = 1.0 if end == -1 else -1.0
    nodes = np.asarray(quadrature.nodes, np.float64)
    value = float(nodes.max() if end == -1 else nodes.min())
    if not any(quadrature.range) and not np.any(quadrature.residuals):
        floor = quadrature.noise_floor  # every product was zero, to what rounding would have changed them by
        return Interval(-floor, 0.0, floor) if floor else Interval(0.0, 0.0, 0.0)
    far = sampled_ends(quadrature, level)[end] if far is None else far
    if (links := quadrature.parts.links) is not None:
        far = links.end(far, sign)
    moved = _moved(quadrature)
    if quadrature.status is Status.EXACT:
        return Interval(value - moved, value, value + moved)
    inner, outer = value - sign * moved, sign * max(sign * far, sign * value + moved)
    return Interval(min(inner, outer), value, max(inner, outer))


def _moved(quadrature: Quadrature) -> float:
    """How far rounding can have moved an eigenvalue; of a dense matrix as far as the matrix itself (Weyl)."""
    return quadrature.noise_floor if quadrature.status is Status.EXACT else shift(quadrature)


def sampled_ends(quadrature: Quadrature, level: float = LEVEL) -> tuple[float, float]:
    """The limits of what is sampled: without the eigenpairs, or the space, that was taken out."""
    nodes, open_ = (quadrature.bulk or quadrature).nodes, Openness([quadrature], 1 - level)
    return open_.end(float(np.min(nodes)), -1.0), open_.end(float(np.max(nodes)), 1.0)


def norm(quadrature: Quadrature) -> Interval:
    """|H|, the largest |eigenvalue|: never below the lower end, above the upper one in 1 of 100 cases."""
    low, high = (extreme(quadrature, end) for end in (0, -1))
    least = max(float(high.lower), -float(low.upper), 0.0)
    most = max(float(high.upper), -float(low.lower))
    return Interval(least, max(map(abs, quadrature.range)), most)


def shows_fourth_powers(quadrature: Quadrature) -> bool:
    """Whether fourth powers of deviations are seen: those of two nodes are as small as their squares allow.

    A rule of three nodes integrates x⁴ exactly, and one that has exhausted its space everything.
    """
    sampled = quadrature.bulk or quadrature
    return sampled.num_steps >= 3 or not np.any(sampled.residuals)


def ritz_pairs(quadratures: Iterable[Quadrature]) -> tuple[np.ndarray, np.ndarray]:
    """All Ritz values and their residuals, of all probes."""
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    for q in quadratures:
        live = np.arange(q.num_steps) < np.asarray(q.lengths)[:, None]
        parts.append((np.asarray(q.nodes, np.float64)[live], np.asarray(q.residuals, np.float64)[live]))
    return np.concatenate([theta for theta, _ in parts]), np.concatenate(
        [residuals for _, residuals in parts]
    )


def nonzero_bound(theta: np.ndarray, residuals: np.ndarray, moved: float, cut: float) -> tuple[float, float]:
    """(bound, estimate) of the smallest |λ| above `cut`: infinite if no Ritz pair is known to be of one.

    [θ - r, θ + r] holds an eigenvalue of a matrix within `moved` of H. Where it stays clear of zero, that
    eigenvalue is none of the zeros, and the smallest |λ| that is not zero is at most |θ| + r.
    """
    sizes = np.abs(theta)
    known = sizes - residuals - moved > cut
    if not known.any():
        return np.inf, np.inf
    best = int(np.argmin(np.where(known, sizes + residuals, np.inf)))
    return float(sizes[best] + residuals[best] + moved), float(sizes[best])


def condition_lower_bound(quadrature: Quadrature) -> float:
    """A lower bound on |λ|max over the smallest |λ| that is not zero.

    Numerator: the largest |Ritz value|, a Rayleigh quotient. Denominator: the smallest |θ| + residual of a
    Ritz pair that is certainly of an eigenvalue other than zero, see `nonzero_bound`. Zeros may be there or
    not, and nothing smaller than the noise floor is claimed. It is 1 where nothing is known.
    """
    moved, top = _moved(quadrature), max(map(abs, quadrature.range))
    smallest, _ = nonzero_bound(*ritz_pairs([quadrature]), moved, ZERO * moved)
    return max((top - moved) / smallest, 1.0) if top else 1.0


def condition(quadrature: Quadrature) -> Interval:
    """|λ|max over the smallest |λ| that is not zero: a lower bound, the value, and an upper bound.

    The upper bound is infinite, and the value the lower bound, unless all eigenvalues are known and each of
    them differs from zero.
    """
    least, top = condition_lower_bound(quadrature), max(map(abs, quadrature.range))
    smallest, moved = float(np.min(np.abs(quadrature.nodes))), _moved(quadrature)
    if quadrature.status is not Status.EXACT or not top or smallest <= ZERO * moved:
        return Interval(least, least, np.inf)
    return Interval(least, top / smallest, (top + moved) / (smallest - moved))


def sampling_error(weights: np.ndarray, values: np.ndarray, size: int) -> tuple[float, float | None]:
    """Standard error of n times the mean of Σ_j w_j f(θ_j) over rows, and its degrees of freedom.

    See `error_of_powers`; the means over all eigenvalues are those of the quadrature.

    Args:
        weights: (k, m), rows sum to one.
        values: (k, m), f at the nodes.
        size: n.
    """
    k = len(weights)
    mean = np.sum(weights * values) / k
    largest = float(np.max(np.abs(values - mean), initial=0.0, where=weights > 0))
    # Squares of the smallest and of the largest numbers do not under- or overflow.
    g = (values - mean) / (largest or 1.0)
    square, fourth = (float(np.sum(weights * g**p) / k) for p in (2, 4))
    return error_of_powers(largest, square, fourth, size, k)


def error_of_powers(
    scale: float, square: float, fourth: float, size: int, num_probes: int
) -> tuple[float, float | None]:
    """Standard error of n times the mean of vᵀf(H)v over k probes, and its degrees of freedom.

    For v uniform on the sphere Var vᵀf(H)v = 2 (mean g²) / (n + 2) with g = f - mean f; `square` and `fourth`
    are means of g² and g⁴ in units of `scale`. The estimate of mean g² is Σ g_i² χ²_1 / (n k) nearly, whose
    degrees of freedom are k (Σ g²)² / Σ g⁴ (Satterthwaite): at least k, whatever the spectrum, which an
    estimate of them from few probes need not be. None where f is constant.
    """
    if scale == 0 or square == 0:
        return 0.0, None
    stderr = size * scale * np.sqrt(2 * square / (size + 2) / num_probes)
    dof = num_probes * size * square**2 / fourth if fourth > 0 else 0.0
    return float(stderr), float(max(num_probes, dof))
