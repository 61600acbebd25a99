"""The diagonal of Gauss-Newton matrices from the layers of a model is that of the dense matrix.

Truths are Σ_n J_nᵀ H_n J_n with `jax.jacobian` and `jax.hessian` of the loss in the outputs, in float64.
"""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow_but
from networks import Network, cross_entropy, curvature, half_square, model_fn
from test_kfac import normal, tied_fn, words_fn, words_params

import spectra
from spectra.base import trees
from spectra.operators.layer_diagonal import layer_diagonal

TOLERANCE = 1e-10
"""Relative: sums of some thousand positive terms in float64, from gradients through half a dozen layers."""
EXAMPLES, TOKENS, WORDS = 5, 4, 7


def weighted_square(outputs, targets):
    """Diagonal and dense at once: a curvature that depends on the targets, beyond any Fisher matrix."""
    return jnp.mean(jnp.sum((1 + targets**2) * (outputs - targets) ** 2, -1) + jnp.sum(outputs, -1) ** 4)


def concave(outputs, targets):
    return jnp.mean(jnp.sum(jnp.cos(outputs - targets), -1))


def contrastive(outputs, targets):
    del targets
    return jnp.mean((outputs @ outputs.T) ** 2)


def dense_diagonal(model_fn, loss_fn, params, batch):
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    inputs, targets = batch
    outputs = model_fn(params, inputs)
    size = outputs.size
    hessian = jax.jit(jax.hessian(lambda f: loss_fn(f.reshape(outputs.shape), targets)))(outputs.ravel())
    rows = jax.jit(jax.jacobian(lambda x: model_fn(unravel(x), inputs).reshape(size)))(flat)
    rows, hessian = np.asarray(rows), np.asarray(hessian)
    return np.einsum("an,ab,bn->n", rows, hessian, rows)


def ids(tokens=TOKENS):
    drawn = np.random.default_rng(0).integers(0, WORDS, (EXAMPLES, tokens))
    drawn[0] = drawn[0, 0]  # one word at every position: its gradients add before they are squared
    return jnp.asarray(drawn)


def perceptron_fn(params, x):
    return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"]


def mixed_fn(params, x):
    """What is no layer: a matrix in an exponential, a scale that is used twice."""
    turn = jax.scipy.linalg.expm(params["skew"] - params["skew"].T)
    return params["scale"] * jnp.tanh(x @ turn * params["scale"]) @ params["w"]


def convolution_fn(params, x):
    y = jax.lax.conv_general_dilated(x, params["kernel"], (2, 2), "SAME", feature_group_count=2)
    y = jnp.tanh(y + params["bias"][:, None, None])
    return y.reshape(len(x), -1) @ params["out"]


def case(name):
    x = normal(EXAMPLES, 4)
    labels, real = jnp.arange(EXAMPLES) % 2, normal(EXAMPLES, 2, seed=4)
    layers = {"w1": normal(4, 3), "b1": normal(3), "w2": normal(3, 2)}
    if name == "perceptron":
        return perceptron_fn, cross_entropy, layers, (x, labels)
    if name == "perceptron, a loss that couples outputs":
        return perceptron_fn, weighted_square, layers, (x, real)
    if name == "convolution in groups":
        params = {"kernel": normal(4, 2, 2, 2), "bias": normal(4), "out": normal(16, 2)}
        return convolution_fn, half_square, params, (normal(EXAMPLES, 4, 4, 4), real)
    if name == "embedding, projections, scales, scanned layers":
        return words_fn, half_square, words_params(), (ids(), real)
    if name == "an embedding that is the last layer":
        return tied_fn, half_square, {"E": normal(WORDS, 3)}, (ids(), normal(EXAMPLES, WORDS))
    params = {"skew": normal(4, 4), "scale": jnp.array(1.3), "w": normal(4, 2)}
    return mixed_fn, half_square, params, (x, real)


NAMES = {  # the leaves whose gradients are formed example by example
    "perceptron": "",
    "perceptron, a loss that couples outputs": "",
    "convolution in groups": "",
    "embedding, projections, scales, scanned layers": "gain, last, scale, shift",
    "an embedding that is the last layer": "",
    "no layers but one": "scale, skew",
}
EVERY = ("embedding, projections, scales, scanned layers",)


