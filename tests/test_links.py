"""Ritz vectors taken out, converged or not: what couples them to the rest is known, and bounds hold."""

import jax
import numpy as np
import pytest
from scipy.stats import binom, wasserstein_distance

import spectra
from spectra.density.extremes import extreme
from spectra.estimators.bracket import linked
from spectra.quadrature.links import Links

N, R, STEPS, PROBES = 150, 30, 12, 3
RNG = np.random.default_rng(0)
SPECTRA = {
    "decaying": np.arange(1.0, N + 1) ** -1.5,
    "flat": np.linspace(-1.0, 2.0, N),
    "repeated": np.repeat(RNG.uniform(0.0, 1.0, N // 3) ** 4, 3),
    "indefinite with outliers": np.append(0.1 * RNG.standard_normal(N - 8), np.linspace(1.0, 5.0, 8)),
}
FUNCTIONS = {
    "log": (lambda x: np.log(x + 3.0), True),
    "exp": (np.exp, True),
    "inverse": (lambda x: 1 / (x + 2.0), True),
    "absolute value": (np.abs, False),
    "ramp": (lambda x: np.maximum(x - 0.3, 0.0), False),
}
X = np.linspace(-1.2, 5.2, 400)


def split_by_hand(values, r, share, seed):
    """T, r_j and B from Lanczos with full orthogonalisation and the dense complement, in NumPy alone."""
    rows = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(values), 1)))[0].T
    for _ in range(r - 1):
        w = values * rows[-1]
        for _ in range(2):
            w = w - rows.T @ (rows @ w)
        rows = np.vstack([rows, w / np.linalg.norm(w)])
    theta, s = np.linalg.eigh(rows * values @ rows.T)
    vectors = s.T @ rows
    residuals = np.linalg.norm(vectors * values - theta[:, None] * vectors, axis=1)
    taken = np.argsort(residuals)[: int(share * r)]
    outside = np.linalg.svd(vectors[taken])[2][len(taken) :]
    return theta[taken], residuals[taken], np.linalg.eigvalsh(outside * values @ outside.T)


@pytest.fixture(scope="module", params=[*SPECTRA])
def parts(request):
    values = SPECTRA[request.param]
    return values, [split_by_hand(values, r, share, r) for r in (3, 12, R) for share in (0.7, 1.0)]


def test_functions_are_off_by_no_more_than_is_said(parts):
    values, cases = parts
    ends = (float(values.min()), float(values.max()))
    for theta, residuals, rest in cases:
        for f, one_signed in FUNCTIONS.values():
            off = f(values).sum() - f(theta).sum() - f(rest).sum()
            low, high = linked(f, Links(theta, residuals), ends, one_signed)
            rounding = 100 * N * np.finfo(float).eps * np.abs(f(values)).max()
            assert low - rounding <= off <= high + rounding


def test_the_bound_of_a_square_is_what_it_is_off_by(parts):
    # tr H² = |T|² + |B|² + 2 β², to the digit; so says the bound by f'' = 2, the least of the three.
    values, cases = parts
    for theta, residuals, rest in cases:
        off = np.sum(values**2) - np.sum(theta**2) - np.sum(rest**2)
        beta = Links(theta, residuals).beta
        assert off == pytest.approx(2 * beta**2, abs=1e-11 * np.sum(values**2))
        low, high = linked(np.square, Links(theta, residuals), (-9.0, 9.0), True)
        assert (low, high) == (0.0, pytest.approx(2 * beta**2, rel=1e-6, abs=1e-13))


def test_no_count_is_off_by_more_than_is_said(parts):
    values, cases = parts
    for theta, residuals, rest in cases:
        away = Links(theta, residuals).moved(X, 1e-12)

        def below(places, x):
            return np.searchsorted(np.sort(places), x)

        off = below(values, X) - below(theta, X)
        assert (np.abs(off - below(rest, X)) <= 1).all()
        near = np.where(np.isfinite(away), away, 1e9) + 1e-11
        assert (below(rest, X - near) <= off).all()
        assert (off <= below(rest, X + near)).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_whole_reaches_no_further_than_is_said(sign, parts):
    values, cases = parts
    for theta, residuals, rest in cases:
        links = Links(theta, residuals)
        end, truth = links.end(float(sign * (sign * rest).max()), sign), float((sign * values).max())
        assert sign * end >= truth - 1e-12
        # By Weyl no further than β from the further of both; and not a bound of nothing.
        assert sign * end <= max((sign * rest).max(), (sign * theta).max()) + links.beta + 1e-12


def run(values, key, probes=PROBES):
    op = spectra.MatrixOperator(np.diag(values))
    return spectra.slq(op, key=key, num_steps=STEPS, num_probes=probes, deflate=R)


