"""Densities and CDF bands against exact spectra: mass, scale, coverage."""

import jax
import numpy as np
import pytest
from cases import diagonal, runs_of
from scipy.stats import norm

import spectra
from spectra.density.hats import hat_means, moved_kernels, smooth
from spectra.density.kernels import Width
from spectra.density.smoothing import _curves, _relative_width, spectral_density

BULK_AND_OUTLIERS = np.concatenate([np.random.default_rng(0).normal(size=990), 1e4 * (1 + np.arange(10))])
SPECTRA = {
    "semicircle": 2 * np.cos(np.arange(1, 1001) * np.pi / 1001),
    "bulk and outliers": BULK_AND_OUTLIERS,
    "decay": 10.0 ** (-5 * np.linspace(0, 1, 1000)),
    "half null": np.concatenate([np.zeros(500), np.linspace(0.5, 2, 500)]),
}


def run(values, seed, num_steps=60, num_probes=8, **options):
    """60 steps wherever their number does not matter: the compiled code is shared."""
    op, key = diagonal(values, "float32"), jax.random.key(seed)
    return spectra.slq(op, key=key, num_steps=num_steps, num_probes=num_probes, **options)


def exact_cdf(values, x):
    return np.searchsorted(np.sort(values), x, side="right") / len(values)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECTRA)
def test_density_integrates_to_one_without_renormalising(name):
    density = spectral_density(run(SPECTRA[name], 0))
    # Kernels are cut 6 widths out, where 2e-9 of their mass lies.
    assert abs(density.integral() - 1) < 1e-8
    assert (density.lower <= density.density).all()
    assert (density.density <= density.upper).all()


def test_a_grid_that_cuts_the_spectrum_off_shows_the_lost_mass():
    density = spectral_density(run(SPECTRA["half null"], 0), grid=np.linspace(0.25, 3, 400))
    # Half of the eigenvalues are zero. A probe's share of them varies by sqrt(2 / 4 / (n k)) = 0.8 %.
    assert abs(density.integral() - 0.5) < 5 * 0.008


@pytest.mark.slow
def test_trapezoidal_mass_is_kept_on_a_grid_coarser_than_the_kernel():
    density = spectral_density(run(SPECTRA["semicircle"], 0), bandwidth=1e-3, grid=np.linspace(-3, 3, 11))
    assert abs(density.integral() - 1) < 1e-12


def test_hat_means_agree_with_numerical_integration():
    from scipy.integrate import quad

    grid, center, width = np.array([-1.0, -0.2, 0.1, 0.9]), 0.15, 0.3
    got = hat_means(grid, np.array([center]), np.array([width]))[:, 0]
    for i, value in enumerate(got):
        hat = np.eye(4)[i]
        total = quad(
            lambda x, hat=hat: np.interp(x, grid, hat) * norm.pdf(x, center, width),
            -1,
            0.9,
            points=[-0.2, 0.1],
        )[0]
        area = np.trapezoid(hat, grid)
        assert abs(value - total / area) < 1e-10  # quad's own error estimate is 1.5e-8 at most


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_default_bandwidth_scales_with_the_operator(factor):
    quadrature = run(BULK_AND_OUTLIERS, 0)
    scaled = run(BULK_AND_OUTLIERS * factor, 0)
    one, other = spectral_density(quadrature), spectral_density(scaled)
    # Ritz values agree to the noise floor, 1e-7 |H| = 1e-2; the spacing in the bulk, 0.1, sets the scale.
    assert abs(other.linear_scale / factor / one.linear_scale - 1) < 0.1


def test_bulk_is_resolved_beside_outliers_ten_thousand_times_larger():
    """Away from the edges of the bulk the density follows the normal law that it was drawn from."""
    density = spectral_density(run(BULK_AND_OUTLIERS, 0))
    x = np.linspace(-1.5, 1.5, 13)
    got = np.interp(x, density.grid, density.density)
    width = np.interp(x, density.grid, density.bandwidth)
    assert width.max() < 0.5
    # The normal law smoothed by the kernel; 990 draws make 990 * 2 * width * p, about 100 a window:
    # 10 % of sampling, three standard deviations.
    expected = 0.99 * np.exp(-(x**2) / 2 / (1 + width**2)) / np.sqrt(2 * np.pi * (1 + width**2))
    assert np.abs(got / expected - 1).max() < 0.3


@pytest.mark.parametrize("name", SPECTRA)
def test_outliers_are_eigenvalues(name):
    values = SPECTRA[name]
    for outlier in spectral_density(run(values, 0)).outliers:
        # Resolved to 1 % of the gap to the next node by the rule; the mean over probes is no worse.
        assert np.abs(values - outlier).min() <= 0.01 * np.ptp(values)


