"""Preconditioned operators: P is the one that optax divides by, the matrix that NumPy computes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import Ridge, relative_error
from flax import nnx

import spectra

RATE = 0.1
# An eps of the size of the gradients' root, so that where it stands can be told from its effect.
OPTIMIZERS = {
    "adam": (optax.adam(RATE), {}),
    "adam, other numbers": (
        optax.adam(RATE, b1=0.8, b2=0.9, eps=0.03, eps_root=0.02),
        {"b1": 0.8, "b2": 0.9, "eps": 0.03, "eps_root": 0.02},
    ),
    "adam, injected": (
        optax.inject_hyperparams(optax.adam)(RATE, b1=0.8, b2=0.9, eps=0.03, eps_root=0.02),
        {},
    ),
    "adamw": (optax.adamw(RATE, weight_decay=0.0), {}),
    "adam in a chain": (optax.chain(optax.clip_by_global_norm(1e3), optax.adam(RATE)), {}),
    "adam behind a mask": (optax.masked(optax.adam(RATE), {"b": True, "w": True}), {}),
    "adam every second step": (optax.MultiSteps(optax.adam(RATE), 1), {}),
    "adam for all groups": (optax.multi_transform({"x": optax.adam(RATE)}, {"b": "x", "w": "x"}), {}),
    "adam on a schedule": (optax.adam(optax.constant_schedule(RATE)), {}),
    "amsgrad": (optax.amsgrad(RATE, eps=0.03, eps_root=0.02), {"eps": 0.03, "eps_root": 0.02}),
    "adabelief": (optax.adabelief(RATE, eps=0.03, eps_root=0.02), {"eps": 0.03}),
    "yogi": (optax.yogi(RATE), {"rule": "yogi"}),
    "adamax": (optax.adamax(RATE), {"rule": "adamax"}),
    "rmsprop": (optax.rmsprop(RATE, eps=0.03), {"eps": 0.03}),
    "rmsprop, injected": (optax.inject_hyperparams(optax.rmsprop)(RATE, decay=0.8, eps=0.03), {}),
    "rmsprop, eps outside": (
        optax.rmsprop(RATE, eps=0.03, eps_in_sqrt=False),
        {"eps": 0.03, "eps_in_sqrt": False},
    ),
    "rmsprop, corrected": (optax.rmsprop(RATE, decay=0.8, bias_correction=True), {"b2": 0.8}),
    "adagrad": (optax.adagrad(RATE, eps=0.03), {"eps": 0.03}),
}


def after_steps(optimizer, params, count=3):
    """The state after some steps along fixed gradients, and the last gradient and update."""
    rng = np.random.default_rng(0)
    state = optimizer.init(params)
    for _ in range(count):
        gradient = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), params)
        updates, state = optimizer.update(gradient, state, params)
    return state, gradient, updates


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_of_optax_is_the_momentum_divided_by_p(name, x64):
    optimizer, options = OPTIMIZERS[name]
    ridge = Ridge()
    params = ridge.params()
    state, gradient, updates = after_steps(optimizer, params)
    op = spectra.PreconditionedOperator(ridge.operator(), state, **options)
    found = [x for x in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(x, "mu")]
    momentum = found[0].mu if found else gradient
    for update, m, root in zip(*map(jax.tree.leaves, (updates, momentum, op.scale)), strict=True):
        # A dozen roundings each; optax holds the injected numbers in float32.
        tolerance = 1e-6 if "injected" in name else 1e-13
        np.testing.assert_allclose(update, -RATE * m * root**2, rtol=tolerance)


def test_the_matrix_is_that_of_numpy_with_adam_written_out(x64):
    rng, ridge = np.random.default_rng(0), Ridge()
    gradients = [(rng.standard_normal(()), rng.standard_normal(5)) for _ in range(3)]
    second = np.zeros(6)
    for b, w in gradients:
        second = 0.999 * second + 0.001 * np.concatenate([[b], w]) ** 2
    p = (1 - 0.9**3) * (np.sqrt(second / (1 - 0.999**3)) + 1e-8)
    state, _, _ = after_steps(optax.adam(RATE), ridge.params())
    op = spectra.PreconditionedOperator(ridge.operator(), state)
    # optax computes 1 - b^t in float32 at t = 3: relative errors of eps32 / (1 - b2^3).
    expected = ridge.hessian() / np.sqrt(np.outer(p, p))
    assert relative_error(op.as_matrix(), expected) <= 1e-12
    v = np.ones(6)
    np.testing.assert_allclose(op @ jnp.asarray(v), expected @ v, atol=1e-12 * np.abs(expected).max())


def test_blocks_take_the_scales_of_their_parameters(x64):
    ridge = Ridge()
    state, _, _ = after_steps(optax.adam(RATE), ridge.params())
    whole = spectra.PreconditionedOperator(ridge.operator(), state)
    matrix = np.asarray(whole.as_matrix())
    for block in (
        whole.block("w"),
        spectra.PreconditionedOperator(ridge.operator().block("w"), state),
        spectra.PreconditionedOperator(ridge.operator(wrt="w"), state),
    ):
        np.testing.assert_allclose(block.as_matrix(), matrix[1:, 1:], rtol=1e-12, atol=1e-12)


def test_one_of_several_groups_can_be_chosen():
    ridge = Ridge()
    params = ridge.params()
    groups = {"x": optax.adam(RATE), "y": optax.rmsprop(RATE)}
    state, _, _ = after_steps(optax.multi_transform(groups, {"b": "x", "w": "y"}), params)
    with pytest.raises(spectra.SpectraError, match="holds 2 second moments"):
        spectra.PreconditionedOperator(ridge.operator(), state)
    part = state.inner_states["x"]
    assert spectra.PreconditionedOperator(ridge.operator().block("b"), part).size == 1
    with pytest.raises(spectra.StructureError, match="of the parameter 'w'; it has those of b"):
        spectra.PreconditionedOperator(ridge.operator(), part)


def test_what_is_no_adaptive_optimizer_is_refused():
    ridge = Ridge()
    params = ridge.params()
    with pytest.raises(spectra.SpectraError, match="holds no second moment"):
        spectra.PreconditionedOperator(ridge.operator(), optax.sgd(0.1, momentum=0.9).init(params))
    with pytest.raises(spectra.SpectraError, match="has taken no step yet"):
        spectra.PreconditionedOperator(ridge.operator(), optax.adam(0.1).init(params))
    state, _, _ = after_steps(optax.adam(RATE), {"b": jnp.ones(()), "w": jnp.ones(4)})
    with pytest.raises(spectra.StructureError, match=r"shape \(4,\), the parameter \(5,\)"):
        spectra.PreconditionedOperator(ridge.operator(), state)
    state, _, _ = after_steps(optax.rmsprop(RATE), params)
    with pytest.raises(spectra.SpectraError, match="rule='yogi' with a ScaleByRmsState"):
        spectra.PreconditionedOperator(ridge.operator(), state, rule="yogi")
    zeros = jax.tree.map(jnp.zeros_like, params)
    optimizer = optax.adam(RATE)
    _, state = optimizer.update(zeros, optimizer.init(params), params)
    with pytest.raises(spectra.SpectraError, match="preconditioner of 'b' is zero"):
        spectra.PreconditionedOperator(ridge.operator(), state, eps=0.0)


def test_adagrad_leaves_parameters_without_gradient_where_they_are():
    params = jnp.ones(3)
    optimizer = optax.adagrad(RATE, initial_accumulator_value=0.0)
    _, state = optimizer.update(jnp.array([1.0, 0.0, 2.0]), optimizer.init(params), params)
    op = spectra.PreconditionedOperator(spectra.MatrixOperator(jnp.eye(3)), state, eps=0.0)
    np.testing.assert_allclose(op.as_matrix(), np.diag([1.0, 0.0, 0.5]), rtol=1e-6)


def test_the_state_of_an_nnx_optimizer_and_a_trace():
    class Model(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))

    model = Model()
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    graph, params = nnx.split(model, nnx.Param)
    x = jnp.ones((4, 3))

    def loss_fn(params, x):
        return jnp.mean(nnx.merge(graph, params).layer(x) ** 2)

    optimizer.update(model, jax.grad(loss_fn)(params, x))
    params = nnx.state(model, nnx.Param)
    op = spectra.PreconditionedOperator(spectra.HessianOperator(loss_fn, params, x), optimizer.opt_state)
    assert op.size == 8
    traced = jax.jit(lambda base, state: spectra.PreconditionedOperator(base, state).as_matrix())
    np.testing.assert_allclose(
        traced(op.base, nnx.as_pure(optimizer.opt_state)), op.as_matrix(), rtol=1e-5, atol=1e-4
    )
