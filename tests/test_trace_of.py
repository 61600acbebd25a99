"""Functions of an operator: brackets that hold for certain, errors that hold at their rate."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import SHARP, diagonal, planted, runs_of, slow_but
from scipy.special import stdtrit

import spectra
from spectra.estimators import bracket
from spectra.estimators.bracket import _is_finite
from spectra.quadrature import hinges
from spectra.quadrature.changes import estimated_error
from spectra.report.spectrum import trace_estimate

KEY = jax.random.key(0)
N, STEPS = 120, 30  # the same wherever neither matters: the compiled code is shared
LOW, HIGH = 0.02, 2.0
EIGENVALUES = np.linspace(LOW, HIGH, N)
FUNCTIONS = {
    "log": np.log,
    "inverse": lambda x: 1 / x,
    "square root": np.sqrt,
    "power 1.5": lambda x: x**1.5,
    "power -0.5": lambda x: x**-0.5,
    "exp": np.exp,
    "effective dimension": lambda x: x / (x + 0.1),
}


@pytest.fixture(scope="module")
def quadratures():
    with jax.enable_x64(True):
        op = diagonal(EIGENVALUES)
        return {m: spectra.slq(op, key=KEY, num_steps=m, num_probes=3) for m in (1, 2, 5, 12, 30)}


@pytest.mark.parametrize("num_steps", [1, 2, 5, 12, 30])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_bracket_holds_for_the_probes_drawn(name, num_steps, quadratures, x64):
    f = FUNCTIONS[name]
    truth = 0.0
    for i in range(3):
        v = np.asarray(jax.random.normal(jax.random.fold_in(jax.random.fold_in(KEY, i), 0), (N,)))
        truth += N / 3 * np.sum(f(EIGENVALUES) * v**2) / np.sum(v**2)
    got = spectra.trace_of(quadratures[num_steps], f, bounds=(LOW, HIGH), one_signed=True)
    rounding = 100 * N * np.finfo(float).eps * np.abs(f(EIGENVALUES)).max()
    assert got.lower - rounding <= truth <= got.upper + rounding
    assert got.lower <= got.value <= got.upper
    assert "given bounds" in got.reason
    if num_steps == 30:
        # Gauss converges like ((sqrt(κ) - 1) / (sqrt(κ) + 1))^2m = 0.82^60 = 6e-6 for κ = 100.
        assert got.upper - got.lower <= 1e-3 * abs(truth)


OTHERS = {
    "absolute value": lambda x: np.abs(x - 0.7),
    "Huber": lambda x: np.where(np.abs(x - 0.7) < 0.1, (x - 0.7) ** 2 / 2, 0.1 * np.abs(x - 0.7) - 0.005),
    "ramp": lambda x: np.maximum(x - 1.0, 0),
    "steep softplus": lambda x: np.logaddexp(0, 100 * (x - 0.7)),
    "step": lambda x: np.where(x > 1.3, 1.0, 0.0),
    "peak": lambda x: 1 / ((x - 0.7) ** 2 + 1e-4),
    "oscillation": lambda x: np.sin(9 * x),
}


@pytest.mark.parametrize("num_steps", [2, 5, 12, 30])
@pytest.mark.parametrize("name", OTHERS)
def test_the_bracket_of_any_function_holds_for_the_probes_drawn(name, num_steps, quadratures, x64):
    f = OTHERS[name]
    for i, q in enumerate(runs_of(1, quadratures[num_steps])):
        v = np.asarray(jax.random.normal(jax.random.fold_in(jax.random.fold_in(KEY, i), 0), (N,)))
        truth = N * np.sum(f(EIGENVALUES) * v**2) / np.sum(v**2)
        got = spectra.trace_of(q, f, bounds=(LOW, HIGH))
        rounding = 100 * N * np.finfo(float).eps * np.abs(f(EIGENVALUES)).max()
        assert got.lower - rounding <= truth <= got.upper + rounding
        assert "from the variation" in got.reason
        # Kinks and peaks are at 0.7; of sin(9 x) a grid of steps h misses 81 h² / 8.
        values = N * f(np.append(np.linspace(LOW, HIGH, 100_001), 0.7))
        slack = N * 81 / 8 * ((HIGH - LOW) / 100_000) ** 2
        lower, _, upper = got.interval()
        assert values.min() - slack <= lower <= upper <= values.max() + slack, "the range of f"
        if (name, num_steps) == ("absolute value", 30):
            # The Chebyshev series up to degree d of f with a jump of V in its derivative, on an interval of
            # half length 0.99, is 2 · 0.99 V / (π (d - 1)) off at most (Trefethen, ATAP, theorem 7.2).
            assert upper - lower > got.upper - got.lower > 0
            assert got.upper - got.lower <= 2 * N * 2 * 0.99 * 2 / (np.pi * 58)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("side", [-1, 1])
def test_a_step_counts_where_mass_can_lie(side, sign):
    """The rule with one node, at 0, and the residual 1 stands for all measures of mean 0 and variance 1.

    Such a measure has up to 1 / (1 + t²) of its mass beyond t (Cantelli), and may have none there.
    """

    def step(x):
        return sign * np.where(side * x > 0.5, 1.0, 0.0)

    rule = np.array([0.0]), np.array([1.0]), np.array([1.0])
    extra = hinges.kinks(step, -2.0, 2.0, rule[0])
    low, high = bracket._of_any(step, rule, -2.0, 2.0, extra)
    most = max(low * sign, high * sign)
    assert 0 in (low, high)
    # The step is found to 1e-11 of the interval, where the bracket has the slope 2 t / (1 + t²)² < 1.
    assert 0.8 - 1e-9 <= most <= 0.8 + 1e-9


@pytest.mark.parametrize("t", [-2.5, -0.4, 0.0, 0.7, 3.0])
def test_a_hinge_has_the_sharp_bracket_of_mean_and_variance(t):
    """max(-t, 0) <= E max(x - t, 0) <= (sqrt(1 + t²) - t) / 2 for mean 0 and variance 1 (Scarf, 1958)."""
    rule = np.array([0.0]), np.array([1.0]), np.array([1.0])

    def hinge(x):
        return np.maximum(x - t, 0)

    low, high = bracket._of_any(hinge, rule, -20.0, 20.0, hinges.kinks(hinge, -20.0, 20.0, rule[0]))
    least, most = max(-t, 0), (np.sqrt(1 + t * t) - t) / 2
    # The kink is found to 1e-11 of the interval, in which f has the slope one; the upper bound is a chord
    # between the points where members of the family are stationary.
    assert least - 4e-10 <= low <= least + 4e-10
    assert most - 4e-10 <= high <= 1.25 * most


def test_no_interval_leaves_what_is_possible(quadratures, x64):
    spiked = np.append(1 + 0.01 * np.random.default_rng(0).standard_normal(N - 1), 100.0)
    op = diagonal(spiked)
    for q in runs_of(1, spectra.slq(op, key=KEY, num_steps=12, num_probes=3)):
        lower, _, upper = spectra.trace_of(q, np.square).interval()
        # One probe, three numbers: the error is as large as the value, and squares are not below zero.
        assert 0 <= lower <= np.sum(spiked**2) <= upper <= N * 101.0**2
        for threshold in (0.5, 1.0, 50.0, 99.99):
            found = spectra.count_above(q, threshold)
            lower, _, upper = found.interval()
            assert 0 <= lower <= found.lower <= found.value <= found.upper <= upper <= N
            assert lower <= np.sum(spiked > threshold) <= upper


RATES = ["log", "inverse", "effective dimension", "rank one", "rank deficient log"]


@pytest.mark.slow
@pytest.mark.parametrize("name", RATES)
def test_intervals_hold_at_their_rate(name, x64):
    entries, f = {
        "log": (EIGENVALUES, np.log),
        "inverse": (EIGENVALUES, FUNCTIONS["inverse"]),
        "effective dimension": (0.9 ** np.arange(N), lambda x: x / (x + 1e-3)),
        "rank one": (np.append(3.0, np.zeros(N - 1)), lambda x: x),
        "rank deficient log": (np.append(np.arange(1.0, 6.0), np.zeros(N - 5)), lambda x: np.log(x + 0.1)),
    }[name]
    quadrature, held, stderr = spectra.slq(diagonal(entries), key=KEY, num_steps=STEPS, num_probes=800), 0, []
    for part in runs_of(4, quadrature):
        got = spectra.trace_of(part, f)
        lower, _, upper = got.interval()
        held += lower <= f(entries).sum() <= upper
        stderr.append(got.stderr)
    assert held >= 0.92 * 200
    # Of n values f_i a probe that is uniform on the sphere gives their sum with variance
    # 2 n (Σ f_i² - (Σ f_i)² / n) / (n + 2). The square of the error stated, over 200 runs of four probes, is
    # that on average, to sqrt(2 / 600) = 6 % and twice that where one value dominates.
    ideal = np.sqrt(2 * N / (N + 2) * N * np.var(f(entries)) / 4)
    assert 0.85 <= np.sqrt(np.mean(np.square(stderr))) / ideal <= 1.15


@pytest.mark.parametrize("num_steps", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_few_steps_know_less_of_the_spread_than_of_the_value(num_steps, x64):
    """One step integrates x exactly and shows nothing of its spread; nor do two of that of x²."""
    power = [lambda x: x, np.square][num_steps - 1]
    for entries, f in (
        (np.linspace(-2, 2, N) ** 3, power),
        (np.append(np.full(N - 1, 0.01), 5.0), power),
        # The domain of this f ends close below an eigenvalue that two steps cannot exclude.
        (np.repeat([0.0, 1.0, 10.0], [N - 13, 12, 1]), lambda x: np.log(x + 0.01)),
    ):
        held = 0
        many = spectra.slq(diagonal(entries), key=KEY, num_steps=num_steps, num_probes=800, probe_batch=100)
        for part in runs_of(8, many):
            lower, _, upper = spectra.trace_of(part, f).interval()
            held += lower <= f(entries).sum() <= upper
        assert held >= 0.885 * 100  # at a rate of 95 % less by three standard errors of 2.2 %


@pytest.mark.parametrize("f", [np.abs, np.exp])
def test_a_single_product_is_one_degree_of_freedom(f, x64):
    """Two moments of one probe exclude no eigenvalue further out, and tell nothing of fourth powers."""
    entries, runs = np.append(np.full(7, 0.01), 1.0), 200
    many = spectra.slq(diagonal(entries), key=KEY, num_steps=1, num_probes=runs)
    for estimate in (lambda part: spectra.trace_of(part, f), trace_estimate):
        truth = f(entries).sum() if estimate is not trace_estimate else entries.sum()
        ends = np.array([estimate(part).interval() for part in runs_of(1, many)])
        assert np.mean((ends[:, 0] <= truth) & (truth <= ends[:, 2])) >= 0.92


@SHARP
def test_the_log_determinant_of_half_the_identity_is_exact(dtype):
    got = spectra.logdet(diagonal(np.full(N, 0.5), dtype), key=KEY, num_steps=STEPS)
    assert got.value == pytest.approx(N * np.log(0.5), rel=4 * float(jnp.finfo(dtype).eps))
    # A node may be off by the noise floor, 4 eps |H|, which moves the logarithm by 4 eps.
    assert got.stderr <= 4.001 * N * float(jnp.finfo(dtype).eps)
    assert got.upper - got.lower <= got.stderr


DEFICIENT = np.append(np.arange(1.0, 6.0), np.zeros(95))


@pytest.mark.slow
def test_the_exponential_of_a_rank_deficient_matrix():
    exponents = DEFICIENT / 2
    op = spectra.MatrixOperator(planted(exponents))
    got = spectra.trace_of(op, np.exp, key=KEY, num_probes=16, num_steps=STEPS)
    lower, _, upper = got.interval(0.999)
    assert lower <= np.exp(exponents).sum() <= upper
    assert got.stderr <= 0.1 * got.value


def test_rank_deficient_operators_need_a_shift_and_get_advice():
    op = spectra.MatrixOperator(planted(DEFICIENT))
    options = {"key": KEY, "num_steps": STEPS}
    got = spectra.logdet(op, 1e-2, **options)
    lower, _, upper = got.interval(0.999)
    assert lower <= np.log(DEFICIENT + 1e-2).sum() <= upper
    with pytest.raises(spectra.SpectraError, match=r"op.shift\(delta\)"):
        spectra.logdet(op, **options)
    with pytest.raises(spectra.SpectraError, match="not finite"):
        spectra.effective_dimension(spectra.MatrixOperator(-np.eye(100)), 0.5, **options)
    dimension = spectra.effective_dimension(op, 1e-2, bounds=(0, None), **options)
    lower, _, upper = dimension.interval(0.999)
    assert lower <= np.sum(DEFICIENT / (DEFICIENT + 1e-2)) <= upper


def test_eigenvalues_at_a_pole_to_rounding_have_no_estimate():
    """1/x of zeros is finite at their Ritz values, which rounding has moved: the sum was -4.8e9 ± 4.9e9."""
    found = spectra.slq(diagonal(DEFICIENT), key=KEY, num_steps=20, num_probes=2)
    for f in (lambda x: 1 / x, lambda x: np.log(np.abs(x)), lambda x: np.abs(x) ** -0.3):
        with pytest.raises(spectra.SpectraError, match="f has a pole closer to the Ritz value"):
            spectra.trace_of(found, f)
    for f in (
        lambda x: np.sqrt(np.abs(x)),
        lambda x: 1 - np.abs(x) ** 0.5,
        lambda x: np.log(np.abs(x) + 1e-3),
    ):
        assert np.isfinite(spectra.trace_of(found, f).stderr)


def test_the_domain_may_end_at_a_zero_that_rounding_made_negative(quadratures, x64):
    """The rule with another node there has it at infinity. A damped matrix of low rank had no interval."""
    q = quadratures[12]
    moved = dataclasses.replace(q, nodes=q.nodes - np.min(q.nodes) - q.noise_floor / 2)
    for f in (spectra.logdet, spectra.effective_dimension):
        got = f(moved, 2 * q.noise_floor)
        assert got.reason.endswith("no Ritz value is negative; likely, not certain")
        low, value, high = got.interval()
        assert low < got.lower <= value <= got.upper < high


@pytest.mark.slow
def test_one_step_says_nothing_of_the_signs_of_eigenvalues():
    """Its node is their mean: positive here, where two in five are negative, as f is at them."""
    eigenvalues = np.concatenate([np.linspace(-1, -0.1, 20), np.linspace(0.1, 3, 30)])
    op, exact = spectra.DiagonalOperator(jnp.asarray(eigenvalues)), np.sum(eigenvalues / (eigenvalues + 2))
    for seed in range(30):
        q = spectra.slq(op, key=jax.random.key(seed), num_steps=1, num_probes=8)
        lower, _, upper = spectra.effective_dimension(q, 2.0).interval()
        assert lower <= exact <= upper


def test_bounds_are_checked_and_poles_are_noticed(quadratures, x64):
    q = quadratures[5]
    with pytest.raises(spectra.SpectraError, match="do not contain the spectrum"):
        spectra.trace_of(q, np.log, bounds=(0.5, None))
    estimated = spectra.trace_of(q, np.exp)
    assert "hold with 99 %" in estimated.reason
    assert "Gauss and Radau" in estimated.reason
    nowhere = spectra.trace_of(q, lambda x: np.where(x > q.range[1], np.nan, x))
    assert (nowhere.lower, nowhere.upper) == (None, None)
    assert nowhere.reason.startswith("no bracket: f has a pole between the smallest Ritz value and")
    nodes = np.sort(np.ravel(q.nodes))
    widest = int(np.argmax(np.diff(nodes)))
    low, high = nodes[widest : widest + 2]
    between = spectra.trace_of(q, lambda x: np.where((x > low) & (x < high), np.nan, x))
    assert between.reason == "no bracket: f is not finite between the Ritz values"
    # What five steps leave reaches across the pole at zero. The inverse known by name is that of a positive
    # definite matrix; of a function that is finite on both sides eigenvalues may be on either.
    got = spectra.trace_of(q, np.reciprocal)
    assert np.isfinite([got.lower, got.upper]).all()
    assert "not certain" in got.reason
    assert spectra.trace_of(q, lambda x: 1 / x).reason.startswith("no bracket: f has a pole near ")
    with pytest.raises(spectra.SpectraError, match="key=None"):
        spectra.trace_of(diagonal(EIGENVALUES), np.log)
    with pytest.raises(spectra.SpectraError, match="tol="):
        spectra.trace_of(q, np.log, tol=-1)


def share_held(values, f, num_steps, keys=20):
    """Of the intervals of tr f by that many steps of eight probes, and the estimates."""
    many, truth = (
        spectra.slq(diagonal(values), key=KEY, num_steps=num_steps, num_probes=8 * keys),
        np.sum(f(values)),
    )
    found = [spectra.trace_of(quadrature, f) for quadrature in runs_of(8, many)]
    return np.mean([e.interval()[0] <= truth <= e.interval()[2] for e in found]), found


def inverse_distance(x):
    return 1 / np.abs(x - 0.0013)


def test_where_nothing_bounds_the_quadrature_its_last_changes_are_in_the_interval(x64):
    """Of 1/|x - p| with p among the eigenvalues, intervals held for 5 % of keys after ten steps."""
    values = np.linspace(-1, 1, N)
    held, found = share_held(values, inverse_distance, num_steps=10)
    assert held >= 0.93
    assert {estimate.lower for estimate in found} == {None}
    # With the pole outside, and many steps, nothing is left of it.
    many, few, more = (spectra.slq(diagonal(values), key=KEY, num_steps=m, num_probes=8) for m in (10, 6, 24))
    exact = dataclasses.replace(many, residuals=np.zeros_like(many.residuals))
    assert estimated_error(exact, inverse_distance) == 0.0
    errors = [estimated_error(q, lambda x: 1 / (x - 1.5)) for q in (few, more)]
    assert errors[1] < 1e-6 * errors[0] < 1e-5
    one = spectra.slq(diagonal(values), key=KEY, num_steps=1, num_probes=2)
    assert estimated_error(one, np.exp) == np.inf


def test_slow_convergence_from_one_side_is_many_times_the_last_change(x64):
    """With a pole just beyond the spectrum 8 of 20 intervals held by the last change alone."""
    values = np.linspace(-1, 1, N) + 0.003

    def inverse(x):
        return 1 / (x - values[0] + 1e-3)

    held, found = share_held(values, inverse, num_steps=10)
    assert held >= 0.85
    truth, wide = np.sum(inverse(values)), [e.interval()[2] - e.value for e in found]
    assert np.median(wide) < 8 * np.median([abs(e.value - truth) for e in found])


@pytest.mark.parametrize("num_steps", slow_but([3, 10], 3))
@pytest.mark.parametrize("f", [np.log, np.reciprocal, lambda x: x**-0.25], ids=["log", "inverse", "power"])
def test_a_function_that_ends_at_zero_is_bounded_down_to_zero(f, num_steps, x64):
    """Half of the smallest Ritz value stood for the smallest eigenvalue: after 3 steps no interval held."""
    held, found = share_held(np.geomspace(1e-3, 1, N), f, num_steps)
    assert held == 1.0
    assert all("likely, not certain" in e.reason and np.isfinite([e.lower, e.upper]).all() for e in found)


def test_a_quadrature_is_no_other_run_than_it_was(quadratures, x64):
    q, same = quadratures[5], spectra.trace_of(quadratures[5], np.log)
    for asked in ({"num_steps": 9}, {"num_probes": 4}, {"probe_batch": 2}):
        with pytest.raises(spectra.SpectraError, match="has no effect on a quadrature, which is a run of 5"):
            spectra.trace_of(q, np.log, **asked)
    with pytest.raises(spectra.SpectraError, match="num_steps=9 has no effect"):
        spectra.count_above(q, 1.0, num_steps=9)
    assert spectra.trace_of(q, np.log, num_steps=5, num_probes=3, key=KEY).value == same.value


@pytest.mark.slow
def test_a_tolerance_adds_probes_or_says_that_the_budget_ended(x64):
    op = diagonal(EIGENVALUES)
    loose = spectra.trace_of(op, np.sqrt, key=KEY, num_steps=STEPS, num_probes=200, tol=0.02)
    assert loose.status is spectra.Status.CONVERGED
    assert loose.num_matvecs < 200 * STEPS
    assert abs(loose.value - np.sqrt(EIGENVALUES).sum()) <= 5 * loose.stderr
    tight = spectra.trace_of(op, np.sqrt, key=KEY, num_steps=STEPS, num_probes=3, tol=1e-5)
    assert tight.status is spectra.Status.BUDGET_EXHAUSTED
    # The first probe may go on for longer, of which at most half of the budget is.
    assert 2 * STEPS <= tight.num_matvecs <= 3 * STEPS
    # With n products left all eigenvalues are known.
    exact = spectra.trace_of(op, np.sqrt, key=KEY, num_steps=STEPS, num_probes=8, tol=1e-5)
    assert exact.status is spectra.Status.CONVERGED
    assert exact.value == pytest.approx(np.sqrt(EIGENVALUES).sum(), rel=1e-12)
    assert exact.num_matvecs == 32 + N  # the first probe is looked at every 16 steps
    # Two steps leave a bracket that no number of probes can narrow: it ends at the first look.
    coarse = spectra.trace_of(op, np.log, key=KEY, num_steps=2, num_probes=50, tol=0.01, bounds=(LOW, HIGH))
    assert coarse.status is spectra.Status.BUDGET_EXHAUSTED
    assert coarse.num_matvecs == 8


WIDE = np.linspace(-1.0, 3.0, 400)


def test_a_tolerance_that_is_reached_does_not_hide_noise(quadratures, x64):
    noisy = dataclasses.replace(quadratures[12], status=spectra.Status.NOISY)
    assert spectra.trace_of(noisy, np.exp, tol=0.9).status is spectra.Status.NOISY
    assert spectra.trace_of(noisy, np.exp, tol=1e-9).status is spectra.Status.BUDGET_EXHAUSTED


@pytest.fixture(scope="module")
def wide():
    with jax.enable_x64(True):
        return spectra.slq(diagonal(WIDE), key=KEY, num_steps=60, num_probes=4 * 60)


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [-0.5, 0.0, 2.0, 2.9, 2.985])
def test_counts_hold_at_their_rate(threshold, wide):
    truth, held, widths = np.sum(threshold < WIDE), 0, []
    for q in runs_of(4, wide):  # 60 runs
        got = spectra.count_above(q, threshold)
        lower, _, upper = got.interval()
        held += lower <= truth <= upper
        widths.append(upper - lower)
        assert got.lower <= got.value <= got.upper
    # 92 % of 60 runs, less two standard deviations of the count.
    assert held >= 51
    assert got.num_matvecs == 240
    # A share F seen by four probes spreads by sqrt(2 F (1 - F) / 4n), and 2 · 1.96 of that is the interval of
    # an exact rule; the bracket adds two nodes of 60 at most, of weight π / 120 each where they are
    # sparsest. Both ends move to the next whole number, by half of one on average.
    share = truth / 400
    ideal = 400 * 2 * 1.96 * np.sqrt(2 * share * (1 - share) / 1600)
    assert ideal - 1 <= np.mean(widths) <= 1.3 * ideal + 400 * 2 * np.pi / 120


def test_more_probes_are_more_runs(wide):
    """What the rates rest on: probes depend on the key and their number alone."""
    with jax.enable_x64(True):
        few = spectra.slq(diagonal(WIDE), key=KEY, num_steps=60, num_probes=4)
    np.testing.assert_array_equal(next(runs_of(4, wide)).nodes, few.nodes)


def test_share_of_negative_curvature(x64):
    lower, _, upper = spectra.negative_share(diagonal(WIDE), key=KEY, num_steps=60).interval()
    assert lower <= 0.25 <= upper
    assert upper - lower < 0.1
    positive = spectra.negative_share(diagonal(np.append(1.0, np.zeros(399))), key=KEY, num_steps=60)
    assert positive.value == 0.0


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_estimates_are_equivariant_under_scaling(scale, x64):
    one, other = (diagonal(c * EIGENVALUES) for c in (1.0, scale))
    options = {"key": KEY, "num_steps": 12, "num_probes": 2}
    a = spectra.logdet(one, **options)
    b = spectra.trace_of(other, lambda x: np.log(x / scale), **options)
    assert b.value == pytest.approx(a.value, rel=1e-9)
    assert b.stderr == pytest.approx(a.stderr, rel=1e-6)
    counts = [spectra.count_above(op, c, **options) for op, c in ((one, 1.0), (other, scale))]
    assert counts[1].value == pytest.approx(counts[0].value, rel=1e-6)


@pytest.mark.slow
def test_intervals_from_inside_jit_hold_at_their_rate(x64):
    """One eigenvalue dominates: the spread of eight samples would say too little, see `error_of_powers`."""
    entries = np.append(np.linspace(0.0, 0.02, N - 1), 3.0)
    op = diagonal(entries)
    found = jax.jit(jax.vmap(lambda key: spectra.trace_of(op, jnp.exp, key=key, num_steps=5, num_probes=8)))(
        jax.random.split(KEY, 400)
    )
    half = stdtrit(found.dof, 0.975) * np.asarray(found.stderr)
    held = np.abs(np.asarray(found.value) - np.exp(entries).sum()) <= half
    assert np.mean(held) >= 0.93  # 95 % less by two standard errors of 1.1 %


@pytest.mark.slow
def test_inside_jit_nodes_below_a_known_bound_are_at_it():
    """A product with a singular matrix leaves nodes of -1e-8, of which there is no root."""
    entries = np.append(np.zeros(30), np.linspace(0.1, 1.0, 20))
    op = diagonal(entries)
    options = {"key": KEY, "num_steps": 50, "num_probes": 2}
    found, q = jax.jit(
        lambda op: (
            spectra.trace_of(op, jnp.sqrt, bounds=(0, None), **options).value,
            spectra.slq(op, **options),
        )
    )(op)
    assert np.min(q.nodes) < 0
    roots = np.sqrt(np.maximum(np.asarray(q.nodes, np.float64), 0))
    assert float(found) == pytest.approx(
        50 * float(np.mean(np.sum(np.asarray(q.weights) * roots, axis=1))), rel=1e-5
    )
    with pytest.raises(spectra.SpectraError, match="probe_batch=9"):
        jax.jit(lambda op: spectra.trace_of(op, jnp.exp, **options, probe_batch=9).value)(op)


def test_inside_jit_what_needs_values_is_refused_with_a_reason():
    op = diagonal(EIGENVALUES)
    with pytest.raises(spectra.SpectraError, match="outside jit"):
        jax.jit(lambda key: spectra.trace_of(op, jnp.log, key=key, tol=0.1).value)(KEY)
    with pytest.raises(spectra.SpectraError, match="outside jit"):
        jax.jit(lambda key: spectra.count_above(op, 1.0, key=key).value)(KEY)


def test_a_count_lies_between_its_limits(x64):
    """To the last bit: without a limit on the sums' rounding one of 30 did not."""
    op = diagonal(np.append(1 + 0.01 * np.random.default_rng(0).standard_normal(N - 1), 100.0))
    for seed in range(10):
        for q in runs_of(1, spectra.slq(op, key=jax.random.key(seed), num_steps=12, num_probes=3)):
            for threshold in (50.0, 99.99):
                found = spectra.count_above(q, threshold)
                assert found.lower <= found.value <= found.upper