@pytest.mark.slow
def test_a_run_is_what_it_is_by_hand(x64):
    values = SPECTRA["flat"]
    q = run(values, jax.random.key(0))
    assert (q.size, q.bulk.size, q.num_matvecs) == (N, N - R, R + PROBES * STEPS)
    # Traces of powers 1 and 2 are those of T, B and β: what is taken out and what probes see of the rest.
    assert q.links.shape == q.atoms.shape == (R,)
    assert np.all(np.abs(q.atoms) <= 2.0)
    centre = values.sum() - q.atoms.sum()
    assert abs(q.bulk.mean(np.asarray) * q.bulk.size - centre) <= 5 * np.sqrt(2 * np.sum(values**2) / PROBES)
    np.testing.assert_allclose(q.weights.sum(axis=1), 1, rtol=0, atol=1e-12)
    # A flat spectrum has no eigenpair after a fifth of its order; outliers have.
    assert len(q.resolved) < R / 3


@pytest.mark.slow
def test_resolved_eigenvalues_are_eigenvalues(x64):
    values = SPECTRA["indefinite with outliers"]
    q = run(values, jax.random.key(1))
    found = q.resolved
    assert len(found) >= 8
    away = np.abs(found[:, None] - values).min(axis=1)
    # r <= 0.01 gap: within r² / gap of an eigenvalue, at most a hundredth of a hundredth of the range.
    assert (away <= 1e-4 * np.ptp(values)).all()
    count = spectra.count_above(q, 0.8)
    assert count.lower == count.value == 8
    assert count.upper < 8.5  # what is not resolved may have some weight there


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SPECTRA])
def test_bands_limits_and_intervals_hold_at_their_rate(name, x64):
    values = np.sort(SPECTRA[name])
    truth = np.searchsorted(values, X, side="right") / N
    misses, keys = np.zeros(4, int), jax.random.split(jax.random.key(2), 12)
    for key in keys:
        q = run(values, key)
        low, _, high = q.cdf(X)
        misses[0] += not ((low <= truth + 1e-12) & (truth <= high + 1e-12)).all()
        for i, f in ((1, lambda x: np.log(x + 3.0)), (2, np.abs)):
            ends = spectra.trace_of(q, f, bounds=(-2.0, 6.0)).interval()
            misses[i] += not ends[0] <= f(values).sum() <= ends[2]
        top, bottom = extreme(q, -1), extreme(q, 0)
        misses[3] += not (top.lower <= values[-1] <= top.upper and bottom.lower <= values[0] <= bottom.upper)
    assert all(binom.sf(x - 1, len(keys), 0.05) > 1e-3 for x in misses), misses


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SPECTRA])
def test_the_density_holds_the_smoothed_spectrum(name, x64):
    values, grid, h = SPECTRA[name], np.linspace(-2.0, 6.0, 1601), 0.1
    density = spectra.spectral_density(run(values, jax.random.key(3)), bandwidth=h, grid=grid)
    kernels = np.exp(-(((grid[:, None] - values) / h) ** 2) / 2) / (h * np.sqrt(2 * np.pi))
    exact = kernels.mean(axis=1)
    # A grid point has the mean under its hat, of variance Δ² / 6: (Δ / h)² / 12 of a peak further.
    slack = (grid[1] - grid[0]) ** 2 / h**2 / 12 * kernels.max()
    assert ((density.lower <= exact + slack) & (exact <= density.upper + slack)).all()


@pytest.mark.slow
def test_half_of_the_products_taken_out_leave_a_third_of_the_error(x64):
    # A decaying spectrum: R + 3 x 12 products against 3 x 22 of plain SLQ, means over keys.
    values, op = SPECTRA["decaying"], spectra.MatrixOperator(np.diag(SPECTRA["decaying"]))
    found = np.zeros(2)
    for key in jax.random.split(jax.random.key(4), 6):
        q = run(values, key)
        plain = spectra.slq(op, key=key, num_steps=22, num_probes=PROBES)
        assert q.num_matvecs == plain.num_matvecs
        places, masses = q.parts.measure()
        found += [
            wasserstein_distance(places, values, masses),
            wasserstein_distance(plain.nodes.ravel(), values, plain.weights.ravel()),
        ]
    assert found[0] <= found[1] / 3


def test_it_is_saved_and_loaded_whole(x64, tmp_path):
    q = run(SPECTRA["repeated"], jax.random.key(5))
    loaded = spectra.load(spectra.save(q, tmp_path / "q"))
    np.testing.assert_array_equal(loaded.links, q.links)
    for got, want in zip(loaded.cdf(X), q.cdf(X), strict=True):
        np.testing.assert_array_equal(got, want)


def test_what_cannot_be_taken_out_is_refused(tmp_path):
    op, key = spectra.MatrixOperator(np.diag(SPECTRA["flat"])), jax.random.key(0)
    for count in (0, -1, N - 11):
        with pytest.raises(spectra.SpectraError, match=f"deflate={count} is not between 1 and {N - STEPS}"):
            spectra.slq(op, key=key, num_steps=STEPS, deflate=count)
    for place in ({"basis": "none"}, {"basis_dtype": "bfloat16"}, {"checkpoint": tmp_path / "c"}):
        with pytest.raises(spectra.SpectraError, match="leave out basis=, basis_dtype= and checkpoint="):
            spectra.slq(op, key=key, num_steps=STEPS, deflate=5, **place)
    for given in (True, False):
        with pytest.raises(spectra.SpectraError, match="deflate is of type bool"):
            spectra.slq(op, key=key, num_steps=STEPS, deflate=given)
    with pytest.raises(spectra.SpectraError, match=f"num_steps={N} leaves none of {N} Ritz vectors"):
        spectra.slq(op, key=key, num_steps=N, deflate=5)


