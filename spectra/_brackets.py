"""What a quadrature leaves open of a probe's distribution: the bracket of Chebyshev, Markov and Stieltjes.

Of all measures with the coefficients α_1, β_1, ..., α_m, β_m of a run none has less mass to the left of a
point x, or more up to x, than one of them: the Gauss-Radau rule of m + 1 nodes with a node at x. Its
sum without the mass at x bounds the mass on (-inf, x) from below, and with it that on (-inf, x] from above.

These rules form a family with one parameter, the last diagonal entry of the extended matrix, and *every* node
of a member is the point x of its own bracket: one matrix gives m + 1 of them, one in each gap of the Gauss
nodes. As bounds of a distribution function grow with x, those of a point hold for all points on one side
of it. So a few members bracket the whole curve.

References:
    Krein and Nudelman, The Markov Moment Problem and Extremal Problems, 1977, ch. III; Golub and Meurant,
    Matrices, Moments and Quadrature, 2010, ch. 6.
"""

import functools

import numpy as np

from spectra._blas import one_thread
from spectra._breakdown import breakdown_noise
from spectra._copies import rule_of

MEMBERS = 12
"""Members of the family for a curve: between their nodes the bracket takes that of the nearest."""
EXACT = 4
"""So many points have members of their own."""


def gauss_radau(nodes, weights, residuals, fixed: float) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of the rule with one more node, at `fixed`, which is none of the nodes."""
    return tuple(
        part[0] for part in _members(nodes, weights, residuals, [_parameter(nodes, residuals, fixed)])
    )  # pyright: ignore[reportReturnType]


def _parameter(nodes, residuals, x):
    """The member with a node at x: x + Σ_j r_j² / (θ_j - x), for each x."""
    return x + np.sum(residuals**2 / (nodes - np.asarray(x)[..., None]), axis=-1)


@one_thread()
def _members(nodes, weights, residuals, parameters) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights (p, m + 1) of the members of the family.

    T grows by a row with β_m beside and the parameter on the diagonal. In the eigenbasis of T, of vectors
    with positive first components, that is an arrowhead matrix with β_m s_mj = r_j on the border.
    """
    m = len(nodes)
    arrows = np.zeros((len(parameters), m + 1, m + 1))
    arrows[:, np.arange(m), np.arange(m)] = nodes
    arrows[:, m, m] = parameters
    arrows[:, m, :m] = arrows[:, :m, m] = residuals
    theta, vectors = np.linalg.eigh(arrows)
    return theta, (np.sqrt(weights) @ vectors[:, :m]) ** 2


class Steps:
    """Bounds of a distribution function at sorted points: least mass left of them, most up to them."""

    def __init__(self, points, least, most):
        order = np.argsort(points, kind="stable")
        self.points = points[order]
        self.least = np.append(0.0, np.clip(np.maximum.accumulate(least[order]), 0, 1))
        self.most = np.append(np.clip(np.minimum.accumulate(most[order][::-1])[::-1], 0, 1), 1.0)

    def at(self, low, high) -> tuple[np.ndarray, np.ndarray]:
        """The least mass up to `low` and the most up to `high`."""
        below = np.searchsorted(self.points, low, side="right")
        above = np.searchsorted(self.points, high, side="left")
        return self.least[below], self.most[above]


def _steps(nodes, weights, residuals, parameters) -> Steps:
    theta, masses = _members(nodes, weights, residuals, parameters)
    most = np.cumsum(masses, axis=1)
    gauss = np.cumsum(weights)  # the member without a mass at its last node, which is infinite
    return Steps(
        np.concatenate([theta.ravel(), nodes]),
        np.concatenate([(most - masses).ravel(), gauss - weights]),
        np.concatenate([most.ravel(), gauss]),
    )


@functools.lru_cache(maxsize=256)
def _curve(*stored: bytes) -> Steps:
    """Bounds for a whole curve, at points spread over every gap."""
    nodes, weights, residuals = (np.frombuffer(part) for part in stored)
    gaps = np.diff(nodes)
    shares = (np.arange(MEMBERS) + 0.5) / MEMBERS
    inside = nodes[:-1] + shares[:, None] * gaps  # (members, gaps)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = _parameter(nodes, residuals, inside)
    found = np.where(np.isfinite(found), found, np.nan)
    middle = weights[:-1] + weights[1:]
    parameters = [_median(row, middle) for row in found] if len(gaps) else [nodes[0]]
    return _steps(nodes, weights, residuals, np.array([x for x in parameters if np.isfinite(x)]))


def _median(values, weights) -> float:
    good = np.isfinite(values)
    if not good.any():
        return np.nan
    order = np.argsort(values[good])
    sums = np.cumsum(weights[good][order])
    return float(values[good][order][np.searchsorted(sums, sums[-1] / 2)])


