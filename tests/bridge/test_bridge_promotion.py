"""PyTorch's result_type over dtypes, 0-d tensors and Python numbers, as the installed release has it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from spectra import bridge
from spectra.bridge.dtypes import category, result_type

LEFT = [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64,
        torch.complex64]  # fmt: skip
RIGHT = [torch.bool, torch.int8, torch.int32, torch.bfloat16, torch.float32, torch.float64, 2, 2.5, True, 1j]
SHAPES = [((2,), (2,)), ((2,), ()), ((), (2,)), ((), ())]
# JAX has no complex numbers of halves: the bridge's are complex64 (see test_complex_halves).
HALVES = {"complex32": "complex64", "bcomplex32": "complex64"}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _struct(tensor):
    return jax.ShapeDtypeStruct(tensor.shape, _name(tensor.dtype))


@pytest.mark.parametrize("left", LEFT, ids=_name)
def test_promotion(left):
    wrong = []
    for right, (shape, other) in itertools.product(RIGHT, SHAPES):
        x = torch.zeros(shape, dtype=left)
        y = torch.zeros(other, dtype=right) if isinstance(right, torch.dtype) else right
        with jax.enable_x64(True):
            ours = jnp.dtype(result_type(_struct(x), _struct(y) if isinstance(y, torch.Tensor) else y))
        theirs = _name(torch.result_type(x, y))
        theirs = jnp.dtype(HALVES.get(theirs, theirs))
        if ours != theirs or category(ours) != category(theirs):
            wrong.append((shape, right, other, ours, theirs))
    assert not wrong


class _Turned(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("unit", torch.tensor(1j))

    def forward(self, x):
        return torch.view_as_real(x * self.unit)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=_name)
def test_complex_halves(dtype):
    """A module that computes with complex numbers of halves is refused; what is complex64 there, is here."""
    x = torch.ones(3, 2, dtype=dtype)
    wide = torch.result_type(x, 1j)
    if wide == torch.complex64:
        model = bridge.from_torch(_Turned(), x)
        np.testing.assert_array_equal(model.apply({}, x), _Turned()(x))
    else:
        with pytest.raises(bridge.BridgeError, match=f"{_name(wide)} has no counterpart"):
            bridge.from_torch(_Turned(), x)
