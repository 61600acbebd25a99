"""Bands and errors against the laws that they are made of, from both sides: neither too narrow nor too wide.

The expected number of points at which a band fails is the sum of the probabilities that it fails at one, in
whatever way these hang together. Where the law of one point is exact, that sum is a closed form.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import beta
from scipy.stats import t as student

import spectra
from spectra.quadrature.distribution import share_limits, share_upper_bound

LEVEL = 0.5  # bands fail often enough to be counted


def quadrature(nodes, masses, num_normals):
    """The exact quadrature of an operator of order `num_normals`: all its eigenvalues, with masses (k, m)."""
    shape = masses.shape
    return spectra.Quadrature(
        nodes=np.broadcast_to(nodes, shape),
        weights=masses / masses.sum(axis=1, keepdims=True),
        residuals=np.zeros(shape),
        lengths=np.full(len(masses), len(nodes)),
        asymmetry=np.zeros(len(masses)),
        size=num_normals,
        num_matvecs=masses.size,
        precision=np.finfo(float).eps,
        status=spectra.Status.INVARIANT,
    )


def within_five_errors(samples, expected):
    """Whether the mean of independent samples is what is expected, at odds of two million to one."""
    return abs(np.mean(samples) - expected) <= 5 * np.std(samples) / len(samples) ** 0.5


@pytest.mark.parametrize("normals", [2.0, 3.0, 10.0, 4e3, 1e4, 1e6])
def test_a_bound_on_a_share_is_where_its_law_has_the_tail(normals):
    """What is 1e-6 of its distance to an end less is possible still, and as much more is not."""
    shares = np.concatenate([np.geomspace(1e-12, 0.5, 200), 1 - np.geomspace(1e-8, 0.5, 100)])
    for tail in (0.4, 0.025, 2.5e-4, 1e-7):
        bound = share_upper_bound(shares, normals, tail)
        assert np.all(bound >= shares)  # no less than what was seen
        inside = (1 - bound > 1e-6) & (bound > 1e-6) & (bound > (1 + 1e-9) * shares)
        bound, seen = bound[inside], shares[inside]
        for side in (-1, 1):  # SciPy's own law decides, which is known to some 1e-10 for the largest order
            moved = bound + side * 1e-6 * np.minimum(bound, 1 - bound)
            excess = beta.cdf(seen, normals * moved / 2, normals * (1 - moved) / 2) - tail
            assert np.all(side * excess < 0)
    np.testing.assert_array_equal(share_upper_bound(np.array([0.0, 1.0]), normals, 0.025), [0, 1])
    np.testing.assert_array_equal(share_upper_bound(np.array([0.0, 0.5]), 0, 0.025), [0, 1])


@pytest.mark.parametrize("truth", [0.02, 0.4, 0.9])
@pytest.mark.parametrize("width", [0.0, 0.3, 1.0, 3.0, 30.0])
def test_an_interval_about_a_bracket_fails_at_its_rate_where_the_truth_is_at_an_end(truth, width):
    """Probes see a share by its law, here its quantiles, and a bracket of so many deviations that ends there.

    A tenth of the draws may miss, half of that beyond each limit without a bracket, and all of it beyond the
    near one beside a wide one, so that limits are closer. Beside one as wide as the law they are safe.
    """
    normals, level, each = 2000.0, 0.1, (np.arange(4000) + 0.5) / 4000
    seen = beta.ppf(each, normals * truth / 2, normals * (1 - truth) / 2)
    away = width * np.sqrt(2 * truth * (1 - truth) / normals)
    for low, high in ((seen, np.minimum(seen + away, 1.0)), (np.maximum(seen - away, 0.0), seen)):
        lower, upper = share_limits(low, high, normals, level / 2)
        misses = np.mean((truth < lower) | (truth > upper))
        assert level * (0.5 if 0 < width < 3 else 0.95) <= misses <= level * 1.02
    if width == 30:  # no wider than one limit alone
        inside = upper < 1
        np.testing.assert_allclose(upper[inside], share_upper_bound(high[inside], normals, level), rtol=1e-6)


@pytest.mark.parametrize("num_probes", [1, 3])
def test_the_cdfs_band_fails_at_as_many_nodes_as_it_states(num_probes):
    """Shares of a probe have the law Beta(nF/2, n(1-F)/2), and their mean nearly that with k n for n.

    Bonferroni gives each of m nodes the m-th part of what may fail, and above the last node nothing can.
    """
    rng, nodes, copies = np.random.default_rng(0), np.arange(6.0), 10
    x, truth = nodes[:-1] + 0.5, np.arange(1, 6) / 6
    fails = []
    for _ in range(500):
        masses = np.sum(rng.standard_normal((num_probes, 6, copies)) ** 2, axis=2)
        lower, _, upper = quadrature(nodes, masses, 6 * copies).cdf(x, level=LEVEL)
        fails.append(np.sum((truth < lower) | (truth > upper)))
    assert within_five_errors(fails, (1 - LEVEL) * 5 / 6)


def test_the_densitys_band_fails_at_as_many_widths_as_it_states():
    """The value at a point has, to two moments, a chi-square law; each width of a kernel is a test."""
    rng, eigenvalues, width = np.random.default_rng(0), np.linspace(-1.0, 1.0, 400), 0.1
    options = {"grid": np.linspace(-0.7, 0.7, 15), "bandwidth": width, "level": LEVEL}
    truth = spectra.spectral_density(quadrature(eigenvalues, np.ones((1, 400)), 400), **options).density
    shares = []
    for _ in range(400):
        density = spectra.spectral_density(
            quadrature(eigenvalues, rng.standard_normal((1, 400)) ** 2, 400), **options
        )
        shares.append(np.mean((truth < density.lower) | (truth > density.upper)))
    # The variance is that at the values found and not at the true ones: a tenth either way.
    expected = (1 - LEVEL) * width / 1.4
    assert within_five_errors(shares, np.clip(np.mean(shares), 0.9 * expected, 1.1 * expected))


@pytest.mark.slow
@pytest.mark.parametrize("num_probes", [1, 3])
def test_the_densitys_band_holds_for_few_eigenvalues_under_a_narrow_kernel(num_probes):
    """Twelve of them, apart by a few widths or many: each is a share of its own.

    Of 100 bands at 95 % more than 13 miss with probability 5e-4.
    """
    rng, n = np.random.default_rng(0), 12
    eigenvalues, misses = np.sort(rng.standard_normal(n)), 0
    options = {"bandwidth": 0.05, "grid": np.linspace(-3.0, 3.0, 241)}
    truth = spectra.spectral_density(quadrature(eigenvalues, np.ones((1, n)), n), **options).density
    slack = 1e-9 * truth.max()  # kernels are cut off there
    for _ in range(100):
        masses = rng.standard_normal((num_probes, n)) ** 2
        density = spectra.spectral_density(quadrature(eigenvalues, masses, n), **options)
        misses += np.any((truth < density.lower - slack) | (truth > density.upper + slack))
    assert misses <= 13


def test_an_interval_lies_between_both_tails_of_students_t():
    estimate = spectra.Estimate(10.0, 2.0, 64, "hutchinson", dof=7.0)
    for level in (0.5, 0.95):
        lower, value, upper = estimate.interval(level)
        assert (lower, upper) == pytest.approx(student.interval(level, 7, loc=10, scale=2), rel=1e-12)
        assert value == 10


def test_a_diagonals_errors_from_three_probes_have_two_degrees_of_freedom(x64):
    """An entry is its own sum of 99 random signs of what stands beside it: normal, all but 1 % of kurtosis.

    Its variance s² from three probes has the mean σ² and the law χ² with two degrees. No smaller than the
    mean over the entries, σ², it is max(s², σ²), of mean σ² (1 + 1/e).
    """
    a = np.random.default_rng(0).standard_normal((100, 100))
    op, diagonal = spectra.MatrixOperator(jnp.asarray(a + a.T)), 2 * np.diag(a)
    variance = jnp.asarray((np.sum((a + a.T) ** 2, axis=0) - diagonal**2) / 3)

    @jax.jit
    @jax.vmap
    def looked(key):
        found = spectra.diagonal(op, key=key, method="hutchinson", num_matvecs=3)
        lower, _, upper = found.interval(0.95)
        return jnp.mean((lower <= diagonal) & (upper >= diagonal)), jnp.mean(found.stderr**2 / variance)

    held, ratio = looked(jax.random.split(jax.random.key(0), 400))
    assert np.mean(held) >= 0.95
    # σ² differs by 14 % (one standard deviation) from row to row, which makes the ratio 1.2 % larger.
    assert np.mean(ratio) == pytest.approx(1.012 * (1 + 1 / np.e), rel=0.02)
    found = spectra.diagonal(op, key=jax.random.key(0), method="hutchinson", num_matvecs=3)
    assert found.dof == 2


@pytest.mark.slow
def test_the_error_of_a_function_of_an_operator_is_that_of_a_probe_on_the_sphere():
    eigenvalues = np.linspace(1.0, 3.0, 400)
    op = spectra.MatrixOperator(jnp.diag(jnp.asarray(eigenvalues, jnp.float32)))
    found = spectra.trace_of(op, np.log, key=jax.random.key(0), num_steps=12, num_probes=4)
    # vᵀAv on the sphere has the variance 2 var(λ(A)) / (n + 2), found here from 1,600 squares: 5 % at most.
    stated = 400 * np.sqrt(2 * np.log(eigenvalues).var() / 402 / 4)
    assert found.stderr == pytest.approx(stated, rel=0.15)


def test_sampled_targets_have_the_variance_of_the_normal_law_that_a_squared_loss_stands_for():
    """a/2 (f - y)² is -log of a normal density of variance 1 / a, up to a constant."""
    inputs, targets = jnp.zeros((4000, 1)), jnp.zeros((4000, 1))

    def loss_fn(outputs, targets):
        return 8 * jnp.mean((outputs - targets) ** 2)

    op = spectra.FisherOperator(
        lambda params, x: x + params,
        loss_fn,
        jnp.ones(1),
        (inputs, targets),
        kind="mc",
        key=jax.random.key(0),
    )
    squares = np.asarray(op.data[1] - 1.0) ** 2
    assert within_five_errors(squares, 1 / 16)
