"""The bracket of a probe's distribution holds on measures that are known, and none is narrower."""

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest

from spectra.base.errors import Status
from spectra.quadrature import brackets
from spectra.quadrature.hinges import DOUBT, _touched, hinges
from spectra.quadrature.rules import gauss_rule
from spectra.results import Quadrature


def lanczos(values, start, steps):
    """Coefficients (steps,) of a diagonal matrix, with two full reorthogonalisations a step, in float64."""
    rows, alpha, beta = [start / np.linalg.norm(start)], [], []
    for _ in range(steps):
        w = values * rows[-1]
        alpha.append(rows[-1] @ w)
        for _ in range(2):
            w = w - np.array(rows).T @ (np.array(rows) @ w)
        beta.append(np.linalg.norm(w))
        rows.append(w / beta[-1])
    return np.array(alpha), np.array(beta)


MEASURES = {
    "uniform": lambda rng: np.linspace(-1.0, 1.0, 300),
    "decaying": lambda rng: np.arange(1, 301.0) ** -1.5,
    "bulk and spikes": lambda rng: np.append(rng.standard_normal(297), [20.0, 30.0, -25.0]),
    "log-normal": lambda rng: np.exp(2 * rng.standard_normal(300)),
    "two clusters": lambda rng: np.repeat([1.0, 5.0], 150) + 1e-3 * rng.standard_normal(300),
}


def measure(name, steps, seed=0):
    """Eigenvalues, their exact masses, and the quadrature of a probe."""
    rng = np.random.default_rng(seed)
    values = np.sort(MEASURES[name](rng))
    start = rng.standard_normal(300)
    alpha, beta = lanczos(values, start, steps)
    nodes, weights, residuals = gauss_rule(alpha, beta, steps)
    quadrature = Quadrature(
        nodes=nodes[None],
        weights=weights[None],
        residuals=residuals[None],
        lengths=np.array([steps]),
        asymmetry=np.zeros(1),
        size=300,
        num_matvecs=steps,
        precision=float(np.finfo(float).eps),
        status=Status.COMPLETE,
    )
    return values, start**2 / (start @ start), quadrature


def distribution(values, masses, x):
    return np.append(0.0, np.cumsum(masses))[np.searchsorted(values, x, side="right")]


@pytest.mark.parametrize("steps", [3, 12, 40])
@pytest.mark.parametrize("name", MEASURES)
def test_the_bracket_holds_at_every_point_and_is_narrower_than_whole_weights(name, steps):
    for seed in range(5):
        values, masses, q = measure(name, steps, seed)
        floor = 64 * q.noise_floor  # the exact values of the diagonal matrix are the truth; nodes round
        inside = np.linspace(values[0] - 0.1, values[-1] + 0.1, 200)
        x = np.sort(np.concatenate([values - floor, values + floor, inside, q.nodes[0] + floor]))
        lower, middle, upper = brackets.bracket(q, x, q.noise_floor)
        truth = distribution(values, masses, x)
        assert (lower <= truth + 1e-14).all()
        assert (truth <= upper + 1e-14).all()
        assert (lower <= middle + 1e-12).all()
        assert (middle <= upper + 1e-12).all()
        sums = np.append(0.0, np.cumsum(q.weights[0]))
        left = np.searchsorted(q.nodes[0], inside, side="right")
        whole = sums[np.minimum(left + 1, steps)] - sums[np.maximum(left - 1, 0)]
        lower, _, upper = brackets.bracket(q, inside, q.noise_floor)
        assert np.mean(upper - lower) <= 0.7 * np.mean(whole)


@pytest.mark.parametrize("name", MEASURES)
def test_single_points_have_the_narrowest_bracket_and_curves_come_near(name):
    """The narrowest: the mass at x, and all left of it, belong to a measure with the same coefficients."""
    _, _, q = measure(name, 12)
    ((nodes, weights, residuals),) = brackets.rules(q)
    x = np.linspace(*q.range, 44)[1:-1]
    curve = brackets.bracket(q, x, q.noise_floor)
    narrowest = []
    for i, point in enumerate(x):
        theta, masses = brackets.gauss_radau(nodes, weights, residuals, point)
        for power in range(2 * 12 - 1):  # the measure has the moments of the rule
            scale = np.abs(theta).max() ** power
            assert abs(masses @ theta**power - weights @ nodes**power) <= 1e-10 * scale
        at = np.abs(theta - point).argmin()
        assert theta[at] == pytest.approx(point, abs=1e-10 * np.abs(theta).max())
        low, _, high = brackets.bracket(q, point, q.noise_floor)
        assert low == pytest.approx(masses[:at].sum(), abs=1e-6)
        assert high == pytest.approx(masses[: at + 1].sum(), abs=1e-6)
        assert curve[0][i] <= low + 1e-6
        assert high <= curve[2][i] + 1e-6
        narrowest.append(high - low)
    assert np.mean(curve[2] - curve[0]) <= 1.3 * np.mean(narrowest) + 1e-6


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_converged_node_is_an_eigenvalue_only_to_within_what_a_breakdown_drops(sign):
    values, masses, q = measure("bulk and spikes", 24)
    q = dataclasses.replace(q, precision=1e-6)  # that of float32, in units that are visible
    assert abs(q.residuals[0, -1]) < q.noise_floor
    nodes = q.nodes.copy()
    nodes[0, -1] = values[-1] + sign * (q.noise_floor + 0.45 * brackets.dropped(q))
    moved = dataclasses.replace(q, nodes=nodes)
    x = np.array([values[-2] + 1, values[-1] - 1e-9, values[-1]])
    lower, _, upper = brackets.bracket(moved, x, moved.noise_floor)
    truth, rounding = distribution(values, masses, x), 300 * np.finfo(float).eps  # of sums of 300 masses
    assert (lower <= truth + rounding).all()
    assert (truth <= upper + rounding).all()


