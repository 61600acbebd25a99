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
B2 = {"b2": 0.999}
ADAM_RULE = {"rule": "adam", **B2}
OPTIMIZERS = {
    "adam": (optax.adam(RATE), ADAM_RULE),
    "adam, other numbers": (
        optax.adam(RATE, b1=0.8, b2=0.9, eps=0.03, eps_root=0.02),
        {"rule": "adam", "b1": 0.8, "b2": 0.9, "eps": 0.03, "eps_root": 0.02},
    ),
    "adam, injected": (
        optax.inject_hyperparams(optax.adam)(RATE, b1=0.8, b2=0.9, eps=0.03, eps_root=0.02),
        {"rule": "adam"},
    ),
    "adamw": (optax.adamw(RATE, weight_decay=0.0), ADAM_RULE),
    "adam in a chain": (optax.chain(optax.clip_by_global_norm(1e3), optax.adam(RATE)), ADAM_RULE),
    "adam behind a mask": (optax.masked(optax.adam(RATE), {"b": True, "w": True}), ADAM_RULE),
    "adam every second step": (optax.MultiSteps(optax.adam(RATE), 1), ADAM_RULE),
    "adam for all groups": (optax.multi_transform({"x": optax.adam(RATE)}, {"b": "x", "w": "x"}), ADAM_RULE),
    "adam on a schedule": (optax.adam(optax.constant_schedule(RATE)), ADAM_RULE),
    "amsgrad": (optax.amsgrad(RATE, eps=0.03, eps_root=0.02), {"eps": 0.03, "eps_root": 0.02}),
    "adabelief": (optax.adabelief(RATE, eps=0.03, eps_root=0.02), {"eps": 0.03, **B2}),
    "yogi": (optax.yogi(RATE), {"rule": "yogi", **B2}),
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
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for _ in range(count):
        gradient = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), params)
        updates, state = update(gradient, state, params)
    return state, gradient, updates


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_of_optax_is_the_momentum_divided_by_p(name, x64):
    optimizer, options = OPTIMIZERS[name]
    ridge = Ridge()
    params = ridge.params()
    state, gradient, updates = after_steps(optimizer, params)
    op = spectra.PreconditionedOperator(ridge.operator(), state, **options)
    measured = spectra.PreconditionedOperator(ridge.operator(), state, update_fn=optimizer.update)
    found = [x for x in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(x, "mu")]
    momentum = found[0].mu if found else gradient
    # A dozen roundings each; optax holds the injected numbers in float32. An eps that is measured is a small
    # difference of large numbers: that of RMSProp's, of two responses that differ by 4 % here.
    tolerance = 1e-6 if "injected" in name else 1e-13
    for which, limit in ((op, tolerance), (measured, max(tolerance, 1e-11))):
        for update, m, root in zip(*map(jax.tree.leaves, (updates, momentum, which.scale)), strict=True):
            np.testing.assert_allclose(update, -RATE * m * root**2, rtol=limit)


def test_the_matrix_is_that_of_numpy_with_adam_written_out(x64):
    rng, ridge = np.random.default_rng(0), Ridge()
    gradients = [(rng.standard_normal(()), rng.standard_normal(5)) for _ in range(3)]
    second = np.zeros(6)
    for b, w in gradients:
        second = 0.999 * second + 0.001 * np.concatenate([[b], w]) ** 2
    p = (1 - 0.9**3) * (np.sqrt(second / (1 - 0.999**3)) + 1e-8)
    state, _, _ = after_steps(optax.adam(RATE), ridge.params())
    op = spectra.PreconditionedOperator(ridge.operator(), state, **ADAM_RULE)
    # optax computes 1 - b^t in float32 at t = 3: relative errors of eps32 / (1 - b2^3).
    expected = ridge.hessian() / np.sqrt(np.outer(p, p))
    assert relative_error(op.as_matrix(), expected) <= 1e-12
    v = np.ones(6)
    np.testing.assert_allclose(op @ jnp.asarray(v), expected @ v, atol=1e-12 * np.abs(expected).max())


