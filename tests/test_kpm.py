"""Chebyshev moments and their density: exact moments of the probes, mass one, a band that holds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import SPECTRA, N, Ridge, diagonal, planted, slow_but
from scipy.stats import norm

import spectra
from spectra.density.moments import _rounding as rounding_of

KEY = jax.random.key(0)


def exact_density(eigenvalues, moments, grid):
    """The true spectrum under the same kernel: the density of its own moments."""
    a, b = moments.bounds
    angles = np.arccos(np.clip((2 * eigenvalues - a - b) / (b - a), -1, 1))
    mu = np.cos(np.arange(moments.num_moments)[:, None] * angles).mean(axis=1)
    exact = spectra.Moments(mu[None], moments.bounds, 10**12, 0, 0.0, moments.status)
    return spectra.spectral_density(exact, grid=grid).density


@pytest.mark.parametrize("num_moments", [2, 7, 65])  # 32 products and more run in calls of 16
@pytest.mark.parametrize("name", ["indefinite", "rank deficient", "multiple of the identity", "zero"])
def test_moments_are_those_of_the_probes(name, num_moments, x64):
    a = planted(SPECTRA[name])
    got = spectra.kpm(spectra.MatrixOperator(a), key=KEY, num_moments=num_moments, num_probes=2)
    low, high = got.bounds
    assert low < SPECTRA[name].min()
    assert high > SPECTRA[name].max()
    values, vectors = np.linalg.eigh(a)
    angles = np.arccos((2 * values - low - high) / (high - low))
    for i in range(2):
        v = np.asarray(jax.random.normal(jax.random.fold_in(jax.random.fold_in(KEY, i), 0), (N,)))
        weights = (vectors.T @ v) ** 2 / (v @ v)
        exact = np.cos(np.arange(num_moments)[:, None] * angles) @ weights
        # The recurrence adds a rounding of |H| / (b - a) a step; at most 100 here (the identity).
        np.testing.assert_allclose(got.moments[i], exact, rtol=0, atol=1e3 * num_moments * N * 2.2e-16)
    assert got.num_matvecs <= 24 + 2 * max(num_moments // 2, 2)  # two of a probe show symmetry


@pytest.mark.parametrize("name", SPECTRA)
def test_the_density_integrates_to_one_and_lies_in_its_band(name):
    op = spectra.MatrixOperator(planted(SPECTRA[name]))
    moments = spectra.kpm(op, key=KEY, num_moments=65, num_probes=4)
    density = spectra.spectral_density(moments)
    assert density.integral() == pytest.approx(1.0, abs=1e-6)
    assert (density.density >= 0).all()
    assert ((density.lower <= density.density) & (density.density <= density.upper)).all()
    low, high = moments.bounds
    coarse = spectra.spectral_density(moments, grid=np.linspace(low, high, 33))
    assert coarse.integral() == pytest.approx(1.0, abs=1e-6)
    spectra.plot_density(density).figure.canvas.draw()


EIGENVALUES = np.concatenate([np.linspace(-1.0, 1.0, 190), np.linspace(2.0, 3.0, 9), [6.0]])


@pytest.mark.slow
def test_the_band_holds_at_its_rate(x64):
    # Probe i depends on the key and i alone: 60 runs of four probes each are one run of 240.
    moments = spectra.kpm(diagonal(EIGENVALUES), key=KEY, num_moments=64, num_probes=240, bounds=(-1.1, 6.1))
    grid = spectra.spectral_density(moments).grid  # of order and bounds alone: the same for each run
    exact, held, widths = exact_density(EIGENVALUES, moments, grid), 0, []
    for rows in np.split(np.arange(240), 60):
        part = dataclasses.replace(moments, moments=moments.moments[rows])
        density = spectra.spectral_density(part)
        np.testing.assert_array_equal(density.grid, grid)
        held += ((density.lower <= exact) & (exact <= density.upper)).all()
        widths.append(density.upper - density.lower)
    # 95 % of 60 keys for the whole curve, less three standard deviations.
    assert held >= 52
    # A probe sees the smoothed density p with variance 2 (mean K² - p²) / (n + 2), K the kernel at each of
    # the eigenvalues. The limits take up to sqrt(3) of mean K² for it, see `_squared_kernel`: 1.32 of the
    # spread; and what four probes show, where that is more. Every fourth eigenvalue stands for four.
    kernel = np.stack([exact_density(value, moments, density.grid) for value in EIGENVALUES[::4]])
    variance = 2 * (np.mean(kernel**2, axis=0) - kernel.mean(axis=0) ** 2) / (200 + 2) / 4
    tests = np.sum(np.diff(density.grid) / density.bandwidth[1:])
    bulk = np.abs(density.grid) < 0.9
    ratio = np.mean(widths, axis=0) / (2 * norm.isf(0.025 / tests) * np.sqrt(variance))
    assert 0.9 <= np.median(ratio[bulk]) <= 1.6


@pytest.mark.slow
def test_it_agrees_with_quadrature(x64):
    op = diagonal(np.linspace(-1.0, 3.0, 200))
    density = spectra.spectral_density(spectra.kpm(op, key=KEY, num_moments=96, num_probes=8))
    below = np.trapezoid(np.where(density.grid <= 1.0, density.density, 0), density.grid)
    lower, _, upper = spectra.slq(op, key=KEY, num_steps=60, num_probes=8).cdf(1.0)
    assert lower - 0.02 <= below <= upper + 0.02


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_densities_are_equivariant_under_scaling(scale, x64):
    a = planted(SPECTRA["indefinite"])
    one, other = (
        spectra.kpm(spectra.MatrixOperator(c * a), key=KEY, num_moments=64, num_probes=2)
        for c in (1.0, scale)
    )
    np.testing.assert_allclose(other.moments, one.moments, rtol=0, atol=1e-9)
    np.testing.assert_allclose(other.bounds / scale, one.bounds, rtol=1e-9)


@pytest.mark.slow
def test_streams_batches_and_files_give_the_same(tmp_path):
    ridge = Ridge()
    whole = spectra.kpm(ridge.operator(), key=KEY, num_moments=33, num_probes=3)
    streamed = spectra.kpm(
        ridge.operator(ridge.parts(5)), key=KEY, num_moments=33, num_probes=3, bounds=whole.bounds
    )
    together = spectra.kpm(
        ridge.operator(), key=KEY, num_moments=33, num_probes=3, bounds=tuple(whole.bounds), probe_batch=2
    )
    for other in (streamed, together):
        np.testing.assert_allclose(other.moments, whole.moments, rtol=0, atol=1e-4)
    loaded = spectra.load(spectra.save(whole, tmp_path / "moments"))
    np.testing.assert_array_equal(loaded.moments, whole.moments)
    assert loaded.status is spectra.Status.COMPLETE
    assert "num_moments=33" in repr(loaded)


@pytest.mark.slow
def test_bad_input_is_refused():
    op = spectra.MatrixOperator(planted(SPECTRA["indefinite"]))
    for options, match in (
        ({"num_moments": 1}, "num_moments=1"),
        ({"num_probes": 0}, "num_probes=0"),
        ({"bounds": (1.0, 0.0)}, "bounds="),
        ({"bounds": (-0.1, 0.1)}, "do not contain the spectrum"),
        ({"probe_batch": 9}, "probe_batch=9"),
    ):
        with pytest.raises(spectra.SpectraError, match=match):
            spectra.kpm(op, **({"key": KEY} | options))
    with pytest.raises(spectra.SpectraError, match="outside jit"):
        jax.jit(lambda key: spectra.kpm(op, key=key).moments)(KEY)
    moments = spectra.kpm(op, key=KEY, num_moments=65, num_probes=1)
    with pytest.raises(spectra.SpectraError, match="bandwidth"):
        spectra.spectral_density(moments, bandwidth=0.1)
    broken = spectra.FunctionOperator(lambda v: v / 0.0, jnp.zeros(9))
    with pytest.raises(spectra.NonFiniteError):
        spectra.kpm(broken, key=KEY)


SKEW = jnp.triu(jnp.ones((N, N)), 1) / N
NO_OPERATORS = {
    "not symmetric": lambda v: jnp.linspace(-1.0, 3.0, N) * v + SKEW @ v,
    "slightly not symmetric": lambda v: jnp.linspace(-1.0, 3.0, N) * v + 0.2 * SKEW @ v,
    "a rotation": lambda v: jnp.roll(v, 1),
    "affine": lambda v: v + 1,
    "not linear": lambda v: v * jnp.abs(v),
}


@pytest.mark.parametrize("options", [{}, {"bounds": (-4.0, 4.0)}])
@pytest.mark.parametrize("name", slow_but(NO_OPERATORS, "slightly not symmetric", "affine", "not linear"))
def test_maps_that_are_not_symmetric_or_not_linear(name, options):
    op = spectra.FunctionOperator(NO_OPERATORS[name], jnp.zeros(N))
    for num_moments in (2, 20):
        with pytest.raises(spectra.NotSymmetricError, match="not symmetric"):
            spectra.kpm(op, key=KEY, num_moments=num_moments, num_probes=2, **options)


@pytest.mark.parametrize("name", SPECTRA)
def test_operators_that_are_symmetric_are_taken_for_it(name):
    """In float32, also where the interval is narrow and a step rounds more in its units."""
    values = SPECTRA[name]
    op, size = diagonal(values, jnp.float32), np.abs(values).max() or 1.0
    narrow = (values.min() - 1e-3 * size, values.max() + 1e-3 * size)
    for bounds in (None, narrow):
        assert spectra.kpm(op, key=KEY, num_moments=65, num_probes=4, bounds=bounds).status.ok


ISOLATED = {
    "all but one at zero": np.append(np.zeros(199), 1.0),
    "a narrow bulk and one": np.append(np.linspace(-0.1, 0.1, 199), 1.0),
    "two values": np.repeat([-1.0, 1.0], [180, 20]),
}


@pytest.mark.parametrize(
    ("num_moments", "num_probes"),
    slow_but([(2, 1), (7, 8), (40, 1), (150, 8), (150, 1)], (2, 1), (7, 8), (150, 8)),
)
@pytest.mark.parametrize("name", slow_but(ISOLATED, "a narrow bulk and one"))
def test_the_band_holds_for_isolated_eigenvalues_and_few_moments(name, num_moments, num_probes):
    """The moments are those of random probes, without a product: only the band is tested.

    It had no width where the kernel is larger at the eigenvalues than at the grid point, and no lower part in
    the tails of kernels: none of 60 whole curves were within it with 2 and 7 moments, 18 to 78 % with 150.
    """
    values, rng, held = ISOLATED[name], np.random.default_rng(1), 0
    low, high = values.min() - 0.01, values.max() + 0.01
    angles = np.arccos((2 * values - low - high) / (high - low))
    polynomials = np.cos(np.arange(num_moments)[:, None] * angles)
    for _ in range(40):
        shares = rng.standard_normal((num_probes, len(values))) ** 2
        mu = shares / shares.sum(axis=1, keepdims=True) @ polynomials.T
        moments = spectra.Moments(mu, np.array([low, high]), len(values), 0, 1e-16, spectra.Status.COMPLETE)
        density = spectra.spectral_density(moments)
        exact = exact_density(values, moments, density.grid)
        slack = 1e-9 * exact.max()
        held += ((density.lower <= exact + slack) & (exact <= density.upper + slack)).all()
    assert held >= 34  # 95 % of 40, less 2.9 standard deviations


@pytest.mark.parametrize("num_moments", [2, 3, 4])
def test_few_moments_show_bounds_that_miss_the_spectrum(num_moments):
    with pytest.raises(spectra.SpectraError, match="do not contain the spectrum"):
        spectra.kpm(
            diagonal(np.linspace(-1.0, 1.0, 300)), key=KEY, num_moments=num_moments, bounds=(-0.5, 0.5)
        )


def test_the_band_holds_what_rounding_does():
    """Nearly all eigenvalues are at one place, where rounding of each step moves them the same way."""
    num_moments, errors = 400, []
    for place in np.float32([0.0, 0.3, 0.37, -0.71]):
        values = np.append(np.full(99, place), 1.0).astype(float)
        moments = spectra.kpm(
            diagonal(values, jnp.float32), key=KEY, num_moments=num_moments, num_probes=2, bounds=(-1.0, 1.1)
        )
        low, high = moments.bounds
        angles = np.arccos((2 * values - low - high) / (high - low))
        polynomials = np.cos(np.arange(num_moments)[:, None] * angles)
        for i in range(2):
            v = np.asarray(jax.random.normal(jax.random.fold_in(jax.random.fold_in(KEY, i), 0), (100,)))
            exact = polynomials @ (v**2 / (v @ v))
            errors.append(np.abs(moments.moments[i] - exact))
            assert (errors[-1] <= rounding_of(moments) + 4 * moments.precision).all()
        density = spectra.spectral_density(moments)
        assert (exact_density(values, moments, density.grid) <= density.upper).all()
    # It does grow with the degree: a hundred degrees up it is far more than what one step rounds.
    assert np.max(errors) > 10 * moments.precision


DECAYING = {
    "geometric": 0.8 ** np.arange(400),
    "outliers": np.r_[np.linspace(-0.01, 0.02, 395), 0.3, 0.5, 1.0, 2.0, 3.0],
}


@pytest.mark.parametrize("name", DECAYING)
def test_rounding_does_not_move_the_bounds(name):
    """Copies of converged ends have residuals that it decides: bounds with these moved by up to a fifth."""
    values = DECAYING[name]
    signs = np.random.default_rng(0).choice([-1, 1], len(values))
    for seed in range(6):
        key = jax.random.key(seed)
        bounds = [
            spectra.kpm(diagonal(moved, jnp.float32), key=key, num_moments=2, num_probes=1).bounds
            for moved in (values, values * (1 + 2.0**-23 * signs))
        ]
        # A residual of sqrt(eps) |H| = 3.5e-4 ends orthogonality: rounding decides what is smaller.
        assert np.max(np.abs(bounds[0] - bounds[1])) <= 3.5e-4 * np.ptp(values)
        assert bounds[0][0] < values.min()
        assert bounds[0][1] > values.max()