def test_beyond_all_nodes_and_for_a_single_node_nothing_is_in_doubt_that_need_not_be():
    values, _, q = measure("uniform", 12)
    lower, _, upper = brackets.bracket(q, np.array([values[0] - 9, values[-1] + 9]), q.noise_floor)
    assert lower[0] == 0.0
    assert upper[1] == 1.0
    _, _, one = measure("uniform", 1)
    lower, middle, upper = brackets.bracket(one, np.linspace(-2, 2, 9), one.noise_floor)
    assert (lower <= middle).all()
    assert (middle <= upper).all()


@pytest.mark.parametrize("steps", [1, 3, 12, 40])
@pytest.mark.parametrize("name", MEASURES)
def test_means_of_hinges_hold_at_every_point_and_are_sharp(name, steps):
    values, masses, quadrature = measure(name, steps)
    rule = next(brackets.rules(quadrature))
    theta, w, _ = rule
    a, b = values[0] - 0.01, values[-1] + 0.01
    kinks = values[[60, 150, 240]] + 1e-4
    x = np.unique(np.concatenate([np.linspace(a, b, 301), kinks, np.clip(theta, a, b)]))
    found = hinges(rule, x, kinks)
    truth = np.maximum(values[:, None] - x, 0).T @ masses
    gauss = np.maximum(theta[:, None] - x, 0).T @ w
    # The hinge does not feel how rounding divides mass between neighbours; its slack is 64 eps (b - a).
    assert np.all(gauss - found.below <= truth)
    assert np.all(truth <= gauss + found.above)
    # Where a member has a node the least value is that of the member: no bracket is sharper.
    for t in kinks[np.isfinite(brackets.parameter(theta, rule[2], kinks))]:
        nodes, weights = brackets.gauss_radau(*rule, t)
        i = np.searchsorted(x, t)
        assert gauss[i] - found.below[i] <= weights @ np.maximum(nodes - t, 0)
        slack = 1e-12 * (b - a)
        assert gauss[i] - found.below[i] >= weights @ np.maximum(nodes - t, 0) - slack
        if steps == 40:
            continue
        # Along the family, as far as its nodes stay in [a, b], no member is above; the bracket is a chord
        # between the stationary points of a dozen members. Few members of few nodes stay inside.
        places = np.tan(np.linspace(-1.57, 1.57, 2001)) * (b - a) / (10 * steps) + t
        nodes, weights = brackets._members(*rule, brackets.parameter(theta, rule[2], places))
        inside = (nodes[:, 0] > a) & (nodes[:, -1] < b)
        heights = np.sum(weights * np.maximum(nodes - t, 0), axis=1)[inside]
        assert heights.max() <= gauss[i] + found.above[i]
        if steps == 12:
            spread = heights.max() - heights.min()
            assert gauss[i] + found.above[i] - heights.max() <= 0.25 * spread + slack


@pytest.mark.parametrize("width", [0.3, 1e-2, 1e-3, 1e-4])
def test_stationary_points_that_rounding_hides_are_left_out(width):
    # Five nodes in each of two clusters, whose divided differences cancel; the truth is in whole fractions.
    rng = np.random.default_rng(0)
    x = np.sort(np.concatenate([width * rng.random(5), 1 - width * rng.random(5)]))
    exact = [Fraction(value) for value in x.tolist()]
    apart = [[a - b for b in exact if b != a] for a in exact]
    c = [1 / math.prod(row) ** 2 for row in apart]
    d = [2 * sum(1 / a for a in row) for row in apart]
    found, known = _touched(x), 0
    for g, t in enumerate(found):
        right = range(g + 1, len(x))
        slope = sum(c[i] * d[i] for i in right)
        truth = float(sum(c[i] * (d[i] * exact[i] - 1) for i in right) / slope)
        if np.isfinite(t):
            assert abs(t - truth) <= DOUBT * (x[g + 1] - x[g])
            known += 1
        elif width == 0.3:  # there rounding hides nothing
            assert not x[g] + 1e-9 < truth < x[g + 1] - 1e-9
    assert known >= 1


@pytest.mark.parametrize("scale", [1e-150, 1e-20, 1.0, 1e20, 1e150])
def test_the_largest_mass_knows_no_scale_and_nodes_may_coincide(scale):
    """At a node it is that of the node; of two that rounding has made one, finite."""
    nodes, weights = np.array([-1.0, 0.5, 0.5, 2.0]), np.array([0.2, 0.3, 0.1, 0.4])
    residuals, x = np.array([1e-3, -10.0, 1e-9, 2.0]), np.array([-1.0, 0.5, 0.75, 2.0])
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        found = brackets.largest_mass(scale * nodes, weights, scale * residuals, scale * x)
    assert found[[0, 3]] == pytest.approx([0.2, 0.4], rel=1e-12)
    assert 0.3 * (1 - 1e-9) <= found[1] <= 0.4
    assert found == pytest.approx(brackets.largest_mass(nodes, weights, residuals, x), rel=1e-12)
