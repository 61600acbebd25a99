"""Deflated quadratures: known eigenpairs are atoms, the rest is resolved, and the band still holds."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import diagonal, planted, runs_of
from scipy.stats import norm

import spectra

N, OUTLIERS = 600, 5e3 * np.arange(1, 6)
RNG = np.random.default_rng(0)
ENTRIES = np.concatenate([RNG.uniform(-0.5, 0.5, N - 5), OUTLIERS]).astype(np.float32)
OP, STEPS = diagonal(ENTRIES), 20
X = np.array([-0.4, -0.25, -0.1, 0.0, 0.1, 0.25, 0.4, 100.0, 1.2e4, 3e4])
TRUTH = np.mean(X[:, None] >= ENTRIES, axis=1)


@pytest.fixture(scope="module")
def pairs():
    return spectra.eigsh(OP, 5, which="LA", key=jax.random.key(1))


def test_rows_contain_the_atoms_with_their_exact_weight(pairs):
    q = spectra.slq(OP, key=jax.random.key(0), num_steps=STEPS, num_probes=3, deflate=pairs)
    assert q.nodes.shape == (3, 25)
    assert (np.diff(q.nodes, axis=1) >= 0).all()
    np.testing.assert_allclose(q.weights.sum(axis=1), 1, rtol=0, atol=1e-6)
    np.testing.assert_allclose(q.nodes[:, -5:], np.tile(OUTLIERS, (3, 1)), rtol=1e-5)
    np.testing.assert_array_equal(q.weights[:, -5:], 1 / N)
    # The bulk is inside its own range: nothing of the outliers has leaked into the complement.
    assert np.abs(q.nodes[:, :-5]).max() <= 0.51
    assert q.size == N
    assert q.num_matvecs == 60


def test_the_bulk_is_resolved_where_outliers_hid_it(pairs):
    options = {"key": jax.random.key(0), "num_steps": STEPS, "num_probes": 4}
    plain = spectra.slq(OP, **options)
    deflated = spectra.slq(OP, **options, deflate=pairs)
    inside = np.linspace(-0.45, 0.45, 50)
    widths = [np.mean(q.cdf(inside).upper - q.cdf(inside).lower) for q in (plain, deflated)]
    assert widths[1] < widths[0]


@pytest.mark.slow
@pytest.mark.parametrize("num_probes", [1, 4])
def test_the_band_covers_the_true_cdf_as_often_as_it_says(pairs, num_probes):
    every = spectra.slq(OP, key=jax.random.key(0), num_steps=STEPS, num_probes=60 * num_probes, deflate=pairs)
    runs = [q.cdf(X) for q in runs_of(num_probes, every)]
    misses = sum(not ((low <= TRUTH) & (high >= TRUTH)).all() for low, _, high in runs)
    # 95 %: more than 8 of 60 misses have probability below 1e-2 if the band is as good as it says.
    assert misses <= 8
    # What it cannot do without: the law of a share F of the bulk under k probes, at the quantile for as many
    # tests as there are nodes; and the bracket, two nodes of 20, on a flat bulk of weight π / 40 each where
    # they are sparsest. Points are moved by the noise floor of the outliers besides, a hundredth of the bulk.
    share = np.minimum(TRUTH * N / (N - 5), 1)
    sampling = 2 * norm.isf(0.025 / STEPS) * np.sqrt(2 * share * (1 - share) / ((N - 5) * num_probes))
    width = np.mean([high - low for low, _, high in runs], axis=0)
    assert (width >= sampling).all()
    assert (width <= 1.5 * (sampling + np.pi / STEPS)).all()


def test_moments_have_no_part_of_the_outliers_variance(pairs):
    trace = ENTRIES.astype(np.float64).sum()
    q = spectra.slq(OP, key=jax.random.key(3), num_steps=STEPS, num_probes=2, deflate=pairs)
    estimate = spectra.report.spectrum.trace_estimate(q)
    # Without deflation the standard error is 0.4 of the trace; the bulk alone has 5, and the values of
    # five float32 eigenvalues near 1e4 are good to 1e-2 each.
    assert estimate.stderr < 10
    assert abs(estimate.value - trace) <= 4 * estimate.stderr + 0.1


def test_density_integrates_to_one_and_keeps_its_band(pairs):
    q = spectra.slq(OP, key=jax.random.key(4), num_steps=STEPS, num_probes=3, deflate=pairs)
    density = spectra.spectral_density(q)
    assert density.integral() == pytest.approx(1.0, abs=1e-6)
    assert ((density.lower <= density.density) & (density.density <= density.upper)).all()
    # Atoms are known to δ, the noise floor and the coupling. On a contour one kernel width h high that
    # changes the density of an atom by δ / h of a kernel's peak, on either side, times sqrt(e) for |K| there.
    above, h = np.append(0, density.grid[:-1]) > 1e3, density.bandwidth  # hats and all
    known = 5 / N * (q.noise_floor + q.coupling) / h / (np.sqrt(2 * np.pi) * h)
    assert (density.upper - density.lower <= 1.05 * 2 * np.sqrt(np.e) * known)[above].all()
    assert len(density.outliers) >= 5


def test_tolerance_saves_and_loads(pairs, tmp_path):
    q = spectra.slq(OP, key=jax.random.key(5), num_steps=STEPS, num_probes=4, tol=0.2, deflate=pairs)
    loaded = spectra.load(spectra.save(q, tmp_path / "q"))
    for got, want in zip(loaded.cdf(X), q.cdf(X), strict=True):
        np.testing.assert_array_equal(got, want)


def test_unconverged_vectors_widen_the_band_or_are_refused():
    op = diagonal(np.concatenate([np.linspace(-1, 1, N - 5), np.arange(5.0, 10.0)]), "float32")
    rough = spectra.eigsh(op, 5, which="LA", key=jax.random.key(0), tol=1e-3)
    q = spectra.slq(op, key=jax.random.key(0), num_steps=STEPS, num_probes=2, deflate=rough)
    size = np.linalg.norm(rough.residuals)
    assert 0 < q.coupling <= size**2 / 3  # the gap from 5 down to 1, less what Ritz values stay inside
    bad = spectra.eigsh(op, 5, which="LA", key=jax.random.key(0), tol=1e-6, max_matvecs=8)
    with pytest.raises(spectra.SpectraError, match="have not converged"):
        spectra.slq(op, key=jax.random.key(0), num_steps=STEPS, deflate=bad)
    with pytest.raises(spectra.SpectraError, match=f"vectors of order {N}"):
        spectra.slq(spectra.MatrixOperator(np.eye(20)), key=jax.random.key(0), num_steps=5, deflate=rough)


def repeated(values, n=40, seed=0):
    """A dense matrix in which each of a few values is an eigenvalue many times."""
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]
    return spectra.MatrixOperator((q * np.resize(values, n) @ q.T).astype(np.float32))


def test_a_space_that_ends_beside_known_vectors_is_no_asymmetry():
    """Three of forty keys: a remainder of 1e-6 just beyond rounding, a tenth of it along the known vector."""
    op = repeated([1.0, -1.0])
    for seed in range(40):
        q = spectra.slq(op, key=jax.random.key(seed), num_steps=5, num_probes=4, deflate=1)
        # Rows of coefficients are those of H to 40 roundings (see `breakdown_noise`), at most.
        assert np.abs(q.range).max() <= 1 + 40 * np.finfo(np.float32).eps
        assert q.status is not spectra.Status.NOISY


def test_probes_are_independent_of_pairs_from_the_same_key():
    """Eigenvectors of a repeated eigenvalue are what a start has of its space: probes from the same numbers
    would have none of it left, and the band missed in every run with two pairs and more."""
    op, missed = repeated([0.0, 1.0]), 0
    for seed in range(20):
        key = jax.random.key(seed)
        pairs = spectra.eigsh(op, 2, key=key)
        low, _, high = spectra.slq(op, key=key, num_steps=5, num_probes=4, deflate=pairs).cdf(0.5)
        missed += not low <= 0.5 <= high
    assert missed <= 4  # 5 % each: five and more of 20 have probability 0.3 %


def test_pairs_of_another_operator_are_refused(x64):
    """Of parameters before the last steps of training, or changed by hand: their atoms are in the wrong
    place. Pairs that have hardly converged belong to it."""
    values = np.append(np.linspace(-1.0, 1.0, 44), [20.0, 12.0, 8.0, 5.0])
    op = spectra.MatrixOperator(planted(values))
    pairs = spectra.eigsh(op, 4, which="LA", key=jax.random.key(0))
    run = partial(spectra.slq, key=jax.random.key(0), num_steps=6, num_probes=2)
    more = partial(spectra.eigsh, k=2, which="LA", key=jax.random.key(0))
    moved = spectra.MatrixOperator(planted(values) + 0.01 * np.diag(np.cos(np.arange(48.0))))
    x = np.asarray(pairs.vectors)
    for case, text in (
        (dataclasses.replace(pairs, values=np.asarray(pairs.values) * 1.001), "not those of this operator"),
        (dataclasses.replace(pairs, vectors=jnp.asarray(x[::-1].copy())), "not those of this operator"),
        (dataclasses.replace(pairs, vectors=jnp.asarray(x * 1.01)), "not orthonormal"),
        (dataclasses.replace(pairs, vectors=jnp.asarray(x[[0, 0, 1, 2]])), "not orthonormal"),
        (dataclasses.replace(pairs, vectors=jnp.asarray(x * np.nan)), "not orthonormal"),
    ):
        for function in (run, more):
            with pytest.raises(spectra.SpectraError, match=text):
                function(op, deflate=case)
    for function in (run, more):
        with pytest.raises(spectra.SpectraError, match="not those of this operator"):
            function(moved, deflate=pairs)
        with pytest.raises(spectra.SpectraError, match="vectors of order 48, the operator has 60"):
            function(spectra.MatrixOperator(jnp.eye(60)), deflate=pairs)
    for tol in (1e-8, 0.3):
        assert run(
            op, deflate=spectra.eigsh(op, 4, which="LA", key=jax.random.key(0), tol=tol)
        ).atoms.shape == (4,)


@pytest.mark.slow
def test_pairs_beside_rough_ones_are_as_rough_and_say_so():
    """Of an order that is computed by LAPACK, whose residuals are of the matrix and not of the complement."""
    op = spectra.MatrixOperator(planted(np.append(np.linspace(-1.0, 1.0, 44), [20.0, 12.0, 8.0, 5.0])))
    rough = spectra.eigsh(op, 4, which="LA", key=jax.random.key(0), tol=1e-8, max_matvecs=9)
    assert not rough.converged.all()
    for which, k in (("LA", 25), ("SM", 2)):
        found = spectra.eigsh(op, k, which=which, key=jax.random.key(0), tol=1e-6, deflate=rough)
        matrix, x = (np.asarray(a, np.float64) for a in (op.as_matrix(), found.matrix()))
        true = np.linalg.norm(matrix @ x - x * found.values, axis=0)
        # |H - λ| is 40 at most, by which the rounding of the vectors to float32 counts.
        np.testing.assert_allclose(found.residuals, true, rtol=0, atol=40 * np.finfo(np.float32).eps)
        assert not found.converged.all()
        assert found.status is spectra.Status.NOT_CONVERGED
