"""Models with state: batch statistics, dropout, tied weights, frozen and integer leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import relative_error
from flax import linen as nn
from flax import nnx

import spectra

X = np.random.default_rng(0).standard_normal((6, 3))
Y = np.random.default_rng(1).standard_normal((6, 2))
MEAN, VAR = np.array([0.5, -0.2]), np.array([1.5, 0.7])
EPS = 1e-5
W = np.random.default_rng(2).standard_normal((3, 2))


def half_square(outputs, targets):
    return 0.5 * jnp.mean(jnp.sum((outputs - targets) ** 2, -1))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Dense(2, use_bias=False, param_dtype=x.dtype)(x)
        x = nn.Dropout(0.5, deterministic=True)(x)
        return nn.BatchNorm(
            use_running_average=not train,
            use_scale=False,
            use_bias=False,
            use_fast_variance=False,
            epsilon=EPS,
            param_dtype=x.dtype,
        )(x)


class Nnx(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        options = {"param_dtype": jnp.float64, "rngs": rngs}
        self.linear = nnx.Linear(3, 2, use_bias=False, **options)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.norm = nnx.BatchNorm(
            2, use_scale=False, use_bias=False, use_fast_variance=False, epsilon=EPS, **options
        )
        self.linear.kernel[...] = jnp.asarray(W)
        self.norm.mean = nnx.BatchStat(jnp.asarray(MEAN))
        self.norm.var = nnx.BatchStat(jnp.asarray(VAR))

    def __call__(self, x):
        return self.norm(self.dropout(self.linear(x)))


def linen_operator(batch_stats):
    model_fn = spectra.linen_model(Linen(), batch_stats=batch_stats, train=batch_stats == "batch")
    variables = {
        "params": {"Dense_0": {"kernel": jnp.asarray(W)}},
        "batch_stats": {"BatchNorm_0": {"mean": jnp.asarray(MEAN), "var": jnp.asarray(VAR)}},
    }
    return model_fn, variables


def nnx_operator(batch_stats):
    module = Nnx()
    result = spectra.nnx_model(module, batch_stats=batch_stats)
    assert not module.dropout.deterministic  # the user's module is left alone
    return result


ADAPTERS = {"linen": linen_operator, "nnx": nnx_operator}


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_running_statistics_are_constants(adapter, x64):
    model_fn, variables = ADAPTERS[adapter]("running")
    data = (jnp.asarray(X), jnp.asarray(Y))
    np.testing.assert_allclose(model_fn(variables, data[0]), (X @ W - MEAN) / np.sqrt(VAR + EPS), rtol=1e-13)
    op = spectra.GGNOperator(model_fn, half_square, variables, data, wrt="params")
    expected = np.kron(X.T @ X / len(X), np.diag(1 / (VAR + EPS)))  # linear in the kernel, leaves (3, 2)
    assert relative_error(op.as_matrix(), expected) <= 64 * np.finfo(float).eps


def batch_normalised_loss(w):
    """In PyTorch, differentiated twice by its own double backward."""
    import torch

    x, y = torch.tensor(X), torch.tensor(Y)
    z = torch.nn.functional.batch_norm(x @ w.reshape(3, 2), None, None, training=True, eps=EPS)
    return 0.5 * ((z - y) ** 2).sum(1).mean()


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_batch_statistics_are_differentiated(adapter, x64):
    torch = pytest.importorskip("torch")

    model_fn, variables = ADAPTERS[adapter]("batch")

    def loss_fn(variables, batch):
        return half_square(model_fn(variables, batch[0]), batch[1])

    op = spectra.HessianOperator(loss_fn, variables, (jnp.asarray(X), jnp.asarray(Y)), wrt="params")
    expected = torch.autograd.functional.hessian(batch_normalised_loss, torch.tensor(W.ravel())).numpy()
    assert relative_error(op.as_matrix(), expected) <= 64 * np.finfo(float).eps


@pytest.mark.slow
def test_compiled_code_is_shared_between_checkpoints():
    traces = 0

    class Counting(nn.Module):
        @nn.compact
        def __call__(self, x):
            nonlocal traces
            traces += 1
            return nn.Dense(2)(x)

    x = jnp.asarray(X, jnp.float32)
    for seed in range(3):
        variables = Counting().init(jax.random.key(seed), x)
        model_fn = spectra.linen_model(Counting())
        options = {"wrt": "params", "mode": "forward-over-reverse"}
        op = spectra.GGNOperator(
            model_fn, half_square, variables, (x, jnp.asarray(Y, jnp.float32)), **options
        )
        before = traces
        op @ jnp.ones(op.size)
        if seed:
            assert traces == before


@pytest.mark.slow
def test_tied_weights_are_one_parameter(x64):
    """f = Wᵀ W x with W used twice: H by PyTorch's double backward."""
    torch = pytest.importorskip("torch")

    def loss_fn(params, batch):
        return half_square(batch[0] @ params["w"] @ params["w"].T, batch[0] + 1)

    def torch_loss(w):
        x = torch.tensor(X)
        return 0.5 * ((x @ w @ w.T - x - 1) ** 2).sum(1).mean()

    op = spectra.HessianOperator(loss_fn, {"w": jnp.asarray(W)}, (jnp.asarray(X),))
    expected = torch.autograd.functional.hessian(torch_loss, torch.tensor(W)).numpy().reshape(6, 6)
    assert relative_error(op.as_matrix(), expected) <= 64 * np.finfo(float).eps


