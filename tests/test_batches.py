"""What a batch may hold, what a list stands for, and how a loss is called."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Ridge, relative_error

import spectra
from spectra import DataError, HessianOperator, StructureError

RNG = np.random.default_rng(0)
X = RNG.standard_normal((12, 3))
NODES = np.arange(6)
PARAMS = {"a": RNG.standard_normal(3)}


def interior_and_boundary(p, b):
    return jnp.mean(jnp.tanh(b["in"] @ p["a"]) ** 2) + jnp.mean((b["bc"] @ p["a"]) ** 4)


def messages(p, graph):
    """A named tuple of leaves of three lengths, one of them None, as jraph's graphs are."""
    sent = jnp.tanh(graph["nodes"] @ p["a"])[graph["senders"]]
    return jnp.mean(jax.ops.segment_sum(sent, graph["receivers"], 12) ** 2)


def with_key(p, b):
    noise = jax.random.normal(b["key"], b["x"].shape, b["x"].dtype)
    return jnp.mean(jnp.tanh((b["x"] + noise) @ p["a"]) ** 2)


def weighted(p, b):
    """A temperature, weights of features and text, shared by all examples."""
    return jnp.mean(jnp.tanh((b["x"] * b["weights"]) @ p["a"]) ** 2) * (
        b["t"] if b["split"] == "train" else 1
    )


WHOLE = {
    "regions": (interior_and_boundary, {"in": X, "bc": X[:2]}),
    "graph": (messages, {"nodes": X, "senders": NODES, "receivers": NODES[::-1].copy(), "globals": None}),
    "graph without edges": (interior_and_boundary, {"in": X, "bc": X[:1], "edges": NODES[:0]}),
    "one key": (with_key, {"x": X, "key": jax.random.key(0)}),
    "one old key": (with_key, {"x": X, "key": jax.random.PRNGKey(0)}),
    "shared": (weighted, {"x": X, "weights": np.arange(3.0), "t": 0.5, "split": "train"}),
    "names of files": (
        weighted,
        {"x": X, "weights": np.arange(3.0), "t": 2, "split": "", "names": ["a"] * 12},
    ),
}


def exact(loss_fn, batch):
    params = jax.tree.map(jnp.asarray, PARAMS)
    return jax.jit(jax.hessian(lambda a: loss_fn({"a": a}, batch)))(params["a"])


@pytest.mark.slow
@pytest.mark.parametrize("case", WHOLE)
def test_a_batch_that_is_used_whole_holds_leaves_of_any_shape(case, x64):
    loss_fn, batch = WHOLE[case]
    for data in (batch, [batch]):
        op = HessianOperator(loss_fn, PARAMS, data)
        assert relative_error(op.as_matrix(), exact(loss_fn, batch)) <= 1e-10


def test_leaves_that_examples_share_are_not_cut(x64):
    batch = WHOLE["shared"][1]
    parts = [batch | {"x": X[i : i + 4]} for i in (0, 4, 8)]
    for data, microbatch in ((batch, 4), (parts, None), (parts, 3)):
        op = HessianOperator(weighted, PARAMS, data, shared="weights", microbatch=microbatch)
        assert relative_error(op.as_matrix(), exact(weighted, batch)) <= 1e-10
    covariance = spectra.GradientCovarianceOperator(weighted, PARAMS, batch, shared=["weights", "t"])
    scaled = X * batch["weights"]
    t = np.tanh(scaled @ PARAMS["a"])
    gradients = (batch["t"] * 2 * t * (1 - t**2))[:, None] * scaled
    assert relative_error(covariance.as_matrix(), gradients.T @ gradients / 12) <= 1e-10


def test_what_is_cut_needs_a_common_axis():
    batch = WHOLE["shared"][1]
    with pytest.raises(DataError, match=r"\{'weights': 3, 'x': 12\}.*shared="):
        HessianOperator(weighted, PARAMS, batch, microbatch=4)
    with pytest.raises(DataError, match=r"batch 0: leaves differ.*shared=.*weight_fn="):
        HessianOperator(weighted, PARAMS, [batch, batch])
    HessianOperator(weighted, PARAMS, [batch, batch], weight_fn=lambda batch: 1)
    with pytest.raises(DataError, match=r"shared='w' names no leaf of the batch; they are: .*weights"):
        HessianOperator(weighted, PARAMS, batch, shared="w")


def pair_loss(p, b):
    """Takes (x, y), and by chance a single array as well."""
    return jnp.mean((b[0] @ p["a"] - jnp.mean(b[1])) ** 2)


def strict_pair_loss(p, b):
    x, y = b
    return jnp.mean(jnp.tanh(x @ p["a"] - y) ** 2)


def single_loss(p, x):
    return jnp.mean(jnp.tanh(x @ p["a"]) ** 2)


