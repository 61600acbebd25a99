"""The model object and the export: transformations, argument checks, tied weights, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import spectra
from spectra import bridge
from spectra.bridge import (
    BridgeError,
    FrozenParametersWarning,
    StaticBatchWarning,
    UnsupportedOperatorError,
)


@pytest.fixture(scope="module")
def mlp():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3))
    return bridge.from_torch(module, (torch.zeros(2, 4),))


def _loss(model):
    x = jnp.cos(jnp.arange(20.0)).reshape(5, 4)
    return lambda params: jnp.mean(jax.nn.logsumexp(model.apply(params, x), -1))


@pytest.mark.slow
def test_linearize_agrees_with_jvp(mlp):
    gradient = jax.jit(jax.grad(_loss(mlp)))
    vector = jax.tree.map(jnp.ones_like, mlp.params)
    _, linear = jax.linearize(gradient, mlp.params)
    expected = jax.jit(lambda v: jax.jvp(gradient, (mlp.params,), (v,))[1])(vector)
    for name, value in jax.jit(linear)(vector).items():
        # The same sums in another order: some ten roundings of eps = 1.2e-7.
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_vmap_over_probes_and_over_parameters(mlp):
    vectors = jax.tree.map(lambda p: jnp.stack([jnp.ones_like(p), p]), mlp.params)

    @jax.jit
    def product(v):
        return jax.jvp(jax.grad(_loss(mlp)), (mlp.params,), (v,))[1]

    together = jax.jit(jax.vmap(product))(vectors)
    for i in range(2):
        alone = product(jax.tree.map(lambda v, i=i: v[i], vectors))
        for name in alone:
            np.testing.assert_allclose(together[name][i], alone[name], rtol=1e-5, atol=1e-6)
    assert jax.jit(jax.vmap(_loss(mlp)))(vectors).shape == (2,)


@pytest.mark.slow
def test_apply_traces_once_a_shape(mlp):
    traces = []

    @jax.jit
    def run(params, x):
        traces.append(x.shape)
        return mlp.apply(params, x)

    for batch in (2, 2, 7, 7, 1):
        run(mlp.params, jnp.ones((batch, 4)))
    assert traces == [(2, 4), (7, 4), (1, 4)]


def test_apply_is_a_static_argument(mlp):
    run = jax.jit(lambda f, p, x: f(p, x), static_argnums=0)
    assert run(mlp.apply, mlp.params, jnp.ones((2, 4))).shape == (2, 3)


def test_matmul_precision_is_the_callers(mlp):
    with jax.default_matmul_precision("float32"):
        text = str(jax.make_jaxpr(mlp.apply)(mlp.params, jnp.ones((2, 4))))
    assert "HIGHEST" in text or "float32" in text.split("dot_general")[1]
    assert "HIGHEST" not in str(jax.make_jaxpr(mlp.apply)(mlp.params, jnp.ones((2, 4))))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((jnp.ones((2, 5)),), "shape"),
        ((jnp.ones((2, 4), int),), "float32"),
        ((), "length 1"),
        ((jnp.ones((2, 4)), 1), "length 1"),
        ((jnp.ones((2, 5)),), r"shape \(any, 4\), got \(2, 5\)"),
        ((jnp.ones(4),), r"\(any, 4\), got \(4,\): one example, to which x\[None\] gives the first axis"),
    ],
)
def test_wrong_inputs(mlp, inputs, message):
    with pytest.raises(BridgeError, match=message):
        mlp.apply(mlp.params, *inputs)


def test_wrong_params(mlp):
    with pytest.raises(BridgeError, match=r"params is a .*Array.*like \.params, first"):
        mlp.apply(jnp.ones((2, 4)))
    with pytest.raises(BridgeError, match="missing"):
        mlp.apply({}, jnp.ones((2, 4)))
    with pytest.raises(BridgeError, match="shape"):
        mlp.apply({**mlp.params, "0.bias": jnp.ones(2)}, jnp.ones((2, 4)))
    with pytest.raises(BridgeError, match="keyword"):
        mlp.apply(mlp.params, jnp.ones((2, 4)), mask=1)


@pytest.mark.slow
def test_float64_parameters_on_a_float32_export(mlp):
    with jax.enable_x64(True):
        params = {k: jnp.asarray(v, jnp.float64) for k, v in mlp.params.items()}
        assert mlp.apply(params, jnp.ones((2, 4))).dtype == jnp.float64


class _Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, ids):
        return self.head(self.embed(ids) * self.frozen)


def test_tied_and_frozen_parameters(tmp_path):
    module = _Tied()
    example = (torch.zeros(2, 4, dtype=torch.long),)
    bridge.export(module, example, tmp_path)
    for make in (lambda: bridge.from_torch(module, example), lambda: bridge.load(tmp_path)):
        with pytest.warns(FrozenParametersWarning, match=r"model\.frozen: frozen\.") as caught:
            model = make()
        assert [w.filename for w in caught] == [__file__]
        assert list(model.params) == ["embed.weight"]
        assert list(model.frozen) == ["frozen"]
        assert model.trainable == ("embed.weight",)
    op = spectra.HessianOperator(
        lambda p, ids: model.apply(p, ids).mean(), model.params, jnp.zeros((2, 4), int)
    )
    assert op.size == 15
    state = {k: torch.tensor(v) for k, v in model.state_dict().items()}
    assert set(state) == set(module.state_dict())
    module.load_state_dict(state)
    changed = model.state_dict({**model.params, "embed.weight": jnp.zeros((5, 3))})
    assert not changed["head.weight"].any()
    # Frozen parameters among the others take the place of the model's own.
    everything = {**model.params, **model.frozen, "frozen": jnp.zeros(3)}
    assert not model.apply(everything, jnp.zeros((2, 4), int)).any()


@pytest.mark.slow
def test_a_module_that_is_frozen_as_a_whole_keeps_its_parameters():
    model = bridge.from_torch(_Tied().requires_grad_(False), (torch.zeros(2, 4, dtype=torch.long),))
    assert list(model.params) == ["frozen", "embed.weight"]
    assert not model.frozen


@pytest.mark.slow
def test_the_module_is_left_as_it_was():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
    module[2].eval()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    model = bridge.from_torch(module, (torch.randn(3, 2),))
    assert [m.training for m in module] == [True, True, False]
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    with torch.no_grad():
        module[0].weight.zero_()
    assert np.any(np.asarray(model.params["0.weight"]))
    assert list(model.params) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert {"1.running_mean", "1.running_var"} <= set(model.buffers)  # not differentiated


@pytest.mark.slow
def test_example_of_batch_one_is_dynamic():
    model = spectra.from_torch(nn.Linear(3, 2), torch.zeros(1, 3))
    assert model.apply(model.params, jnp.ones((6, 3))).shape == (6, 2)


class _Trilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.core, self.side = nn.Parameter(torch.randn(4, 3, 5)), nn.Parameter(torch.randn(5, 2))

    def forward(self, x):
        return torch.einsum("...i,ijk,kl->...jl", x, self.core, self.side)


@pytest.mark.slow
def test_a_product_of_three_factors_takes_any_batch_size():
    """PyTorch searches for the order of such a product by sizes, which would fix them."""
    module, x = _Trilinear(), torch.randn(7, 4)
    model = bridge.from_torch(module, x[:2])
    expected = module(x).detach().numpy()
    np.testing.assert_allclose(model.apply(model.params, x.numpy()), expected, rtol=1e-5, atol=1e-5)


class _Branching(nn.Module):
    """Takes another branch, which is not traced, at batches of other sizes."""

    def __init__(self, condition):
        super().__init__()
        self.condition = condition

    def forward(self, x):
        return x.cumsum(0) if self.condition(x.shape[0]) else x


@pytest.mark.parametrize(
    ("condition", "reason"),
    [
        pytest.param(lambda size: size == 3, "batch size", id="one", marks=pytest.mark.slow),
        pytest.param(lambda size: size <= 3, "is 4, not 3 .*in forward", id="small", marks=pytest.mark.slow),
        pytest.param(lambda size: size >= 3, "is 2, not 3 .*in forward", id="large", marks=pytest.mark.slow),
        pytest.param(
            lambda size: size % 2 == 1, "another branch where a size is 2, not 3 .*in forward", id="odd"
        ),
        pytest.param(
            lambda size: size != 700, "700, not 3 .*in forward", id="not 700", marks=pytest.mark.slow
        ),
    ],
)
def test_static_batch_is_announced(condition, reason):
    with pytest.warns(StaticBatchWarning, match=reason):
        model = bridge.from_torch(_Branching(condition), torch.ones(3, 2))
    assert not model.dynamic_batch
    assert model.apply({}, jnp.ones((3, 2))).shape == (3, 2)
    with pytest.raises(BridgeError, match="export it again"):
        model.apply({}, jnp.ones((4, 2)))


class _Alone(nn.Module):
    """Another function for one example than for two and more; statistics that a run moves."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x):
        return self.norm(x) if x.shape[0] > 1 else x


