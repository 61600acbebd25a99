"""Losses that refuse some derivative: the mode that is chosen, what is said, and its accuracy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import relative_error

import spectra

X = np.random.default_rng(0).standard_normal((7, 4))
W = np.array([0.3, -0.2, 0.5, 0.1])


def exact_hessian():
    """mean of sin(xᵀw) over examples: H = -mean sin(xᵀw) x xᵀ, indefinite."""
    return -(X.T * np.sin(X @ W)) @ X / len(X)


@jax.custom_vjp
def recursive_sin(x):
    return jnp.sin(x)


# The rule calls the function itself, so every derivative meets the rule again: forward mode, which
# has no rule, is refused at the second derivative.
def _forward(x):
    return recursive_sin(x), x


recursive_sin.defvjp(_forward, lambda x, g: (recursive_sin(x + jnp.pi / 2) * g,))


def on_host(function, x):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(function, shape, x, vmap_method="expand_dims")


@jax.custom_vjp
def host_sin(x):
    return on_host(np.sin, x)


def _host_cos(x, cotangent):
    return (on_host(np.cos, x) * cotangent,)


host_sin.defvjp(lambda x: (host_sin(x), x), _host_cos)


def loss_of(function):
    def loss_fn(w, x):
        return jnp.mean(function(x @ w))

    return loss_fn


def build(function, **options):
    return spectra.HessianOperator(loss_of(function), jnp.asarray(W), jnp.asarray(X), **options)


def test_a_plain_loss_uses_forward_over_reverse_and_says_nothing(dtype):
    op = build(jnp.sin)  # a warning would be an error
    assert op.mode == "forward-over-reverse"
    assert relative_error(op.as_matrix(), exact_hessian()) <= 32 * float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize("linearize", [True, False, "auto"])
def test_a_custom_vjp_falls_back_to_reverse_over_reverse(linearize, dtype):
    with pytest.warns(UserWarning, match="products use reverse-over-reverse") as record:
        op = build(recursive_sin, linearize=linearize)
    assert "custom_vjp" in str(record[0].message)
    assert "recursive_sin" in str(record[0].message)
    assert op.mode == "reverse-over-reverse"
    # 32 roundings of a product, as for any exact mode.
    assert relative_error(op.as_matrix(), exact_hessian()) <= 32 * float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize("microbatch", [None, 3])
def test_a_first_order_loss_falls_back_to_finite_differences(microbatch, dtype):
    with pytest.warns(UserWarning, match="products use finite-difference") as record:
        op = build(host_sin, microbatch=microbatch)
    message = str(record[0].message)
    assert "host_sin" in message
    assert "Expect relative errors near" in message
    assert op.mode == "finite-difference"
    eps = float(jnp.finfo(dtype).eps)
    assert op.precision == pytest.approx(eps ** (2 / 3))
    # With ε = eps^(1/3) |θ|, |θ| = 0.6: truncation ε² |∇⁴L| / 6 and cancellation eps |∇L| / ε are
    # each below a few eps^(2/3) of |H| for derivatives of a sine, which all have one size.
    assert relative_error(op.as_matrix(), exact_hessian()) <= 32 * eps ** (2 / 3)


def test_finite_differences_do_not_depend_on_the_length_of_the_vector(x64):
    op = build(jnp.sin, mode="finite-difference")
    v = jnp.array([1.0, -2.0, 0.5, 3.0])
    for factor in (1e-8, 1e8):
        got = np.asarray(op @ (factor * v)) / factor
        np.testing.assert_allclose(got, op @ v, rtol=1e-12)
    np.testing.assert_array_equal(op @ jnp.zeros(4), np.zeros(4))


def test_the_fallback_works_for_streams_and_at_zero_parameters(x64):
    data = [jnp.asarray(X[:3]), jnp.asarray(X[3:])]
    with pytest.warns(UserWarning, match="host_sin"):
        op = spectra.HessianOperator(loss_of(host_sin), jnp.asarray(W), data)
    assert relative_error(op.as_matrix(), exact_hessian()) <= 32 * op.precision
    loss_fn = lambda w, x: jnp.mean((x @ w) ** 2)  # noqa: E731
    zero = spectra.HessianOperator(loss_fn, jnp.zeros(4), jnp.asarray(X), mode="finite-difference")
    assert relative_error(zero.as_matrix(), 2 * X.T @ X / len(X)) <= 32 * zero.precision


def test_lanczos_runs_on_the_fallbacks():
    with pytest.warns(UserWarning, match="reverse-over-reverse"):
        op = build(recursive_sin)
    q = spectra.slq(op, key=jax.random.key(0), num_steps=4, num_probes=1)
    exact = np.linalg.eigvalsh(exact_hessian())
    np.testing.assert_allclose(q.nodes[0], exact, rtol=0, atol=32 * 1.2e-7 * np.abs(exact).max())


def test_an_explicit_mode_that_fails_is_an_error_with_advice():
    with pytest.raises(spectra.DifferentiationError, match=r"mode='forward-over-reverse'.*'auto'"):
        build(recursive_sin, mode="forward-over-reverse")


def test_a_loss_without_a_gradient_is_refused():
    def bare(x):
        return on_host(np.sin, x)

    with pytest.raises(spectra.DifferentiationError, match="cannot be differentiated") as info:
        build(bare)
    assert "callback" in str(info.value).lower()


def test_modes_agree_with_each_other(x64):
    matrices = {
        mode: np.asarray(build(jnp.sin, mode=mode).as_matrix())
        for mode in ("forward-over-reverse", "reverse-over-reverse", "finite-difference")
    }
    exact = exact_hessian()
    assert relative_error(matrices["forward-over-reverse"], exact) <= 1e-14
    assert relative_error(matrices["reverse-over-reverse"], exact) <= 1e-14
    assert relative_error(matrices["finite-difference"], exact) <= 32 * 4e-11


def test_auto_linearisation_follows_the_memory_estimate(monkeypatch):
    op = build(jnp.sin)
    assert op.linearized
    assert op.prepared_bytes() > 0
    monkeypatch.setattr("spectra._memory.available_bytes", lambda device=None: 16)
    assert not op.linearized
    assert op.prepared_bytes() == 0
    assert build(jnp.sin, linearize=True).linearized
    np.testing.assert_allclose(op.as_matrix(memory_limit=10**6), exact_hessian(), atol=1e-6)