@pytest.mark.parametrize("name", slow_but(NAMES, *EVERY))
def test_the_diagonal_is_that_of_the_dense_matrix(name, x64):
    model_fn, loss_fn, params, batch = case(name)
    op = spectra.GGNOperator(model_fn, loss_fn, params, batch)
    found = spectra.diagonal(op, key=None, method="exact")
    outputs = jax.eval_shape(model_fn, params, batch[0])
    assert (found.method, found.num_matvecs) == ("exact", outputs.size // EXAMPLES)
    assert found.reason.startswith(f"exact from {found.num_matvecs} backward passes")
    assert found.reason.partition("single examples for ")[2] == NAMES[name]
    truth = dense_diagonal(model_fn, loss_fn, params, batch)
    value = np.asarray(jax.flatten_util.ravel_pytree(found.value)[0])
    assert np.abs(value - truth).max() <= TOLERANCE * truth.max()
    np.testing.assert_allclose(value, truth, rtol=TOLERANCE, atol=TOLERANCE**1.5 * truth.max())


@pytest.mark.slow
def test_pieces_blocks_streams_and_groups_have_the_same(x64):
    model_fn, loss_fn, params, (x, labels) = case("perceptron")
    truth = dense_diagonal(model_fn, loss_fn, params, (x, labels))
    for data, options in (((x, labels), {"microbatch": 2}), ([(x[:2], labels[:2]), (x[2:], labels[2:])], {})):
        op = spectra.GGNOperator(model_fn, loss_fn, params, data, **options)
        found = spectra.diagonal(op, key=None)  # "auto": two outputs an example, within the budget of 64
        assert found.num_matvecs == 2
        value = jax.flatten_util.ravel_pytree(found.value)[0]
        np.testing.assert_allclose(value, truth, rtol=TOLERANCE)
    grouped = spectra.diagonal(op.block("w*"), key=None, by="leaf")
    assert list(grouped.value) == ["w1", "w2"]
    np.testing.assert_allclose(np.ravel(grouped.value["w2"]), truth[15:], rtol=TOLERANCE)
    np.testing.assert_allclose(np.ravel(grouped.total.value["w1"]), truth[3:15], rtol=TOLERANCE)


@pytest.mark.slow
def test_fisher_matrices_have_theirs(x64):
    model_fn, loss_fn, params, (x, labels) = case("perceptron")
    empirical = spectra.FisherOperator(model_fn, loss_fn, params, (x, labels), kind="empirical")
    found = spectra.diagonal(empirical, key=None)
    assert (found.method, found.num_matvecs) == ("exact", 1)
    rows = [
        jax.grad(lambda p, i=i: loss_fn(model_fn(p, x[i : i + 1]), labels[i : i + 1]))(params)
        for i in range(5)
    ]
    truth = np.mean([np.asarray(jax.flatten_util.ravel_pytree(row)[0]) ** 2 for row in rows], axis=0)
    np.testing.assert_allclose(jax.flatten_util.ravel_pytree(found.value)[0], truth, rtol=TOLERANCE)


@pytest.mark.parametrize(
    ("loss_fn", "why"),
    [
        (concave, "is not convex"),
        pytest.param(contrastive, "sets examples against each other", marks=pytest.mark.slow),
    ],
)
def test_what_is_no_sum_of_squares_has_products_instead(loss_fn, why, x64):
    model_fn, _, params, (x, _) = case("perceptron")
    batch = x, normal(EXAMPLES, 2, seed=4)
    op = spectra.GGNOperator(model_fn, loss_fn, params, batch)
    found = spectra.diagonal(op, key=None, method="exact")
    assert found.num_matvecs == op.size
    assert why in found.reason
    truth = dense_diagonal(model_fn, loss_fn, params, batch)
    value = jax.flatten_util.ravel_pytree(found.value)[0]
    np.testing.assert_allclose(value, truth, atol=1e-12 * np.abs(truth).max())


def batch_statistics_fn(params, x):
    h = x @ params["w1"]
    return (h - h.mean(0)) @ params["w2"]


@pytest.mark.slow
def test_why_there_is_none_is_said(x64, tmp_path):
    model_fn, loss_fn, params, (x, labels) = case("perceptron")
    op = spectra.GGNOperator(model_fn, loss_fn, params, (x, labels))
    assert "has 2 outputs" in layer_diagonal(op, 1)
    coupled = spectra.GGNOperator(batch_statistics_fn, loss_fn, params, (x, labels))
    assert "change with the others of its batch" in layer_diagonal(coupled, 9)
    assert layer_diagonal(spectra.MatrixOperator(jnp.eye(3)), 9) == ""
    saved = spectra.diagonal(op, key=None, method="exact", checkpoint=tmp_path / "run")
    assert saved.num_matvecs == op.size
    assert saved.reason == "not from its layers: a checkpoint holds products"
    few = spectra.diagonal(op, key=jax.random.key(0), num_matvecs=1)
    assert few.method == "hutchinson"
    assert "; not from its layers: an example has 2 outputs" in few.reason
    with pytest.raises(spectra.SpectraError, match="probe_batch=0"):
        spectra.diagonal(op, key=None, probe_batch=0)
    inside = jax.jit(lambda op: spectra.diagonal(op, key=None, method="exact").value)(op)
    np.testing.assert_allclose(
        jax.flatten_util.ravel_pytree(inside)[0],
        dense_diagonal(model_fn, loss_fn, params, (x, labels)),
        rtol=1e-9,
    )


@pytest.mark.slow
def test_the_error_holds_the_rounding_of_float32():
    model_fn, loss_fn, params, (x, labels) = case("perceptron")
    single = jax.tree.map(lambda a: a.astype(jnp.float32), (params, x))
    op = spectra.GGNOperator(model_fn, loss_fn, single[0], (single[1], labels))
    found = spectra.diagonal(op, key=None)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), single)
        truth = dense_diagonal(model_fn, loss_fn, exact[0], (exact[1], labels))
    value, stderr = (
        np.asarray(jax.flatten_util.ravel_pytree(x)[0], float) for x in (found.value, found.stderr)
    )
    ratio = np.abs(value - truth) / stderr
    assert np.mean(ratio <= 2.8) >= 0.95  # Student's t of 4 degrees of freedom
    assert np.all(stderr <= 1e-5 * truth.max())


