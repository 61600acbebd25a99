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

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from spectra.base.host import one_thread
from spectra.quadrature import Measures, Rule
from spectra.quadrature.rules import breakdown_noise, rule_of

MEMBERS = 12
"""Members of the family for a curve: between their nodes the bracket takes that of the nearest."""
EXACT = 4
"""So many points have members of their own."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a quadrature of the rest was made from: that of all, and the nodes of each probe taken out.

    All that is known of the rest's measure ν = (μ - Σ w_i δ(λ_i)) / (1 - Σ w_i) is known of μ.
    """

    whole: Any
    nodes: np.ndarray  # (r, k)

    def rules(self) -> Iterator[tuple[Rule, Any]]:
        """(nodes, weights, residuals) of each probe with all nodes, and the numbers of those taken out."""
        return zip(rules(self.whole), self.nodes.T, strict=True)


def gauss_radau(
    nodes: np.ndarray, weights: np.ndarray, residuals: np.ndarray, fixed: float
) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of the rule with one more node, at `fixed`.

    If that is one of the nodes, it is the rule itself: the other one is infinite then, without a mass. The
    smallest node is an end of the domain where it is a zero eigenvalue that rounding made negative.
    """
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        last = parameter(nodes, residuals, fixed)
    if not np.isfinite(last):
        return nodes, weights
    theta, masses = _members(nodes, weights, residuals, [last])
    points = theta[0]
    points[np.argmin(np.abs(points - fixed))] = fixed  # but for rounding, which counts where f has a pole
    return points, masses[0]


def parameter(nodes, residuals, x):
    """The member with a node at x: x + Σ_j r_j² / (θ_j - x), for each x."""
    return x + np.sum(residuals**2 / (nodes - np.asarray(x)[..., None]), axis=-1)


def arrowheads(nodes, residuals, parameters) -> tuple[np.ndarray, np.ndarray]:
    """Nodes (p, m + 1) of the members of the family, and vectors with a row for each Gauss node and the last.

    T grows by a row with β_m beside and the parameter on the diagonal. In the eigenbasis of T, of vectors
    with positive first components, that is an arrowhead matrix with β_m s_mj = r_j on the border.
    """
    m = len(nodes)
    arrows = np.zeros((len(parameters), m + 1, m + 1))
    arrows[:, np.arange(m), np.arange(m)] = nodes
    arrows[:, m, m] = parameters
    arrows[:, m, :m] = arrows[:, :m, m] = residuals
    theta, vectors = np.linalg.eigh(arrows)
    return theta, vectors


@one_thread()
def _members(nodes, weights, residuals, parameters) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights (p, m + 1) of the members of the family."""
    theta, vectors = arrowheads(nodes, residuals, parameters)
    return theta, (np.sqrt(weights) @ vectors[:, :-1]) ** 2


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


def _steps(nodes, weights, residuals, parameters, fixed=None) -> Steps:
    """From these members; each has a node at its own of the `fixed` points, but for what LAPACK rounds."""
    theta, masses = _members(nodes, weights, residuals, parameters)
    if fixed is not None:
        own = np.argmin(np.abs(theta - fixed[:, None]), axis=1)
        np.put_along_axis(theta, own[:, None], fixed[:, None], axis=1)
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
    return _steps(nodes, weights, residuals, spread_parameters(nodes, weights, residuals))


def spread_parameters(nodes, weights, residuals) -> np.ndarray:
    """Members whose nodes are spread over every gap."""
    gaps = np.diff(nodes)
    shares = (np.arange(MEMBERS) + 0.5) / MEMBERS
    inside = nodes[:-1] + shares[:, None] * gaps  # (members, gaps)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = parameter(nodes, residuals, inside)
    found = np.where(np.isfinite(found), found, np.nan)
    middle = weights[:-1] + weights[1:]
    parameters = [_median(row, middle) for row in found] if len(gaps) else [nodes[0]]
    return np.array([x for x in parameters if np.isfinite(x)])


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
        parameters = parameter(nodes, residuals, ends)
    own = np.isfinite(parameters)  # a point on a node has the Gauss rule
    least, most = _steps(nodes, weights, residuals, parameters[own], ends[own]).at(*ends)
    return least.reshape(low.shape), most.reshape(high.shape)


