"""What is said about a module that cannot be exported: the cause, the user's line, the remedy."""

from typing import Any

import numpy as np
import pytest
import torch
from cases import all_but
from torch import nn

from spectra import bridge
from spectra.bridge import BridgeError


class _Of(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.layer, self.function = nn.Linear(4, 2), function

    def forward(self, x):
        return self.function(self, x)


def _branch(self, x):
    return x if x.sum() > 0 else -x


def _numpy(self, x):
    return x * float(np.linalg.norm(x.numpy()))


def _data(self, x):
    return x * x.data


def _gradient(self, x):
    return torch.func.grad(lambda z: torch.tanh(self.layer(z)).sum())(x)


def _gradient_of_a_row(self, x):  # which torch.export traces, and cannot decompose
    return torch.func.grad(lambda z: torch.tanh(z @ self.layer.weight[0]).sum())(x)


def _mapped(self, x):
    weights, x = self.layer.weight.reshape(2, 2, 2), x.reshape(-1, 2, 2)
    return torch.vmap(lambda w, z: z @ w, in_dims=(0, 1), out_dims=1)(weights, x)


def _autograd(self, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(torch.tanh(self.layer(x)).sum(), x, create_graph=True)[0]


def _mask(self, x):
    return self.layer(x)[x[:, 0] > 0]


def _masked_rows(self, x):
    x = x.clone()
    x[x[:, 0] > 0] = x[0]
    return self.layer(x)


def _ctc(self, x):
    lengths = torch.tensor([3]), torch.tensor([2])
    return nn.functional.ctc_loss(self.layer(x)[:, None].log_softmax(-1), torch.ones(1, 2).long(), *lengths)


def _entries(self, x):
    return self.layer(x) * self.matrix.values().sum()


def _with_matrix(function):
    module = _Of(function)
    module.register_buffer("matrix", torch.eye(3).to_sparse())
    return module


def _sparse():
    layer = nn.Linear(4, 2)
    layer.weight = nn.Parameter(torch.eye(2, 4).to_sparse())
    return layer


X = torch.ones(3, 4)
CASES = {
    "the width": (nn.Linear(4, 2), torch.ones(3, 5), "itself rejects the example: RuntimeError: .*mat1.*3x5"),
    "its own line": (
        _Of(lambda self, x: x + torch.ones(7)), X, r"itself rejects the example.*torch.ones.7.*RuntimeError",
    ),
    "NumPy": (nn.Linear(4, 2), np.ones((3, 4), np.float32), "NumPy arrays: pass tensors"),
    "ids": (nn.Embedding(5, 3), X, "itself rejects the example"),
    "ids beyond": (nn.Embedding(5, 3), torch.full((2, 3), 9), r"itself rejects the example.*index"),
    "a branch": (_Of(_branch), X, r"test_bridge_refusals.py, line \d+: return x if .*tensor's values"),
    "NumPy inside": (_Of(_numpy), X, r"test_bridge_refusals.py, line \d+: return x \* float.*with torch"),
    ".data": (_Of(_data), X, r"test_bridge_refusals.py, line \d+: return x \* x.data.*use .detach"),
    "torch.func": (_Of(_gradient), X, r"differentiates .*line \d+: return torch.func.grad.*jax.vmap"),
    "torch.func of a row": (_Of(_gradient_of_a_row), X, r"differentiates .*line \d+: return torch.func.grad"),
    "vmap": (_Of(_mapped), X, r"torch.vmap maps .*line \d+: return torch.vmap.*torch.einsum"),
    "autograd": (_Of(_autograd), X, r"differentiates .*line \d+: return torch.autograd.grad.*jax.grad"),
    "a mask": (_Of(_mask), X, r"aten.index.Tensor .*depends on values.*torch.where.*line \d+: return s"),
    "masked rows": (_Of(_masked_rows), X, r"a boolean mask needs a scalar.*torch.where.*py, line \d+"),
    "CTC": (_Of(_ctc), X, r"line \d+: return nn.functional.ctc_loss.*optax.ctc_loss"),
    "an object": (_Of(lambda self, x: object()), X, "Return tensors in tuples"),
    "a lazy layer": (nn.LazyLinear(3), X, r"'weight', 'bias'.* no shape yet"),
    "weights alone": (nn.Linear(4, 2).state_dict(), X, r"got OrderedDict.*load_state_dict of its module"),
    "no numbers": (nn.BatchNorm1d(4, device="meta"), X, r"'weight', 'bias', 'running_mean'.*meta .*to_empty"),
    "sparse weights": (_sparse(), X, r"'weight'.* sparse: .*the values alone .*sparse_coo_tensor"),
    "sparse entries": (
        _with_matrix(_entries), X, r"line \d+: return self.layer\(x\) \* .*indices and values as buffers",
    ),
    "a class": (nn.Tanh, X, "Tanh is a class: pass the module that it makes"),
    "parallel": (nn.DataParallel(nn.Linear(4, 2)), X, "pass its .module"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize(
    "name",
    all_but(CASES, "a mask", "masked rows", "torch.func of a row", "vmap", "autograd", "ids beyond"),
)
def test_the_message(name, capfd):
    module, example, message = CASES[name]
    example = (example,) if isinstance(example, np.ndarray) else example
    with pytest.raises(BridgeError, match=message) as caught:
        bridge.from_torch(module, example)
    if name not in ("a branch", "a mask"):
        assert "tensor's values" not in str(caught.value)
    assert capfd.readouterr().err == ""


@pytest.mark.filterwarnings(r"ignore:.*are deprecated")
def test_quantized_layers_are_named():
    module = nn.Sequential(nn.Tanh(), torch.ao.nn.quantized.dynamic.Linear(4, 2))
    with pytest.raises(BridgeError, match=r"'1'.* quantized: .*Pass the float module"):
        bridge.from_torch(module, X)


@pytest.mark.slow
@pytest.mark.filterwarnings(r"ignore:.*is deprecated")
def test_wrappers_of_modules():
    """What stands for a module is unwrapped where the module is behind it, and named where it is not."""
    module = nn.Linear(4, 2)
    with pytest.raises(BridgeError, match="TorchScript"):
        bridge.from_torch(torch.jit.script(module), X)
    program = torch.export.export(module, (X,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    wrappers: list[Any] = [torch.compile(module), program]
    for wrapped in wrappers:
        model = bridge.from_torch(wrapped, X)
        assert list(model.params) == ["weight", "bias"]
        # A product of four terms of order one, in float32.
        np.testing.assert_allclose(model.apply(model.params, X), module(X).detach(), atol=1e-6)
