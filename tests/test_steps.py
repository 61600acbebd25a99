"""Updates under the curvature: closed forms on quadratics, and the edge of stability of whole update maps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from programs import OFTEN

import spectra
from benchmarks import edge as edge_of

SCALES = jnp.array([5.0, 2.0, 1.0, -0.5])
W = jnp.array([1.0, -2.0, 0.5, 3.0])
KEY = jax.random.key(0)


def quadratic(w, _):
    return 0.5 * jnp.sum(SCALES * w**2)


def quartic(w, _):
    return jnp.sum(w**4)


OP = spectra.HessianOperator(quadratic, W, None)


def test_a_quadratic_changes_as_predicted_and_a_quartic_does_not():
    d = np.array([-0.5, 0.2, 0.1, 0.4])
    found = spectra.step_quality(OP, jnp.asarray(d, jnp.float32))
    h, w = np.asarray(SCALES, float), np.asarray(W, float)
    slope, curvature = h * w @ d, d @ (h * d)
    np.testing.assert_allclose([found.slope, found.curvature], [slope, curvature], rtol=1e-5)
    np.testing.assert_allclose(found.predicted, slope + curvature / 2, rtol=1e-5)
    np.testing.assert_allclose(found.ratio, 1, rtol=1e-5)
    np.testing.assert_allclose(found.sharpness, curvature / abs(slope), rtol=1e-5)
    np.testing.assert_allclose(found.largest_step, -2 * slope / curvature, rtol=1e-5)
    rising = spectra.step_quality(OP, jnp.asarray(-d, jnp.float32), measure=False)
    assert rising.largest_step == 0
    assert np.isnan(rising.measured)
    power = spectra.step_quality(spectra.HessianOperator(quartic, W, None), -W)
    # (1 - s)⁴ at s = 1: predicted -4 + 6 of the loss, true -1.
    np.testing.assert_allclose(
        [power.predicted / power.loss, power.measured / power.loss], [2, -1], rtol=1e-6
    )


def shallow(w, _):
    return 1000 + 1e-3 * jnp.sum(w**2)


def test_a_step_that_the_loss_does_not_resolve_is_said_to_be_one():
    """Predicted 6e-7, of 1000 in float32, whose neighbours are 6e-5 apart."""
    found = spectra.step_quality(spectra.HessianOperator(shallow, jnp.ones(3), None), 1e-4 * jnp.ones(3))
    np.testing.assert_allclose(found.predicted, 6e-7, rtol=1e-3)
    assert np.isnan(found.ratio)
    assert found.rounding >= np.spacing(np.float32(1000))
    assert f"± {found.rounding:.2g}; the loss does not resolve this step" in repr(found)
    assert not np.isnan(spectra.step_quality(OP, -W).ratio)


def test_a_loss_that_is_flat_along_an_update_has_no_sharpness_there():
    found = spectra.step_quality(spectra.HessianOperator(quadratic, 0 * W, None), W * (SCALES == 0) + 1e-30)
    flat = spectra.StepQuality(slope=0.0, curvature=0.0, length=1.0, loss=3.0, measured=0.0)
    assert np.isnan(flat.sharpness)
    assert flat.largest_step == np.inf
    assert "flat along the update" in repr(flat)
    assert found.largest_step == 0  # at a minimum along it
    assert spectra.StepQuality(0.0, -1.0, 1.0, 3.0, -0.5).largest_step == np.inf


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1.0, 1e22])
def test_small_and_large_updates_have_the_curvature_of_their_direction(size):
    """|d|² is beyond float32 for the first two and the last: predictions are products of units."""
    d = np.array([-0.5, 0.2, 0.1, 0.4])
    h, w = np.asarray(SCALES, float), np.asarray(W, float)
    slope, curvature = h * w @ d, d @ (h * d)
    update = jnp.asarray(size * d, jnp.float32)
    found = spectra.step_quality(OP, update, measure=False)
    np.testing.assert_allclose([found.slope / size, found.curvature / size**2], [slope, curvature], rtol=1e-5)
    pairs = spectra.perturbation(OP, {"d": update, "e": -2 * update})
    wanted = [[curvature, -2 * curvature], [-2 * curvature, 4 * curvature]]
    np.testing.assert_allclose(pairs.curvature / size**2, wanted, rtol=1e-5)
    np.testing.assert_allclose(pairs.slopes / size, [slope, -2 * slope], rtol=1e-5)


def test_overlap_of_the_gradient_with_eigenvectors():
    g = np.asarray(SCALES * W, float)
    pairs = spectra.eigsh(OP, 2, which="LA", key=KEY)
    found = spectra.gradient_overlap(OP, pairs)
    np.testing.assert_allclose(found.shares[::-1], g[:2] ** 2 / (g @ g), rtol=1e-5)
    np.testing.assert_allclose(float(found), np.sum(g[:2] ** 2) / (g @ g), rtol=1e-5)
    np.testing.assert_allclose(found.length, np.linalg.norm(g), rtol=1e-6)


def edge(optimizer, state, low=1e-3, high=1e6, scales=SCALES, point=W):
    """The multiple at which an eigenvalue of the whole map, state included, passes -1; bisected."""
    leaves, treedef = jax.tree.flatten(state)
    moves = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating)]
    sizes = np.cumsum([point.size, *(leaves[i].size for i in moves)])

    def once(flat, multiple):
        parts = jnp.split(flat, sizes[:-1])
        own, own_point = list(leaves), parts[0].reshape(point.shape)
        for i, part in zip(moves, parts[1:], strict=True):
            own[i] = part.reshape(leaves[i].shape)
        updates, new = optimizer.update(scales * own_point, treedef.unflatten(own), own_point)
        new = jax.tree.leaves(new)
        return jnp.concatenate([parts[0] + multiple * updates.ravel(), *(new[i].ravel() for i in moves)])

    flat = jnp.concatenate([point.ravel(), *(leaves[i].ravel() for i in moves)])
    jacobian = jax.jit(jax.jacfwd(once))
    for _ in range(40):
        middle = np.sqrt(low * high)
        values = np.linalg.eigvals(np.asarray(jacobian(flat, middle), float))
        past = (np.abs(values) > 1 + 1e-6) & (values.real < 0)
        low, high = (low, middle) if past.any() else (middle, high)
    return low


def after(optimizer, steps):
    """A state with moments in it."""
    state = optimizer.init(W)
    for i in range(steps):
        _, state = optimizer.update(SCALES * W * (1 + 0.1 * i), state, W)
    return state


@pytest.mark.parametrize(
    ("optimizer", "multiple"),
    [
        pytest.param(optax.sgd(0.1), 2 / 5 / 0.1, marks=pytest.mark.slow),
        (optax.sgd(0.1, momentum=0.9), 3.8 / 5 / 0.1),
        (optax.sgd(0.1, momentum=0.9, nesterov=True), 3.8 / 2.8 / 5 / 0.1),
        pytest.param(
            optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1, momentum=0.8)),
            3.6 / 5.5 / 0.1,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["sgd", "momentum", "nesterov", "decay"],
)
def test_the_edge_of_gradient_descent_is_that_of_its_closed_form(optimizer, multiple):
    found = spectra.stable_step(OP, optimizer, optimizer.init(W), key=KEY, learning_rate=0.1)
    np.testing.assert_allclose(float(found), multiple, rtol=1e-4)
    np.testing.assert_allclose(found.learning_rate, 0.1 * multiple, rtol=1e-4)
    assert found.status.ok


@pytest.mark.parametrize(
    ("optimizer", "multiple"),
    [
        (optax.MultiSteps(optax.sgd(0.1), 4), 2 / 5 / 0.1),  # their mean
        pytest.param(
            optax.MultiSteps(optax.sgd(0.1, momentum=0.9), 4).gradient_transformation(),
            3.8 / 5 / 0.1,
            marks=pytest.mark.slow,
        ),
        (optax.chain(optax.sgd(0.1), optax.apply_every(4)), 2 / 5 / 0.4),  # their sum
    ],
    ids=["mean", "momentum", "sum"],
)
def test_gradients_that_are_gathered_count_by_the_cycle(optimizer, multiple):
    """Three calls of four give no update, wherever in a cycle one asks."""
    for calls in range(5):
        found = spectra.stable_step(OP, optimizer, after(optimizer, calls), key=KEY)
        np.testing.assert_allclose(float(found), multiple, rtol=1e-4)


def test_an_optimizer_may_ask_for_the_loss():
    """Polyak's step, loss / |g|², is half of one over the curvature where all curvature is the same."""
    op = spectra.HessianOperator(lambda w, c: 0.5 * c * jnp.sum(w**2), W, jnp.float32(5.0))
    polyak = optax.polyak_sgd(max_learning_rate=1e3)
    found = spectra.stable_step(op, polyak, polyak.init(W), key=KEY)
    np.testing.assert_allclose(float(found), 4.0, rtol=1e-4)
    for update in (  # of a user's, which names what it takes
        lambda grad, state, params, *, value: polyak.update(grad, state, params, value=value),
        lambda grad, state, params, **more: polyak.update(grad, state, params, value=more["value"]),
    ):
        own = optax.GradientTransformationExtraArgs(polyak.init, update)
        np.testing.assert_allclose(float(spectra.stable_step(op, own, own.init(W), key=KEY)), 4.0, rtol=1e-4)
    with pytest.raises(spectra.StructureError, match="pass the state of this optimizer"):
        spectra.stable_step(op, optax.adam(0.1), optax.adam(0.1).init(W[:2]), key=KEY)
    with pytest.raises(spectra.SpectraError, match="outside jit"):
        jax.jit(lambda w: spectra.stable_step(OP, polyak, polyak.init(w), key=KEY).multiple)(W)
    search = optax.chain(optax.sgd(0.1), optax.scale_by_backtracking_linesearch(5))
    with pytest.raises(spectra.StructureError, match=r"needs more than.*value_fn"):
        spectra.stable_step(OP, search, search.init(W), key=KEY)


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_the_stable_step_is_held_where_large_eigenvalues_are_close(momentum):
    """A third of all are within 1 % of the largest. A ball of the residual about the Ritz value holds one of
    them: in none of 20 keys was it the largest. The limit fails for 1 % of keys, so for three with 1e-3."""
    scales = np.float32(np.r_[np.linspace(0.99, 1.0, 30), np.zeros(60)])
    op = spectra.HessianOperator(lambda w, _: jnp.sum(scales * w**2) / 2, jnp.ones(90), None)
    optimizer = optax.sgd(0.1, momentum=momentum)
    truth, held = (2 + 2 * (momentum or 0.0)) / 0.1, 0
    for key in jax.random.split(KEY, 20):
        found = spectra.stable_step(op, optimizer, optimizer.init(op.params), key=key)
        assert found.status is spectra.Status.CONVERGED
        assert 0.98 * truth <= found.lower <= found.multiple <= found.upper
        held += found.lower <= truth <= found.upper
    assert held >= 18


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adam(0.1),
        optax.adamw(0.1, weight_decay=0.1),
        optax.rmsprop(0.05, momentum=0.5),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)),
        optax.lion(0.1),
        optax.adabelief(0.1),
        optax.contrib.schedule_free_sgd(0.1),
        optax.contrib.ademamix(0.1),
    ],
)
def test_the_edge_of_any_optimizer_is_that_of_its_whole_update_map(optimizer):
    state = after(optimizer, 5)
    found = spectra.stable_step(OP, optimizer, state, key=KEY)
    wanted = edge(optimizer, state)
    if np.isinf(float(found)):  # signs: the update does not feel the gradient's size
        assert wanted > 9e5
    else:
        np.testing.assert_allclose(float(found), wanted, rtol=1e-3)