def largest_mass(nodes: np.ndarray, weights: np.ndarray, residuals: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The largest mass that a measure can have at each x: of the member with a node there.

    (Σ_j sqrt(w_j) r_j / (θ_j - x))² / (1 + Σ_j r_j² / (θ_j - x)²), and w_j at θ_j itself.
    """
    size = max(np.abs(nodes).max(), np.abs(residuals).max()) or 1.0
    away, r = (nodes - np.asarray(x)[..., None]) / size, residuals / size
    nearest = 1e-150  # a node itself; neither its square nor sums of such squares leave the range of float64
    inverse = 1 / np.where(np.abs(away) < nearest, nearest, away)
    return (inverse @ (np.sqrt(weights) * r)) ** 2 / (1 + inverse**2 @ r**2)


def dropped(quadrature: Measures) -> float:
    """How far from its nodes a rule that ended in an invariant space reaches.

    What a breakdown takes for zero may be a recurrence coefficient β of rounding's size: a bulk with such
    coefficients is one node and reaches 2 β to each side of it.
    """
    return 2 * breakdown_noise(quadrature.size, quadrature.precision) * max(map(abs, quadrature.range))


def rules(quadrature: Measures) -> Iterator[Rule]:
    """Nodes, weights that sum to one, and residuals of each probe, in float64 and at their true length.

    Residuals have the signs of s_1j s_mj, which alternate between neighbouring Ritz values. Where copies were
    merged the rule is that of T itself, copies and all: it is exact for a measure near that of the probe (see
    `spectra.quadrature.rules`), and the merged one is exact for none.
    """
    if quadrature.coefficients is not None:
        yield from map(rule_of, np.asarray(quadrature.coefficients, np.float64))
        return
    columns = zip(quadrature.nodes, quadrature.weights, quadrature.residuals, quadrature.lengths, strict=True)
    for nodes, weights, residuals, length in columns:
        theta, w, r = (np.asarray(x, np.float64)[:length] for x in (nodes, weights, residuals))
        yield theta, w / w.sum(), r * (-1.0) ** np.arange(len(r))


def exhausted(quadrature: Measures) -> bool:
    """Whether the run of a probe ended in an invariant space."""
    if quadrature.coefficients is None:
        return not np.any(quadrature.residuals, axis=1).all()
    return any(not r.any() for *_, r in rules(quadrature))


def alike(found: Iterable[Rule]) -> Iterator[tuple[Rule, int]]:
    """Rules without those that repeat the one before, and how often each comes: stand-ins are alike."""
    for _, group in itertools.groupby(found, lambda rule: [part.tobytes() for part in rule]):
        first, *others = group
        yield first, 1 + len(others)


def _sums(weights) -> np.ndarray:
    """Sums of the first weights, of none to all: one to the bit."""
    return np.append(0.0, np.append(np.cumsum(weights[:-1]), 1.0))


def bracket(
    quadrature: Measures, x: np.ndarray, shift: float | np.ndarray, origin: Origin | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(lower, estimate, upper) of the probes' weighted distributions at x, averaged over probes.

    Points move by `shift` first, the noise floor at least, so that rounding of a node cannot break a bound.
    A rule that ended in an invariant space is the measure itself, but for a coupling of rounding's size that
    it dropped. With an `origin`, from which the quadrature was made, the measure there is bracketed.
    """
    x = np.asarray(x, np.float64)
    total = np.zeros((3, *x.shape))
    if origin is None:
        for rule, count in alike(rules(quadrature)):
            below, above = _of_rule(quadrature, rule, x - shift, x + shift)
            middle = _sums(rule[1])[np.searchsorted(rule[0], x, side="right")]
            total += count * np.stack([below, middle, above])
        return tuple(total / quadrature.num_probes)  # pyright: ignore[reportReturnType]
    for rule, taken in origin.rules():
        total += np.stack(_of_rest(origin.whole, rule, taken, x, shift))
    return tuple(total / quadrature.num_probes)  # pyright: ignore[reportReturnType]


def _of_rest(quadrature, rule, taken, x, shift):
    """The same of one probe without the nodes taken out, which have half of the gaps beside them alone.

    In there the distribution of the rest does not grow, so that the ends of it bracket it.
    """
    theta, w, _ = rule
    apart = np.append(np.append(np.inf, np.diff(theta)), np.inf)
    half = np.minimum(apart[:-1], apart[1:])[taken] / 2
    low, high = x - shift, x + shift
    if len(theta) > 1:
        # Beyond the first and the last node nothing but what rounding moved is in doubt.
        least = np.minimum(half, np.min(shift))
        starts = theta[taken] - np.where(taken == 0, least, half)
        stops = theta[taken] + np.where(taken == len(theta) - 1, least, half)
        low, high = _outside(low, starts, stops, 0), _outside(high, starts, stops, 1)
    known, rest = _sums_of(w[taken]), np.delete(np.arange(len(theta)), taken)
    left = w[rest].sum()
    below, above = _of_rule(quadrature, rule, low, high, rest)
    below = below - known[np.searchsorted(theta[taken], low, side="right")]
    above = above - known[np.searchsorted(theta[taken], high, side="right")]
    middle = _sums(w[rest] / left)[np.searchsorted(theta[rest], x, side="right")]
    below, above = np.clip(below / left, 0, 1), np.clip(above / left, 0, 1)
    return np.minimum(below, middle), middle, np.maximum(above, middle)


def _outside(x, starts, stops, end: int):
    """Points inside of sorted, disjoint intervals moved to an end of theirs."""
    found = np.searchsorted(starts, x, side="right") - 1
    inside = (found >= 0) & (x < stops[found])
    return np.where(inside, (starts, stops)[end][found], x)


def _sums_of(weights) -> np.ndarray:
    return np.append(0.0, np.cumsum(weights))


def _of_rule(quadrature, rule, low, high, rest=None) -> tuple[np.ndarray, np.ndarray]:
    """The least mass up to `low` and the most up to `high` of one probe; of `rest`, where it is asked for.

    A change E of H turns the invariant space on one side of a gap by |E| / gap (Davis and Kahan), which
    carries 2 sqrt(F (1 - F)) times as much from one side to the other, for the mass F on that side. What is
    carried from or to the rest crosses the distance between one of its nodes and any other.
    """
    (theta, w, r), behind = rule, dropped(quadrature)
    rounding = 4 * quadrature.precision  # of the weights, whose sum is one
    sums = _sums(w)
    if r.any():
        inner = sums[1:-1]
        spread, gaps = 2 * np.sqrt(inner * np.clip(1 - inner, 0, 1)), np.diff(theta)
        slack = np.full(len(inner), rounding)
        if rest is not None:
            gaps, slack = _crossings(theta, rest), rounding * spread
        carried = np.zeros(len(theta) + 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            carried[1:-1] = quadrature.noise_floor * spread / gaps
        carried[1:-1] = np.nan_to_num(carried[1:-1], nan=1.0) + slack  # nodes that agree: nothing is known
        least, most = _limits(theta, w, r, low, high, carried, behind / 2)
        error, moved = quadrature.noise_floor / quadrature.spread, quadrature.noise_floor
        below = _turned(theta, sums, low + moved, error) - rounding
        above = 1 - _turned(-theta[::-1], 1 - sums[::-1], moved - high, error) + rounding
        left, right = np.searchsorted(theta, low, side="right"), np.searchsorted(theta, high, side="left")
        # Beyond all nodes x is itself the first or the last: nothing is to its left, or everything up to it.
        least = np.where(left == 0, 0.0, np.maximum(below, least))
        most = np.where(right == len(theta), 1.0, np.minimum(above, most))
        return np.clip(least, 0, 1), np.clip(most, 0, 1)
    left = np.searchsorted(theta, low - behind, side="right")
    right = np.searchsorted(theta, high + behind, side="right")
    turn = np.arcsin(np.minimum(quadrature.noise_floor / np.maximum(np.diff(theta), np.finfo(float).tiny), 1))
    angle = np.arcsin(np.sqrt(np.clip(sums[1:-1], 0, 1)))
    less = np.sin(np.maximum(angle - turn, 0)) ** 2 - rounding
    more = np.sin(np.minimum(angle + turn, np.pi / 2)) ** 2 + rounding
    least = np.maximum.accumulate(np.concatenate([[0.0], less, [1.0]]))
    most = np.minimum.accumulate(np.concatenate([[0.0], more, [1.0]])[::-1])[::-1]
    return np.clip(least[left], 0, 1), np.clip(most[right], 0, 1)


def _crossings(theta, rest) -> np.ndarray:
    """For each gap between nodes the least distance, across it, between a node of the rest and any other."""
    own = np.isin(np.arange(len(theta)), rest)
    below = np.maximum.accumulate(np.where(own, theta, -np.inf))[:-1]
    above = np.minimum.accumulate(np.where(own, theta, np.inf)[::-1])[::-1][1:]
    return np.minimum(theta[1:] - below, above - theta[:-1])


def _turned(theta, sums, x, error: float) -> np.ndarray:
    """The least mass up to x, from sums of whole Gauss weights.

    The rule is exact for H + E, |E| = `error`, whose mass up to a node θ is no less than the sum S of the
    weights before it. By Davis and Kahan the space of H + E up to θ is within arcsin(|E| / (x - θ)) of that
    of H up to x, and so far can the probe, which is at arccos(sqrt(S)) from the one, be from the other in
    addition. The best of some nodes below x: the farther, the less is carried, and the less is the sum.
    """
    before = np.searchsorted(theta, x, side="left")  # nodes below x
    found = np.zeros(np.shape(x))
    for back in dict.fromkeys([*range(1, 5), *(2**k for k in range(3, len(theta).bit_length()))]):
        node = before - back
        distance = np.where(node >= 0, x - theta[np.maximum(node, 0)], np.inf)
        turn = np.arcsin(np.minimum(error / distance, 1))
        angle = np.arcsin(np.sqrt(np.clip(sums[np.maximum(node, 0)], 0, 1))) - turn
        found = np.maximum(found, np.sin(np.maximum(angle, 0)) ** 2)
    return found


def _limits(theta, w, r, low, high, carried: np.ndarray, moved: float) -> tuple[np.ndarray, np.ndarray]:
    """The least mass up to `low` and the most up to `high`, by the bracket proper.

    It gives way by what rounding can have `carried` from one side of a gap to the other. And a converged
    node is an eigenvalue to within `moved` only.
    """
    sums = _sums(w)
    low, high = low - moved, high + moved
    left, right = np.searchsorted(theta, low, side="right"), np.searchsorted(theta, high, side="left")
    if low.size <= EXACT:
        least, most = _at_points(theta, w, r, low, high)
    else:
        curve = _curve(theta.tobytes(), w.tobytes(), r.tobytes()).at(low, high)
        # The Gauss rule is one of the measures: least <= its sum <= most = least + the largest mass at x.
        least = np.maximum(curve[0], sums[left] - largest_mass(theta, w, r, low))
        most = np.minimum(curve[1], sums[right] + largest_mass(theta, w, r, high))
    return least - carried[left], most + carried[right]