@pytest.mark.slow
def test_frozen_and_integer_leaves(x64):
    """Embedding table, frozen; its index, an integer; only the output layer varies."""
    params = {
        "table": jnp.asarray(W),
        "order": jnp.array([2, 0, 1]),
        "out": {"w": jnp.array([0.3, -1.0])},
    }

    def loss_fn(params, batch):
        rows = params["table"][params["order"][batch]]
        return jnp.mean(jnp.tanh(rows @ params["out"]["w"]) ** 2)

    batch = jnp.array([0, 1, 2, 1])
    op = spectra.HessianOperator(loss_fn, params, batch, wrt="out")
    rows = W[np.array([2, 0, 1])[np.asarray(batch)]]
    t = np.tanh(rows @ np.array([0.3, -1.0]))
    expected = (rows.T * (2 * (1 - t**2) * (1 - 3 * t**2))) @ rows / 4
    # Terms of both signs cancel: roundings are those of the sum of their sizes.
    sizes = (np.abs(rows).T * (2 * (1 - t**2) * (1 + 3 * t**2))) @ np.abs(rows) / 4
    bound = 64 * np.finfo(float).eps * np.linalg.norm(sizes) / np.linalg.norm(expected)
    assert relative_error(op.as_matrix(), expected) <= bound
    assert list(op.blocks()) == ["out/w"]
    with pytest.raises(spectra.StructureError, match="'order' has dtype int"):
        spectra.HessianOperator(loss_fn, params, batch)
    with pytest.raises(spectra.StructureError, match="paths are"):
        spectra.HessianOperator(loss_fn, params, batch, wrt="output")


def test_unknown_batch_statistics_are_refused():
    with pytest.raises(spectra.SpectraError, match="batch_stats="):
        spectra.linen_model(Linen(), batch_stats="frozen")


def attended(kind, attention, causal_mask):
    """A model with an attention layer, and its variables: Flax linen's or nnx's."""
    if kind == "linen":
        module = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)
        variables = module.init(jax.random.key(0), SEQUENCE)
        model = spectra.linen_model(module, attention=attention, mask=causal_mask)
        return model, variables
    module = nnx.MultiHeadAttention(2, 6, qkv_features=8, decode=False, rngs=nnx.Rngs(0))
    return spectra.nnx_model(module, attention=attention)