@pytest.mark.slow
def test_adam_is_at_the_edge_of_the_preconditioned_sharpness():
    optimizer = optax.adam(0.1)
    state = optimizer.init(W)
    moments = state[0]._replace(count=jnp.array(100_000), mu=SCALES * W, nu=(SCALES * W) ** 2)
    state = (moments, *state[1:])
    felt = spectra.PreconditionedOperator(OP, state, rule="adam", b2=0.999)
    sharpness = np.linalg.eigvalsh(np.asarray(felt.as_matrix(), float))[-1]
    found = spectra.stable_step(OP, optimizer, state, key=KEY, learning_rate=0.1)
    # The second moment answers as well, by (1 - b2) / (1 + b2) where the first does by (1 - b1) / (1 + b1).
    wanted = 38 / sharpness / (1 - 19 * 0.001 / 1.999)
    np.testing.assert_allclose(found.learning_rate, wanted, rtol=1e-4)


def test_parameters_without_a_gradient_change_no_edge():
    """As the weights of pixels that are always black: Adam's second moment of them is zero, which has no root
    with a slope."""
    optimizer, found = optax.adam(0.1), []
    for scales in (SCALES[:3], jnp.array([5.0, 2.0, 1.0, 0.0])):
        point = W[: len(scales)]
        state = optimizer.init(point)
        for i in range(5):
            _, state = optimizer.update(scales * point * (1 + 0.1 * i), state, point)
        op = spectra.HessianOperator(lambda w, s: 0.5 * jnp.sum(s * w**2), point, scales)
        found.append(float(spectra.stable_step(op, optimizer, state, key=KEY)))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4)


