"""The Lanczos decomposition: exact spectra, orthogonality, breakdown, and what T means."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import SHARP, SPECTRA, N, diagonal, laplacian_eigenvalues, negative_laplacian, planted
from scipy.linalg import eigh_tridiagonal

import spectra
from spectra.operators.pytree import operator


def gram_error(result) -> float:
    """max |Q Qᵀ - I| in NumPy float64, from the rows themselves."""
    length = int(result.length)
    leaves = [np.asarray(x, np.float64)[:length] for x in jax.tree.leaves(result.basis)]
    q = np.concatenate([x.reshape(length, -1) for x in leaves], axis=1)
    return float(np.abs(q @ q.T - np.eye(length)).max())


def ritz(result):
    length = int(result.length)
    alpha = np.asarray(result.alpha, np.float64)[:length]
    return eigh_tridiagonal(alpha, np.asarray(result.beta, np.float64)[: length - 1])


@pytest.mark.parametrize("name", SPECTRA)
def test_decomposition_holds_and_ritz_values_are_eigenvalues(name, dtype):
    eigenvalues = np.sort(SPECTRA[name])
    a = planted(eigenvalues)
    op = spectra.MatrixOperator(a)
    v0 = jnp.asarray(np.random.default_rng(0).standard_normal(N))
    result = spectra.lanczos(op, v0, N)
    length, eps = int(result.length), float(jnp.finfo(dtype).eps)
    size = np.abs(eigenvalues).max()
    assert np.isfinite(result.alpha).all()
    assert np.isfinite(result.beta).all()
    assert (np.asarray(result.alpha)[length:] == 0).all()
    assert (np.asarray(result.beta)[max(length - 1, 0) :] == 0).all()
    assert gram_error(result) <= 1e-5 if dtype == "float32" else gram_error(result) <= 1e-12
    # H Qᵀ = Qᵀ T + r e_mᵀ up to N roundings of a product, each of norm eps |H|.
    q = np.asarray(result.basis, np.float64)[:length]
    t = np.asarray(result.matrix(), np.float64)[:length, :length]
    residual = a @ q.T - q.T @ t
    assert np.linalg.norm(residual[:, :-1]) <= N * eps * size * np.sqrt(N)
    last = np.linalg.norm(residual[:, -1])
    # After a breakdown |r| is reported as zero; it was at most (10 + √N / 2) eps |T|, which
    # N √N eps |H| has room for.
    assert abs(last - float(result.residual_norm)) <= (N * np.sqrt(N) + 30) * eps * size
    # Every Ritz value of an exhausted Krylov space is an eigenvalue (same bound, by Weyl); all
    # eigenvalues are there, since a random start has a component on each.
    theta, _ = ritz(result)
    distance = np.abs(theta[:, None] - eigenvalues)
    bound = N * np.sqrt(N) * eps * size
    assert distance.min(axis=1).max() <= bound
    assert distance.min(axis=0).max() <= bound


BREAKDOWNS = {
    "zero": np.zeros(6),
    "multiple of the identity": 3.5 * np.ones(6),
    "negative multiple of the identity": -1e-3 * np.ones(6),
    "three pairs": np.array([1.0, 1, 2, 2, 3, 3]),
    "rank five of sixty": np.concatenate([np.arange(1.0, 6), np.zeros(55)]),
    "thirty ones and thirty fives": np.repeat([1.0, 5.0], 30),
}


jitted_lanczos = jax.jit(lambda op, v, steps: spectra.lanczos(op, v, steps), static_argnums=2)


@SHARP
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
@pytest.mark.parametrize("name", BREAKDOWNS)
def test_breakdown_ends_with_exact_values_weights_and_length(name, scale, dtype):
    entries = scale * BREAKDOWNS[name]
    values, counts = np.unique(entries, return_counts=True)
    n, eps = len(entries), float(jnp.finfo(dtype).eps)
    steps = min(n, len(values) + 3)
    op = spectra.MatrixOperator(np.diag(entries))
    size = np.abs(entries).max()
    eager = spectra.lanczos(op, jnp.ones(n), steps)
    jitted = jitted_lanczos(op, jnp.ones(n), steps)
    assert eager.status is spectra.Status.INVARIANT
    for result in (eager, jitted):
        assert int(result.length) == len(values)
        assert float(result.residual_norm) == 0
        theta, vectors = ritz(result)
        # n roundings of |H| for the values; weights of values that are separated by at least a
        # fifth of |H| move by five times as much.
        np.testing.assert_allclose(theta, values, rtol=0, atol=n * eps * size)
        np.testing.assert_allclose(vectors[0] ** 2, counts / n, rtol=0, atol=5 * n * eps)
        assert gram_error(result) <= n * eps


CASES = [(name, start) for name in ("uniform", "outliers", "decaying") for start in ("ones", "random")]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"], indirect=True)
@pytest.mark.parametrize(("name", "start"), CASES)
def test_basis_is_orthonormal_after_a_hundred_steps(name, start, dtype):
    n = 100_000
    entries = {
        "uniform": np.linspace(-1.0, 1.0, n),
        "outliers": np.concatenate([np.linspace(0.5, 1.5, n - 10), 1e4 * np.arange(1, 11)]),
        "decaying": np.logspace(0, -8, n),
    }[name]
    v0 = np.ones(n) if start == "ones" else np.random.default_rng(1).standard_normal(n)
    result = spectra.lanczos(diagonal(entries), jnp.asarray(v0), 100)
    # The requirement itself: 84 eps in float32 (1e-5) and 4500 eps in float64 (1e-12).
    limit = 1e-5 if dtype == "float32" else 1e-12
    assert gram_error(result) <= limit
    # The result measures itself in the working precision: sums over 64 numbers at a time and then
    # over at most n / 64 positive parts; 64 roundings for each level.
    assert abs(float(result.orthogonality) - gram_error(result)) <= 128 * jnp.finfo(dtype).eps


def test_extreme_eigenvalues_of_a_one_dimensional_laplacian(dtype):
    n = 40
    op = spectra.FunctionOperator(negative_laplacian, jnp.zeros(n))
    v0 = jnp.asarray(np.random.default_rng(0).standard_normal(n))
    theta, _ = ritz(spectra.lanczos(op, v0, n))
    # All n eigenvalues are distinct, so n steps find them: n roundings of |H| = 4.
    bound = n * float(jnp.finfo(dtype).eps) * 4
    np.testing.assert_allclose(theta, laplacian_eigenvalues(n), rtol=0, atol=bound)


@pytest.mark.slow
def test_extreme_eigenvalues_of_a_two_dimensional_laplacian(dtype):
    shape = (12, 9)
    op = spectra.FunctionOperator(negative_laplacian, jnp.zeros(shape))
    v0 = jnp.asarray(np.random.default_rng(0).standard_normal(shape))
    result = spectra.lanczos(op, v0, 100)
    assert result.basis.shape == (100, *shape)
    theta, _ = ritz(result)
    bound = 100 * float(jnp.finfo(dtype).eps) * 8
    np.testing.assert_allclose(theta[[0, -1]], laplacian_eigenvalues(*shape)[[0, -1]], rtol=0, atol=bound)


def hadamard(v):
    """Orthonormal fast Walsh-Hadamard transform: log2(n) butterflies, its own inverse."""
    n, h = v.size, 1
    while h < n:
        v = v.reshape(-1, 2, h)
        v = jnp.stack([v[:, 0] + v[:, 1], v[:, 0] - v[:, 1]], axis=1)
        h *= 2
    return v.reshape(n) / jnp.sqrt(jnp.asarray(n, v.dtype))


@operator(leaves=("entries",))
class RotatedDiagonal(spectra.LinearOperator):
    """W diag(entries) W with W the Hadamard transform: dense, of known spectrum, at any size."""

    entries: jax.Array

    @property
    def like(self):
        return self.entries

    def mv(self, v):
        return hadamard(self.entries * hadamard(v))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "steps", "n"),
    [("float32", 40, 2**17), ("float32", 100, 2**20), ("float64", 40, 2**20)],
    indirect=["dtype"],
)
@pytest.mark.usefixtures("optimised")
def test_planted_spectrum_of_up_to_a_million_parameters(dtype, steps, n):
    outliers = 1e4 * np.arange(1.0, 7.0)
    entries = np.concatenate([[-5e3], np.linspace(-1.0, 1.0, n - 7), outliers])
    op = RotatedDiagonal(jnp.asarray(entries, dtype))
    # The rotated vector of ones is n^(1/2) e_0: a start that sees one eigenvalue would end at once.
    v0 = jax.random.normal(jax.random.key(0), (n,), dtype)
    result = spectra.lanczos(op, v0, steps)
    assert gram_error(result) <= (3e-5 if dtype == "float32" else 1e-12)
    theta, _ = ritz(result)
    # A product passes 2 log2(n) = 40 butterflies, each with one rounding; Ritz values move by at
    # most the error of H on the Krylov space: 40 eps |H|, and the basis' own error beside it.
    bound = (40 + steps) * float(jnp.finfo(dtype).eps) * outliers[-1]
    np.testing.assert_allclose(theta[-6:], outliers, rtol=0, atol=bound)
    np.testing.assert_allclose(theta[0], -5e3, rtol=0, atol=bound)
    # Every other Ritz value lies in the bulk: no copies, nothing beside the spectrum.
    inside = np.abs(theta[1:-6]) <= 1 + bound
    assert inside.all()


def test_without_reorthogonalisation_no_basis_is_kept():
    op = spectra.MatrixOperator(planted(SPECTRA["indefinite"]))
    v0 = jnp.asarray(np.random.default_rng(0).standard_normal(N))
    bare = spectra.lanczos(op, v0, 12, reorthogonalize="none")
    full = spectra.lanczos(op, v0, 12)
    # Twelve steps on 48 spread eigenvalues converge nowhere, so nothing is lost yet.
    np.testing.assert_allclose(bare.alpha, full.alpha, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="reorthogonalize='full'"):
        _ = bare.basis


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_scaling_the_operator_scales_the_result(scale, dtype):
    a = planted(SPECTRA["decaying"])
    v0 = jnp.asarray(np.random.default_rng(0).standard_normal(N))
    base = spectra.lanczos(spectra.MatrixOperator(a), v0, 30)
    other = spectra.lanczos(spectra.MatrixOperator(scale * a), v0, 30)
    assert int(base.length) == int(other.length)
    # The scaled matrix has other roundings; what both runs share to rounding is the spectrum, and
    # the first step, before the recurrence amplifies them.
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(other.alpha[0] / scale, base.alpha[0], rtol=0, atol=N * eps)
    np.testing.assert_allclose(ritz(other)[0][-3:] / scale, ritz(base)[0][-3:], atol=N * eps)
    # A power of two changes no rounding at all: the same digits.
    exact = spectra.lanczos(spectra.MatrixOperator(2.0**-20 * a), v0, 30)
    np.testing.assert_array_equal(exact.alpha * 2.0**20, base.alpha)
    np.testing.assert_array_equal(exact.beta * 2.0**20, base.beta)