@pytest.mark.slow
def test_a_list_is_one_batch_or_a_stream(x64):
    y = np.ones(12)
    with pytest.raises(DataError, match=r"one batch or a stream of 2.*data=tuple\(data\).*lambda: iter"):
        HessianOperator(pair_loss, PARAMS, [X, X])
    pair = HessianOperator(strict_pair_loss, PARAMS, [X, y])  # as PyTorch's default collate makes it
    assert pair.stream is None
    assert relative_error(pair.as_matrix(), exact(strict_pair_loss, (X, y))) <= 1e-10
    batches = HessianOperator(strict_pair_loss, PARAMS, [[X[:4], y[:4]], [X[4:], y[4:]]])
    assert relative_error(batches.as_matrix(), exact(strict_pair_loss, (X, y))) <= 1e-10
    arrays = HessianOperator(single_loss, PARAMS, [X[:4], X[4:]])
    assert relative_error(arrays.as_matrix(), exact(single_loss, X)) <= 1e-10


@pytest.mark.parametrize(
    ("loss_fn", "data", "found"),
    [
        (lambda p, x, y: 0.0, (X, X), r"called as loss_fn\(params, batch\).*\(float64\[12, 3\], .*\*batch\)"),
        (lambda p, x, key: 0.0, X, r"Close over all else: lambda params, batch: loss_fn\(params, batch, "),
        (
            lambda p: 0.0,
            None,
            r"called as loss_fn\(params, batch\).*Write lambda params, batch: loss_fn\(params\)",
        ),
        (lambda p, x, t: 0.0, {"x": X, "t": X}, r"loss_fn\(params, \*\*batch\)"),
        (
            strict_pair_loss,
            {"x": X},
            r"raised ValueError in .*test_batches.py, line \d+.*\{'x': float64\[12, 3\]\}",
        ),
        (strict_pair_loss, ((X, X[:, 0]), (X, X[:, 0])), "A tuple is one batch"),
    ],
    ids=["x, y", "a key", "no batch", "keywords", "another batch", "a tuple of batches"],
)
def test_a_loss_of_another_signature(loss_fn, data, found):
    with pytest.raises(StructureError, match=found):
        HessianOperator(loss_fn, PARAMS, data)


def test_lists_of_numbers_in_place_of_arrays():
    with pytest.raises(StructureError, match=r"\.\.\..*make one array of a list, by np.asarray") as caught:
        HessianOperator(lambda p, batch: jnp.sum(batch[0] @ p), PARAMS, ([[1.0, 2.0]] * 300, [0] * 300))
    assert len(str(caught.value)) < 900


def test_a_model_of_another_signature():
    with pytest.raises(StructureError, match=r"model_fn\(x\) is called as model_fn\(params, inputs\)"):
        spectra.GGNOperator(lambda x: x, lambda f, y: jnp.mean(f - y), PARAMS, (X, X))  # pyright: ignore


@functools.partial(jax.jit, donate_argnums=0)
def step(params):
    return jax.tree.map(lambda x: 0.9 * x, params)


def test_arrays_that_were_donated():
    params = {"a": jnp.ones(3) + 0}
    op = HessianOperator(single_loss, params, X)
    step(params)
    for call in (
        lambda: op @ jnp.ones(3),
        op.loss,
        op.prepare,
        lambda: spectra.eigsh(op, 1, key=jax.random.key(0)),
        lambda: HessianOperator(single_loss, params, X),
    ):
        with pytest.raises(StructureError, match=r"'.*a' was deleted: it was donated"):
            call()


@pytest.mark.slow
def test_products_with_a_matrix(x64):
    ridge = Ridge(width=4)
    for op, factor in ((ridge.operator(), 1.0), (2.0 * ridge.operator(ridge.parts(5)), 2.0)):
        got = op @ np.eye(5)[:, :3]
        assert relative_error(got, factor * ridge.hessian()[:, :3]) <= 1e-12
    with pytest.raises(StructureError, match="dtype int"):
        _ = ridge.operator() @ np.eye(5, dtype=int)


@pytest.mark.slow
def test_a_vector_in_the_dtype_of_half_precision_parameters():
    ridge = Ridge(width=4)
    params = ridge.params(jnp.bfloat16)
    for op in (
        HessianOperator(spectra_loss, params, ridge.batch()),
        spectra.GradientCovarianceOperator(spectra_loss, params, ridge.batch(), centered=True),
    ):
        here, there = op.mv(params)["w"], (op @ params)["w"]
        # Compiled as one program and operation by operation: a sum over 13 examples rounds otherwise.
        np.testing.assert_allclose(
            here, there, rtol=0, atol=32 * np.finfo(np.float32).eps * np.abs(there).max()
        )


def spectra_loss(params, batch):
    return jnp.mean(jnp.tanh(batch[0] @ params["w"] + params["b"]) ** 2)


@pytest.mark.slow
def test_leaves_without_numbers_are_no_blocks():
    params = {"a": PARAMS["a"].astype(np.float32), "none": np.ones((0, 3), np.float32)}
    op = HessianOperator(single_loss, params, X.astype(np.float32))
    assert set(op.blocks()) == {"a"}
    assert set(spectra.trace(op, key=jax.random.key(0), by="leaf").value) == {"a"}
    with pytest.raises(StructureError, match="'none' holds no numbers"):
        op.block("none")