@pytest.mark.slow
def test_blocks_take_the_scales_of_their_parameters(x64):
    ridge = Ridge()
    state, _, _ = after_steps(optax.adam(RATE), ridge.params())
    whole = spectra.PreconditionedOperator(ridge.operator(), state, **ADAM_RULE)
    matrix = np.asarray(whole.as_matrix())
    for block in (
        whole.block("w"),
        spectra.PreconditionedOperator(ridge.operator().block("w"), state, **ADAM_RULE),
        spectra.PreconditionedOperator(ridge.operator(wrt="w"), state, **ADAM_RULE),
    ):
        np.testing.assert_allclose(block.as_matrix(), matrix[1:, 1:], rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_one_of_several_groups_can_be_chosen():
    ridge = Ridge()
    params = ridge.params()
    groups = {"x": optax.adam(RATE), "y": optax.rmsprop(RATE)}
    state, _, _ = after_steps(optax.multi_transform(groups, {"b": "x", "w": "y"}), params)
    with pytest.raises(spectra.SpectraError, match="holds 2 second moments"):
        spectra.PreconditionedOperator(ridge.operator(), state, **ADAM_RULE)
    part = state.inner_states["x"]
    assert spectra.PreconditionedOperator(ridge.operator().block("b"), part, **ADAM_RULE).size == 1
    with pytest.raises(spectra.StructureError, match="of the parameter 'w'; it has those of b"):
        spectra.PreconditionedOperator(ridge.operator(), part, **ADAM_RULE)


@pytest.mark.slow
def test_what_is_no_adaptive_optimizer_is_refused():
    ridge = Ridge()
    params = ridge.params()
    with pytest.raises(spectra.SpectraError, match="contains no known second moment"):
        spectra.PreconditionedOperator(ridge.operator(), optax.sgd(0.1, momentum=0.9).init(params))
    with pytest.raises(spectra.SpectraError, match="has taken no step yet"):
        spectra.PreconditionedOperator(ridge.operator(), optax.adam(0.1).init(params), **ADAM_RULE)
    state, _, _ = after_steps(optax.adam(RATE), {"b": jnp.ones(()), "w": jnp.ones(4)})
    with pytest.raises(spectra.StructureError, match=r"shape \(4,\), the parameter \(5,\)"):
        spectra.PreconditionedOperator(ridge.operator(), state, **ADAM_RULE)
    state, _, _ = after_steps(optax.rmsprop(RATE), params)
    with pytest.raises(spectra.SpectraError, match="rule='yogi' with a ScaleByRmsState"):
        spectra.PreconditionedOperator(ridge.operator(), state, rule="yogi")
    zeros = jax.tree.map(jnp.zeros_like, params)
    optimizer = optax.adam(RATE)
    _, state = optimizer.update(zeros, optimizer.init(params), params)
    with pytest.raises(spectra.SpectraError, match="preconditioner of 'b' is zero"):
        spectra.PreconditionedOperator(ridge.operator(), state, eps=0.0, **ADAM_RULE)


@pytest.mark.parametrize(
    "number", [{"b2": 1.0}, {"b2": -0.5}, {"b2": np.nan}, {"b1": 1.0}, {"eps": -1e-8}, {"eps_root": np.inf}]
)
def test_numbers_that_no_optimizer_has_are_refused(number):
    """With b2=1 P was infinite, and the matrix zero without a word."""
    ridge = Ridge()
    state, _, _ = after_steps(optax.adam(RATE), ridge.params())
    with pytest.raises(spectra.SpectraError, match=f"{next(iter(number))}=.*: use "):
        spectra.PreconditionedOperator(ridge.operator(), state, **ADAM_RULE | number)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "inside"), [({}, True), ({"eps_in_sqrt": False}, False), ({"eps": 1e-5}, True)]
)
def test_rmsprop_with_parameters_that_have_seen_no_gradient(options, inside):
    """As the weights of pixels that are always black: there P is eps alone, whatever it is."""
    optimizer, gradient = optax.rmsprop(RATE, decay=0.9, **options), np.array([1.0, 2.0, 0.0])
    params = jnp.ones(3)
    state, moment = optimizer.init(params), np.zeros(3)
    for _ in range(3):
        _, state = optimizer.update(jnp.asarray(gradient, jnp.float32), state, params)
        moment = 0.9 * moment + 0.1 * gradient**2
    eps = options.get("eps", 1e-8)
    p = np.sqrt(moment + eps) if inside else np.sqrt(moment) + eps
    identity = spectra.MatrixOperator(jnp.eye(3))
    found = spectra.PreconditionedOperator(identity, state, update_fn=optimizer.update)
    # An eps of its own is measured from responses in float32, to AGREE; its root to half of that.
    np.testing.assert_allclose(np.asarray(found.as_matrix()).diagonal(), 1 / p, rtol=1e-3)
    nothing = optimizer.update(jnp.zeros(3), optimizer.init(params), params)[1]
    with pytest.raises(spectra.SpectraError, match="has seen no gradient yet"):
        spectra.PreconditionedOperator(identity, nothing, update_fn=optimizer.update)


