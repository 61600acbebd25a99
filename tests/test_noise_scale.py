"""The gradient noise scale against NumPy, and its interval on gradients whose law is known."""

import jax.numpy as jnp
import numpy as np
import pytest

import spectra
from spectra.training import noise

N, D = 60, 5
X = np.random.default_rng(0).standard_normal((N, D)) + np.array([1.0, 0.5, 0, 0, 0])
WEIGHTS = np.random.default_rng(1).integers(0, 4, N).astype(float)


def linear(w, batch):
    """g_i = w_i x_i / mean w: a weighted mean over the examples."""
    x, weights = batch
    return jnp.sum(weights * (x @ w)) / jnp.sum(weights)


def total_weight(batch):
    return jnp.sum(batch[1])


def ratio(x, weights):
    """By the definition, every sum written out."""
    p = weights / weights.sum()
    mean = p @ x
    far = np.sum((x - mean) ** 2, axis=1)
    rest = 1 - np.sum(p**2)
    return (p @ far) / rest, mean @ mean - (p**2 @ far) / rest


def estimate(x, weights=None, **options):
    weights = np.ones(len(x)) if weights is None else weights
    batch = jnp.asarray(x, jnp.float32), jnp.asarray(weights, jnp.float32)
    op = spectra.GradientCovarianceOperator(
        linear, jnp.ones(x.shape[1]), batch, weight_fn=total_weight, **options
    )
    return spectra.gradient_noise_scale(op)


@pytest.mark.parametrize("weights", [np.ones(N), WEIGHTS], ids=["equal", "weighted"])
def test_value_and_error_are_those_of_the_definition(weights):
    found = estimate(X, weights, microbatch=7)
    noise_, signal = ratio(X, weights)
    # Sums of N numbers in float32, of which signal is the difference: N eps (|ḡ|² + tr Σ).
    tol = N * np.finfo(np.float32).eps * (noise_ + abs(signal))
    np.testing.assert_allclose([found.noise, found.signal], [noise_, signal], atol=tol)
    np.testing.assert_allclose(found.value, noise_ / signal, rtol=4 * tol / signal)
    used = np.flatnonzero(weights)
    assert found.num_examples == len(used)
    without = np.array([ratio(np.delete(X, i, 0), np.delete(weights, i)) for i in used]).T
    centred = without - without.mean(axis=1, keepdims=True)
    jackknife = (len(used) - 1) / len(used) * centred @ centred.T
    np.testing.assert_allclose(found.covariance, jackknife, rtol=1e-4)
    step = np.array([1, -found.value]) / found.signal
    np.testing.assert_allclose(found.stderr, np.sqrt(step @ jackknife @ step), rtol=1e-3)


@pytest.mark.slow
def test_a_stream_and_one_batch_agree_at_every_scale():
    whole = estimate(X, WEIGHTS)
    batch = jnp.asarray(X, jnp.float32), jnp.asarray(WEIGHTS, jnp.float32)
    parts = [tuple(x[a:b] for x in batch) for a, b in [(0, 25), (25, 50), (50, 60)]]
    for size in (1e-15, 1.0, 1e15):  # squares of these are no numbers of float32

        def scaled(w, batch, size=size):
            return size * linear(w, batch)

        op = spectra.GradientCovarianceOperator(scaled, jnp.ones(D), parts, weight_fn=total_weight)
        found = spectra.gradient_noise_scale(op)
        np.testing.assert_allclose(found.value, whole.value, rtol=1e-4)
        np.testing.assert_allclose(found.interval(), whole.interval(), rtol=1e-3)
        np.testing.assert_allclose(found.noise, size**2 * whole.noise, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1e-65, 1e65])
def test_fourth_powers_of_gradients_may_be_anywhere_in_float64(size, x64):
    def of(scale):
        op = spectra.GradientCovarianceOperator(
            lambda w, x: jnp.mean(x @ w), jnp.ones(D), scale * jnp.asarray(X)
        )
        return spectra.gradient_noise_scale(op)

    np.testing.assert_allclose(of(size).interval(), of(1.0).interval(), rtol=1e-10)
    with pytest.raises(spectra.DataError, match="Multiply the loss by a constant"):
        of(size**2)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_squares_of_weights_may_leave_the_type_of_a_stream(size):
    def found(weights):
        x, weights = jnp.asarray(X, jnp.float32), jnp.asarray(weights, jnp.float32)
        parts = [(x[a:b], weights[a:b]) for a, b in [(0, 25), (25, 60)]]
        op = spectra.GradientCovarianceOperator(linear, jnp.ones(D), parts, weight_fn=total_weight)
        return spectra.gradient_noise_scale(op)

    # Sums of N numbers in float32, in units of their difference |g|².
    np.testing.assert_allclose(found(size * WEIGHTS).interval(), found(WEIGHTS).interval(), rtol=1e-4)


