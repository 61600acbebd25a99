"""What an export is compared with: the module's own outputs and gradient.

Each module here has the loss of its graph and another gradient, or is legitimate and looks like one that has.
"""

import random
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import torch
from cases import slow_but
from torch import nn
from torch.utils.checkpoint import checkpoint

from spectra import DataError, bridge
from spectra.bridge import BridgeError, rounding


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, grad):
        return grad


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -grad


class _Cube(torch.autograd.Function):
    """Consistent: the backward is the derivative of the forward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class _Net(nn.Module):
    def __init__(self, middle: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.first, self.last, self.middle = nn.Linear(4, 6), nn.Linear(6, 3), middle

    def forward(self, x):
        return self.last(torch.tanh(self.middle(self.first(x))))


def _halving_hook(h):
    if h.requires_grad:
        h.register_hook(lambda grad: grad / 2)
    return h


def _doubled_unseen(h):
    with torch.no_grad():
        h.mul_(2.0)
    return h


def _inference(h):
    with torch.inference_mode():
        gate = torch.sigmoid(h)
    return h * gate.clone()


def _backward_hook():
    net = _Net(lambda h: h)
    net.last.register_full_backward_hook(lambda layer, inputs, outputs: tuple(g / 2 for g in inputs))
    return net


def _parameter_hook():
    net = _Net(lambda h: h)
    net.first.weight.register_hook(lambda grad: grad * (torch.arange(4) > 1))
    return net


def _cosine(h):
    return h * torch.cosine_similarity(h, h.roll(1, -1), dim=-1, eps=3.0)[:, None]


class _Deciding(nn.Module):
    """A decision at a tie, which rounding takes either way, beside a hook."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        near_a_half = self.first.bias.detach() / self.first.bias.detach() * 2.5
        return self.last(_halving_hook(self.first(x)) * near_a_half.round())


OTHERS = {
    "straight-through": (lambda: _Net(_Sign.apply), "autograd.Function _Sign"),
    "reversal": (lambda: _Net(_Reversal.apply), "autograd.Function _Reversal"),
    "tensor hook": (lambda: _Net(_halving_hook), r"hook on a tensor .*test_bridge_agreement.py, line"),
    "module hook": (_backward_hook, "backward hook on Linear 'last'"),
    "parameter hook": (_parameter_hook, "hook on the parameter 'first.weight'"),
    "no_grad": (lambda: _Net(_doubled_unseen), r"in-place change under torch.no_grad.*h.mul_"),
    "half precision": (lambda: _Net(_Sign.apply).bfloat16(), "autograd.Function _Sign"),
    "decisions at ties": (_Deciding, r"hook on a tensor .*test_bridge_agreement.py, line"),
    "cosine of short vectors": (lambda: _Net(_cosine), r"cosine_similarity .*shorter than its eps=.*"),
    "inference_mode": (lambda: _Net(_inference), r"inference_mode.*torch.sigmoid"),
}


@pytest.mark.parametrize("name", slow_but(OTHERS, "decisions at ties"))
def test_another_gradient_is_refused_with_its_cause(name):
    """Also at an example of zeros, which is what people pass, and where the first gradient vanishes."""
    build, cause = OTHERS[name]
    module = build()
    with pytest.raises(BridgeError, match=f"not the module.*gradient.*(?s:.*){cause}"):
        bridge.from_torch(module, torch.zeros(3, 4, dtype=module.last.weight.dtype))


@pytest.mark.slow
def test_a_changed_output_is_refused_with_its_cause(tmp_path):
    module = nn.Embedding(7, 4, max_norm=1.0)
    before = module.weight.detach().clone()
    with pytest.raises(BridgeError, match=r"output differs.*max_norm"):
        bridge.export(module, torch.arange(7), tmp_path / "model")
    assert not (tmp_path / "model").exists()
    assert torch.equal(module.weight, before)
    # The advice in the message, followed: rows of norm one, which stay.
    module.weight.data.renorm_(2, 0, 1.0)
    module.max_norm = None
    bridge.from_torch(module, torch.arange(7))


