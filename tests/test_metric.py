"""Eigenpairs in a metric are those of SciPy's generalised problem, and bad metrics are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import spectra

KEY = jax.random.key(0)
N = 40
rng = np.random.default_rng(0)
ORTHOGONAL = np.linalg.qr(rng.standard_normal((N, N)))[0]
MATRIX = ORTHOGONAL @ np.diag(np.linspace(-2.0, 5.0, N)) @ ORTHOGONAL.T
WEIGHT = (lambda a: a @ a.T / N + 0.5 * np.eye(N))(rng.standard_normal((N, N)))
DIAGONAL = np.geomspace(0.1, 10.0, N)


def truth(weight, which, k):
    values = scipy.linalg.eigh(MATRIX, weight, eigvals_only=True)
    order = {"LA": -values, "SA": values, "LM": -np.abs(values), "SM": np.abs(values)}[which]
    return np.sort(values[np.argsort(order)[:k]])


@pytest.mark.parametrize("which", ["LA", "SM"])
@pytest.mark.parametrize("kind", ["operator", "diagonal"])
def test_pairs_are_scipys(kind, which):
    weight = WEIGHT if kind == "operator" else np.diag(DIAGONAL)
    metric = spectra.MatrixOperator(jnp.asarray(WEIGHT)) if kind == "operator" else jnp.asarray(DIAGONAL)
    pairs = spectra.eigsh(spectra.MatrixOperator(jnp.asarray(MATRIX)), 3, which=which, key=KEY, metric=metric)
    error = np.abs(pairs.values - truth(weight, which, 3))
    assert (error <= pairs.residuals + pairs.noise_floor).all()
    assert pairs.noise_floor <= 1e-3 * 5 / np.linalg.eigvalsh(weight)[0]  # 40 roundings, |H| |M⁻¹|
    vectors = pairs.matrix()
    # float32 vectors, and products of the length of |M|^(1/2) times them
    bound = 1e-4 if pairs.converged.all() else np.inf
    assert np.abs(vectors.T @ weight @ vectors - np.eye(3)).max() <= bound


def test_a_metric_that_is_none_is_refused():
    op = spectra.MatrixOperator(jnp.asarray(MATRIX))
    with pytest.raises(spectra.SpectraError, match="not positive definite"):
        spectra.eigsh(op, 2, key=KEY, metric=op)
    with pytest.raises(spectra.StructureError, match="order 3"):
        spectra.eigsh(op, 2, key=KEY, metric=spectra.MatrixOperator(jnp.eye(3)))
    with pytest.raises(spectra.SpectraError, match="takes 40 products"):
        spectra.eigsh(op, 2, key=KEY, metric=spectra.MatrixOperator(jnp.asarray(WEIGHT)), max_matvecs=39)
    with pytest.raises(spectra.SpectraError, match="without a metric"):
        spectra.eigsh(op, 2, key=KEY, metric=jnp.ones(N), v0=jnp.ones(N))


def test_a_large_metric_needs_a_diagonal():
    large = spectra.FunctionOperator(lambda v: 2 * v, jnp.ones(2001))
    with pytest.raises(spectra.SpectraError, match="diagonal as a pytree"):
        spectra.eigsh(large, 1, key=KEY, metric=large)