@pytest.mark.slow
def test_what_couples_counts_where_all_of_the_complement_is_known(x64):
    # 28 + 12 = 40: each probe has all eigenvalues of B, and those of H are others.
    values = np.linspace(-1.0, 2.0, 40)
    op = spectra.MatrixOperator(np.diag(values))
    q = spectra.slq(op, key=jax.random.key(0), num_steps=STEPS, num_probes=PROBES, deflate=40 - STEPS)
    assert q.status is spectra.Status.COMPLETE
    truth = np.searchsorted(values, X, side="right") / 40
    low, _, high = q.cdf(X)
    assert ((low <= truth + 1e-12) & (truth <= high + 1e-12)).all()
    for f in (np.exp, np.abs):
        low, _, high = spectra.trace_of(q, f, bounds=(-1.0, 2.0)).interval()
        assert low <= f(values).sum() <= high
    count = spectra.count_above(q, 0.5).interval()
    assert count.lower <= 20 <= count.upper
    assert np.isfinite(spectra.spectral_density(q).upper).all()
    # r <= 0.01 gap: within 1e-4 of a gap, of 3 / 39.
    assert (np.abs(q.resolved[:, None] - values).min(axis=1) <= 1e-5).all()


@pytest.mark.slow
def test_a_tolerance_is_met_by_the_whole(x64):
    # One eigenvalue of 30 is in doubt on either side, which no probe narrows.
    op = spectra.MatrixOperator(np.diag(np.linspace(-1.0, 2.0, 30)))
    for tol in (0.05, 0.3, 0.6):
        q = spectra.slq(op, key=jax.random.key(0), num_steps=20, num_probes=6, deflate=4, tol=tol)
        assert (q.status is spectra.Status.CONVERGED) == (q.band_width() <= tol)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_eigenvalues_of_the_complement_are_not_taken_for_those_of_the_whole(seed, x64):
    # One Ritz vector mixes all eigenvectors: what probes resolve outside of it is off by up to 0.03.
    values = 2.0 ** -np.arange(40)
    op = spectra.MatrixOperator(np.diag(values))
    q = spectra.slq(op, key=jax.random.key(seed), num_steps=STEPS, num_probes=PROBES, deflate=1)
    assert len(q.parts.sampled)
    for found in q.resolved:
        i = int(np.argmin(np.abs(values - found)))
        gap = np.min(np.abs(np.delete(values, i) - values[i]))
        assert abs(values[i] - found) <= max(1e-3 * gap, 1e-15)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "count"),
    [
        (np.append(np.zeros(35), np.arange(1.0, 6.0)), 8),
        (np.zeros(40), 5),
    ],
)
def test_a_space_longer_than_the_spectrum_leaves_rounding_which_is_no_asymmetry(values, count, x64):
    op = spectra.MatrixOperator(np.diag(values))
    truth = np.searchsorted(values, X + 1e-6, side="right") / 40
    for key in jax.random.split(jax.random.key(0), 3):
        q = spectra.slq(op, key=key, num_steps=STEPS, num_probes=PROBES, deflate=count)
        assert q.status is not spectra.Status.NOISY
        low, _, high = q.cdf(X + 1e-6, level=0.999)
        assert ((low <= truth + 1e-12) & (truth <= high + 1e-12)).all()
        low, _, high = spectra.trace_of(q, np.abs, bounds=(-2.0, 6.0)).interval(level=0.999)
        assert low - 1e-9 <= np.abs(values).sum() <= high + 1e-9


@pytest.mark.slow  # as the space above, which holds them
def test_eigenpairs_that_are_all_leave_rounding_which_is_no_asymmetry(x64):
    values = np.append(np.zeros(35), np.arange(1.0, 6.0))
    op = spectra.MatrixOperator(np.diag(values))
    pairs = spectra.eigsh(op, 5, key=jax.random.key(0))
    q = spectra.slq(op, key=jax.random.key(1), num_steps=STEPS, num_probes=PROBES, deflate=pairs)
    assert float(spectra.trace_of(q, np.abs, bounds=(-1.0, 6.0))) == pytest.approx(15, abs=1e-9)


@pytest.mark.slow
def test_an_invariant_space_leaves_nothing_coupled(x64):
    values = np.repeat([0.0, 1.0, 4.0], N // 3)
    q = run(values, jax.random.key(6))
    assert len(q.atoms) == 3
    low, _, high = q.cdf(np.array([-0.5, 0.5, 2.0, 5.0]))
    truth = np.array([0, 1 / 3, 2 / 3, 1])
    assert ((low <= truth + 1e-12) & (truth <= high + 1e-12)).all()