@pytest.mark.parametrize("factored", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_adafactor_with_parameters_that_have_seen_no_gradient(factored):
    """Its moments of them are 1e-30, whose slope is beyond float32: the truth is in float64."""
    if factored:
        optimizer = optax.adafactor(0.1, min_dim_size_to_factor=2, multiply_by_parameter_scale=False)
        point, scales = W.reshape(2, 2), jnp.array([[5.0, 2.0], [0.0, 0.0]])
    else:
        optimizer, point, scales = optax.adafactor(0.1), W, jnp.array([5.0, 2.0, 1.0, 0.0])
    state = optimizer.init(point)
    for i in range(5):
        _, state = optimizer.update(scales * point * (1 + 0.1 * i), state, point)
    op = spectra.HessianOperator(lambda w, s: 0.5 * jnp.sum(s * w**2), point, scales)
    found = spectra.stable_step(op, optimizer, state, key=KEY, tol=1e-4)
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda x: x.astype(float) if x.dtype == jnp.float32 else x, (state, scales, point)
        )
        wanted = edge(optimizer, wide[0], scales=wide[1], point=wide[2])
    # Arnoldi to 1e-4 of the eigenvalue of a map that is no symmetric one.
    np.testing.assert_allclose(float(found), wanted, rtol=1e-3)


