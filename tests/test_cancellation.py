"""Parts of an operator that cancel are each rounded relative to themselves; stated errors hold that.

Truth is the same combination of the float32 parts in float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow_but
from scipy import stats

import spectra
from spectra.base.errors import Status

N = 40
rng = np.random.default_rng(1)
TURN = np.linalg.qr(rng.standard_normal((N, N)))[0]
SPIKED = (TURN * np.append(np.linspace(0.5, 1.0, N - 1), 1e3)) @ TURN.T
SPIKED = np.asarray((SPIKED + SPIKED.T) / 2, np.float32)
TOP = np.asarray(TURN[:, -1], np.float32)[None]
NEAR = np.asarray(np.stack([TOP[0], TOP[0] + 1e-3 * TURN[:, 0]]), np.float32)


def deflated():
    """A spectrum without its outlier: a matrix less its leading pair."""
    op = spectra.MatrixOperator(SPIKED) - spectra.LowRankOperator(TOP, [1e3])
    return op, SPIKED.astype(float) - 1e3 * TOP.T.astype(float) @ TOP.astype(float)


def subtracted():
    """The same as two matrices, neither of which says what it depends on."""
    pair = np.asarray(1e3 * TOP.T @ TOP, np.float32)
    return spectra.MatrixOperator(SPIKED) - spectra.MatrixOperator(pair), SPIKED.astype(float) - pair


def projected():
    """The same by a projector on both sides."""
    project = spectra.MatrixOperator(np.eye(N, dtype=np.float32)) - spectra.LowRankOperator(TOP)
    dense = np.eye(N) - TOP.T.astype(float) @ TOP.astype(float)
    return project @ spectra.MatrixOperator(SPIKED) @ project, dense @ SPIKED.astype(float) @ dense


def parallel():
    """The difference of two directions that are nearly the same."""
    return spectra.LowRankOperator(NEAR, [1e3, -1e3]), NEAR.T.astype(float) * [1e3, -1e3] @ NEAR.astype(float)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "make",
    [
        subtracted,
        pytest.param(deflated, marks=SLOW),
        pytest.param(projected, marks=SLOW),
        pytest.param(parallel, marks=SLOW),
    ],
)
def test_what_is_stated_holds_the_rounding_of_the_parts(make):
    op, dense = make()
    eigenvalues = np.linalg.eigvalsh(dense)
    for key in jax.random.split(jax.random.key(0), 3):
        pairs = spectra.eigsh(op, 2, which="LA", key=key)
        away = np.abs(pairs.values[:, None] - eigenvalues).min(axis=1)
        assert (away <= pairs.residuals + pairs.noise_floor).all()
    # Not by being wide: a product of float32 with parts of this size is right to some sqrt(n) roundings.
    assert pairs.noise_floor <= 4 * np.sqrt(N) * 1e3 * float(jnp.finfo(jnp.float32).eps) * 3
    report = spectra.spectrum(op, key=jax.random.key(0))
    assert report.status is Status.EXACT
    assert report.largest.lower <= eigenvalues[-1] <= report.largest.upper
    low, _, high = report.trace.interval(0.9999)
    assert low <= np.trace(dense) <= high
    low, _, high = spectra.trace(op, key=jax.random.key(0)).interval(0.9999)
    assert low <= np.trace(dense) <= high


@pytest.mark.slow
def test_a_shift_that_cancels_leaves_the_rounding_of_what_it_cancels():
    shift = 3e3
    for seed in range(20):
        noise = np.random.default_rng(seed).standard_normal((N, N)) / np.sqrt(N)
        matrix = np.asarray(shift * np.eye(N) + noise + noise.T, np.float32)
        eigenvalues = np.linalg.eigvalsh(matrix.astype(float)) - shift
        op = spectra.MatrixOperator(matrix).shift(-shift)
        pairs = spectra.eigsh(op, 3, which="LA", tol=1e-4, key=jax.random.key(seed))
        away = np.abs(pairs.values[:, None] - eigenvalues).min(axis=1)
        assert (away <= pairs.residuals + pairs.noise_floor).all()
        # Entries of a product are rounded by eps / 2 of the shift's share, in H v and with the shift.
        assert pairs.noise_floor <= 3 * float(jnp.finfo(jnp.float32).eps) * shift


def test_shifts_meet_as_numbers():
    """Of products only the rounding of the larger shift would be left; a power of two scales without any."""
    matrix = np.asarray(SPIKED / 1e3, np.float32)
    op = spectra.MatrixOperator(matrix)
    for back, scale in ((op.shift(1e4).shift(-1e4), 1), ((2 * op.shift(1e4)).shift(-2e4), 2)):
        np.testing.assert_array_equal(back.as_matrix(), scale * matrix)
        low, _, high = spectra.trace(back, key=jax.random.key(0), method="exact").interval()
        assert low <= scale * np.trace(matrix.astype(float)) <= high
    np.testing.assert_allclose((3 * op.shift(2.0)).as_matrix(), 3 * matrix + 6 * np.eye(N), rtol=1e-6)


def test_a_large_diagonal_hides_nothing_of_the_spread_of_signs():
    """|Hv|² less (vᵀHv)² / n is below the rounding of either where the diagonal is 10⁴ times the rest; it was
    taken for the variance, and 45 % of keys missed."""
    noise = np.random.default_rng(0).standard_normal((N, N)) / np.sqrt(N)
    op = spectra.MatrixOperator(np.asarray(noise + noise.T, np.float32)).shift(1e4)
    exact = np.trace(np.asarray(noise + noise.T, np.float32).astype(float)) + 1e4 * N

    def estimate(key):
        found = spectra.trace(op, key=key, method="hutchinson", num_matvecs=16)
        return found.value - exact, found.stderr, found.dof

    error, stderr, dof = map(
        np.asarray, jax.jit(jax.vmap(estimate))(jax.random.split(jax.random.key(0), 300))
    )
    # Values near 4e5 are rounded to 0.03; the standard error is 2.8. 300 keys: 95 % less two deviations.
    assert np.mean(np.abs(error) <= stats.t.ppf(0.975, dof) * stderr + 0.06) >= 0.925
    assert np.mean(stderr) <= 1.5 * np.sqrt(np.mean(error**2))


@pytest.mark.slow
def test_asymmetry_names_a_shift_that_cancels():
    noise = np.random.default_rng(0).standard_normal((60, 60)) / np.sqrt(60)
    op = spectra.MatrixOperator(np.asarray(1e5 * np.eye(60) + noise, np.float32)).shift(-1e5)
    with pytest.raises(spectra.NotSymmetricError, match=r"The shift by -100000 may cancel .* float64"):
        spectra.eigsh(op, 3, which="LA", key=jax.random.key(0))


SMALL = 60
AXES = np.linalg.qr(np.random.default_rng(8).standard_normal((SMALL, SMALL)))[0]
SPREAD = (AXES * (1 / np.arange(1.0, SMALL + 1))) @ AXES.T


@pytest.mark.slow
@pytest.mark.parametrize("share", [1e-5, 1e-7])
def test_samples_of_a_difference_hold_the_rounding_of_both(share):
    """Products of either are right to 6e-8 of themselves: of what is left, that is up to all. Compared with
    what is left alone, rounding was taken for a map that is not symmetric, and refused."""
    first = np.float32((SPREAD + SPREAD.T) / 2)
    second = np.float32(first + share * np.ones((SMALL, SMALL)) / SMALL)
    rest = first.astype(float) - second
    a, b = spectra.MatrixOperator(jnp.asarray(first)), spectra.MatrixOperator(jnp.asarray(second))
    held = []
    for seed in range(5):
        key = jax.random.key(seed)
        norm = spectra.frobenius_norm(a - b, key=key, num_matvecs=24)
        parts = [(norm, np.linalg.norm(rest))]
        for method in ("hutchinson", "xtrace"):
            found = spectra.trace(a - b, key=key, num_matvecs=24, method=method)
            parts.append((found, np.trace(rest)))
            assert found.stderr <= 1e-5 * SMALL**0.5  # the products' own, |v| |Hv| 6e-8, and the sample's
        held += [lower <= truth <= upper for found, truth in parts for lower, _, upper in [found.interval()]]
    assert np.mean(held) >= 0.9  # 15 intervals of 95 %


@pytest.mark.slow
@pytest.mark.parametrize(("step", "probes"), [(1e-7, 8), (1e-1, SMALL)])
def test_a_comparison_holds_the_rounding_of_both(step, probes):
    """As many probes as columns leave no sampling error, and rounding all the same."""
    first = np.float32((SPREAD + SPREAD.T) / 2)
    second = first + np.float32(step * (SPREAD @ SPREAD + np.eye(SMALL)))
    a, b = (spectra.MatrixOperator(jnp.asarray((x + x.T) / 2)) for x in (first, second))
    exact = [np.asarray(op.matrix, float) for op in (a, b)]
    truth = np.linalg.norm(exact[0] - exact[1]) / np.linalg.norm(exact[1])
    for seed in range(4 if probes < SMALL else 1):
        key = jax.random.key(seed)
        found = spectra.compare_operators(a, b, key=key, num_probes=probes, num_pairs=1, by=None)
        assert found.frobenius.lower <= truth <= found.frobenius.upper
        assert found.trace.lower <= np.trace(exact[0]) / np.trace(exact[1]) <= found.trace.upper
        assert found.frobenius.upper <= 3 * truth + 1e-6


@pytest.mark.slow
def test_factors_of_a_product_do_not_cancel():
    """A (-A) is -A²: that A - A is nothing says nothing of it."""
    numbers = np.arange(1.0, 81.0)
    op = spectra.MatrixOperator(jnp.asarray(np.diag(numbers), jnp.float32))
    product = op @ (-1.0 * op)
    found = spectra.trace(product, key=jax.random.key(0), method="xtrace", num_matvecs=40)
    alone = spectra.trace(op @ op, key=jax.random.key(0), method="xtrace", num_matvecs=40)
    np.testing.assert_allclose([found.value, found.stderr], [-alone.value, alone.stderr], rtol=1e-5)
    low, _, high = found.interval(0.9999)
    assert low <= -np.sum(numbers**2) <= high


def _near_a_multiple_of_the_identity(seed, shift, dtype):
    noise = np.random.default_rng(seed).standard_normal((N, N)) / np.sqrt(N)
    return np.asarray(shift * np.eye(N) + noise + noise.T, dtype)


@pytest.mark.parametrize("around", slow_but(["a submatrix", "a preconditioner"], "a preconditioner"))
def test_a_shift_that_cancels_inside_of_another_operator_is_in_its_floor(around):
    """Only the outermost operator was asked: 13 of these 20 calls stated less than they were off by."""
    shift, held = 3e3, []
    for seed in range(20):
        matrix = _near_a_multiple_of_the_identity(seed, shift, np.float32)
        op, dense = spectra.MatrixOperator(matrix).shift(-shift), matrix.astype(float) - shift * np.eye(N)
        if around == "a submatrix":
            op, dense = op.submatrix(np.arange(N - 8)), dense[: N - 8, : N - 8]
        else:
            op = spectra.PreconditionedOperator(op, jnp.asarray(np.geomspace(0.5, 2, N), jnp.float32))
            scale = np.asarray(op.scale, float)
            dense = scale[:, None] * dense * scale
        pairs = spectra.eigsh(op, 3, which="LA", tol=1e-4, key=jax.random.key(seed))
        away = np.abs(pairs.values[:, None] - np.linalg.eigvalsh(dense)).min(axis=1)
        held.append((away <= pairs.residuals + pairs.noise_floor).all())
        assert pairs.noise_floor <= 8 * float(jnp.finfo(jnp.float32).eps) * shift
    assert all(held)


@pytest.mark.slow
def test_residuals_hold_a_shift_that_cancels_inside_of_a_submatrix(x64):
    """What the shift leaves was taken for |A|, in the type of which nothing finer is known."""
    shift = 1e6
    for seed in range(5):
        matrix = _near_a_multiple_of_the_identity(seed, shift, np.float64)
        op, keep = spectra.MatrixOperator(matrix).shift(-shift).submatrix(np.arange(N - 8)), slice(N - 8)
        dense = (matrix - shift * np.eye(N))[keep, keep]
        b = np.random.default_rng(seed).standard_normal(N - 8)
        found = spectra.solve(op, jnp.asarray(b), key=jax.random.key(0), method="minres", tol=1e-6)
        truth = np.linalg.norm(b - dense @ np.asarray(found.x))
        assert abs(truth - found.residual_norm) <= found.rounding
        assert found.rounding <= 100 * np.finfo(float).eps * shift * np.linalg.norm(found.x)


@pytest.mark.slow
def test_samples_hold_what_cancels_inside_of_another_operator():
    """A difference, cut or scaled, was refused as not symmetric, where the difference alone was not."""
    first = np.float32((SPREAD + SPREAD.T) / 2)
    second = np.float32(first + 1e-6 * np.ones((SMALL, SMALL)) / SMALL)
    rest = first.astype(float) - second
    difference = spectra.MatrixOperator(first) - spectra.MatrixOperator(second)
    scaled = spectra.PreconditionedOperator(
        difference, jnp.asarray(np.geomspace(0.1, 10, SMALL), jnp.float32)
    )
    scale = np.asarray(scaled.scale, float)
    held = []
    for op, dense in (
        (difference.submatrix(np.arange(SMALL - 10)), rest[: SMALL - 10, : SMALL - 10]),
        (scaled, scale[:, None] * rest * scale),
    ):
        for method in ("hutchinson", "xtrace"):
            for seed in range(4):
                found = spectra.trace(op, key=jax.random.key(seed), num_matvecs=24, method=method)
                lower, _, upper = found.interval()
                held.append(lower <= np.trace(dense) <= upper)
                assert found.stderr <= 1e-4 * SMALL**0.5
    assert np.mean(held) >= 0.85  # 16 intervals of 95 %


@pytest.mark.parametrize("seed", range(3))
def test_exact_traces_hold_a_product_that_a_shift_cancels(seed):
    """A column of A ⊗ B is rounded as its largest entry is, which the shift takes away."""
    rng, shift = np.random.default_rng(seed), 1e3
    left, right = (rng.standard_normal((k, k)) for k in (6, 8))
    left = np.float32(np.eye(6) + (left + left.T) / shift)
    right = np.float32(shift * np.eye(8) + right + right.T)
    op = spectra.KroneckerOperator(left, right).shift(-shift)
    dense = np.kron(left.astype(float), right.astype(float)) - shift * np.eye(48)
    low, _, high = spectra.trace(op, key=jax.random.key(0), method="exact").interval()
    assert low <= np.trace(dense) <= high
    assert high - low <= 48 * 8 * float(jnp.finfo(jnp.float32).eps) * shift
    low, _, high = spectra.diagonal(op, key=jax.random.key(0), method="exact").interval()
    inside = (np.ravel(low) <= np.diag(dense)) & (np.diag(dense) <= np.ravel(high))
    assert inside.all()


def _near_identity(size):
    """A matrix of float32 that differs from I by so much, less I: what is left, and the same in float64."""
    moved = np.asarray(np.eye(N) + size * (TURN * np.linspace(-1, 1, N)) @ TURN.T, np.float32)
    moved = (moved + moved.T) / 2
    return spectra.MatrixOperator(moved).shift(-1.0), moved.astype(float) - np.eye(N)


def test_what_nearly_cancels_is_not_taken_for_asymmetry():
    """Rounding of the parts is a hundredth of what is left of them, whose square root is what is allowed."""
    op, dense = _near_identity(1e-5)
    key, top = jax.random.key(0), np.linalg.eigvalsh(dense)[-1]
    assert np.abs(op.as_matrix() - dense).max() <= 2 * N**0.5 * float(jnp.finfo(jnp.float32).eps)
    pairs = spectra.eigsh(op, 1, which="LA", key=key)
    assert abs(float(pairs.values[0]) - top) <= pairs.residuals[0] + pairs.noise_floor
    rule = spectra.slq(op, key=key, num_steps=20, num_probes=2)
    eps = float(jnp.finfo(jnp.float32).eps)
    assert np.max(rule.nodes) <= top + 8 * eps  # of the parts, of norm one
    spectra.kpm(op, key=key, num_moments=20, num_probes=2)
    # Asymmetry of the size of what is left is none of rounding.
    lopsided = jnp.asarray(np.eye(N) + 1e-2 * np.triu(np.ones((N, N))), jnp.float32)
    other = spectra.FunctionOperator(lambda v: lopsided @ v, jnp.zeros(N)).shift(-1.0)
    with pytest.raises(spectra.NotSymmetricError):
        other.as_matrix()
    with pytest.raises(spectra.NotSymmetricError):
        spectra.slq(other, key=key, num_steps=20, num_probes=2)


@pytest.mark.parametrize("size", [1e-3, 1e-4])
def test_functions_of_what_is_left_hold_the_rounding_of_the_parts(size):
    op, dense = _near_identity(size)
    values, vectors = np.linalg.eigh(dense)
    v = np.random.default_rng(2).standard_normal(N).astype(np.float32)
    for f in (lambda x: x, lambda x: np.exp(x / size)):
        result = spectra.funm(op, f, v)
        error = np.linalg.norm(np.asarray(result.value, float) - vectors @ (f(values) * (vectors.T @ v)))
        assert error <= result.error_bound <= 500 * error  # 36 to 140 times for f(x) = x, as measured


@pytest.mark.slow
def test_what_is_left_of_terms_that_cancel_is_said_to_be_rounding():
    """Of two terms that differ by rounding alone, which need not be symmetric, and is not here."""
    rng = np.random.default_rng(0)
    whole, rounding = (jnp.asarray(x, jnp.float32) for x in rng.standard_normal((2, 12, 12)))
    whole, rounding = whole + whole.T, jnp.finfo(jnp.float32).eps * (rounding - rounding.T)
    terms = [spectra.FunctionOperator(lambda v, m=m: m @ v, jnp.zeros(12)) for m in (whole + rounding, whole)]
    with pytest.raises(spectra.NotSymmetricError, match="terms nearly cancel"):
        (terms[0] - terms[1]).as_matrix()