@pytest.mark.slow
@pytest.mark.parametrize("in_double", [True, False])
def test_sums_over_many_equal_examples_are_within_the_error(in_double, monkeypatch):
    """Each addition rounds the same way: off by 1e-5 after 3,000 of them in float32, and stated as 1e-7."""
    if not in_double:
        monkeypatch.setattr("spectra.operators.layer_diagonal.doubled", lambda op: None)
    x, params = np.full((3000, 4), 0.7, np.float32), case("perceptron")[2]
    op = spectra.GGNOperator(perceptron_fn, half_square, params, (x, np.zeros((3000, 2), np.float32)))
    with jax.enable_x64(True):
        one = jnp.asarray(x[:1], float), jnp.zeros((1, 2))
        wide = jax.tree.map(lambda a: jnp.asarray(a, float), params)
        truth = dense_diagonal(perceptron_fn, half_square, wide, one)
    found = spectra.diagonal(op, key=None, method="exact")
    assert "layers" in found.reason
    lower, _, upper = map(trees.ravel, found.interval())
    assert np.all((lower <= truth) & (truth <= upper))
    assert not in_double or np.all(upper - lower <= 4e-7 * truth)


@pytest.mark.slow
def test_outputs_below_float32_have_a_diagonal():
    """Weights of terms are float32 at least, so that roots are not of the outputs' type."""
    network = Network()
    op = spectra.GGNOperator(
        lambda params, x: model_fn(params, x).astype(jnp.bfloat16),
        cross_entropy,
        jax.tree.map(jnp.float32, network.params()),
        (jnp.float32(network.x), network.labels),
    )
    lower, _, upper = map(trees.ravel, spectra.diagonal(op, key=None, method="exact").interval())
    truth = np.einsum(
        "iam,iab,ibm->m", network.jacobians(), curvature("cross_entropy", network)[0], network.jacobians()
    )
    assert np.all((lower <= truth) & (truth <= upper))
    assert np.all(upper - lower <= 0.2 * truth.max())


@pytest.mark.slow
@pytest.mark.parametrize(("size", "scale"), [(1e-20, 4096.0), (1e10, 1e-38)])
def test_squares_of_gradients_do_not_underflow_one_by_one(size, scale):
    """Those of single examples are below float32, and their sum, or their product with rows, is not."""
    x = np.float32(size * np.random.default_rng(0).standard_normal((64, 3)))
    op = spectra.GGNOperator(
        lambda w, x: x @ w,
        lambda f, y: 0.5 * scale * jnp.mean((f - y) ** 2),
        jnp.ones((3, 1), jnp.float32),
        (jnp.asarray(x), jnp.zeros((64, 1))),
    )
    found = spectra.diagonal(op, key=None, method="exact")
    assert "layers" in found.reason
    truth = scale * np.mean(x.astype(float) ** 2, 0)[:, None]
    lower, value, upper = map(np.asarray, found.interval())
    assert np.all((lower <= truth) & (truth <= upper))
    np.testing.assert_allclose(value, truth, rtol=1e-5)  # 1e-38 is no normal number of float32: 3e-6