def test_an_update_that_turns_the_gradient_has_the_edge_of_its_pair():
    """θ - 0.1 m c R θ with R a rotation by φ has |1 - 0.1 m c exp(iφ)| = 1 at m = 2 cos φ / (0.1 c)."""
    angle, c = 0.3, 5.0
    turn = jnp.kron(jnp.eye(2), jnp.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]))
    optimizer = optax.stateless(lambda updates, params: -0.1 * (turn @ updates))
    op = spectra.HessianOperator(lambda w, c: 0.5 * c * jnp.sum(w**2), W, jnp.float32(c))
    found = spectra.stable_step(op, optimizer, optimizer.init(W), key=KEY, tol=1e-4)
    np.testing.assert_allclose(float(found), 2 * np.cos(angle) / (0.1 * c), rtol=1e-4)


@pytest.mark.slow
def test_muon_is_at_the_edge_of_its_whole_update_map():
    """Newton-Schulz steps of a matrix: its derivative is no diagonal and turns what alternates, by 0.068."""
    optimizer, point = optax.contrib.muon(0.1), W.reshape(2, 2)
    scales = jnp.abs(SCALES).reshape(2, 2)
    state = optimizer.init(point)
    for i in range(5):
        _, state = optimizer.update(scales * point * (1 + 0.1 * i), state, point)
    op = spectra.HessianOperator(lambda w, s: 0.5 * jnp.sum(s * w**2), point, scales)
    found = spectra.stable_step(op, optimizer, state, key=KEY, tol=1e-4)
    # The answer is taken at -1, and the map passes beside it: second order in the angle, 0.068² = 5e-3.
    np.testing.assert_allclose(float(found), edge(optimizer, state, scales=scales, point=point), rtol=5e-3)