@pytest.mark.parametrize("rank", [20, 32])
def test_what_is_left_beside_resolved_eigenvalues_has_a_spread(rank):
    """The spread of what is left is a difference that cancels: it came out negative, and its root NaN.

    n steps leave rounding alone: a noise floor of 4 eps on each resolved eigenvalue, some 2e-5 of the sum.
    """
    values = np.append(np.zeros(rank), np.linspace(0.1, 1.0, rank))
    op = spectra.MatrixOperator(jnp.asarray(planted(values), jnp.float32))
    for seed in range(10):
        q = spectra.slq(op, key=jax.random.key(seed), num_steps=2 * rank, num_probes=4)
        low, _, high = spectra.trace_of(q, lambda x: x**2).interval()
        truth = np.sum(values**2)
        assert low <= truth <= high <= 1.001 * truth


def test_no_limit_of_a_trace_is_above_what_a_cusp_at_zero_allows():
    """The least sample was f(1e-12), and 29 zeros with that excluded the trace, for 7 of 60 keys of √|x|."""
    side = np.random.default_rng(30).integers(-3, 4, 30)
    op, truth = (
        spectra.MatrixOperator(jnp.asarray(np.outer(side, side), jnp.float32)),
        float(side @ side) ** 0.1,
    )
    for seed in range(12):
        found = spectra.trace_of(op, lambda x: np.abs(x) ** 0.1, key=jax.random.key(seed), num_steps=30)
        assert found.least <= truth <= found.most
        low, _, high = found.interval()
        assert low <= truth <= high


