"""Products where they help: plans from one probe, and what comes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import binom

import spectra
from spectra.density import plans, spending
from spectra.krylov import recurrence
from spectra.quadrature import distribution

N = 200
KEY = jax.random.key(0)
DECAYING = np.arange(1.0, N + 1) ** -2
OP = spectra.MatrixOperator(jnp.diag(jnp.asarray(DECAYING, jnp.float32)))
SHIFT = 0.01
TRUTH = float(np.sum(np.log(DECAYING + SHIFT)))


@pytest.mark.slow
def test_steps_on_the_nodes_are_steps_of_the_run(x64):
    q = spectra.slq(spectra.MatrixOperator(np.diag(DECAYING)), key=KEY, num_steps=24, num_probes=1)
    short = spectra.slq(spectra.MatrixOperator(np.diag(DECAYING)), key=KEY, num_steps=9, num_probes=1)
    found = plans._shortened(q.nodes[0], q.weights[0], q.residuals[0], 9)
    for ours, theirs in zip(found, (short.nodes, short.weights, short.residuals), strict=True):
        np.testing.assert_allclose(ours, theirs[0], rtol=0, atol=1e-12)


def open_share(goal):
    """Half of the trace's interval over a goal, and of steps the width of the CDF's bracket."""

    def error(q):
        from spectra.report.spectrum import trace_estimate

        return trace_estimate(q).stderr / goal + distribution.band_width_parts(q, 0.95)[0]

    return error


def test_a_space_is_taken_out_where_outliers_are_all_there_is_to_sample(x64):
    values = np.append(np.linspace(-0.01, 0.01, N - 8), np.linspace(5.0, 12.0, 8))
    q = spectra.slq(spectra.MatrixOperator(np.diag(values)), key=KEY, num_steps=20, num_probes=1)
    plan = plans.best_plan(q, open_share(0.3), 2000)
    assert plan is not None
    # All eight are known from the first probe or resolved by all: what is left has a variance of nothing.
    assert plan.steps * plan.probes <= 100


def test_a_cluster_of_copies_is_not_taken_for_one_eigenvalue(x64):
    values = np.append(np.zeros(N // 2), np.linspace(1.0, 2.0, N - N // 2))
    q = spectra.slq(spectra.MatrixOperator(np.diag(values)), key=KEY, num_steps=20, num_probes=1)
    at = int(np.argmin(np.abs(q.nodes[0])))
    assert q.residuals[0, at] < 1e-6  # it has converged, but for its other N/2 - 1 copies
    left = plans._left(q, np.ones(20, bool))
    # n w of the zeros is χ² of N/2 degrees of freedom over n of them: 4 standard errors, √(2 / (N/2)) of it.
    assert abs(left[at] - 0.5) <= 4 * 0.5 * np.sqrt(4 / N) + 1 / N
    assert not np.isin(0.0, np.round(plans._resolved(q, 20), 6))


@pytest.mark.slow
def test_a_goal_out_of_reach_has_no_plan(x64):
    q = spectra.slq(
        spectra.MatrixOperator(np.diag(np.linspace(-1, 1, N))), key=KEY, num_steps=8, num_probes=1
    )
    assert plans.best_plan(q, open_share(1e-9), 100) is None


@pytest.mark.slow
def test_intervals_hold_and_few_products_are_spent():
    keys = jax.random.split(KEY, 24)
    found = [spectra.logdet(OP, SHIFT, key=key, tol=0.005, bounds=(0.0, None)) for key in keys]
    ends = np.array([estimate.interval() for estimate in found])
    misses = int(np.sum((ends[:, 0] > TRUTH) | (ends[:, 2] < TRUTH)))
    assert binom.sf(misses - 1, len(keys), 0.05) > 1e-3
    assert all(x.status is spectra.Status.CONVERGED for x in found)
    assert all(x.stderr + (x.upper - x.lower) / 2 <= 0.005 * abs(x.value) for x in found)
    # 4 probes of 100 steps is what the rule before this one took at least.
    assert np.mean([x.num_matvecs for x in found]) < 120


@pytest.mark.parametrize("last", [32, 48])
def test_runs_outside_of_a_space_say_what_is_known_and_what_it_cost(last, x64, monkeypatch):
    """Also where the first probe went on after the look that made the plan: 32 of its 48 steps are used."""
    values = np.append(np.linspace(0.5, 1.5, N - 8), np.linspace(50.0, 120.0, 8))
    op = spectra.MatrixOperator(np.diag(values))

    def plan(found, *_):
        steps = found.num_steps
        return plans.Plan(40, 10, 4, np.arange(steps) >= 10) if 32 <= steps <= last else None

    monkeypatch.setattr(spending, "best_plan", plan)
    q = spending.spend(op, lambda q: 0.5, key=KEY, num_steps=40, num_probes=8)
    assert q.atoms is not None
    np.testing.assert_allclose(np.sort(q.atoms)[-8:], values[-8:], rtol=1e-9)
    assert q.bulk.nodes.max() <= 1.51  # no outlier is left
    taken = len(q.atoms)
    assert taken == last - 10
    assert (q.size, q.bulk.size) == (N, N - taken)
    assert q.bulk.num_matvecs == 40
    assert q.num_matvecs == 48 + 40
    estimate = spectra.trace_of(q, np.sqrt)
    low, _, high = estimate.interval()
    assert low <= np.sqrt(values).sum() <= high
    # The spread of sqrt over the rest, n σ √(2 / n / 4) with σ = 0.15, twice over for the bracket.
    assert high - low <= 2 * 4 * 0.15 * np.sqrt(2 * N / 4)


def test_a_share_is_as_narrow_as_asked(x64):
    op, tol = spectra.MatrixOperator(np.diag(np.linspace(0.0, 1.0, N))), 0.05
    for threshold, truth in ((-0.05, N), (0.45, 110)):
        found = spectra.count_above(op, threshold, key=KEY, tol=tol, num_probes=64)
        low, _, high = found.interval()
        assert low <= truth <= high
        assert high - low <= 2 * tol * N
        assert found.status is spectra.Status.CONVERGED
    # None is below zero: moments of a few steps of one probe leave no more, and it is not asked for the rest.
    none = spectra.count_above(op, -0.05, key=KEY, tol=tol, num_probes=64)
    assert none.num_matvecs < recurrence.CHUNK
    fewer = spectra.count_above(op, -0.05, key=KEY, num_steps=none.num_matvecs - 2, num_probes=1).interval()
    assert fewer[2] - fewer[0] > 2 * tol * N
    short = spectra.count_above(op, 0.45, key=KEY, tol=0.001, num_steps=8, num_probes=4)
    assert short.status is spectra.Status.BUDGET_EXHAUSTED
    assert short.num_matvecs <= 32
    share = spectra.negative_share(op, key=KEY, tol=tol, num_probes=64)
    assert share.status is spectra.Status.CONVERGED
    assert share.interval()[0] == 0.0


def test_a_tolerance_of_a_share_is_one():
    for tol in (0.0, 1.0, -0.1):
        with pytest.raises(spectra.SpectraError, match="share of all eigenvalues"):
            spectra.count_above(OP, 0.5, key=KEY, tol=tol)