# Of the others in benchmarks/results/training.md the curvature moves by more within the steps watched.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "optimizer"),
    [
        ("mlp", "adam"),
        ("convolutional", "sgd"),
        ("mlp", "momentum"),
        ("convolutional", "momentum"),
        ("convolutional", "adam"),
        ("attention", "adam"),
    ],
)
def test_networks_turn_unstable_within_a_tenth_of_it(network, optimizer):
    run = edge_of.Run(network, *edge_of.OPTIMIZERS[optimizer], compiler_options=OFTEN)
    run.prepare()
    found = float(run.stable_step())
    run.move()
    assert run.unstable(1.1 * found)
    assert not run.unstable(found / 1.1)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
@pytest.mark.parametrize("network", edge_of.NETWORKS)
def test_at_rest_all_networks_turn_unstable_within_a_tenth_of_it(network, optimizer):
    """Where the curvature stands still: on the way there that of the attention moves by more than a tenth."""
    run = edge_of.Run(network, *edge_of.OPTIMIZERS[optimizer], compiler_options=OFTEN)
    run.prepare()
    run.rest()
    found = float(run.stable_step())
    run.move()
    assert run.unstable(1.1 * found)
    assert not run.unstable(found / 1.1)


def ridge_of_one_direction(w, _):
    return -0.5 * (w[0] + 0.3 * w[1] + 0.7 * w[2] - w[3]) ** 2


def test_no_positive_curvature_but_by_rounding_leaves_the_multiple_open():
    op = spectra.HessianOperator(ridge_of_one_direction, W, None)
    optimizer = optax.sgd(0.1)
    for seed in range(3):
        found = spectra.stable_step(op, optimizer, optimizer.init(W), key=jax.random.key(seed))
        assert found.upper == np.inf
        assert found.lower > 1e5  # 2 / (0.1 · 4 eps · 2.6)


def test_results_are_saved_and_bad_input_is_refused(tmp_path):
    pairs = spectra.eigsh(OP, 1, which="LA", key=KEY)
    sgd = optax.sgd(0.1)
    for found in (
        spectra.step_quality(OP, W),
        spectra.gradient_overlap(OP, pairs),
        spectra.stable_step(OP, sgd, sgd.init(W), key=KEY),
    ):
        again = spectra.load(spectra.save(found, tmp_path / type(found).__name__))
        assert repr(again) == repr(found)
    with pytest.raises(spectra.SpectraError, match="length 0"):
        spectra.step_quality(OP, 0 * W)
    with pytest.raises(spectra.SpectraError, match="no direction"):
        spectra.gradient_overlap(spectra.HessianOperator(quadratic, 0 * W, None), pairs)
    with pytest.raises(spectra.StructureError, match="has no loss"):
        spectra.step_quality(spectra.MatrixOperator(jnp.eye(2)), W)  # pyright: ignore
    with pytest.raises(spectra.StructureError, match="pairs is a NoneType: pass the Eigenpairs"):
        spectra.gradient_overlap(OP, None)  # pyright: ignore
    for rate in (0.0, -1.0, np.nan):
        with pytest.raises(spectra.SpectraError, match=r"learning_rate=.* positive"):
            spectra.stable_step(OP, sgd, sgd.init(W), key=KEY, learning_rate=rate)
    scaled = optax.GradientTransformation(lambda w: (), lambda g, state, w: (g, ()))
    with pytest.raises(spectra.StructureError, match=r"optimizer_state is float32\[4\].*optimizer.init"):
        spectra.stable_step(OP, scaled, W, key=KEY)
    with pytest.raises(spectra.StructureError, match="without an update"):
        spectra.stable_step(OP, 3, None, key=KEY)
    concave = spectra.HessianOperator(lambda w, _: -jnp.sum(w**2), W, None)
    assert spectra.stable_step(concave, sgd, sgd.init(W), key=KEY).multiple == np.inf