FAR = np.concatenate([[-0.5], np.zeros(50), np.full(47, 1e-3), [5.0, 50.0]])
PAIRS = np.repeat([-0.2, 0.8], [40, 60])
ENDS = np.geomspace(1e-6, 1, 5)


@pytest.mark.parametrize(
    ("values", "f", "num_steps"),
    [
        (FAR, lambda x: np.sqrt(np.abs(x)), 3),
        (PAIRS, lambda x: (x > -0.2) * 1.0, 1),
        (ENDS, lambda x: np.abs(x - 10**-4.5), 1),
    ],
    ids=["cusp between samples", "step at the end", "kink beside the end"],
)
def test_a_bracket_holds_where_samples_of_a_polynomial_miss_a_kink(values, f, num_steps, x64):
    """A cusp at zero lay between two samples that agree: 33 of 40 brackets missed, by up to three times."""
    op = diagonal(values)
    for seed in range(8):
        options = {"key": jax.random.key(seed), "num_probes": 1}
        ends = (values.min(), values.max())
        found = spectra.trace_of(op, f, num_steps=num_steps, bounds=ends, **options)
        whole = spectra.slq(op, num_steps=len(np.unique(values)), **options)  # the measure of this probe
        weights = np.asarray(whole.weights[0]) / np.sum(whole.weights[0])
        nearest = np.abs(np.asarray(whole.nodes[0])[:, None] - np.unique(values)).argmin(axis=1)
        exact = len(values) * np.sum(weights * f(np.unique(values)[nearest]))
        rounding = 1e-12 * len(values) * np.abs(f(values)).max()  # of weights, to some hundred eps
        assert found.lower - rounding <= exact <= found.upper + rounding