FEW = ("bulk and outliers", 40, 6)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "keys", "most"), [FEW, *((name, 100, 11) for name in SPECTRA)])
def test_cdf_band_contains_the_true_cdf_at_the_promised_rate(name, keys, most):
    """Over 100 keys the whole true curve leaves the 95 % band at most 11 times, over 40 at most 6.

    With a true rate of 5 % the number of misses is Binomial(100, 0.05), above 11 with probability 0.4 %, or
    Binomial(40, 0.05), above 6 with probability 0.3 %.
    """
    values = SPECTRA[name]
    x = np.sort(np.concatenate([values, values - 1e-3, np.linspace(values.min(), values.max(), 200)]))
    truth = exact_cdf(values, x)
    misses = 0
    for seed in range(keys):
        lower, estimate, upper = run(values, seed, num_probes=2).cdf(x)
        assert (lower <= estimate).all()
        assert (estimate <= upper).all()
        misses += not ((lower <= truth) & (truth <= upper)).all()
    assert misses <= most


@pytest.mark.slow  # 100 runs; `test_laws` and two spectra below are the short form
@pytest.mark.parametrize("name", SPECTRA)
def test_density_band_contains_the_smoothed_truth_at_the_promised_rate(name):
    """As above, for the exact spectrum smoothed by the kernel that each result states."""
    values = np.sort(SPECTRA[name])
    misses = 0
    for seed in range(100):
        quadrature = run(values, seed, num_probes=4)
        density = spectral_density(quadrature)
        widths = 0.05 * np.hypot(values, density.linear_scale)
        equal = np.full((1, len(values)), 1 / len(values))
        truth = smooth(density.grid, values, equal, widths)[0][0]
        # The ends of the grid hold the tails of kernels only; compare where one eigenvalue is seen.
        seen = truth > 0.1 / (len(values) * density.bandwidth.max() * np.sqrt(2 * np.pi))
        inside = (density.lower <= truth * (1 + 1e-6)) & (truth * (1 - 1e-6) <= density.upper)
        misses += not inside[seen].all()
    assert misses <= 11


WIDE_RANGE = {
    "mostly zeros": np.append(np.zeros(360), np.exp(2 * np.random.default_rng(0).standard_normal(40))),
    "sixteen decades": np.logspace(-12, 4, 400),
    "log-normal": np.exp(3 * np.random.default_rng(1).standard_normal(400)),
}


@pytest.fixture(scope="module")
def few_steps():
    with jax.enable_x64(True):
        run = {"key": jax.random.key(0), "num_steps": 30, "num_probes": 80}
        return {name: spectra.slq(diagonal(values), **run) for name, values in WIDE_RANGE.items()}


def smoothed(density, values, masses=None):
    """The spectrum under the kernel that a density states, with equal masses or those of a probe."""
    widths = 0.05 * np.hypot(values, density.linear_scale)
    masses = np.full((1, len(values)), 1 / len(values)) if masses is None else masses[None]
    return smooth(density.grid, values, masses, widths)[0][0]


@pytest.mark.slow
@pytest.mark.parametrize("name", WIDE_RANGE)
def test_the_density_band_holds_where_the_quadrature_has_not_converged(name, few_steps):
    """Of 40 runs more than 8 miss with probability 1e-4 if the rate is 5 %: Binomial(40, 0.05)."""
    misses = 0
    for q in runs_of(2, few_steps[name]):
        density = spectral_density(q)
        truth = smoothed(density, WIDE_RANGE[name])
        slack = 1e-9 * truth.max()  # kernels are cut off there
        misses += not ((density.lower <= truth + slack) & (truth <= density.upper + slack)).all()
        # No density is above the peak of its kernel; h changes by 5 % in a width, and a little within a cell.
        assert (density.upper * density.bandwidth * np.sqrt(2 * np.pi) <= 1.05).all()
    assert misses <= 8


@pytest.mark.parametrize("name", WIDE_RANGE)
def test_the_density_of_the_probes_is_within_what_their_quadratures_leave_open(name, few_steps, x64):
    values, opened = WIDE_RANGE[name], []
    for i, q in enumerate(runs_of(1, few_steps[name])):
        if i == 8:
            break
        draw = jax.random.normal(jax.random.fold_in(jax.random.fold_in(jax.random.key(0), i), 0), (400,))
        density = spectral_density(q)
        exact = smoothed(density, values, np.asarray(draw) ** 2 / np.sum(np.asarray(draw) ** 2))
        widths = _relative_width(density.linear_scale)
        lower, middle, upper = _curves(q, density.grid, widths, q.noise_floor, None)
        slack = 1e-9 * exact.max()
        assert (lower <= exact + slack).all()
        assert (exact <= upper + slack).all()
        opened.append(np.abs(exact - middle).max() / exact.max())
    assert max(opened) > 1e-5, "there is an error to hold"


