"""Losses that refuse some derivative: the mode that is chosen, what is said, and its accuracy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import COARSE, relative_error, slow_but
from jax.experimental import pallas

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


@functools.cache  # one function, one program
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


@jax.custom_vjp
def mean_of_squares(outputs):
    return jnp.mean(outputs**2)


mean_of_squares.defvjp(lambda f: (mean_of_squares(f), f), lambda f, g: (2 * g * f / f.size,))


def fused_squares(w, x):
    return mean_of_squares(x @ w)


@pytest.mark.slow
def test_a_custom_vjp_that_gives_the_loss_itself_falls_back_too(dtype):
    """Nothing uses the derivative of a loss's own value, so a single compiled product leaves out the rule
    that refuses forward mode; several at once, and saved values, met it."""
    with pytest.warns(UserWarning, match="custom_vjp.*mean_of_squares.*use reverse-over-reverse"):
        op = spectra.HessianOperator(fused_squares, jnp.asarray(W), jnp.asarray(X))
    expected = 2 * X.T @ X / len(X)
    eps = 32 * float(jnp.finfo(dtype).eps)  # 32 roundings of a product, as above
    assert relative_error(op.as_matrix(), expected) <= eps
    assert relative_error(op.mv_batch(jnp.eye(len(W))), expected) <= eps
    assert relative_error(op.prepare() @ jnp.eye(len(W)), expected) <= eps


def sine_kernel(x, out):
    out[...] = jnp.sin(x[...])


def cosine_kernel(x, cotangent, out):
    out[...] = jnp.cos(x[...]) * cotangent[...]


def kernel_call(kernel, *args):
    out = jax.ShapeDtypeStruct(args[0].shape, args[0].dtype)
    return pallas.pallas_call(kernel, out_shape=out, interpret=True)(*args)


@jax.custom_vjp
def kernel_sin(x):
    return kernel_call(sine_kernel, x)


def _kernel_sin_forward(x):  # the kernel itself, not the function with the rule: see `recursive_sin`
    return kernel_call(sine_kernel, x), x


kernel_sin.defvjp(_kernel_sin_forward, lambda x, g: (kernel_call(cosine_kernel, x, g),))


def squared_kernel_sin(x):
    return kernel_sin(x) ** 2


@pytest.mark.parametrize("linearize", slow_but([True, False, "auto"], "auto"))
def test_a_kernel_that_has_products_but_no_linear_map(linearize):
    """JAX has a rule for `jvp` of a Pallas kernel, and no `linearize`: nothing is saved.

    The mean of sin²(xᵀw) has the Hessian mean of 2 cos(2 xᵀw) x xᵀ.
    """
    op = build(squared_kernel_sin, linearize=linearize)
    assert op.mode == "forward-over-reverse"
    expected = 2 * (X.T * np.cos(2 * X @ W)) @ X / len(X)
    # 32 roundings of a product, as for any exact mode.
    assert relative_error(op.as_matrix(), expected) <= 32 * float(jnp.finfo(jnp.float32).eps)
    planned = spectra.plan(op, num_steps=3, num_probes=1)
    assert op.prepare() is op
    assert planned.linearization == 0
    assert op.evaluated_bytes() >= X.shape[0] * 4  # the gradient holds at least x w


def of_two_halves(w, x):
    return jnp.mean((x.reshape(2, -1, len(w)) @ w) ** 2)


def test_what_no_mode_admits_is_said_of_each():
    """A loss that can be differentiated, and that refuses the single examples of a covariance."""
    with pytest.raises(spectra.DifferentiationError, match=r"forward-.*failed: cannot reshape.*difference"):
        spectra.GradientCovarianceOperator(of_two_halves, jnp.asarray(W), jnp.asarray(X[:4]))


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


@pytest.mark.slow
def test_a_first_order_loss_has_everything_that_a_dense_matrix_gives():
    """How much a product holds was read from a derivative that such a loss does not have."""
    with pytest.warns(UserWarning, match="products use finite-difference"):
        op = build(host_sin)
    values, key = np.linalg.eigvalsh(exact_hessian()), jax.random.key(0)
    report = spectra.spectrum(op, key=key)
    assert report.status is spectra.Status.EXACT
    np.testing.assert_allclose(report.quadrature.nodes[0], values, rtol=0, atol=report.noise_floor)
    pairs = spectra.eigsh(op, 2, which="SA", key=key)
    np.testing.assert_allclose(
        pairs.values, values[:2], rtol=0, atol=float(np.max(pairs.residuals)) + pairs.noise_floor
    )
    low, _, high = spectra.trace(op, key=key).interval()
    assert low <= values.sum() <= high
    low, _, high = spectra.condition_number(op, key=key).effective_interval
    assert low <= np.abs(values).max() / np.abs(values).min() <= high
    found = spectra.solve(op.shift(2.0), jnp.ones(4))
    wanted = np.linalg.solve(exact_hessian() + 2 * np.eye(4), np.ones(4))
    assert np.linalg.norm(found.x - wanted) <= found.error_bound


@pytest.mark.slow
def test_finite_differences_do_not_depend_on_the_length_of_the_vector(x64):
    op = build(jnp.sin, mode="finite-difference")
    v = jnp.array([1.0, -2.0, 0.5, 3.0])
    for factor in (1e-8, 1e8):
        got = np.asarray(op @ (factor * v)) / factor
        np.testing.assert_allclose(got, op @ v, rtol=1e-12)
    np.testing.assert_array_equal(op @ jnp.zeros(4), np.zeros(4))


@pytest.mark.slow
def test_the_fallback_works_for_streams_and_at_zero_parameters(x64):
    data = [jnp.asarray(X[:3]), jnp.asarray(X[3:])]
    with pytest.warns(UserWarning, match="host_sin"):
        op = spectra.HessianOperator(loss_of(host_sin), jnp.asarray(W), data)
    assert relative_error(op.as_matrix(), exact_hessian()) <= 32 * op.precision
    loss_fn = lambda w, x: jnp.mean((x @ w) ** 2)  # noqa: E731
    zero = spectra.HessianOperator(loss_fn, jnp.zeros(4), jnp.asarray(X), mode="finite-difference")
    assert relative_error(zero.as_matrix(), 2 * X.T @ X / len(X)) <= 32 * zero.precision


@COARSE
def test_the_step_of_differences_fits_leaves_of_unlike_sizes(dtype):
    """eps^(1/3) |θ| is far longer than what bends the loss along `w`: half of a product was wrong."""

    def loss_fn(params, x):
        return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"]) ** 2)

    params = {"w": jnp.asarray(0.5 * np.outer(W, [1.0, -0.5])), "v": jnp.asarray([150.0, -100.0])}
    op = spectra.HessianOperator(loss_fn, params, jnp.asarray(X), mode="finite-difference")
    exact = spectra.HessianOperator(loss_fn, params, jnp.asarray(X))
    matrix = np.asarray(exact.as_matrix(), float)
    errors = np.asarray(op @ jnp.eye(op.size), float) - matrix
    assert np.linalg.norm(errors, 2) <= 64 * op.precision * np.linalg.norm(matrix, 2)
    assert op.precision <= 100 * float(jnp.finfo(dtype).eps) ** (2 / 3)
    report = spectra.spectrum(op, key=jax.random.key(0))
    np.testing.assert_allclose(
        report.quadrature.nodes[0], np.linalg.eigvalsh(matrix), rtol=0, atol=4 * report.noise_floor
    )
    block, wanted = op.block("w"), exact.block("w").as_matrix()
    assert relative_error(block.as_matrix(), wanted) <= 64 * block.precision


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
    monkeypatch.setattr("spectra.base.host.available_bytes", lambda device=None: 16)
    assert not op.linearized
    assert op.prepared_bytes() == 0
    assert build(jnp.sin, linearize=True).linearized
    np.testing.assert_allclose(op.as_matrix(memory_limit=10**6), exact_hessian(), atol=1e-6)


# Models with a custom_vjp inside: a fused cross-entropy, as t5x has, and a fused attention.


@jax.custom_vjp
def fused_cross_entropy(logits, labels):
    return jnp.mean(jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, labels[:, None], 1)[:, 0])


def _fused_backward(saved, g):
    logits, labels = saved
    hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return g * (jax.nn.softmax(logits) - hot) / len(labels), None


fused_cross_entropy.defvjp(lambda f, y: (fused_cross_entropy(f, y), (f, y)), _fused_backward)


@jax.custom_vjp
def fused_attention(q, k, v):
    return jax.nn.softmax(q @ k.T) @ v


def _attention_backward(saved, g):
    q, k, v = saved
    p = jax.nn.softmax(q @ k.T)
    d = p * (g @ v.T - jnp.sum(g * (p @ v), -1, keepdims=True))
    return d @ k, d.T @ q, p.T @ g


fused_attention.defvjp(lambda q, k, v: (fused_attention(q, k, v), (q, k, v)), _attention_backward)


def attention_model(attention):
    def model_fn(params, x):
        def one(x):
            return jnp.mean(attention(x @ params["q"], x @ params["k"], x @ params["v"]), 0)

        return jax.vmap(one)(x)

    return model_fn


def plain_attention(q, k, v):
    return jax.nn.softmax(q @ k.T) @ v


def plain_cross_entropy(logits, labels):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1))


def attention_problem():
    rng = np.random.default_rng(4)
    params = {name: jnp.asarray(rng.standard_normal((3, 3)) / 2) for name in "qkv"}
    return params, (jnp.asarray(rng.standard_normal((5, 4, 3))), jnp.asarray(rng.integers(0, 3, 5)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ggn", "empirical", "mc", "hessian", "covariance"])
def test_every_operator_falls_back_where_a_model_refuses_forward_mode(kind, x64):
    params, data = attention_problem()

    def build(attention, loss):
        model_fn = attention_model(attention)
        if kind == "ggn":
            return spectra.GGNOperator(model_fn, loss, params, data)
        if kind in ("empirical", "mc"):
            key = jax.random.key(0) if kind == "mc" else None
            return spectra.FisherOperator(model_fn, loss, params, data, kind=kind, key=key)

        def loss_fn(params, batch):
            return loss(model_fn(params, batch[0]), batch[1])

        cls = spectra.HessianOperator if kind == "hessian" else spectra.GradientCovarianceOperator
        return cls(loss_fn, params, data)

    exact = build(plain_attention, plain_cross_entropy)
    with pytest.warns(UserWarning, match="custom_vjp.*fused_") as record:
        fused = build(fused_attention, fused_cross_entropy)
    assert "reverse-over-reverse" in str(record[0].message)
    assert fused.mode == "reverse-over-reverse"
    assert relative_error(fused.as_matrix(), exact.as_matrix()) <= 64 * np.finfo(float).eps


@pytest.mark.slow
def test_gauss_newton_by_finite_differences(dtype):
    """f = sin(x w) through a host callback that can be differentiated once: J in closed form."""

    def model_fn(w, x):
        return host_sin(x @ w)

    def loss_fn(outputs, targets):
        return 0.5 * jnp.mean((outputs - targets) ** 2)

    data = (jnp.asarray(X), jnp.zeros(len(X)))
    op = spectra.GGNOperator(model_fn, loss_fn, jnp.asarray(W), data, mode="finite-difference")
    jacobian = np.cos(X @ W)[:, None] * X
    expected = jacobian.T @ jacobian / len(X)
    # The model's and the loss's differences each add a few eps^(2/3); see above.
    assert relative_error(op.as_matrix(), expected) <= 64 * float(jnp.finfo(dtype).eps) ** (2 / 3)


def layer(x, w):
    return jnp.tanh(x @ w)


def plain_layers(params, x):
    for w in params["w"]:
        x = layer(x, w)
    return x


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["checkpoint", "scan"])
def test_rematerialised_and_scanned_layers(wrap, x64):
    """The same model written plainly; `linearize` and its transpose go through both constructs."""
    rng = np.random.default_rng(5)
    params = {"w": jnp.asarray(rng.standard_normal((3, 4, 4)) / 2)}
    data = (jnp.asarray(rng.standard_normal((5, 4))), jnp.asarray(rng.integers(0, 4, 5)))

    def wrapped(params, x):
        if wrap == "scan":
            return jax.lax.scan(lambda x, w: (layer(x, w), None), x, params["w"])[0]
        for w in params["w"]:
            x = jax.checkpoint(layer)(x, w)
        return x

    for linearize in (True, False):
        got, expected = (
            spectra.GGNOperator(model, plain_cross_entropy, params, data, linearize=linearize).as_matrix()
            for model in (wrapped, plain_layers)
        )
        assert relative_error(got, expected) <= 64 * np.finfo(float).eps


def test_batches_of_equal_shape_compile_once():
    traces = 0

    def model_fn(w, x):
        nonlocal traces
        traces += 1
        return x @ w

    x = np.random.default_rng(0).standard_normal((12, 4)).astype(np.float32)
    batches = [(x[i : i + 3], np.zeros(3, np.float32)) for i in range(0, 12, 3)]
    loss = lambda outputs, targets: jnp.mean((outputs - targets) ** 2)  # noqa: E731
    op = spectra.GGNOperator(model_fn, loss, jnp.ones(4), batches)
    op @ jnp.ones(4)
    before = traces
    op @ jnp.ones(4)
    assert traces == before
