"""Hessian products of exported modules where a derivative jumps, vanishes, or is infinite on one side."""

from collections.abc import Callable
from typing import Any

import bridge_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import slow_but
from torch import nn

from spectra import bridge
from spectra.bridge import UnsupportedOperatorError
from spectra.bridge.operators.registry import OPERATORS

TIE = torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=torch.float64)
FAR = torch.tensor([-800.0, -20.0, 3.0, 800.0], dtype=torch.float64)
GRID = torch.tensor([[1.0, 2.0], [0.0, 3.0]], dtype=torch.float64)
OTHERS = torch.tensor([[1.0, 5.0], [2.0, 2.0]], dtype=torch.float64)
LABELS = torch.tensor([1.0, 0.0, 0.3, 1.0], dtype=torch.float64)
ONES, ZEROS = torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
POWERS = torch.arange(1.0, 5.0, dtype=torch.float64)

# name: (a function of one array, the array)
FUNCTIONS: dict[str, tuple[Callable[..., Any], torch.Tensor]] = {
    "fmax of equal numbers": (lambda x: torch.fmax(x, ZEROS), TIE),
    "fmin of equal numbers": (lambda x: torch.fmin(x, ZEROS), TIE),
    "elu at 0": (F.elu, TIE),
    "celu at 0": (lambda x: F.celu(x, 2.0), TIE),
    "selu at 0": (F.selu, TIE),
    "|z| at 0": (lambda x: torch.complex(x, 2 * x).abs(), TIE),
    "x**[1, 2, 3, 4] at 0": (lambda x: x**POWERS, ZEROS),
    "softplus far out": (F.softplus, FAR),
    "log_ndtr far out": (torch.special.log_ndtr, FAR / 10),
    "binary cross entropy of 0 and 1": (lambda x: F.binary_cross_entropy(torch.sigmoid(x), LABELS), FAR),
    "huber_loss without residual": (lambda x: F.huber_loss(x, ONES, delta=0.7), TIE),
    "smooth_l1_loss without residual": (lambda x: F.smooth_l1_loss(x, ONES, beta=0.5), TIE),
    "norm along an axis": (lambda x: torch.linalg.vector_norm(x, dim=1), GRID),
    "distances along an axis": (lambda x: torch.cdist(x, OTHERS), GRID),
    "std of constants": (lambda x: x.std(0), ONES),
    "std_mean of constants": (lambda x: torch.std_mean(x, 0)[0], ONES),
    "gaussian_nll_loss below its eps": (lambda x: F.gaussian_nll_loss(x, ONES, x.abs() + 0.1, eps=0.5), TIE),
}  # fmt: skip


def has_double_backward(function, x):
    """Whether this PyTorch has one: that of `cdist` came with 2.14."""
    try:
        torch.autograd.functional.vhp(lambda x: function(x).sum(), x, x)
    except NotImplementedError:
        return False
    return True


FUNCTIONS = {name: (f, x) for name, (f, x) in FUNCTIONS.items() if has_double_backward(f, x)}


OFTEN = {"|z| at 0", "softplus far out", "huber_loss without residual", "norm along an axis"}


class Together(nn.Module):
    def __init__(self, functions):
        super().__init__()
        self.functions = [f for f, _ in functions.values()]
        self.values = nn.ParameterList([nn.Parameter(x.clone()) for _, x in functions.values()])

    def forward(self, one):
        return [f(x * one) for f, x in zip(self.functions, self.values, strict=True)]


@pytest.mark.parametrize("often", slow_but([True, False], True), ids=["often", "seldom"])
def test_products_are_those_of_pytorch(often, x64):
    """Of Σ exp(f/2), so that first and second derivatives count; float64, a few roundings."""
    functions = {name: row for name, row in FUNCTIONS.items() if (name in OFTEN) == often}
    module, one = Together(functions), torch.ones((), dtype=torch.float64)
    model = bridge.from_torch(module, one)
    vectors = [torch.cos(torch.arange(1.0, x.numel() + 1)).reshape(x.shape).to(x) for x in module.values]

    def loss(params):
        return sum(jnp.exp(o / 2).sum() for o in model.apply(params, np.ones(())))

    direction = {f"values.{i}": jnp.asarray(v.numpy()) for i, v in enumerate(vectors)}
    run = jax.jit(lambda p, v: jax.jvp(jax.grad(loss), (p,), (v,)))
    ours = run.lower(model.params, direction).compile(reference.FAST)(model.params, direction)
    outputs, wrong = module(one), {}
    for i, (name, x) in enumerate(zip(functions, module.values, strict=True)):
        (gradient,) = torch.autograd.grad((outputs[i] / 2).exp().sum(), x, create_graph=True)
        (product,) = torch.autograd.grad((gradient * vectors[i]).sum(), x)
        for kind, mine, theirs in zip(("gradient", "product"), ours, (gradient, product), strict=True):
            theirs = theirs.detach().numpy()
            # PyTorch's double backward of a cross entropy adds 1e-12 to x and to 1 - x.
            if not np.allclose(mine[f"values.{i}"], theirs, rtol=1e-9, atol=1e-12 * np.abs(theirs).max()):
                wrong[name, kind] = np.asarray(mine[f"values.{i}"]), theirs
    assert not wrong


@pytest.mark.slow
def test_a_target_that_is_learned():
    """Binary cross entropy by its target, too: the mixed derivative is -1 / (x (1 - x)), both ways."""
    entropy = OPERATORS["aten.binary_cross_entropy.default"]
    hessian = jax.hessian(lambda z: entropy(z[:1], z[1:]))(jnp.array([0.25, 0.5]))
    np.testing.assert_allclose(hessian, [[0.5 / 0.25**2 + 0.5 / 0.75**2, -16 / 3], [-16 / 3, 0]], rtol=1e-6)


class _Bessel(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


@pytest.mark.slow
def test_an_operator_that_is_refused_is_named_with_its_line():
    module = nn.Sequential(nn.Linear(4, 2), _Bessel())
    line = r"bessel_j0.* in module 1 \(.*test_bridge_second_derivatives.py, line \d+: return torch.special"
    with pytest.raises(UnsupportedOperatorError, match=line) as caught:
        bridge.from_torch(module, torch.ones(3, 4))
    assert list(caught.value.operators.values()) == [["1"]]