def test_steps_close_what_the_quadrature_leaves_open():
    """The kernel is two Ritz spacings wide or more: on a contour y widths high, exp(-4 π y + y² / 2) is left
    of the error, below 1e-8 at y = 2. Of rounding, δ / y h times exp(y² / 2) for |K|."""
    q = run(SPECTRA["semicircle"], 0)
    density = spectral_density(q)
    lower, middle, upper = _curves(
        q, density.grid, _relative_width(density.linear_scale), q.noise_floor, None
    )
    bound = 1.1 * np.exp(2) / 2 * q.noise_floor / density.bandwidth * middle.max()
    assert (np.maximum(upper - middle, middle - lower) <= bound + 1e-8 * middle.max()).all()


@pytest.mark.slow
@pytest.mark.parametrize("bandwidth", [1e-5, 1e-3, 0.3])
def test_a_grid_much_coarser_than_the_kernel_has_a_finite_band_that_holds(bandwidth):
    values, grid = SPECTRA["semicircle"], np.linspace(-3.0, 3.0, 13)
    misses = 0
    for q in runs_of(4, run(values, 0, num_probes=40)):
        density = spectral_density(q, bandwidth=bandwidth, grid=grid)
        truth = smooth(grid, values, np.full((1, 1000), 1e-3), np.full(1000, bandwidth))[0][0]
        misses += not ((density.lower <= truth + 1e-9) & (truth <= density.upper + 1e-9)).all()
        assert density.upper.max() <= 1 / 0.5  # all mass under one hat
    assert misses <= 3  # of ten: four or more with probability 1e-3


@pytest.mark.slow
def test_the_density_band_is_no_wider_than_its_level_asks_for():
    """A probe sees the smoothed density p with variance 2 (mean K² - p²) / (n + 2), see `band`.

    The band is as wide as limits at the normal law's quantile, for as many tests as the grid holds kernel
    widths, but where four probes differ by more: χ² of three degrees of freedom is above its mean at 39 % of
    the points, so not at the median. Skewness and what the quadratures leave open add the rest.
    """
    values, ratios = np.sort(SPECTRA["semicircle"]), []
    for seed in range(10):
        density = spectral_density(run(values, seed, num_probes=4))
        equal, widths = np.full((1, 1000), 1e-3), 0.05 * np.hypot(values, density.linear_scale)
        (truth,), square = smooth(density.grid, values, equal, widths)
        inside = truth > 0.1 * truth.max()
        tests = np.sum(np.diff(density.grid) / density.bandwidth[1:])
        ideal = 2 * norm.isf(0.025 / tests) * np.sqrt(2 * (square - truth**2) / (1000 + 2) / 4)
        ratios.append(np.median(((density.upper - density.lower) / ideal)[inside]))
    assert 0.95 <= np.median(ratios) <= 1.2


@pytest.mark.slow
def test_cdf_of_an_exact_rule_is_the_step_function():
    quadrature = run(np.repeat([1.0, 2.0, 4.0], [100, 50, 50]), 0, num_steps=10, num_probes=200)
    lower, estimate, upper = quadrature.cdf(np.array([0.5, 1.5, 3.0, 5.0]))
    assert (lower[[0, 3]] == [0, 1]).all()
    assert (upper[[0, 3]] == [0, 1]).all()
    # 200 probes of 200 dimensions: sd sqrt(2 F (1 - F) / 40000) = 0.35 %.
    assert np.abs(estimate - [0, 0.5, 0.75, 1]).max() < 4 * 0.0036
    # A width from sampling alone: Bonferroni over 3 nodes is 2.394 sd a side, twice. The sd itself is that of
    # the share seen, off by (1 - 2 F) δF / 2 F (1 - F) = 2 % for δF of four sd at F = 3/4. Each end moves
    # inwards to a whole number of the 200 eigenvalues.
    share = np.array([0.5, 0.75])
    width = 2 * norm.isf(0.05 / 6) * np.sqrt(2 * share * (1 - share) / 40_000)
    found = (upper - lower)[1:3]
    assert np.all((0.97 * width - 2 / 200 <= found) & (found <= 1.03 * width))
    np.testing.assert_allclose(200 * found, np.round(200 * found), atol=1e-9)