def test_a_pole_is_noticed_wherever_samples_lie():
    """Where one of them happened to be close to it, values grew no more: 3 % of poles went unnoticed."""
    rng, finite = np.random.default_rng(0), []
    for pole, low, high, node in rng.uniform([-0.9, -1.2, 1.0, -0.9], [0.9, -1.0, 1.2, 1.0], (300, 4)):
        finite.append(_is_finite(lambda x, at=pole: 1 / (x - at), low, high, node))
    assert not any(finite)
    for harmless in (np.exp, np.abs, lambda x: x > 0.3, lambda x: 1 / (1 + (x / 1e-3) ** 2)):
        assert _is_finite(harmless, -1.0, 1.0, 0.95)


def test_a_sum_of_both_signs_does_not_end_a_run_by_luck(monkeypatch):
    """All products are spent where f has both signs, and a tolerance that they meet is met."""
    monkeypatch.setattr("spectra.estimators.functions.LOOSEST", 0.01)
    op = diagonal(np.linspace(0.5, 3.0, 120))
    spent = []
    for f in (np.log, np.sqrt):
        found = spectra.trace_of(op, f, key=KEY, num_steps=8, num_probes=10, tol=0.9, bounds=(0.4, 3.1))
        assert found.status is spectra.Status.CONVERGED
        spent.append(found.num_matvecs)
    assert spent[0] > 60  # of 80
    assert spent[1] < 30
