"""Derivatives of eigenpairs against central differences and closed forms in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import N, Ridge, planted, ridge_loss, rotation

import spectra

KEY = jax.random.key(0)
VALUES = np.geomspace(1.0, 1e-3, N) * np.where(np.arange(N) % 3 == 2, -1, 1)
MATRIX = planted(VALUES)
MOVE = (lambda a: (a + a.T) / np.sqrt(N))(np.random.default_rng(0).standard_normal((N, N)))
WEIGHTS = np.random.default_rng(1).standard_normal((3, N))
STEP = 1e-4
"""Of central differences: h² times a third derivative of order one, 1e-8, and eps / h = 1e-12."""


def pairs(matrix, **options):
    given = {"which": "LM", "key": KEY, "tol": 1e-13, "verify": False, "max_matvecs": N - 1, "num_basis": N}
    return spectra.eigsh(spectra.MatrixOperator(matrix), 3, **(given | options))


def dense(matrix):
    """The three largest |λ|, ascending, with vectors."""
    values, vectors = np.linalg.eigh(matrix)
    chosen = np.sort(np.argsort(-np.abs(values))[:3])
    return values[chosen], vectors[:, chosen]


def test_values_and_separated_vectors(x64):
    """Of f = Σ i λ_i + Σ (w_i·v_i)², whatever the signs of the vectors."""

    def f(t):
        found = pairs(MATRIX + t * MOVE)
        return jnp.arange(1.0, 4.0) @ found.values + jnp.sum(jnp.sum(WEIGHTS * found.vectors, 1) ** 2)

    def exactly(t):
        values, vectors = dense(MATRIX + t * MOVE)
        return np.arange(1.0, 4.0) @ values + np.sum(np.sum(WEIGHTS.T * vectors, 0) ** 2)

    difference = (exactly(STEP) - exactly(-STEP)) / (2 * STEP)
    # Vectors are right to 1e-13 over the gaps, the system for their derivative to 10 eps^(2/3) = 4e-10.
    assert jax.grad(f)(0.0) == pytest.approx(difference, rel=1e-6)


def test_equal_values_have_the_derivative_of_their_sum_and_no_vectors(x64):
    values = np.concatenate([[3.0, 3.0, 5.0], np.linspace(-1, 1, N - 3)])
    q = rotation(N)
    matrix = (q * values) @ q.T

    def found(t):
        return pairs((matrix + matrix.T) / 2 + t * MOVE, which="LA", block_size=2)

    assert jax.grad(lambda t: found(t).values[:2].sum())(0.0) == pytest.approx(
        np.trace(q[:, :2].T @ MOVE @ q[:, :2]), rel=1e-9
    )
    # The third is separated, and its derivative is not spoilt by the others.
    a = q[:, 2]
    others = (q[:, :2] @ (q[:, :2].T @ MOVE @ a)) / 2
    others = others + q[:, 3:] @ ((q[:, 3:].T @ MOVE @ a) / (5 - values[3:]))
    truth = 2 * (WEIGHTS[0] @ a) * (WEIGHTS[0] @ others)
    assert jax.grad(lambda t: (WEIGHTS[0] @ found(t).vectors[2]) ** 2)(0.0) == pytest.approx(truth, rel=1e-7)
    with pytest.raises(spectra.SpectraError, match="eigenvector 0 is not separated"):
        jax.grad(lambda t: (WEIGHTS[0] @ found(t).vectors[0]) ** 2)(0.0)


def test_values_in_a_metric_and_of_the_parameters_of_a_loss(x64):
    """The largest λ of H v = λ M v for the Hessian of `Ridge` at moving parameters, and M moving as well."""
    ridge = Ridge()
    batch = tuple(jnp.asarray(x, jnp.float64) for x in ridge.batch())
    metric = {"b": jnp.asarray(2.0), "w": jnp.linspace(1.0, 3.0, 5)}

    def largest(t):
        op = spectra.HessianOperator(ridge_loss, {"b": jnp.asarray(ridge.b), "w": t * ridge.w}, batch)
        weights = jax.tree.map(lambda x: x**t, metric)
        return spectra.eigsh(op, 1, which="LA", key=KEY, metric=weights).values[0]

    def exactly(t):
        moved = Ridge()
        moved.w = t * ridge.w
        root = np.concatenate([[2.0], np.linspace(1.0, 3.0, 5)]) ** (-t / 2)
        return np.linalg.eigvalsh(moved.hessian() * np.outer(root, root))[-1]

    difference = (exactly(1 + STEP) - exactly(1 - STEP)) / (2 * STEP)
    assert jax.grad(largest)(1.0) == pytest.approx(difference, rel=1e-6)


def test_inside_jit_it_is_refused():
    with pytest.raises(spectra.SpectraError, match="inside jit"):
        jax.jit(lambda t: pairs(jnp.asarray(MATRIX, jnp.float32) * t).values)(1.0)


@pytest.mark.slow
def test_values_have_derivatives_in_forward_mode_and_vectors_nan(x64):
    """Also the sum of two that are equal, whose vectors have no derivative."""
    q = rotation(N)
    equal = (q * np.concatenate([[3.0, 3.0], np.linspace(-1, 1, N - 2)])) @ q.T

    def values(t):
        return jnp.arange(1.0, 4.0) @ pairs(MATRIX + t * MOVE).values

    def common(t):
        return pairs((equal + equal.T) / 2 + t * MOVE, which="LA", block_size=2).values[1:].sum()

    for f in (values, common):
        assert jax.jacfwd(f)(0.0) == pytest.approx(float(jax.grad(f)(0.0)), rel=1e-10)
    primal, tangent = jax.jvp(lambda t: pairs(MATRIX + t * MOVE), (0.0,), (1.0,))
    np.testing.assert_allclose(primal.values, dense(MATRIX)[0], rtol=1e-12)
    assert np.isnan(tangent.vectors).all()
    assert np.isfinite(tangent.values).all()
    for second in (jax.jacfwd(jax.jacfwd(values)), jax.jacrev(jax.jacfwd(values))):
        with pytest.raises(spectra.SpectraError, match="no second derivatives"):
            second(0.0)