@pytest.mark.slow
def test_the_interval_is_where_the_difference_is_within_its_error():
    found = estimate(X)
    low, value, high = found.interval(0.9)
    assert low < value < high < np.inf
    from scipy.stats import t

    def quantile(up, dof):
        own = t.ppf(0.95, dof)
        return own + max(found.skewness if up else -found.skewness, 0) * (1 + 2 * own**2) / (6 * N**0.5)

    step, covariance = np.array([1, -low]), found.covariance.copy()
    # Var |ḡ|² is proportional to |g|², which is tr Σ / r at the end, and tr Σ / N of noise
    covariance[1, 1] *= (found.noise / low + found.noise / N) / (found.signal + found.noise / N)
    error = np.sqrt(step @ covariance @ step)
    np.testing.assert_allclose((found.noise - low * found.signal) / error, quantile(False, N - 1), rtol=1e-6)
    # Above, the nearest pair with that ratio is one quantile away, with tr Σ on a logarithmic scale.
    noise_ = found.noise * np.linspace(0.5, 2, 200_001)
    errors = np.sqrt(np.diag(covariance := found.covariance))
    both = covariance[0, 1] / errors.prod()
    x = np.log(noise_ / found.noise) * found.noise / errors[0] / quantile(True, found.noise_dof)
    y = (noise_ / high - found.signal) / errors[1] / quantile(True, N - 1)
    away = (x**2 - 2 * both * x * y + y**2) / (1 - both**2)
    np.testing.assert_allclose(away.min(), 1, rtol=1e-5)


@pytest.mark.slow
def test_without_a_gradient_there_is_a_lower_end_only():
    found = estimate(np.random.default_rng(5).standard_normal((N, D)))
    assert found.is_one_sided
    assert 0 < found.interval().lower < np.inf
    assert "no upper end" in repr(found)


@pytest.mark.parametrize("law", ["normal", "scales", "exponential"])
@pytest.mark.parametrize("length", [0.2, 1.0, 4.0])
def test_coverage(law, length):
    """300 draws of 150 gradients: of 95 %, fewer than 91 % hold with probability 1e-3."""
    rng = np.random.default_rng(7)
    scales, held = 1 / np.sqrt(np.arange(1, 21)), 0
    truth = np.sum(scales**2) / length**2
    for _ in range(300):
        z = rng.standard_normal((150, 20))
        if law == "scales":
            z *= np.exp(rng.standard_normal((150, 1)) / 2 - 0.25)  # mean square one
        elif law == "exponential":
            z = rng.exponential(size=(150, 20)) - 1
        g, p = length / 20**0.5 + z * scales, np.full(150, 1 / 150)
        found = noise._estimate(noise._Statistics(p, np.sum(g**2, axis=1), g @ (p @ g), g @ (p**2 @ g)), 0.0)
        low, _, high = found.interval()
        held += low <= truth <= high
    assert 0.91 * 300 <= held < 300


@pytest.mark.parametrize(("law", "length"), [("normal", 0.15), ("exponential", 0.15), ("tenth", 0.5)])
def test_coverage_where_the_mean_is_about_its_error(law, length):
    """300 draws of 100 gradients along one direction. With the error at the mean of the sample 75 to 88 %
    held; of 95 %, fewer than 91 % do with probability 1e-3."""
    rng, held = np.random.default_rng(8), 0
    draws = {
        "normal": lambda: rng.standard_normal((100, 1)),
        "exponential": lambda: rng.exponential(size=(100, 1)) - 1,
        "tenth": lambda: ((rng.random((100, 1)) < 0.1) - 0.1) / 0.3,
    }
    for _ in range(300):
        g, p = length + draws[law](), np.full(100, 0.01)
        found = noise._estimate(noise._Statistics(p, np.sum(g**2, axis=1), g @ (p @ g), g @ (p**2 @ g)), 0.0)
        low, _, high = found.interval()
        held += low <= 1 / length**2 <= high
    assert held >= 0.91 * 300