SEQUENCE = np.random.default_rng(0).standard_normal((2, 3, 20, 6)).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_attention_layers_take_another_function(kind):
    calls = []

    def counted(*args, **kwargs):
        calls.append(args[0].shape)
        return spectra.attention(*args, **kwargs)

    mask = nn.make_causal_mask(jnp.ones(SEQUENCE.shape[:-1])) if kind == "linen" else None
    plain, variables = attended(kind, None, mask)
    blocks, _ = attended(kind, counted, mask)
    expected = plain(variables, SEQUENCE)
    assert calls == []
    got = blocks(variables, SEQUENCE)
    assert calls == [(6, 20, 2, 4)]  # both leading axes in one
    # float32, 20 keys: a few roundings of each weight
    np.testing.assert_allclose(got, expected, atol=40 * np.finfo("f").eps * np.abs(expected).max())


@pytest.mark.slow
def test_dropout_of_attention_is_refused():
    module = nn.MultiHeadDotProductAttention(num_heads=2, dropout_rate=0.5, deterministic=False)
    model = spectra.linen_model(module, attention=spectra.attention, rngs={"dropout": jax.random.key(1)})
    variables = module.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, SEQUENCE[0])
    with pytest.raises(spectra.SpectraError, match="deterministic=True"):
        model(variables, SEQUENCE[0])


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=True):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(2)(x))
        return nn.Dropout(0.5, deterministic=not train)(x)


class InTraining(nnx.Module):
    def __init__(self):
        self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(x)[:, :2]


noisy = Noisy()
VARIABLES = noisy.init(jax.random.key(0), X, train=False)
BATCH = jnp.asarray(X), jnp.asarray(Y)


def forgot_the_statistics(params, x):
    return noisy.apply({"params": params["params"]}, x, train=False)


def no_key_for_dropout(variables, x):
    return noisy.apply(variables, x, mutable=["batch_stats"])[0]


def closes_over_a_module(params, x):
    return changed(x) + 0 * params["params"]["Dense_0"]["bias"]


changed = InTraining()
FLAX = {
    "statistics are updated": (
        spectra.linen_model(noisy),
        r"immutable.*linen_model\(module, batch_stats='batch'",
    ),
    "no collection": (forgot_the_statistics, "what module.init returned.*wrt='params'"),
    "no key": (no_key_for_dropout, "deterministic=True"),
    "unbound": (lambda variables, x: noisy(x), r"linen_model\(module\) is a function"),
    "nnx": (closes_over_a_module, r"nnx_model\(module\) gives a function"),
    "inputs alone": (changed, r"take the parameters, too: spectra.nnx_model\(module\)"),
}


@pytest.mark.parametrize(("model_fn", "words"), FLAX.values(), ids=FLAX)
def test_errors_of_flax_come_with_what_to_do(model_fn, words):
    with pytest.raises(spectra.StructureError, match=words):
        spectra.GGNOperator(model_fn, half_square, VARIABLES, BATCH, wrt="params")


def evaluated(variables, batch):
    return half_square(noisy.apply(variables, batch[0], train=False), batch[1])


@pytest.mark.slow
def test_running_statistics_that_would_vary_are_named():
    """Without wrt= nothing says that they are no parameters, and the Hessian has their rows, too."""
    with pytest.warns(UserWarning, match=r"4 numbers of the model's state.*wrt='params'"):
        op = spectra.HessianOperator(evaluated, VARIABLES, BATCH)
    assert op.size == 16
    for wrt, size in (("params", 12), ("*", 16)):
        assert spectra.HessianOperator(evaluated, VARIABLES, BATCH, wrt=wrt).size == size
    module = nnx.BatchNorm(3, use_running_average=True, rngs=nnx.Rngs(0))
    with pytest.warns(UserWarning, match="6 numbers of the model's state"):
        spectra.HessianOperator(
            lambda module, batch: half_square(module(batch[0])[:, :2], batch[1]), module, BATCH
        )
    parameters = {"params": VARIABLES["params"], "head": jnp.ones(2)}  # no state
    assert (
        spectra.HessianOperator(
            lambda p, b: evaluated({**VARIABLES, "params": p["params"]}, b) * p["head"].sum(),
            parameters,
            BATCH,
        ).size
        == 14
    )
