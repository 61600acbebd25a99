"""Derivatives of estimates are those of their values, where a sketch or a Krylov space has an end, too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow_but

import spectra

N, KEY, STEP = 40, jax.random.key(0), 1e-4
RNG = np.random.default_rng(0)
SYMMETRIC = (lambda a: a + a.T)(RNG.standard_normal((N, N)))
RANK_FIVE = (lambda a: a @ a.T)(RNG.standard_normal((N, 5)))
RAMP = np.diag(np.arange(N) * 1.0)


def compare(f, at):
    """The gradient with a central difference, of errors h² and eps / h for f smooth on the scale of 1.

    Values are those outside of programs. The gradient is one program: outside it is a hundred small ones.
    """
    gradient, difference = jax.jit(jax.grad(f))(at), (f(at + STEP) - f(at - STEP)) / (2 * STEP)
    assert gradient == pytest.approx(float(difference), rel=1e-5, abs=1e-6)
    return gradient


@pytest.mark.parametrize("method", slow_but(["auto", "hutch++", "hutchinson"], "auto", "hutchinson"))
def test_the_gradient_of_a_trace(method, x64):
    def f(t):
        op = spectra.MatrixOperator(SYMMETRIC + t * RAMP)
        return spectra.trace(op, key=KEY, method=method, num_matvecs=12).value

    gradient = compare(f, 0.0)
    if method == "hutchinson":  # signs see a diagonal exactly: Σ i
        assert gradient == pytest.approx(N * (N - 1) / 2, rel=1e-12)


@pytest.mark.parametrize("method", slow_but(["xtrace", "xnystrace"], "xnystrace"))
def test_the_gradient_of_a_sketch_that_is_too_wide(method, x64):
    def f(t):
        op = spectra.MatrixOperator(t * RANK_FIVE)
        return spectra.trace(op, key=KEY, method=method, num_matvecs=24).value

    assert jax.jit(jax.grad(f))(1.0) == pytest.approx(np.trace(RANK_FIVE), rel=1e-8)


def test_the_gradient_of_a_norm(x64):
    def f(t):
        return spectra.frobenius_norm(
            spectra.MatrixOperator(SYMMETRIC + t * RAMP), key=KEY, num_matvecs=12
        ).value

    compare(f, 0.0)


SMALL = SYMMETRIC[:6, :6]
KRYLOV = {
    "all steps": (SMALL, np.diag(np.arange(6.0)), 0.1),
    "repeated eigenvalues": (np.diag([1.0, 1.0, 2.0, 2.0, 3.0, 3.0]), np.eye(6), 0.1),
    "a multiple of the identity": (np.eye(6), np.eye(6), 0.1),
}


@pytest.mark.parametrize("name", slow_but(KRYLOV, "all steps", "repeated eigenvalues"))
def test_the_gradient_of_a_quadrature_that_ends(name, x64):
    a, b, at = KRYLOV[name]

    def f(t):
        q = spectra.slq(spectra.MatrixOperator(a + t * b), key=KEY, num_steps=6, num_probes=2)
        return jnp.mean(jnp.sum(q.weights * q.nodes**2, axis=1))

    compare(f, at)


def test_the_gradient_of_lanczos_with_n_steps(x64):
    def f(t):
        op = spectra.MatrixOperator(SMALL + t * np.diag(np.arange(6.0)))
        return spectra.lanczos(op, jnp.ones(6), 6).alpha.sum()

    gradient = compare(f, 0.1)
    assert gradient == pytest.approx(15.0, rel=1e-8)  # the trace: 15 t
    assert jax.grad(f)(0.1) == pytest.approx(float(gradient), rel=1e-12)  # outside of a program, too


def test_the_gradient_of_a_logdet_and_of_a_trace_of(x64):
    """Of n steps: d log det A = tr A⁻¹ dA for the mean over all directions; here, of the value itself."""
    positive = SMALL @ SMALL + np.eye(6)

    def logdet(t):
        op = spectra.MatrixOperator(positive + t * np.diag(np.arange(6.0)))
        return spectra.logdet(op, 0.5, key=KEY, num_steps=6, num_probes=2).value

    compare(logdet, 0.1)

    def exponential(t):
        op = spectra.MatrixOperator(positive + t * np.eye(6))
        return spectra.trace_of(op, np.exp, key=KEY, num_steps=6, num_probes=2).value

    value, gradient = jax.jit(jax.value_and_grad(exponential))(0.0)
    assert gradient == pytest.approx(float(value), rel=1e-8)  # d tr exp(A + t I) = tr exp(A)