def test_adagrad_leaves_parameters_without_gradient_where_they_are():
    params = jnp.ones(3)
    optimizer = optax.adagrad(RATE, initial_accumulator_value=0.0)
    _, state = optimizer.update(jnp.array([1.0, 0.0, 2.0]), optimizer.init(params), params)
    op = spectra.PreconditionedOperator(spectra.MatrixOperator(jnp.eye(3)), state, eps=0.0)
    np.testing.assert_allclose(op.as_matrix(), np.diag([1.0, 0.0, 0.5]), rtol=1e-6)


@pytest.mark.slow
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
    op = spectra.PreconditionedOperator(
        spectra.HessianOperator(loss_fn, params, x), optimizer.opt_state, **ADAM_RULE
    )
    assert op.size == 8
    traced = jax.jit(lambda base, state: spectra.PreconditionedOperator(base, state, **ADAM_RULE).as_matrix())
    np.testing.assert_allclose(
        traced(op.base, nnx.as_pure(optimizer.opt_state)), op.as_matrix(), rtol=1e-5, atol=1e-4
    )


OTHERS = {  # whose states are Adam's in form, and what makes their m and their P of its fields
    "radam": optax.radam(RATE),
    "nadam": optax.nadam(RATE),
    "adam with other numbers": optax.adam(RATE, b1=0.8, b2=0.9, eps=0.03, eps_root=0.02),
    "adam on a schedule that has ended": optax.adam(optax.linear_schedule(RATE, 0.0, 3)),
    "adam at a rate below rounding": optax.adam(1e-10),
    "decoupled decay": optax.adamw(RATE, weight_decay=0.1),
    "momentum in bfloat16": optax.adam(RATE, mu_dtype=jnp.bfloat16),
}


def written_out(name, state):
    """P from the fields of the state: Adam's, rectified, or with the look-ahead's correction."""
    nu, t = np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.nu)]), int(state.count)
    b1, b2, eps, eps_root = (0.8, 0.9, 0.03, 0.02) if "numbers" in name else (0.9, 0.999, 1e-8, 0.0)
    adam = np.sqrt(nu / (1 - b2**t) + eps_root) + eps
    if name == "radam":  # r of Liu et al., arXiv:1908.03265, algorithm 2
        longest = 2 / (1 - b2) - 1
        rho = longest - 2 * t * b2**t / (1 - b2**t)
        adam /= np.sqrt((rho - 4) * (rho - 2) * longest / ((longest - 4) * (longest - 2) * rho))
    return (1 - b1 ** (t + 1 if name == "nadam" else t)) * adam


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_p_is_measured_from_updates(name, x64):
    optimizer, ridge = OTHERS[name], Ridge()
    state, _, _ = after_steps(optimizer, ridge.params(), 12 if name == "radam" else 3)
    op = spectra.PreconditionedOperator(ridge.operator(), state, update_fn=optimizer)
    p = np.concatenate([np.ravel(x) for x in jax.tree.leaves(op.scale)]) ** -2.0
    # optax corrects biases in float32, with errors of eps32 / (1 - b2^t) = 4e-5 for t = 3, of which the root
    # has half; rho - 4 is near 3 where that of RAdam is taken, a difference of numbers near 2000.
    np.testing.assert_allclose(p, written_out(name, state[0]), rtol=1e-4)


