"""Intervals for a distribution from a sample, against distributions that are known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import spectra
from spectra.estimators.batches import _count
from spectra.estimators.law import one_at_risk
from spectra.estimators.population import _for_half

SCALES = np.array([3.0, 2.5, 1.0, 0.7, 0.5, 0.3])
EIGENVALUES = SCALES**2  # of E x xᵀ


def loss_fn(w, x):
    return 0.5 * jnp.mean((x @ w) ** 2)


def draw(seed, count, law="normal"):
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((count, len(SCALES)))
    if law == "skewed":  # few examples carry much: E scale² = 1, kurtosis of x about 3 e
        z *= np.exp(rng.standard_normal((count, 1)) / 2 - 0.25)
    return np.float32(z * SCALES)


def operator(x, **options):
    return spectra.HessianOperator(loss_fn, jnp.ones(len(SCALES)), x, **options)


@pytest.mark.slow
def test_the_sample_end_is_that_of_all_examples_and_the_other_of_vectors_held_out():
    x = draw(0, 160)
    found = spectra.population(
        operator(x), key=jax.random.key(0), num_eigenvalues=2, num_batches=16, tol=1e-4
    )
    exact = np.linalg.eigvalsh(np.float64(x).T @ x / 160)[::-1]
    # n + 1 < 20 products: eigsh has the dense matrix; float32 products.
    np.testing.assert_allclose(found.in_sample, exact[:2], rtol=1e-5)
    assert found.num_examples == 160
    assert found.num_batches == 16
    assert (found.held_out <= found.in_sample).all()
    assert (found.lower < found.held_out).all()
    assert (found.upper > found.in_sample).all()
    assert "for half the width" in repr(found)


def test_held_out_curvature_against_numpy():
    x = draw(1, 96)
    batches = [x[i : i + 8] for i in range(0, 96, 8)]
    found = spectra.population(operator(batches), key=jax.random.key(0), num_eigenvalues=2)
    folds = np.arange(12) % 2
    moments = np.array([np.float64(b).T @ b / 8 for b in batches])
    held, errors = np.zeros(2), np.zeros(12)
    for fold in (0, 1):
        vectors = np.linalg.eigh(moments[folds != fold].mean(0))[1][:, ::-1]
        for j in (1, 2):
            v = vectors[:, :j]
            small = v.T @ moments[folds == fold].mean(0) @ v
            held[j - 1] += np.linalg.eigvalsh(small)[0] / 2
        u = vectors[:, 0]
        each = np.einsum("i,bij,j->b", u, moments[folds == fold], u)
        errors[folds == fold] = each - each.mean()
    np.testing.assert_allclose(found.held_out, held, rtol=1e-5)
    np.testing.assert_allclose(found.in_sample, np.linalg.eigvalsh(moments.mean(0))[:-3:-1], rtol=1e-5)
    # 12 batches of equal weight; a mean of each of the two folds is known.
    np.testing.assert_allclose(found.stderr[0], np.sqrt(np.sum(errors**2) / 12 / 10), rtol=1e-4)
    # n <= 20: eigsh forms the matrix, n products for each fit; then 2 k + 2 with each batch.
    assert found.num_passes == pytest.approx(2 * 0.5 * 6 + 6 + 2 * 2 + 2)


@pytest.mark.slow
def test_batches_of_unequal_weight_count_as_such():
    x = draw(2, 120)
    edges = [*range(0, 84, 12), *range(84, 121, 6)]  # twelve and six examples
    parts = [x[a:b] for a, b in itertools.pairwise(edges)]
    found = spectra.population(operator(parts), key=jax.random.key(0))
    exact = np.linalg.eigvalsh(np.float64(x).T @ x / 120)[-1]
    np.testing.assert_allclose(found.in_sample[0], exact, rtol=1e-5)
    assert found.num_examples == 120


@pytest.mark.parametrize("law", ["normal", "skewed"])
@pytest.mark.slow
def test_a_few_samples_hold_the_truth(law):
    """20 draws: an interval of 95 % misses more than 4 with probability 3e-3."""
    held = np.zeros(3)
    for seed in range(20):
        found = spectra.population(
            operator(draw(100 + seed, 160, law)), key=jax.random.key(seed), num_eigenvalues=2, num_batches=16
        )
        held[:2] += (found.lower <= EIGENVALUES[:2]) & (EIGENVALUES[:2] <= found.upper)
        held[2] += found.trace.lower <= EIGENVALUES.sum() <= found.trace.upper
    assert (held >= 16).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("law", "count"), [("normal", 64), ("normal", 256), ("skewed", 256), ("skewed", 1024)]
)
def test_coverage_of_eigenvalues_trace_and_shares(law, count):
    """400 draws: of 95 %, fewer than 370 hold with probability 1e-2."""
    shares = np.cumsum(EIGENVALUES)[:2] / EIGENVALUES.sum()
    held = np.zeros(5)
    for seed in range(400):
        found = spectra.population(
            operator(draw(1000 + seed, count, law)), key=jax.random.key(seed), num_eigenvalues=2
        )
        held[:2] += (found.lower <= EIGENVALUES[:2]) & (EIGENVALUES[:2] <= found.upper)
        held[2] += found.trace.lower <= EIGENVALUES.sum() <= found.trace.upper
        held[3:] += (found.shares.lower <= shares) & (shares <= found.shares.upper)
    assert (held >= 370).all(), held


@pytest.mark.slow
def test_of_all_the_data_nothing_is_left_to_chance_but_the_probes():
    x = draw(3, 64)
    found = spectra.population(operator(x), key=jax.random.key(0), of="data", num_batches=16)
    assert found.stderr[0] == 0
    assert found.upper[0] == pytest.approx(found.in_sample[0], rel=0.02)  # tol = 1e-2
    assert found.trace_stderr == 0
    part = spectra.population(operator(x), key=jax.random.key(0), of="data", num_examples=32, num_batches=16)
    whole = spectra.population(operator(x), key=jax.random.key(0), num_examples=32, num_batches=16)
    assert part.stderr[0] == pytest.approx(whole.stderr[0] / 2**0.5)


@pytest.mark.parametrize("dof", [4, 20, 1e6])
def test_a_number_between_two_means_is_missed_no_more_often_than_stated(dof):
    """Limits of 95 % about two means with one error, whose distance is known with an error of its own."""
    points, weights = np.polynomial.hermite_e.hermegauss(41)
    weights = weights / weights.sum()
    for spread, true in itertools.product((0.0, 0.2, 0.5, 1.0, 2.0), (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)):
        seen = true + spread * points
        tails = np.array([one_at_risk(0.975, x - spread, dof) for x in seen])
        quantiles = scipy.stats.t.ppf(tails, dof)
        # A number at one mean: its own limit fails, or the other one behind the distance as it was seen.
        missed = weights @ (1 - tails + scipy.stats.t.sf(quantiles + np.maximum(seen, 0), dof))
        assert 0.039 < missed < 0.05 + 1e-6, (spread, true)
    # The distance nought: both limits as always; a large one: only one of them can fail.
    assert one_at_risk(0.975, 0.0, dof) == pytest.approx(0.975, abs=1e-9)
    assert one_at_risk(0.975, 1e6, dof) == pytest.approx(0.95, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_examples_that_are_all_alike_leave_rounding(seed):
    """They have no spread. Without rounding the lower end of an eigenvalue may be above the upper one."""
    x = np.tile(draw(seed, 1), (64, 1))
    found = spectra.population(operator(x), key=jax.random.key(seed), num_batches=8)
    truth = float(np.sum(np.float64(x[0]) ** 2))
    low, value, high = found.interval()
    assert low < truth < high < low + 1e-5 * truth
    assert low < value < high
    one = spectra.population(operator(x * np.eye(6)[0]), key=jax.random.key(seed), num_batches=8)
    truth = float(np.float64(x[0, 0]) ** 2)  # a single parameter has any: signs leave nothing to chance
    assert one.trace.lower < truth < one.trace.upper < one.trace.lower + 1e-5 * truth
    assert float(one.shares.lower[0]) < 1 < float(one.shares.upper[0])


def test_batches_are_equal_and_leave_few_examples_over():
    assert _count(32, 440, 2) == 24  # 432 of the examples, where 32 batches have 416
    assert _count(32, 2000, 2) == 32
    assert _count(8, 8, 3) == 6
    assert _count(9, 30, 3) == 9


def test_examples_for_half_the_width():
    assert _for_half(100, error=1.0, width=1.0) == 400  # falls like a root
    assert _for_half(100, error=0.0, width=1.0) == 200  # falls like one over the number
    count = _for_half(100, error=0.5, width=2.0)
    assert 0.5 / (count / 100) ** 0.5 + 1.5 / (count / 100) == pytest.approx(1.0, rel=0.01)


@pytest.mark.slow
def test_what_is_no_sample_is_refused():
    x, key = draw(0, 40), jax.random.key(0)
    with pytest.raises(spectra.StructureError, match="operator on data"):
        spectra.population(spectra.MatrixOperator(jnp.eye(3)), key=key)  # pyright: ignore
    with pytest.raises(spectra.DataError, match="7 of 40 examples"):
        spectra.population(operator(x), key=key, num_examples=7)
    with pytest.raises(spectra.DataError, match="4 batches"):
        spectra.population(operator([x[:10], x[10:20], x[20:30], x[30:]]), key=key)
    with pytest.raises(spectra.DataError, match="9 examples for num_folds=5"):
        spectra.population(operator(x[:9]), key=key, num_batches=10, num_folds=5)
    with pytest.raises(spectra.DataError, match="8 batches for num_folds=9"):
        spectra.population(operator(list(x.reshape(8, 5, -1))), key=key, num_folds=9)
    with pytest.raises(spectra.SpectraError, match="num_eigenvalues=7"):
        spectra.population(operator(x), key=key, num_eigenvalues=7)
    with pytest.raises(spectra.SpectraError, match="num_folds=1"):
        spectra.population(operator(x), key=key, num_folds=1)
    with pytest.raises(spectra.SpectraError, match="of='all'"):
        spectra.population(operator(x), key=key, of="all")
    centred = spectra.GradientCovarianceOperator(loss_fn, jnp.ones(len(SCALES)), x, centered=True)
    with pytest.raises(spectra.StructureError, match="centred"):
        spectra.population(centred, key=key)


@pytest.mark.slow
def test_it_is_saved_and_loaded(tmp_path):
    found = spectra.population(operator(draw(0, 40)), key=jax.random.key(0), num_batches=8)
    again = spectra.load(spectra.save(found, tmp_path / "population"))
    assert repr(again) == repr(found)
    assert again.interval() == found.interval()


def masked_loss(w, batch):
    return 0.5 * jnp.sum(batch["weight"] * (batch["x"] @ w) ** 2) / jnp.sum(batch["weight"])


@pytest.mark.slow
def test_batches_of_padding_do_not_count():
    """A batch without weight has no mean: the truth is the interval without its examples, one a batch."""
    x = np.float32(np.random.default_rng(0).standard_normal((24, 2)))
    weight = np.repeat(np.float32([1, 0]), [16, 8])
    op = spectra.HessianOperator(
        masked_loss, jnp.ones(2), {"x": x, "weight": weight}, weight_fn=lambda b: jnp.sum(b["weight"])
    )
    found = spectra.population(op, key=jax.random.key(0), num_batches=24)
    exact = np.linalg.eigvalsh(x[:16].T.astype(float) @ x[:16] / 16)[-1]
    np.testing.assert_allclose(found.in_sample[0], exact, rtol=1e-2)  # `tol`
    np.testing.assert_allclose(found.trace.estimate, np.sum(np.float64(x[:16]) ** 2) / 16, rtol=0.5)
    assert found.num_batches == 16
    assert found.lower[0] < found.held_out[0] <= exact * 1.01
    few = spectra.HessianOperator(
        masked_loss,
        jnp.ones(2),
        {"x": x, "weight": np.roll(weight, 8) * (np.arange(24) < 12)},
        weight_fn=lambda b: jnp.sum(b["weight"]),
    )
    with pytest.raises(spectra.DataError, match="4 batches: their spread takes at least 8"):
        spectra.population(few, key=jax.random.key(0), num_batches=24)


@pytest.mark.slow
def test_no_share_of_a_trace_that_nothing_is_taken_from_is_above_all_of_it():
    """Of rank one: the largest eigenvalue is all of the trace, and its limits are about that."""

    def model_fn(w, x):
        return x @ w

    def squares(outputs, targets):
        return jnp.mean((outputs - targets) ** 2)

    x = jnp.asarray(np.outer(np.random.default_rng(3).standard_normal(64), np.ones(4)), jnp.float32)
    op = spectra.FisherOperator(model_fn, squares, jnp.ones(4), (x, jnp.zeros(64)), kind="empirical")
    shares = spectra.population(op, key=jax.random.key(0), num_batches=16).shares
    assert 0 <= shares.lower[0] <= shares.upper[0] <= 1