def _at_points(nodes, weights, residuals, low, high) -> tuple[np.ndarray, np.ndarray]:
    """The bracket itself at a few points, each with its own member of the family."""
    ends = np.stack([low, high]).reshape(2, -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        parameters = _parameter(nodes, residuals, ends)
    own = np.isfinite(parameters)  # a point on a node has the Gauss rule
    steps = _steps(nodes, weights, residuals, parameters[own])
    # The node of a member that belongs to a point is that point but for rounding.
    slack = 4 * np.finfo(float).eps * np.abs(nodes).max()
    least, most = steps.at(ends[0] + slack, ends[1] - slack)
    return least.reshape(low.shape), most.reshape(high.shape)


def _mass(nodes, weights, residuals, x) -> np.ndarray:
    """The largest mass that a measure can have at each x: of the member with a node there.

    (Σ_j sqrt(w_j) r_j / (θ_j - x))² / (1 + Σ_j r_j² / (θ_j - x)²), and w_j at θ_j itself.
    """
    away = nodes - np.asarray(x)[..., None]
    tiny = np.finfo(float).tiny ** 0.5
    away = np.where(np.abs(away) < tiny, tiny, away)
    inverse = 1 / away
    return (inverse @ (np.sqrt(weights) * residuals)) ** 2 / (1 + inverse**2 @ residuals**2)


def dropped(quadrature) -> float:
    """How far from its nodes a rule that ended in an invariant space reaches.

    What a breakdown takes for zero may be a recurrence coefficient β of rounding's size: a bulk with such
    coefficients is one node and reaches 2 β to each side of it.
    """
    return 2 * breakdown_noise(quadrature.size, quadrature.precision) * max(map(abs, quadrature.range))


def rules(quadrature):
    """Nodes, weights that sum to one, and residuals of each probe, in float64 and at their true length.

    Residuals have the signs of s_1j s_mj, which alternate between neighbouring Ritz values. Where copies were
    merged the rule is that of T itself, copies and all: it is exact for a measure near that of the probe (see
    `spectra._copies`), and the merged one is exact for none.
    """
    if quadrature.coefficients is not None:
        yield from map(rule_of, np.asarray(quadrature.coefficients, np.float64))
        return
    columns = zip(quadrature.nodes, quadrature.weights, quadrature.residuals, quadrature.lengths, strict=True)
    for nodes, weights, residuals, length in columns:
        theta, w, r = (np.asarray(x, np.float64)[:length] for x in (nodes, weights, residuals))
        yield theta, w / w.sum(), r * (-1.0) ** np.arange(len(r))


def _sums(weights) -> np.ndarray:
    """Sums of the first weights, of none to all: one to the bit."""
    return np.append(0.0, np.append(np.cumsum(weights[:-1]), 1.0))


def bracket(quadrature, x: np.ndarray, shift) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(lower, estimate, upper) of the probes' weighted distributions at x, averaged over probes.

    Points move by `shift` first, the noise floor at least, so that rounding of a node cannot break a bound.
    A rule that ended in an invariant space is the measure itself, but for a coupling of rounding's size that
    it dropped.
    """
    x, behind = np.asarray(x, np.float64), dropped(quadrature)
    rounding = 4 * quadrature.precision  # of the weights, whose sum is one
    total = np.zeros((3, *x.shape))
    for theta, w, r in rules(quadrature):
        sums = _sums(w)
        low, high = x - shift, x + shift
        if not r.any():
            left = np.searchsorted(theta, low - behind, side="right")
            right = np.searchsorted(theta, high + behind, side="right")
            slack = np.append(0.0, np.append(np.full(len(theta) - 1, rounding), 0.0))
            below, above = np.clip(sums[left] - slack[left], 0, 1), np.clip(sums[right] + slack[right], 0, 1)
        else:
            below, above = _limits(theta, w, r, low, high, quadrature.noise_floor, behind / 2, rounding)
        total += np.stack([below, sums[np.searchsorted(theta, x, side="right")], above])
    return tuple(total / len(quadrature.nodes))  # pyright: ignore[reportReturnType]


def _limits(
    theta, w, r, low, high, noise: float, moved: float, rounding: float
) -> tuple[np.ndarray, np.ndarray]:
    """The least mass up to `low` and the most up to `high`.

    Sums of whole Gauss weights bound both whatever rounding did to a weight. The bracket proper is narrower:
    it gives way by what rounding can have carried from one side of a gap to the other. A change E of H
    turns the invariant space on one side by |E| / gap (Davis and Kahan), which carries 2 sqrt(F (1 - F))
    times as much, for the mass F on that side. And a converged node is an eigenvalue to within `moved` only.
    """
    sums = _sums(w)
    left, right = np.searchsorted(theta, low, side="right"), np.searchsorted(theta, high, side="left")
    whole = sums[np.maximum(left - 1, 0)], sums[np.minimum(right + 1, len(theta))]
    low, high = low - moved, high + moved
    left, right = np.searchsorted(theta, low, side="right"), np.searchsorted(theta, high, side="left")
    if low.size <= EXACT:
        least, most = _at_points(theta, w, r, low, high)
    else:
        curve = _curve(theta.tobytes(), w.tobytes(), r.tobytes()).at(low, high)
        # The Gauss rule is one of the measures: least <= its sum <= most = least + the largest mass at x.
        least = np.maximum(curve[0], sums[left] - _mass(theta, w, r, low))
        most = np.minimum(curve[1], sums[right] + _mass(theta, w, r, high))
    carried = np.zeros(len(theta) + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        carried[1:-1] = 2 * noise * np.sqrt(sums[1:-1] * np.clip(1 - sums[1:-1], 0, 1)) / np.diff(theta)
    carried[1:-1] = np.nan_to_num(carried[1:-1], nan=1.0) + rounding  # two nodes that agree: nothing is known
    # Beyond all nodes x is itself the first or the last: nothing lies to its left, or everything up to it.
    least = np.where(left == 0, 0.0, np.clip(least - carried[left], 0, 1))
    most = np.where(right == len(theta), 1.0, np.clip(most + carried[right], 0, 1))
    return np.maximum(whole[0], least), np.minimum(whole[1], most)
