"""Batches from strata of the loss: their weighted mean, their law, and that intervals from them hold."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectra
from spectra.estimators import strata
from spectra.estimators.batches import draw_batches
from spectra.estimators.law import Law

SCALES = np.array([3.0, 2.0, 1.0, 0.5])
KEY = jax.random.key(0)


def loss_fn(w, x):
    return 0.5 * jnp.mean((x @ w) ** 2)


COVARIANCE = np.outer(SCALES, SCALES) * (1 + np.eye(4) / 4)


def draw(seed, count):
    """Few examples of large loss, which have large curvature; E x xᵀ = COVARIANCE."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.standard_normal((count, 1)) / 2 - 0.25)  # E scale² = 1
    return np.float32(scale * (1 + rng.standard_normal((count, 4)) / 2) * SCALES)


def moments(x):
    x = np.asarray(x, np.float64)
    return x.T @ x / len(x)


def operator(x, **options):
    return spectra.HessianOperator(loss_fn, jnp.ones(len(SCALES)), x, **options)


def test_losses_are_those_of_single_examples():
    x = draw(0, 100)
    found = strata.losses(operator(x))
    # Sums of four products: a few roundings of the largest.
    np.testing.assert_allclose(found, 0.5 * np.float64(x).sum(1) ** 2, rtol=1e-5, atol=1e-6 * found.max())


def test_strata_are_a_partition_with_more_draws_at_large_losses():
    rng = np.random.default_rng(0)
    plan = strata.plan(120, 64, 2)
    assert plan is not None
    assert plan.strata * plan.each * plan.size <= 120
    assert 48 <= plan.strata * plan.each <= 64
    for losses in (rng.standard_exponential(1000) ** 3, np.zeros(1000), -rng.standard_exponential(1000)):
        groups = strata.split(losses, plan)
        assert sorted(np.concatenate(groups)) == list(range(1000))
        assert all(len(group) >= plan.each * plan.size for group in groups)
        for high, low in itertools.pairwise(groups):
            assert losses[high].min() >= losses[low].max()
    sizes = [len(group) for group in strata.split(rng.standard_exponential(1000) ** 3, plan)]
    assert sizes[0] < sizes[-1] / 4
    equal = [len(group) for group in strata.split(np.zeros(1000), plan)]
    assert max(equal) - min(equal) <= plan.strata  # each cut rounds up
    assert strata.plan(20, 8, 2) is None


def test_the_union_is_the_weighted_mean_and_unbiased_for_all_data():
    x = draw(1, 400)
    batches = draw_batches(operator(x), KEY, 64, 150, 2)
    chosen = np.arange(0, len(batches.weights), 2)
    matrices = [moments(op.data) for op in batches.each()]
    weights = batches.weights[chosen] / batches.weights[chosen].sum()
    wanted = np.tensordot(weights, np.array([matrices[i] for i in chosen]), 1)
    np.testing.assert_allclose(batches.union(chosen).as_matrix(), wanted, rtol=1e-5, atol=1e-5 * wanted.max())
    trace = np.mean(np.sum(np.float64(x) ** 2, 1))
    found = []
    for seed in range(40):
        batches = draw_batches(operator(x), jax.random.key(seed), 64, 150, 2)
        traces = [np.mean(np.sum(np.float64(op.data) ** 2, 1)) for op in batches.each()]
        found.append(batches.weights @ traces)
    # Student's t with 39 degrees of freedom exceeds 4 with probability 3e-4.
    assert abs(np.mean(found) - trace) < 4 * np.std(found, ddof=1) / 40**0.5
    # Draws of all alike have this error.
    alike = np.std(np.sum(np.float64(x) ** 2, 1)) * np.sqrt((1 / 144) * (1 - 144 / 400))
    assert np.std(found, ddof=1) < alike / 2


@pytest.mark.parametrize(
    "total", [pytest.param(0, marks=pytest.mark.slow), 400], ids=["data", "distribution"]
)
def test_the_variance_of_the_law_is_that_over_many_draws(total):
    """Three strata of a population of 400, itself drawn anew for a distribution: NumPy alone."""
    rng, plan = np.random.default_rng(0), strata.Plan(3, 6, 4)
    fixed, means, variances = rng.gamma(1.0, 2.0, 400), [], []
    for _ in range(2000):
        values = rng.gamma(1.0, 2.0, 400) if total else fixed
        groups = strata.split(values, plan)
        rows = np.concatenate([rng.permutation(group)[:24].reshape(6, 4) for group in groups])
        weights = np.repeat([len(group) / 400 / 6 for group in groups], 6)
        left = 1 - np.array([24 / len(group) for group in groups])
        folds, of = np.arange(18) % 2, np.repeat(np.arange(3), 6)
        law = Law(weights, folds, 0.975, of, left, np.full(18, 4), total)
        forms = values[rows].mean(1)
        errors = law.errors(forms)
        means.append(weights @ forms)
        variances.append([errors.stderr**2, law.errors(forms, by_fold=True).stderr ** 2])
        assert 1 <= errors.dof <= 400
    # The variance of 2,000 values is known to 1 / sqrt(1000), 3 %, more where they are skewed; 5 of these.
    np.testing.assert_allclose(np.mean(variances, 0) / np.var(means), 1, atol=0.16)


@pytest.mark.slow
def test_an_interval_from_a_part_of_the_data_holds_them():
    x = draw(2, 600)
    exact = np.linalg.eigvalsh(moments(x))[-1]
    wide = spectra.population(operator(x), key=KEY, num_examples=150)
    found = spectra.population(operator(x), key=KEY, num_examples=150, of="data")
    assert found.num_examples == 144
    assert found.lower[0] < exact < found.upper[0]
    assert wide.lower[0] < found.lower[0]
    assert wide.upper[0] > found.upper[0]
    assert wide.stderr[0] > found.stderr[0]


@pytest.mark.slow
@pytest.mark.parametrize("of", ["data", "distribution"])
def test_coverage_from_strata(of):
    """200 draws: of 95 %, fewer than 182 hold with probability 1e-2."""
    held = np.zeros(3)
    for seed in range(200):
        x = draw(100 + seed, 600)
        matrix = moments(x)
        if of == "distribution":
            matrix = COVARIANCE
        values, trace = np.linalg.eigvalsh(matrix)[::-1][:2], np.trace(matrix)
        found = spectra.population(
            operator(x), key=jax.random.key(seed), num_eigenvalues=2, num_examples=200, of=of
        )
        held[:2] += (found.lower <= values) & (values <= found.upper)
        held[2] += found.trace.lower <= trace <= found.trace.upper
    assert (held >= 182).all(), held