class _Drawn(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.weight * x * random.random()


@pytest.mark.slow
def test_a_number_drawn_by_python_is_noticed():
    with pytest.raises(BridgeError, match="output differs"):
        bridge.from_torch(_Drawn(), torch.randn(3, 4))


@pytest.mark.slow
def test_a_function_behind_layers_of_zeros_is_found():
    """Where a layer starts from zeros, no gradient passes it at the example."""
    net = _Net(_Reversal.apply)
    nn.init.zeros_(net.last.weight)
    with pytest.raises(BridgeError, match="_Reversal"):
        bridge.from_torch(net, torch.randn(3, 4))
    assert not net.last.weight.any()


class _Kinks(nn.Module):
    """Decisions at ties and derivatives that jump, at values where both sides are as good."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        zero = x * 0 * self.scale
        equal = x.new_ones(x.shape) * self.scale
        return [
            torch.relu(zero), zero.abs(), torch.maximum(zero, -zero), zero.clamp(0, 1), equal.max(-1).values,
            equal.topk(2, -1).values, equal.sort(-1).values, torch.nn.functional.max_pool1d(equal, 2),
            torch.linalg.vector_norm(zero, dim=-1), torch.where(zero > 0, zero, -2 * zero), equal.round(),
        ]  # fmt: skip


def _double(layer: Any, inputs: Any, output: Any) -> Any:
    return 2 * output


def _observed():
    net = _Net(lambda h: h)
    net.last.register_full_backward_hook(lambda layer, inputs, outputs: None)
    net.first.register_forward_hook(_double)
    return net


class _Sharp(nn.Module):
    def forward(self, x):
        return torch.tanh(1e3 * x)


def _saturated(layer: nn.Module, *further: nn.Module) -> nn.Module:
    """Steep in the first layer and at the end: what is left of the gradient behind it is rounding."""
    first = nn.Linear(4, 6)
    with torch.no_grad():
        for p in first.parameters():
            p.mul_(30)
    return nn.Sequential(first, layer, *further, _Sharp())


LEGITIMATE = {
    "a softmax and a tanh that are one": lambda: _saturated(nn.Softmax(-1), nn.Linear(6, 3)),
    "tails of a GELU": lambda: _saturated(nn.GELU()),
    "tails of its approximation": lambda: _saturated(nn.GELU("tanh")),
    "a consistent Function": lambda: _Net(_Cube.apply),
    "straight-through by detach": lambda: _Net(lambda h: h + (h.sign() - h).detach()),
    "no derivative, detached": lambda: _Net(lambda h: h * torch.special.zeta(h.detach() ** 2 + 2, 1.5)),
    "hooks that look, or change the forward pass": _observed,
    "kinks": _Kinks,
    # Its gradient is exactly zero, and rounding errors in both.
    "a bias before a norm": lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)),
    "bfloat16 inside": lambda: _Net(lambda h: torch.tanh(h.bfloat16() @ torch.ones(6, 6).bfloat16()).float()),
    "no parameter, no gradient": lambda: _Net(lambda h: h.detach()).requires_grad_(False),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LEGITIMATE)
def test_what_agrees_is_accepted(name):
    module = LEGITIMATE[name]()
    bridge.from_torch(module, torch.randn(3, 4), train=name.endswith("norm"))


@pytest.mark.slow
def test_a_derivative_rounded_by_pytorch_is_accepted(x64):
    """PyTorch rounds 1/α of CELU to float32 in its backward: 3e-8 off in float64."""
    bridge.from_torch(nn.Sequential(nn.Linear(4, 5), nn.CELU(0.7)).double(), torch.randn(3, 4).double())


def test_a_checkpointed_region_has_derivatives():
    """PyTorch computes a reentrant one under no_grad: all gradients behind it were zero, unnoticed."""
    net, x = _Net(lambda h: checkpoint(torch.sin, h, use_reentrant=True)), torch.randn(3, 4)
    model = bridge.from_torch(net, x)
    net(x).square().sum().backward()
    gradient = jax.grad(lambda params: (model.apply(params, x.numpy()) ** 2).sum())(model.params)
    expected: Any = net.first.weight.grad
    assert expected.norm() > 0.01
    np.testing.assert_allclose(
        gradient["first.weight"], expected, rtol=1e-5, atol=1e-5 * float(expected.norm())
    )


class _Graph(nn.Module):
    """Sparse matrices from everywhere, and rows of a sparse gradient."""

    def __init__(self):
        super().__init__()
        self.rows, self.values = nn.Embedding(5, 4, sparse=True), nn.Parameter(VALUES)
        self.register_buffer("held", MATRIX.to_sparse())
        self.constant = MATRIX.to_sparse().t()

    def forward(self, ids, given):
        h = torch.sparse.mm(given, self.rows(ids)).tanh()
        built = torch.sparse_coo_tensor(PLACES, self.values, (5, 5), check_invariants=True).coalesce()
        return torch.spmm(built, torch.sparse.addmm(h, self.held, self.constant @ h))


MATRIX, VALUES = torch.cos(torch.arange(25.0)).reshape(5, 5).relu(), torch.tensor([0.5, -1.0, 2.0, 0.3])
PLACES = torch.tensor([[0, 0, 2, 4], [1, 2, 2, 0]])


@pytest.mark.slow
def test_sparse_matrices_are_written_out():
    net, inputs = _Graph(), (torch.tensor([3, 0, 1, 1, 4]), MATRIX.to_sparse())
    held = net.held
    with pytest.warns(bridge.StaticBatchWarning):  # a square matrix fixes the number of its rows
        model = bridge.from_torch(net, inputs)
    assert net.held is held
    net(*inputs).square().sum().backward()
    arrays = inputs[0].numpy(), MATRIX.numpy()
    gradient = jax.grad(lambda params: (model.apply(params, *arrays) ** 2).sum())(model.params)
    for name, p in net.named_parameters():
        expected: Any = p.grad
        expected = expected.to_dense()
        # Four products of five terms each: far fewer than 100 roundings of sums of terms of one size.
        np.testing.assert_allclose(gradient[name], expected, rtol=1e-5, atol=1e-5 * float(expected.norm()))
        assert expected.norm() > 0.1
    with pytest.raises(DataError, match=r"shape \(5, 5\) is sparse .*to_dense"):
        model.apply(model.params, *inputs)


class _Moving(nn.Module):
    """A forward pass that leaves traces wherever it can."""

    def __init__(self):
        super().__init__()
        self.norm, self.calls = nn.BatchNorm1d(4), 0
        self.register_buffer("total", torch.zeros(4))

    def forward(self, x):
        self.calls = self.calls + 1
        random.random()
        np.random.random()  # noqa: NPY002
        torch.rand(1)
        with torch.no_grad():
            self.total += x.sum(0)
        return self.norm(x)


def _random_states():
    legacy: Any = np.random.get_state()  # noqa: NPY002
    return random.getstate(), legacy[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.slow
def test_nothing_moves():
    module = _Moving()
    module.norm.eval()
    module.norm.weight.grad = torch.ones(4)
    before, x = {k: v.clone() for k, v in module.state_dict().items()}, torch.randn(3, 4)
    states = _random_states()
    bridge.from_torch(module, x, train=True)
    assert _random_states() == states
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert (module.training, module.norm.training, module.calls) == (True, False, 0)
    assert torch.equal(module.norm.weight.grad, torch.ones(4))


@pytest.mark.slow
def test_a_wrong_operator_is_noticed(monkeypatch):
    """The comparison is with what JAX computes, not with the exported program alone."""
    from spectra.bridge import interpreter
    from spectra.bridge.operators.registry import OPERATORS

    interpreter._programs.cache_clear()
    stopped = jax.lax.stop_gradient
    monkeypatch.setitem(OPERATORS, "aten.tanh.default", lambda x: jax.numpy.tanh(stopped(x)))
    with pytest.raises(BridgeError, match=r"gradient.*'first\.weight' differs by 100 %.*No cause was found"):
        bridge.from_torch(_Net(lambda h: h), torch.randn(3, 4))
    interpreter._programs.cache_clear()
    monkeypatch.setitem(
        OPERATORS, "aten.tanh.default", lambda x: jax.numpy.tanh(x).at[0, 0].set(jax.numpy.nan)
    )
    with pytest.raises(BridgeError, match="its output, which is finite elsewhere than the module's, differs"):
        bridge.from_torch(_Net(lambda h: h), torch.randn(3, 4))
    interpreter._programs.cache_clear()


@pytest.mark.parametrize("scale", [1.0, 1e25, 1e-25])
def test_numbers_of_any_size_are_moved_by_a_rounding(scale):
    """Their squares are none of float32's, and what masks stand for is no number to move."""
    least = np.finfo(np.float32).min
    x = np.float32(scale) * np.array([1.0, -2.0, 0.0, 3.0], np.float32)
    masked = np.concatenate([x, np.array([-np.inf, least], np.float32)])
    moved = np.asarray(rounding.moved(jax.numpy.asarray(masked), 1e-6, np.random.default_rng(0)))
    np.testing.assert_array_equal(moved[4:], masked[4:])
    change = np.abs(moved[:4] - x)
    assert np.all(change > 0)
    assert np.all(change <= 1e-6 * 6 * 5 * scale)  # |x| + mean is below 6, a normal number below 5
