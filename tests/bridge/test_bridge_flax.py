"""Weights in Flax trees: the Flax model must then compute what the PyTorch module does.

Tolerance 1e-5: sums of up to a few hundred float32 terms in two orders.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx
from torch import nn

from spectra import bridge
from spectra.bridge import BridgeError
from spectra.bridge import weights as _safetensors


class Small(linen.Module):
    """Convolution, BatchNorm, embedding-free head, with PyTorch's names."""

    @linen.compact
    def __call__(self, x):
        x = linen.Conv(6, (3, 3), padding=1, feature_group_count=2, name="conv")(x)
        x = linen.BatchNorm(use_running_average=True, epsilon=1e-5, name="bn")(x)
        x = linen.ConvTranspose(5, (2, 2), (2, 2), padding="VALID", name="up")(x)
        return linen.Dense(3, name="layers_0")(linen.LayerNorm(epsilon=1e-5, name="ln")(x).mean((1, 2)))


class TorchSmall(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.bn = nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 5, 2, 2)
        self.ln = nn.LayerNorm(5)
        self.layers = nn.ModuleList([nn.Linear(5, 3)])
        self.shift = torch.tensor([0.5])  # a constant of the forward pass, not in the state dict
        self.register_buffer("order", torch.arange(3))
        nn.init.uniform_(self.bn.running_var, 0.5, 2.0)
        nn.init.normal_(self.bn.running_mean)

    def forward(self, x):
        x = self.up(self.bn(self.conv(x))).movedim(1, -1)
        return self.layers[0](self.ln(x).mean((1, 2))) + (self.shift - 0.5)


@pytest.mark.slow
def test_linen(tmp_path):
    module, x = TorchSmall().eval(), torch.randn(2, 4, 8, 8)
    bridge.export(module, x, tmp_path)
    model, ours = Small(), jnp.asarray(x.movedim(1, -1).numpy())
    empty = jax.jit(model.init)(jax.random.key(0), ours)
    apply = jax.jit(model.apply)
    for source in (tmp_path, tmp_path / "weights.safetensors", module.state_dict()):
        variables = bridge.to_flax(source, empty)
        result = apply(variables, ours)
        np.testing.assert_allclose(result, module(x).detach(), rtol=1e-5, atol=1e-5)
    assert jax.tree.structure(variables) == jax.tree.structure(empty)


@pytest.mark.slow
def test_attention_fused_and_separate():
    mha = nn.MultiheadAttention(8, 2, batch_first=True)
    nn.init.normal_(mha.in_proj_bias)
    x = torch.randn(3, 5, 8)
    expected = mha(x, x, x)[0].detach()
    model = linen.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)
    empty = jax.jit(model.init)(jax.random.key(0), jnp.ones((3, 5, 8)))
    fused = bridge.to_flax(mha.state_dict(), empty)
    np.testing.assert_allclose(jax.jit(model.apply)(fused, x.numpy()), expected, rtol=1e-5, atol=1e-5)
    weight, bias = mha.in_proj_weight.chunk(3), mha.in_proj_bias.chunk(3)
    names = ("q_proj", "k_proj", "v_proj")
    separate = {f"{n}.weight": w for n, w in zip(names, weight, strict=True)}
    separate |= {f"{n}.bias": b for n, b in zip(names, bias, strict=True)}
    separate |= {k: v for k, v in mha.state_dict().items() if "out_proj" in k}
    again = bridge.to_flax(separate, empty)
    for a, b in zip(jax.tree.leaves(fused), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


class NNXModel(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 6, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(6, 6, rngs=rngs), nnx.Linear(6, 4, rngs=rngs)])
        self.norm = nnx.BatchNorm(6, use_running_average=True, epsilon=1e-5, rngs=rngs)
        self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)

    def __call__(self, ids):
        x = jnp.tanh(self.layers[0](self.embed(ids)))
        return self.layers[1](self.drop(self.norm(x)))


class TorchModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 4)])
        self.norm = nn.BatchNorm1d(6)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)

    def forward(self, ids):
        x = torch.tanh(self.layers[0](self.embed(ids)))
        return self.layers[1](self.norm(x.mT).mT)