WITHOUT_P = {
    "the momentum is of scaled gradients": optax.contrib.adopt(RATE),
    "a rate for each layer": optax.lamb(RATE),
    "scaled behind": optax.chain(optax.scale_by_rms(), optax.scale_by_trust_ratio(), optax.scale(-RATE)),
    "clipped behind": optax.chain(optax.adam(RATE), optax.clip(1e-4)),
    "the sign": optax.chain(optax.adam(1.0), optax.scale_by_sign(), optax.scale(-RATE)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WITHOUT_P)
def test_what_has_no_diagonal_p_is_refused(name):
    optimizer, ridge = WITHOUT_P[name], Ridge()
    state, _, _ = after_steps(optimizer, ridge.params())
    with pytest.raises(spectra.SpectraError, match=r"no diagonal P in its state: .* Pass the diagonal"):
        spectra.PreconditionedOperator(ridge.operator(), state, update_fn=optimizer.update)


@pytest.mark.slow
def test_what_a_state_does_not_say_is_asked_for():
    ridge, adam = Ridge(), optax.adam(RATE)
    op, params = ridge.operator(), ridge.params()
    for optimizer in (adam, optax.radam(RATE), optax.contrib.adopt(RATE), optax.adabelief(RATE)):
        with pytest.raises(spectra.SpectraError, match=r"does not say b2.*update_fn=optimizer\.update"):
            spectra.PreconditionedOperator(op, after_steps(optimizer, params)[0])
    injected = optax.inject_hyperparams(optax.yogi)(RATE)
    with pytest.raises(spectra.SpectraError, match="does not say which optimizer it belongs to"):
        spectra.PreconditionedOperator(op, after_steps(injected, params)[0])
    for optimizer in (adam, optax.radam(RATE), optax.lamb(RATE)):  # whose states are one
        with pytest.raises(
            spectra.SpectraError, match=r"does not say which .* or rule=\"adam\", b2=0.999 if"
        ):
            spectra.PreconditionedOperator(op, after_steps(optimizer, params)[0], **B2)
    with pytest.raises(spectra.SpectraError, match="For other optimizers, pass the diagonal of P"):
        spectra.PreconditionedOperator(op, after_steps(optax.adafactor(RATE), params)[0])
    state, _, _ = after_steps(adam, params)
    with pytest.raises(spectra.SpectraError, match=r"contradicts the P of the numbers.*\(b2\)"):
        spectra.PreconditionedOperator(op, state, update_fn=adam.update, b2=0.9)
    with pytest.raises(spectra.SpectraError, match=r"update_fn\(gradients, state, params\) failed"):
        spectra.PreconditionedOperator(op, state, update_fn=optax.rmsprop(RATE).update)
    still = optax.adam(0.0)
    with pytest.raises(spectra.SpectraError, match="learning rate of zero"):
        spectra.PreconditionedOperator(op, after_steps(still, params)[0], update_fn=still.update)


def test_the_diagonal_itself_can_be_passed(x64):
    ridge = Ridge()
    op, p = ridge.operator(), np.arange(1.0, 7.0)
    expected = ridge.hessian() / np.sqrt(np.outer(p, p))
    for given in (jnp.asarray(p), {"b": jnp.asarray(1.0), "w": jnp.asarray(p[1:])}):
        assert relative_error(spectra.PreconditionedOperator(op, given).as_matrix(), expected) <= 1e-14
    with pytest.raises(spectra.SpectraError, match="the diagonal of 'b' is not positive"):
        spectra.PreconditionedOperator(op, {"b": np.array(1 + 1j), "w": p[1:]})
    with pytest.raises(spectra.SpectraError, match="the diagonal of 'w' is not positive"):
        spectra.PreconditionedOperator(op, {"b": jnp.asarray(1.0), "w": jnp.asarray(p[1:]) - 3})


def nested_loss(variables, data):
    weights = variables["params"]
    return jnp.mean((data @ weights["w"] + weights["b"] * variables["stats"]["scale"]) ** 2)


# How an optimizer's state and an operator's parameters differ in form: what is done to the state of Adam on
# {"b": (), "w": (5,)}, and the optimizer that has such a state.
ADAM = optax.adam(RATE)
FORMS = {
    "as it is": (lambda state: state, ADAM),
    "of a flat vector": (
        lambda _: after_steps(optax.flatten(ADAM), Ridge().params())[0],
        optax.flatten(ADAM),
    ),
    "restored as dicts": (lambda s: {"0": s[0]._asdict(), "1": {}}, ADAM),
    "restored as lists": (lambda s: [s[0]._asdict(), None], ADAM),
    "masked": (
        lambda _: after_steps(optax.masked(ADAM, {"b": True, "w": True}), Ridge().params())[0],
        optax.masked(ADAM, {"b": True, "w": True}),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_states_on_the_parameters_alone_and_in_other_forms(form, x64):
    """The operator's parameters lie under "params", beside constants; the optimizer knows nothing of that."""
    change, optimizer = FORMS[form]
    params = Ridge().params()
    state, _, _ = after_steps(ADAM, params)
    variables = {"params": params, "stats": {"scale": jnp.array(1.0)}}
    op = spectra.HessianOperator(nested_loss, variables, jnp.ones((3, 5)), wrt="params")
    expected = spectra.PreconditionedOperator(Ridge().operator(), state, **ADAM_RULE).scale
    for options in (ADAM_RULE, {"update_fn": optimizer}):
        found = spectra.PreconditionedOperator(op, change(state), **options).scale["params"]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13), found, expected)
    block = spectra.PreconditionedOperator(op.block("params/w"), change(state), update_fn=optimizer)
    np.testing.assert_allclose(block.scale["params"]["w"], expected["w"], rtol=1e-13)