@pytest.mark.slow
def test_the_sampling_band_holds_at_its_rate_and_no_more():
    """The rule of one probe for five eigenvalues is exact, made here in NumPy: all misses are by chance.

    At level 80 % each of the four inner steps of the CDF leaves the band with probability 20 % / 5, which
    Bonferroni over five nodes leaves it. Of 600 probes that is 96 misses, with a spread of
    sqrt(96) = 10 and as much again since neighbours miss together. Without the correction they would be 480,
    twice as many with one side in place of two.
    """
    rng, misses, steps = np.random.default_rng(0), 0, np.arange(1, 5) / 5
    for _ in range(600):
        weights = rng.chisquare(40, (1, 5))  # of five spaces with 40 dimensions each
        exact = spectra.Quadrature(
            nodes=np.arange(1.0, 6.0)[None],
            weights=weights / weights.sum(),
            residuals=np.zeros((1, 5)),
            lengths=np.array([5]),
            asymmetry=np.zeros(1),
            size=200,
            num_matvecs=5,
            precision=2.2e-16,
            status=spectra.Status.INVARIANT,
        )
        lower, _, upper = exact.cdf(np.arange(1.5, 5.0), level=0.8)
        misses += np.sum((steps < lower) | (steps > upper))
    assert 96 - 40 <= misses <= 96 + 40


@pytest.mark.slow
def test_tolerance_is_reached_or_its_absence_is_said():
    values = SPECTRA["semicircle"]
    reached = run(values, 0, num_probes=16, tol=0.1)
    assert reached.status is spectra.Status.CONVERGED
    assert reached.band_width() <= 0.1
    assert reached.num_matvecs < 60 * 16
    short = run(values, 0, num_probes=2, tol=0.01)
    assert short.status is spectra.Status.BUDGET_EXHAUSTED
    assert short.band_width() > 0.01
    assert "num_steps" in str(short.status)


def test_band_width_bounds_the_distance_to_the_truth():
    """Wasserstein-1 over the range, ∫|F - F̂|, is below the mean width of a band that holds both."""
    from scipy.stats import wasserstein_distance

    values = SPECTRA["semicircle"]
    quadrature = run(values, 3)
    distance = wasserstein_distance(values, quadrature.nodes.ravel(), None, quadrature.weights.ravel())
    assert distance / np.ptp(values) <= quadrature.band_width()


def test_more_probes_extend_a_run():
    few, many = (run(BULK_AND_OUTLIERS, 0, num_probes=k) for k in (2, 3))
    np.testing.assert_array_equal(few.nodes, many.nodes[:2])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"bandwidth": 0.0}, "bandwidth"),
        ({"bandwidth": -1.0}, "bandwidth"),
        ({"bandwidth": np.nan}, "bandwidth"),
        ({"grid": [1.0, 0.0]}, "grid"),
        ({"grid": [1.0]}, "grid"),
        ({"grid": [0.0, np.inf]}, "grid"),
        ({"level": 1.0}, "level"),
        ({"level": np.nan}, "level"),
    ],
)
def test_bad_smoothing_arguments_are_named(options, word):
    with pytest.raises(spectra.SpectraError, match=word):
        spectral_density(run(SPECTRA["decay"], 0, num_probes=1), **options)


@pytest.mark.parametrize("moved", [1e-12, 2e-3, 1e-2], ids=["little", "some", "a fifth of a kernel"])
def test_eigenvalues_known_to_within_a_distance_have_the_band_of_that_distance(moved):
    """Of sixty zeros, rounding of a tenth of a kernel left nothing known of the density there."""
    values = np.append(np.zeros(60), np.linspace(0.1, 3, 40))
    widths, equal = Width(0.05, 0.05), np.full((1, 100), 0.01)
    grid = np.linspace(-0.6, 4.5, 700)
    lower, density, upper = moved_kernels(grid, values, widths, moved)
    (truth,) = smooth(grid, values, equal, widths(values))[0]
    np.testing.assert_allclose(density, truth, rtol=1e-12, atol=1e-12)
    rng, furthest = np.random.default_rng(0), []
    for shift in (-moved, moved, *(moved * rng.uniform(-1, 1, (20, 100)))):
        places = values + shift
        (truth,) = smooth(grid, places, equal, widths(places))[0]
        furthest.append(truth)
        rounding = 1e-13 * truth.max()
        assert np.all(truth >= lower - rounding)
        assert np.all(truth <= upper + rounding)
    ends = np.ptp(furthest[:2], axis=0)  # all eigenvalues moved one way, and the other
    assert np.trapezoid(upper - lower, grid) < 2 * np.trapezoid(ends, grid)


@pytest.mark.slow
def test_the_band_of_an_exact_spectrum_with_many_zeros_is_that_of_its_rounding():
    values = np.append(np.zeros(60), np.linspace(0.1, 1, 40))
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((100, 100)))[0]
    report = spectra.spectrum(
        spectra.MatrixOperator(jax.numpy.asarray((rotation * values) @ rotation.T, np.float32)),
        key=jax.random.key(0),
    )
    density = spectra.spectral_density(report)
    assert np.trapezoid(density.upper - density.lower, density.grid) < 0.2  # it was 1.8
