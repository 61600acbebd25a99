"""Hessians with a closed form, through the real product path and through Lanczos."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import SHARP, relative_error, slow_but
from scipy.special import expit, softmax

import spectra

RNG = np.random.default_rng(0)
X = RNG.standard_normal((40, 6))
KEY = jax.random.key(0)


def linear_regression():
    """½ mean (xᵀw - y)²: H = XᵀX / N, whatever w and y."""
    y, w = RNG.standard_normal(40), RNG.standard_normal(6)

    def loss_fn(params, batch):
        inputs, targets = batch
        return 0.5 * jnp.mean((inputs @ params["w"] - targets) ** 2)

    return loss_fn, {"w": w}, (X, y), X.T @ X / 40


def logistic_regression():
    """mean of log(1 + exp(-s xᵀw)): H = mean σ(z)(1 - σ(z)) x xᵀ, whatever the sign s."""
    w, sign = RNG.standard_normal(6), np.sign(RNG.standard_normal(40))

    def loss_fn(params, batch):
        inputs, sign = batch
        return jnp.mean(jax.nn.softplus(-sign * (inputs @ params["w"])))

    p = expit(X @ w)
    return loss_fn, {"w": w}, (X, sign), (X.T * (p * (1 - p))) @ X / 40


def softmax_regression():
    """Cross entropy of softmax(Wᵀx): H = mean x xᵀ ⊗ (diag p - p pᵀ) for W of shape (6, 3)."""
    w, labels = RNG.standard_normal((6, 3)), RNG.integers(0, 3, 40)

    def loss_fn(params, batch):
        inputs, labels = batch
        logs = jax.nn.log_softmax(inputs @ params["w"])
        return -jnp.mean(jnp.take_along_axis(logs, labels[:, None], axis=1))

    p = softmax(X @ w, axis=1)
    hessian = np.zeros((18, 18))
    for x, q in zip(X, p, strict=True):
        hessian += np.kron(np.outer(x, x), np.diag(q) - np.outer(q, q)) / 40
    return loss_fn, {"w": w}, (X, labels), hessian


CASES = [linear_regression, logistic_regression, softmax_regression]


@SHARP
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("form", slow_but(["batch", "microbatch", "stream"], "batch"))
def test_hessian_and_spectrum_equal_the_closed_form(case, form, dtype):
    loss_fn, params, data, exact = case()
    params, data = jax.tree.map(jnp.asarray, (params, data))
    if form == "stream":
        data = [jax.tree.map(lambda x: x[:7], data), jax.tree.map(lambda x: x[7:], data)]
    op = spectra.HessianOperator(loss_fn, params, data, microbatch=16 if form == "microbatch" else None)
    eps, n = float(jnp.finfo(dtype).eps), len(exact)
    # A product sums 40 terms, after and before sums over 6: at most 52 roundings of |H|.
    assert relative_error(op.as_matrix(), exact) <= 52 * eps
    values = np.linalg.eigvalsh(exact)
    q = spectra.slq(op, key=KEY, num_steps=n, num_probes=1)
    nodes = q.nodes[0, : q.lengths[0]]
    bound = (52 + n) * np.sqrt(n) * eps * values[-1]
    # Every Ritz value is an eigenvalue, and every distinct eigenvalue is found. Softmax regression
    # has rank 12: the direction that adds a constant to all logits is flat.
    assert np.abs(nodes[:, None] - values).min(axis=1).max() <= bound
    assert np.abs(nodes[:, None] - values).min(axis=0).max() <= bound


@pytest.mark.slow
def test_trace_and_extremes_of_linear_regression_are_reported(x64):
    loss_fn, params, data, exact = linear_regression()
    op = spectra.HessianOperator(loss_fn, jax.tree.map(jnp.asarray, params), data)
    report = spectra.spectrum(op, key=KEY)
    values = np.linalg.eigvalsh(exact)
    assert float(report.largest.estimate) == pytest.approx(values[-1], rel=1e-13)
    assert float(report.smallest.estimate) == pytest.approx(values[0], rel=1e-12)
    assert report.condition_lower_bound == pytest.approx(values[-1] / values[0], rel=1e-11)
    assert abs(report.trace.value - np.trace(exact)) <= 4 * report.trace.stderr
    assert report.negative.upper == 0
