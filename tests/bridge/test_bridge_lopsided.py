"""Operators whose arguments differ from axis to axis and weigh as much as the data, against PyTorch.

Equal paddings hide axes that are exchanged, an eps of 1e-5 hides where it is added, and float32 hides
which of two close formulas was meant: here the axes differ, constants are of order one, and all is float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from spectra.bridge.operators.registry import OPERATORS

RNG = np.random.default_rng(0)


def t(*shape):
    return torch.from_numpy(RNG.standard_normal(shape))


def cells(gates, inputs, hidden, layers):
    """Weights of recurrent layers in both directions: (w_ih, w_hh, b_ih, b_hh) of each."""
    found = []
    for layer in range(layers):
        for _ in range(2):
            width = inputs if layer == 0 else 2 * hidden
            found += [t(gates * hidden, width), t(gates * hidden, hidden), *(t(gates * hidden) for _ in "ih")]
    return found


STATE = (t(4, 2, 3), t(4, 2, 3))  # of two layers in both directions, two examples, three units
ENDING = (True, 2, 0.0, False, True, False)  # biases, layers, dropout, train, bidirectional, batch_first
CALLS = {
    "convolution": (t(2, 4, 7, 9), t(6, 2, 3, 2), t(6), [2, 1], [2, 0], [1, 2], False, [0, 0], 2),
    "transposed": (t(2, 4, 5, 4), t(4, 3, 3, 2), t(6), [2, 3], [1, 0], [1, 2], True, [1, 0], 2),
    "native_layer_norm": (t(3, 2, 5), [2, 5], t(2, 5), t(2, 5), 0.3),
    "native_group_norm": (t(2, 6, 4), t(6), t(6), 2, 6, 4, 3, 0.3),
    "_native_batch_norm_legit_no_training": (t(4, 3, 5), t(3), t(3), t(3), t(3) ** 2, 0.2, 0.3),
    "_native_batch_norm_legit_functional": (t(4, 3, 5), t(3), t(3), t(3), t(3) ** 2, True, 0.2, 0.3),
    "scaled_dot_product_attention": (t(2, 3, 4, 5), t(2, 3, 6, 5), t(2, 3, 6, 7)),
    "lstm": (t(5, 2, 4), list(STATE), cells(4, 4, 3, 2), *ENDING),
    "gru": (t(5, 2, 4), STATE[0], cells(3, 4, 3, 2), *ENDING),
    "avg_pool2d": (t(1, 2, 5, 6), [3, 2], [2, 1], [1, 0], True, False),
    "padded": (t(1, 2, 5, 6), [3, 2], [2, 1], [1, 0], True, True),
    "gelu": (2 * t(30),),
    "var": (t(4, 5), [1]),
}
NAMES = {"transposed": "convolution", "padded": "avg_pool2d"}
OVERLOADS = {"lstm": "input", "gru": "input", "var": "correction"}


@pytest.mark.parametrize("call", CALLS)
def test_arguments_that_are_not_alike(call, x64):
    packet, arguments = NAMES.get(call, call), CALLS[call]
    overload = OVERLOADS.get(call, "default")
    theirs = getattr(getattr(torch.ops.aten, packet), overload)(*arguments)
    converted = jax.tree.map(
        lambda x: jnp.asarray(x.numpy()) if isinstance(x, torch.Tensor) else x, arguments
    )
    ours = OPERATORS[f"aten.{packet}.{overload}"](*converted)
    for got, wanted in zip(
        *((x if isinstance(x, (tuple, list)) else [x]) for x in (ours, theirs)), strict=True
    ):
        # Sums of at most 100 terms of order one, passed on through ten cells at most.
        np.testing.assert_allclose(got, wanted.numpy(), rtol=0, atol=1000 * np.finfo(float).eps)