@pytest.mark.slow
def test_a_batch_of_one_that_is_another_function_is_announced():
    module, x = _Alone(), torch.randn(3, 2)
    with pytest.warns(
        StaticBatchWarning, match="two and more: it takes another branch where a size is 1, not 3"
    ):
        model = bridge.from_torch(module, x, train=True)
    assert model.dynamic_batch
    assert all(not value.any() for name, value in model.buffers.items() if name.endswith("mean"))


@pytest.mark.slow
def test_a_size_that_the_module_refuses_is_no_branch():
    """A convolution asks whether its kernel fits into the input."""
    module = nn.Sequential(nn.Conv1d(2, 3, 5), nn.Flatten(0))
    model = bridge.from_torch(module, torch.randn(3, 2, 9), batch_axis=[(0, 2)])
    x = torch.randn(4, 2, 7)
    expected = module(x).detach().numpy()
    np.testing.assert_allclose(model.apply(model.params, x.numpy()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_batch_axis_for_each_tensor():
    module = nn.Bilinear(2, 3, 4)
    model = bridge.from_torch(module, (torch.ones(5, 2), torch.ones(5, 3)), batch_axis=[0, 0])
    assert model.apply(model.params, jnp.ones((7, 2)), jnp.ones((7, 3))).shape == (7, 4)
    with pytest.raises(BridgeError, match="axis 0"):
        model.apply(model.params, jnp.ones((7, 2)), jnp.ones((6, 3)))
    with pytest.raises(BridgeError, match="entries"):
        bridge.from_torch(module, (torch.ones(5, 2), torch.ones(5, 3)), batch_axis=[0])
    with pytest.raises(BridgeError, match="does not exist"):
        bridge.from_torch(module, (torch.ones(5, 2), torch.ones(5, 3)), batch_axis=[2, None])
    fixed = bridge.from_torch(module, (torch.ones(5, 2), torch.ones(5, 3)), batch_axis=None)
    assert not fixed.dynamic_batch


class _Random(nn.Module):
    def __init__(self):
        super().__init__()
        self.noise = nn.Dropout(0.5)

    def forward(self, x):
        return self.noise(x)


@pytest.mark.slow
def test_uncovered_operators_are_named():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.ModuleList([_Random()])

        def forward(self, x):
            return torch.special.airy_ai(x).sum(), self.block[0](x)

    with pytest.raises(UnsupportedOperatorError) as caught:
        bridge.from_torch(Outer(), torch.ones(3, 2, 2), train=True)
    message = str(caught.value)
    assert "block.0.noise" in message
    assert "random" in message
    assert any("airy" in name for name in caught.value.operators)


def test_modules_that_cannot_be_traced():
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(BridgeError, match="tensor's values"):
        bridge.from_torch(Branch(), torch.ones(3))
    with pytest.raises(BridgeError, match=r"nn\.Module"):
        bridge.from_torch(lambda x: x, torch.ones(3))  # type: ignore[arg-type]
    with pytest.raises(BridgeError, match="example_inputs"):
        bridge.from_torch(nn.ReLU(), 3)


@pytest.mark.slow
def test_float64_needs_x64():
    module = nn.Linear(2, 2).double()
    with pytest.raises(BridgeError, match="x64"):
        bridge.from_torch(module, torch.ones(2, 2, dtype=torch.float64))


@pytest.mark.slow
def test_wide_integers_need_x64():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("big", torch.tensor([2**40]))

        def forward(self, x):
            return x * self.big

    with pytest.raises(BridgeError, match="outside"):
        bridge.from_torch(Wide(), torch.ones(2))


@pytest.mark.slow
def test_keywords_and_constants():
    class Scaled(nn.Module):
        def forward(self, x, scale=1.0, flip=False):
            return -x * scale if flip else x * scale

    model = bridge.from_torch(Scaled(), {"x": torch.ones(2, 3), "scale": 3.0, "flip": True})
    x = np.ones((4, 3), np.float32)
    for result in (
        model.apply({}, x=x),
        model.apply({}, {"x": x}),
        model.apply({}, x=x, flip=True),
        model.apply({}, x=torch.tensor(x)),
    ):
        np.testing.assert_array_equal(result, -3 * x)
    with pytest.raises(BridgeError, match="part of the graph"):
        model.apply({}, x=x, flip=False)


@pytest.mark.slow
def test_half_precision_weights():
    module = nn.Linear(3, 2).bfloat16()
    model = bridge.from_torch(module, torch.ones(2, 3, dtype=torch.bfloat16))
    assert model.params["weight"].dtype == jnp.bfloat16
    x = torch.randn(4, 3).bfloat16()
    theirs = module(x).detach().float().numpy()
    # One rounding to 8 bits of a sum of four terms of order one.
    np.testing.assert_allclose(np.float32(model.apply(model.params, x)), theirs, atol=2**-6)


def test_operators_are_counted(mlp):
    assert mlp.operators == {"aten.linear.default": 2, "aten.gelu.default": 1}
    assert mlp.dynamic_batch


class _Implicit(nn.Module):
    """Every result here whose dtype only PyTorch's default decides."""

    def forward(self, x):
        n = torch.arange(4)
        made = (
            torch.ones(4) + torch.zeros(4) + torch.full((4,), 2.0) + torch.eye(4)[0] + torch.linspace(0, 1, 4)
        )
        return x * made + torch.sin(n) + n / 3 + n * 0.5 + torch.arange(0, 1, 0.25) + torch.tensor(3.0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_default_dtype_of_the_exporting_program(dtype, x64, tmp_path):
    torch.set_default_dtype(dtype)
    try:
        module, x = _Implicit(), torch.randn(3, 4)
        bridge.export(module, x, tmp_path)
        expected = module(x)
    finally:
        torch.set_default_dtype(torch.float32)
    result = jax.jit(bridge.load(tmp_path).apply)({}, x.numpy())
    assert str(result.dtype) == str(expected.dtype).removeprefix("torch.")
    # A dozen roundings of sums below 20.
    np.testing.assert_allclose(result, expected, atol=12 * 20 * torch.finfo(dtype).eps)


@pytest.mark.slow
def test_a_model_in_a_line():
    """Weights and graph of a large model fill pages."""
    module = torch.nn.Sequential(torch.nn.Linear(300, 40), torch.nn.BatchNorm1d(40), torch.nn.Linear(40, 3))
    model = spectra.from_torch(module.eval(), torch.zeros(4, 300))
    assert repr(model).startswith("TorchModel(12,243 parameters in 6 arrays, 0 frozen, 3 buffers; ")
    assert len(repr(spectra.bridge.make_loss(model, "cross_entropy"))) < 500


@pytest.mark.slow
def test_modules_and_tensors_in_the_place_of_functions_and_arrays():
    module, batch = torch.nn.Linear(3, 2), (torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))
    own = dict(module.named_parameters())
    for loss_fn, params, words in (
        (module, torch.nn.CrossEntropyLoss(), r"loss_fn is a module of PyTorch, Linear.*spectra.from_torch"),
        (lambda params, batch: 0.0, own, r"'bias' is PyTorch's \(Parameter\).*spectra.from_torch"),
    ):
        with pytest.raises(spectra.StructureError, match=words):
            spectra.HessianOperator(loss_fn, params, batch)
    model = spectra.from_torch(module, batch[:1])
    op = spectra.HessianOperator(spectra.bridge.make_loss(model, "cross_entropy"), model.params, batch)
    assert (op @ {name: value.detach() for name, value in own.items()})["weight"].shape == (2, 3)
