"""The end of a run in an invariant space: found with its true length, and nothing else taken for it.

The start has a component on every distinct eigenvalue, so the Krylov space has as many dimensions as there
are distinct eigenvalues. What rounding leaves of the vanishing residual reaches 1e4 eps |H| here.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import diagonal, rotation, slow_but
from scipy.linalg import eigh_tridiagonal

import spectra
from spectra.quadrature.rules import breakdown_noise, invariant_length

DISTINCT = [
    [-0.7],
    [1.0, 5.0],
    [1.0, 2.0, 5.0],
    [-1.0, -0.5, 0.5, 1.0],
    [1.0, 2.0, 3.0, 4.0, 5.0],
    [0.0, 1, 2, 3, 4, 5],
]
PROBES, STEPS = 20, 9
turned = functools.lru_cache(1)(rotation)
"""Of order 3,000 it takes seconds."""


def quadratic(params, batch):
    """Half the mean of s (xᵀw)²: its Hessian is Xᵀ diag(s) X / N at every w."""
    inputs, signs = batch
    return jnp.mean(signs * (inputs @ params) ** 2) / 2


def operator(kind, values, n, dtype):
    """An operator of order n with these eigenvalues, multiplicities as even as can be."""
    values = np.sort(np.resize(np.asarray(values, np.float64), n))
    if kind == "diagonal":
        return diagonal(values, dtype)
    q = turned(n)
    if kind == "dense":
        a = (q * values) @ q.T
        return spectra.MatrixOperator(jnp.asarray((a + a.T) / 2, dtype))
    inputs = (np.sqrt(n * np.abs(values)) * q).T
    data = jnp.asarray(inputs, dtype), jnp.asarray(np.sign(values), dtype)
    return spectra.HessianOperator(quadratic, jnp.zeros(n, dtype), data)


CASES = itertools.product(("float32", "float64"), (3, 48, 300, 3000), ("diagonal", "dense", "Hessian"))
QUICK = [("float32", 3, "diagonal"), ("float64", 300, "dense")]


@pytest.mark.parametrize(("dtype", "n", "kind"), slow_but([*CASES], *QUICK), indirect=["dtype"])
def test_every_probe_ends_with_the_true_length(n, kind, dtype):
    for values in DISTINCT:
        if len(values) > n:
            continue
        op = operator(kind, values, n, dtype)
        q = spectra.slq(op, key=jax.random.key(0), num_steps=min(n, STEPS), num_probes=PROBES)
        assert (q.lengths == len(values)).all(), (values, q.lengths)
        assert q.status is spectra.Status.INVARIANT
        assert (np.asarray(q.residuals) == 0).all()
        # Nodes are eigenvalues to the rounding of the products, √n / 2 + 10 of them a step.
        error = np.abs(np.asarray(q.nodes)[:, : len(values)] - values).max() / np.abs(values).max()
        assert error <= STEPS * (10 + np.sqrt(n) / 2) * float(jnp.finfo(dtype).eps)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(k, d) for k in ("diagonal", "dense") for d in ("float32", "float64")],
    indirect=["dtype"],
)
def test_a_single_start_ends_with_the_true_length_and_an_orthonormal_basis(kind, dtype):
    n = 300
    for values in DISTINCT:
        v0 = jnp.asarray(np.random.default_rng(1).standard_normal(n), dtype)
        result = spectra.lanczos(operator(kind, values, n, dtype), v0, 12)
        assert int(result.length) == len(values)
        assert result.status is spectra.Status.INVARIANT
        assert float(result.residual_norm) == 0


def in_numpy(eigenvalues, start, steps, noise, rng):
    """Lanczos with two Gram-Schmidt passes in float64, each product with an error of `noise` |H|."""
    n, size = len(eigenvalues), np.abs(eigenvalues).max()
    rows, alpha, beta = np.zeros((steps, n)), np.zeros(steps), np.zeros(steps)
    q = start / np.linalg.norm(start)
    for i in range(steps):
        rows[i] = q
        error = rng.standard_normal(n)
        w = eigenvalues * q + noise * size * error / np.linalg.norm(error)
        alpha[i] = q @ w
        for _ in range(2):
            w = w - rows[: i + 1].T @ (rows[: i + 1] @ w)
        beta[i] = np.linalg.norm(w)
        q = w / beta[i]
    return alpha, beta


BULK = np.linspace(-1.0, 1.0, 990)
NOT_INVARIANT = {
    "uniform": np.linspace(-2.0, 3.0, 1000),
    "decaying": np.logspace(0, -8, 1000),
    "sixteen decades": np.logspace(0, -16, 500),
    "three clusters, 1e-3 wide": np.repeat([1.0, 2.0, 5.0], 16) + 1e-3 * np.linspace(-1, 1, 48),
    **{f"outliers {f:g} times the bulk": np.append(BULK, f * np.arange(1, 11)) for f in (10, 100, 1e3, 1e4)},
    "one outlier": np.append(BULK, 3e4),
    "a share of zeros": np.append(np.zeros(700), np.random.default_rng(0).standard_normal(300) ** 2),
}


@pytest.mark.parametrize("precision", [1.2e-7, 2.2e-16])
@pytest.mark.parametrize("name", NOT_INVARIANT)
def test_a_spectrum_that_goes_on_is_not_taken_for_an_invariant_space(name, precision):
    """Truth by construction: more distinct eigenvalues than steps, so no Krylov space ends."""
    eigenvalues, rng = NOT_INVARIANT[name], np.random.default_rng(3)
    for steps in (12, 24, 40):
        for _ in range(3):
            start = rng.standard_normal(len(eigenvalues))
            alpha, beta = in_numpy(eigenvalues, start, steps, precision * rng.choice([0.3, 1, 4]), rng)
            assert invariant_length(alpha, beta, steps, len(eigenvalues), precision) is None


@pytest.mark.parametrize("distinct", [6, 19, 25])
def test_where_a_run_ends_its_nodes_are_eigenvalues(distinct):
    """Rounding is amplified more the more distinct eigenvalues there are, and moves nodes of little weight.

    A node is an eigenvalue to what is dropped, one breakdown, and to the errors of the products (Weyl).
    """
    values, rng, precision = np.linspace(-1.0, 2.0, distinct), np.random.default_rng(4), 1.2e-7
    eigenvalues = np.resize(values, 40)
    allowed = 2 * (breakdown_noise(40, precision) + precision * np.sqrt(distinct)) * 2
    ended = 0
    for _ in range(40):
        steps = min(distinct + 12, 39)
        alpha, beta = in_numpy(eigenvalues, rng.standard_normal(40), steps, precision, rng)
        length = invariant_length(alpha, beta, steps, 40, precision) or steps
        theta, vectors = eigh_tridiagonal(alpha[:length], beta[: length - 1])
        left = 0.0 if length < steps else beta[length - 1] * np.abs(vectors[-1])
        assert (np.abs(theta[:, None] - values).min(axis=1) <= allowed + left).all()
        ended += length == distinct
    assert ended == 40 or distinct > 6


def test_a_start_near_two_eigenvectors_is_not_taken_for_their_span():
    """A start in their span up to 1e-4, which no rounding of 1e-7 explains: the spectrum lies behind it."""
    eigenvalues, rng = np.linspace(-2.0, 3.0, 400), np.random.default_rng(0)
    start = 1e-4 * rng.standard_normal(400) / 20
    start[[0, -1]] = 1
    alpha, beta = in_numpy(eigenvalues, start, 24, 1.2e-7, rng)
    assert beta[1] < 1e-3
    assert invariant_length(alpha, beta, 24, 400, 1.2e-7) is None
