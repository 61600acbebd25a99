"""Kronecker products are those of `numpy.kron`, and so are their closed forms."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import planted

import spectra
from spectra.krylov import product_rounding
from spectra.operators.factored import FactoredOperator
from spectra.operators.kronecker import INDEFINITE

LEFT, RIGHT = planted(np.array([-1.0, 0.5, 2.0, 3.0])), planted(np.array([0.5, 1.0, 4.0]))
DENSE = np.kron(LEFT, RIGHT)
EPS, EPS32 = np.finfo(np.float64).eps, np.finfo(np.float32).eps
TOLERANCE = {"rtol": 0, "atol": 1e3 * EPS * np.linalg.norm(DENSE)}
"""Two chained products of order 4 and 3, and eigenvectors of such matrices."""


def test_matrices_and_their_closed_forms(x64):
    op = spectra.KroneckerOperator(LEFT, jnp.asarray(RIGHT))
    assert op.structure.shape == (4, 3)
    x = np.random.default_rng(0).standard_normal((4, 3))
    np.testing.assert_allclose(op @ x, LEFT @ x @ RIGHT, **TOLERANCE)
    np.testing.assert_allclose(op @ x.ravel(), DENSE @ x.ravel(), **TOLERANCE)
    np.testing.assert_allclose(op.trace(), np.trace(DENSE), **TOLERANCE)
    np.testing.assert_allclose(op.eigenvalues(), np.linalg.eigvalsh(DENSE), **TOLERANCE)
    for damping in (0.0, 0.7, 5.0):  # the first two are indefinite
        shifted = DENSE + damping * np.eye(12)
        inverse = op.inverse(damping)
        condition = np.linalg.cond(shifted)
        np.testing.assert_allclose(
            inverse.as_matrix(), np.linalg.inv(shifted), atol=1e3 * EPS * condition, rtol=0
        )
    # As any operator it enters compiled programs: here as a preconditioner, exact, so that CG takes one step.
    found = spectra.solve(op, x, shift=5.0, preconditioner=op.inverse(5.0), method="cg")
    assert found.converged
    assert found.num_matvecs <= 2
    np.testing.assert_allclose(op.logdet(5.0), np.linalg.slogdet(DENSE + 5 * np.eye(12))[1], rtol=1e-12)


@pytest.mark.slow
def test_factors_may_be_operators_and_products_themselves(x64):
    entries = {"b": jnp.asarray(2.0), "w": jnp.asarray([1.0, 3.0])}
    inner = spectra.KroneckerOperator(spectra.DiagonalOperator(entries), RIGHT)
    op = spectra.KroneckerOperator(LEFT, inner)
    dense = np.kron(LEFT, np.kron(np.diag([2.0, 1.0, 3.0]), RIGHT))
    assert jax.tree.map(lambda s: s.shape, op.structure) == {"b": (4, 3), "w": (4, 2, 3)}
    vector = np.random.default_rng(1).standard_normal((4, 3, 3))
    tree = {"b": jnp.asarray(vector[:, 0]), "w": jnp.asarray(vector[:, 1:])}
    image = op @ tree
    truth = (dense @ vector.ravel()).reshape(4, 3, 3)
    np.testing.assert_allclose(image["b"], truth[:, 0], **TOLERANCE)
    np.testing.assert_allclose(image["w"], truth[:, 1:], **TOLERANCE)
    np.testing.assert_allclose(op.trace(), np.trace(dense), **TOLERANCE)
    np.testing.assert_allclose(op.eigenvalues(), np.linalg.eigvalsh(dense), **TOLERANCE)
    vectors = spectra.KroneckerOperator(spectra.LowRankOperator(jnp.ones((1, 2)), [3.0]), RIGHT)
    np.testing.assert_allclose(vectors.trace(), 6 * np.trace(RIGHT), **TOLERANCE)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda op: spectra.KroneckerOperator("A", op), "the left factor is a str"),
        (lambda op: spectra.KroneckerOperator(np.eye(2), np.ones((2, 3))), "square matrix"),
        (lambda op: spectra.KroneckerOperator(np.eye(2), [[0, 1], [2, 3]]), "not symmetric"),
        (
            lambda op: spectra.KroneckerOperator(op, op).trace(),
            "FunctionOperator has no closed form of its trace",
        ),
        (
            lambda op: spectra.KroneckerOperator(op, np.eye(2)).eigenvalues(),
            "no closed form of its eigenvalues",
        ),
        (lambda op: spectra.KroneckerOperator(op, np.eye(2)).inverse(), "FunctionOperator ⊗ MatrixOperator"),
        (lambda op: spectra.KroneckerOperator(np.eye(2), np.diag([1.0, 0.0])).inverse(), "no inverse"),
        (lambda op: spectra.KroneckerOperator(LEFT, RIGHT).logdet(), "has the eigenvalue -4"),
    ],
)
def test_what_is_wrong_is_said(call, message):
    op = spectra.FunctionOperator(lambda v: 2 * v, jnp.ones(2))
    with pytest.raises(spectra.SpectraError, match=message):
        call(op)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["exact", "heuristic", INDEFINITE])
def test_an_inverse_states_what_rounding_does_to_it(method):
    """A factor of rank 6 of 12, in float32: its zeros are found to a rounding of its largest eigenvalue."""
    misses = []
    for seed, damping in itertools.product(range(4), (1e-1, 1e-3, 1e-4)):
        rng = np.random.default_rng(seed)
        left, right = (
            np.asarray(r.T @ r / len(r), np.float32)
            for r in (rng.standard_normal((6, 12)), rng.standard_normal((16, 8)))
        )
        inverse = spectra.KroneckerOperator(left, right).inverse(damping)
        if method != INDEFINITE:
            own = FactoredOperator(params=inverse.params, parts=inverse.inverted, stacks=())
            inverse = own.inverse(damping, method=method)
        (a, u), (b, v) = np.linalg.eigh(left.astype(float)), np.linalg.eigh(right.astype(float))
        values = np.outer(a, b) + damping
        if method == "heuristic":
            ratio = np.sqrt(a.mean() / b.mean())
            values = np.outer(a + ratio * damping**0.5, b + damping**0.5 / ratio)
        x = rng.standard_normal((12, 8)).astype(np.float32)
        y = inverse @ x
        error = np.linalg.norm(np.asarray(y, float) - u @ ((u.T @ x @ v) / values) @ v.T)
        change = product_rounding.change_of_product(inverse, jnp.asarray(x), y)
        misses.append(error > change + inverse.precision * np.linalg.norm(x) / values.min())
        # No statement without it is wide enough: the error is hundreds of roundings.
        misses.append(method != "heuristic" and damping < 1e-3 and error < 100 * EPS32 * np.linalg.norm(y))
        pairs = spectra.eigsh(inverse, 1, which="LM", key=jax.random.key(seed), tol=1e-6)
        error = abs(float(pairs.values[0]) - (1 / values).max())
        misses.append(error > float(pairs.residuals[0]) + pairs.noise_floor)
    assert sum(misses) == 0
