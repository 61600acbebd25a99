"""Losses and functions that close over values of a caller's `grad`, `vmap` or `jit`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow_but
from jax import lax

import spectra

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (6, 4))
AT = jnp.array([0.3, -0.2, 0.5, 0.1])


def hessian(weight):
    """Of a loss whose weight decay is not among its arguments."""
    return spectra.HessianOperator(
        lambda p, x: jnp.mean(jnp.tanh(x @ p) ** 2) + weight * jnp.sum(p**4), AT, X
    )


def covariance(weight):
    return spectra.GradientCovarianceOperator(lambda p, x: weight * jnp.mean(jnp.tanh(x @ p) ** 2), AT, X)


def function(weight):
    return spectra.FunctionOperator(lambda v: weight * jnp.arange(1.0, 5.0) * v, AT)


USES = {
    "trace": lambda op: spectra.trace(op, key=KEY, method="exact").value,
    "matrix": lambda op: jnp.trace(op.as_matrix()),
    "prepared": lambda op: jnp.sum(op.prepare() @ jnp.ones(4)),
    "slq": lambda op: jnp.sum(spectra.slq(op, key=KEY, num_steps=3, num_probes=2).nodes ** 2),
    "solve": lambda op: jnp.sum(spectra.solve(op, AT, shift=4.0).x),
}
OPERATORS = {"hessian": hessian, "covariance": covariance, "function": function}
CASES = [("hessian", use) for use in USES] + [
    ("covariance", "trace"),
    ("function", "slq"),
    ("function", "trace"),
]


@pytest.mark.parametrize(("kind", "use"), slow_but(CASES, ("hessian", "matrix")))
def test_derivatives_and_batches_by_what_a_loss_closes_over(kind, use, x64):
    def value(weight):
        return USES[use](OPERATORS[kind](weight))

    weights = jnp.array([0.5, 1.5])
    values = np.array([float(value(float(weight))) for weight in weights])
    np.testing.assert_allclose(jax.vmap(value)(weights), values, rtol=1e-5)
    step = 1e-3  # of a central difference in float32: its error is step² and eps / step
    slope = (float(value(0.5 + step)) - float(value(0.5 - step))) / (2 * step)
    assert jax.grad(value)(0.5) == pytest.approx(slope, rel=1e-3, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hessian", "shifted"])
def test_eigenvalues_and_functions_by_what_a_loss_closes_over(kind):
    """Both have derivatives of their own, which see what is a leaf of the operator."""

    def make(weight):
        return hessian(weight) if kind == "hessian" else hessian(weight).shift(0.5)

    def largest(weight):
        return spectra.eigsh(make(weight), 1, which="LA", key=KEY).values[0]

    def exponential(weight):
        return jnp.sum(spectra.funm(make(weight), jnp.exp, AT, num_steps=4).value)

    step = 1e-2
    for f in (largest, exponential):
        slope = (float(f(0.5 + step)) - float(f(0.5 - step))) / (2 * step)
        found = float(jax.grad(f)(0.5))
        assert found == pytest.approx(slope, rel=1e-2)
    assert jax.jit(jax.grad(exponential))(0.5) == pytest.approx(found, rel=1e-4)


def test_what_needs_values_says_that_there_are_none():
    with pytest.raises(spectra.SpectraError, match="cannot run inside jit or vmap"):
        jax.vmap(lambda w: spectra.eigsh(hessian(w), 1, key=KEY).values[0])(jnp.ones(2))


def test_layers_of_a_scan_are_found_whatever_a_loss_closes_over():
    """Traced values that it closes over are inputs of its program before the parameters."""
    params = {"layers": {"w": jnp.stack([jnp.eye(3)] * 2)}, "out": jnp.ones(3)}

    @jax.jit
    def names(params, x, scale):
        def loss(p, _):
            h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x * scale, p["layers"]["w"])
            return jnp.mean((h @ p["out"]) ** 2)

        found.extend(spectra.HessianOperator(loss, params, None).blocks())
        return scale

    found: list[str] = []
    names(params, jnp.ones((2, 3)), jnp.ones(()))
    assert found == ["layers/0/w", "layers/1/w", "out"]
