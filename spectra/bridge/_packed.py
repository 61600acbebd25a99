"""Recurrent layers over sequences of different lengths, as `pack_padded_sequence` makes them.

PyTorch packs the steps that exist into one array whose size depends on the lengths. Here a batch stays
padded: beyond a sequence's end the state stands still, in both directions, and the output is zero.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from spectra.bridge._errors import BridgeError
from spectra.bridge._ops_activation import relu
from spectra.bridge._ops_rnn import _cell_weights, _gru_cell, _lstm_cell, _plain_cell
from spectra.bridge._registry import register

_CELLS = {
    "lstm": _lstm_cell,
    "gru": _gru_cell,
    "rnn_tanh": _plain_cell(jnp.tanh),
    "rnn_relu": _plain_cell(relu),
}


@register("spectra.packed")
def packed(
    kind: str,
    input: jax.Array,
    lengths: jax.Array,
    hx: Any,
    params: Any,
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[jax.Array, ...]:
    """Run the layers of `kind`; arguments as those of `aten.lstm.input`, and the lengths, shape (batch,)."""
    if kind not in _CELLS:
        raise BridgeError(f"unknown kind of recurrent layer {kind!r}")
    if dropout and train:
        raise BridgeError("dropout between recurrent layers is random; export in evaluation mode")
    directions = 2 if bidirectional else 1
    per = len(params) // (num_layers * directions)
    x = jnp.swapaxes(input, 0, 1) if batch_first else input
    exists = (jnp.arange(x.shape[0])[:, None] < lengths)[..., None]
    x = jnp.where(exists, x, 0)  # padding may be anything
    last = []
    for layer in range(num_layers):
        outputs = []
        for side in range(directions):
            k = layer * directions + side
            weights = _cell_weights(params[k * per : (k + 1) * per], has_biases)
            state, out = _direction(_CELLS[kind], x, exists, tuple(s[k] for s in hx), weights, side == 1)
            outputs.append(out)
            last.append(state)
        x = jnp.concatenate(outputs, -1)
    final = tuple(jnp.stack(parts) for parts in zip(*last, strict=True))
    return (jnp.swapaxes(x, 0, 1) if batch_first else x), *final


def _direction(cell: Any, x: Any, exists: Any, state: Any, weights: Any, reverse: bool) -> Any:
    w_ih, w_hh, b_ih, b_hh, w_hr = weights

    def step(carry, now):
        gates, here = now
        moved = cell(carry, gates, (w_hh, b_hh, w_hr))
        carry = tuple(jnp.where(here, new, old) for new, old in zip(moved, carry, strict=True))
        return carry, jnp.where(here, carry[0], 0)

    return lax.scan(step, state, (jnp.matmul(x, w_ih.T) + b_ih, exists), reverse=reverse)