def test_nnx():
    module, model = TorchModel().eval(), NNXModel(nnx.Rngs(0))
    ids = torch.randint(0, 11, (3, 5))
    nnx.update(model, bridge.to_flax(module.state_dict(), nnx.state(model)))
    result = nnx.jit(model)(jnp.asarray(ids.numpy()))
    np.testing.assert_allclose(result, module(ids).detach(), rtol=1e-5, atol=1e-5)


class Unnamed(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(3)(jnp.tanh(linen.Dense(8)(x)))


@pytest.mark.slow
def test_modules_without_namesakes_match_by_shape():
    module = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(2, 5)
    variables = bridge.to_flax(module.state_dict(), jax.jit(Unnamed().init)(jax.random.key(0), x.numpy()))
    result = jax.jit(Unnamed().apply)(variables, x.numpy())
    np.testing.assert_allclose(result, module(x).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_ambiguous_shapes_need_rename():
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

    class Square(linen.Module):
        @linen.compact
        def __call__(self, x):
            first = jnp.tanh(linen.Dense(4)(x))
            return linen.Dense(4)(first)

    x = torch.randn(2, 4)
    empty = Square().init(jax.random.key(0), x.numpy())
    with pytest.raises(BridgeError, match="4 missing, 4 unexpected"):
        bridge.to_flax(module.state_dict(), empty)
    rules = {r"^0\.": "Dense_0.", r"^2\.": "Dense_1."}
    for rename in (rules, lambda n: n.replace("0.", "Dense_0.").replace("2.", "Dense_1.")):
        variables = bridge.to_flax(module.state_dict(), empty, rename=rename)
        result = Square().apply(variables, x.numpy())
        np.testing.assert_allclose(result, module(x).detach(), rtol=1e-5, atol=1e-6)
    with pytest.raises(BridgeError, match="two weights"):
        bridge.to_flax(module.state_dict(), empty, rename={r"^\d\.": "Dense_0."})


@pytest.mark.slow
def test_transposed_convolution_of_equal_channels():
    module = nn.ConvTranspose1d(3, 3, 2, 2)
    model = linen.ConvTranspose(3, (2,), (2,), padding="VALID", name="up")
    x = torch.randn(2, 3, 5)
    ours = x.movedim(1, -1).numpy()
    weights = {f"up.{k}": v for k, v in module.state_dict().items()}
    empty = {"params": {"up": model.init(jax.random.key(0), ours)["params"]}}
    variables = bridge.to_flax(weights, empty, transposed=(r"^up",))
    result = model.apply({"params": variables["params"]["up"]}, ours)
    expected = module(x).detach().movedim(1, -1)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_one_table_for_everything_that_differs():
    empty = {"params": {"a": {"kernel": jnp.ones((2, 3))}, "b": {"bias": jnp.ones(4)},
                        "c": {"bias": jnp.ones(2)}}}  # fmt: skip
    weights = {"a.weight": np.ones((3, 5)), "c.bias": np.full(2, 7.0), "d.bias": np.ones(9)}
    with pytest.raises(BridgeError) as caught:
        bridge.to_flax(weights, empty)
    rows = {line.split()[0]: line for line in str(caught.value).splitlines()[2:]}
    assert set(rows) == {"matched", "shape", "missing", "unexpected"}
    assert "(3, 5)" in rows["shape"]
    assert "(2, 3)" in rows["shape"]
    assert "params/b/bias" in rows["missing"]
    assert "d.bias" in rows["unexpected"]
    with pytest.raises(BridgeError, match="1 of another shape"):
        bridge.to_flax(weights, empty, strict=False)
    weights["a.weight"] = np.ones((3, 2))
    result = bridge.to_flax(weights, empty, strict=False)
    assert result["params"]["c"]["bias"][0] == 7
    assert result["params"]["b"]["bias"][0] == 1


def test_dtype_of_the_tree_is_kept(tmp_path):
    _safetensors.write(tmp_path / "x.safetensors", {"a.bias": np.ones(2, np.float32)})
    result = bridge.to_flax(tmp_path / "x.safetensors", {"a": {"bias": jnp.zeros(2, jnp.bfloat16)}})
    assert result["a"]["bias"].dtype == jnp.bfloat16