@pytest.mark.parametrize(
    ("law", "count", "length", "least"), [("normal", 5, 10, 0.91), ("exponential", 30, 3, 0.88)]
)
def test_coverage_of_few_gradients_along_one_direction(law, count, length, least):
    """600 draws. With an error of tr Σ that does not grow with it, 88 and 81 % held."""
    rng, held = np.random.default_rng(9), 0
    for _ in range(600):
        z = rng.standard_normal((count, 1)) if law == "normal" else rng.exponential(size=(count, 1)) - 1
        g, p = length + z, np.full(count, 1 / count)
        found = noise._estimate(noise._Statistics(p, np.sum(g**2, axis=1), g @ (p @ g), g @ (p**2 @ g)), 0.0)
        low, _, high = found.interval()
        held += low <= 1 / length**2 <= high
    assert held >= least * 600


@pytest.mark.slow
def test_what_has_no_noise_scale_is_refused():
    with pytest.raises(spectra.StructureError, match="GradientCovarianceOperator"):
        spectra.gradient_noise_scale(spectra.MatrixOperator(jnp.eye(2)))  # pyright: ignore
    with pytest.raises(spectra.DataError, match="2 examples of positive weight"):
        estimate(X[:3], np.array([1.0, 0.0, 2.0]))


@pytest.mark.slow
@pytest.mark.parametrize("size", [0.3, 1e-20])
def test_equal_gradients_have_no_noise_within_their_rounding(size):
    """The squares of which tr Σ is the difference are off by a few eps: that is its error, and no more."""
    rows = size * np.tile(np.random.default_rng(2).standard_normal((40, 1, D)), (1, 20, 1))
    for x in rows:
        found = estimate(x)
        low, value, high = found.interval()
        assert low <= 0.0 <= value <= high <= 50 * np.finfo(np.float32).eps
        assert 0 < found.stderr <= 20 * np.finfo(np.float32).eps


def test_it_is_saved_and_loaded(tmp_path):
    found = estimate(X)
    again = spectra.load(spectra.save(found, tmp_path / "noise"))
    assert again.interval() == found.interval()
    assert repr(again) == repr(found)


def test_a_noise_scale_without_degrees_of_freedom_takes_those_of_the_normal_law():
    parts = {"noise": 8.0, "signal": 2.0, "covariance": np.diag([0.04, 0.01]), "num_examples": 1000}
    made = {dof: spectra.NoiseScale(4.0, 0.1, 1, "exact", **parts, dof=dof) for dof in (None, 1e9, 3.0)}
    normal, many, few = (made[dof].interval() for dof in (None, 1e9, 3.0))
    np.testing.assert_allclose(normal, many, rtol=1e-6)  # t's quantile is 1 + (1 + z²) / (4 dof) times z
    assert few.lower < normal.lower < 4.0 < normal.upper < few.upper
    uncounted = spectra.NoiseScale(4.0, 0.1, 1, "exact", **parts | {"num_examples": 0})
    assert uncounted.interval() == normal  # without skewness their number does not matter


@pytest.mark.parametrize("weight", [1e4, 1e8])
def test_one_example_of_almost_all_the_weight_leaves_the_interval_open(weight):
    """Student's quantile of so few degrees of freedom has no square, and squares differ by rounding alone."""
    found = estimate(X[:10], np.array([weight, *np.ones(9)]))
    low, _, high = found.interval()
    assert (low, high) == (0.0, np.inf)
    assert "no upper end" in repr(found)
    with pytest.raises(spectra.DataError, match="one example has all of the weight"):
        estimate(X[:10], np.array([1e20, *np.ones(9)]))


def test_the_rounding_of_squares_counts_in_units_of_what_their_difference_is_divided_by():
    """Equal gradients have no other error. One of ten has 100 of 109 parts of the weight."""
    share = np.array([100.0, *np.ones(9)]) / 109
    square, sizes = np.sum(share**2), np.full(10, 4.0)
    found = noise._estimate(noise._Statistics(share, sizes, sizes, square * sizes), 1e-6)
    np.testing.assert_allclose(np.sqrt(np.diagonal(found.covariance)), 4e-6 / (1 - square), rtol=1e-6)
