"""Recurrent layers as scans over time: LSTM (projected too), GRU, tanh and ReLU cells.

Packed sequences run with a mask in place of lengths.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from spectra.base import arrays
from spectra.bridge.errors import BridgeError
from spectra.bridge.operators.layers import relu
from spectra.bridge.operators.registry import aten, register


def _lstm_cell(state, gates_in, weights):
    (h, c), (w_hh, b_hh, w_hr) = state, weights
    i, f, g, o = jnp.split(gates_in + jnp.matmul(h, w_hh.T) + b_hh, 4, -1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (h if w_hr is None else jnp.matmul(h, w_hr.T), c)


def _gru_cell(state, gates_in, weights):
    (h,), (w_hh, b_hh, _) = state, weights
    r_in, z_in, n_in = jnp.split(gates_in, 3, -1)
    r_h, z_h, n_h = jnp.split(jnp.matmul(h, w_hh.T) + b_hh, 3, -1)
    z = jax.nn.sigmoid(z_in + z_h)
    n = jnp.tanh(n_in + jax.nn.sigmoid(r_in + r_h) * n_h)
    return ((1 - z) * n + z * h,)


def _plain_cell(activation):
    def cell(state, gates_in, weights):
        (h,), (w_hh, b_hh, _) = state, weights
        return (activation(gates_in + jnp.matmul(h, w_hh.T) + b_hh),)

    return cell


def _direction(cell, x, state, weights, reverse):
    """Scan one direction of one layer: (time, batch, features) in and out."""
    w_ih, w_hh, b_ih, b_hh, w_hr = weights
    gates_in = jnp.matmul(x, w_ih.T) + b_ih

    def step(carry, gates):
        carry = cell(carry, gates, (w_hh, b_hh, w_hr))
        return carry, carry[0]

    return lax.scan(step, _carried(state, gates_in, weights), gates_in, reverse=reverse)


def _carried(state, gates_in, weights):
    return arrays.carried(state, gates_in, *state, *(w for w in weights if w is not None))


def _run(cell, input, states, params, biases, layers, dropout, train, bidirectional, batch_first):
    if dropout and train:
        raise BridgeError("dropout between recurrent layers is random; export in evaluation mode")
    directions = 2 if bidirectional else 1
    per = len(params) // (layers * directions)
    if per * layers * directions != len(params) or per < (4 if biases else 2):
        raise BridgeError(f"{len(params)} weights do not make {layers} recurrent layers")
    x = jnp.swapaxes(input, 0, 1) if batch_first else input
    last = []
    for layer in range(layers):
        outputs = []
        for side in range(directions):
            k = layer * directions + side
            state, out = _direction(
                cell,
                x,
                tuple(s[k] for s in states),
                _cell_weights(params[k * per : (k + 1) * per], biases),
                side == 1,
            )
            outputs.append(out)
            last.append(state)
        x = outputs[0] if directions == 1 else jnp.concatenate(outputs, -1)
    final = tuple(jnp.stack(parts) for parts in zip(*last, strict=True))
    return (jnp.swapaxes(x, 0, 1) if batch_first else x), *final


def _cell_weights(weights, biases):
    """Order (w_ih, w_hh, b_ih, b_hh, w_hr); an absent bias is 0 and an absent projection None."""
    w_ih, w_hh, *rest = weights
    b_ih, b_hh, *rest = rest if biases else (0, 0, *rest)
    return w_ih, w_hh, b_ih, b_hh, rest[0] if rest else None


@aten("lstm.input")
def lstm(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first):
    return _run(
        _lstm_cell,
        input,
        hx,
        params,
        has_biases,
        num_layers,
        dropout,
        train,
        bidirectional,
        batch_first,
    )


def _register_single_state(name, cell):
    @aten(f"{name}.input")
    def recurrent(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first):
        return _run(
            cell,
            input,
            (hx,),
            params,
            has_biases,
            num_layers,
            dropout,
            train,
            bidirectional,
            batch_first,
        )


_register_single_state("gru", _gru_cell)
_register_single_state("rnn_tanh", _plain_cell(jnp.tanh))
_register_single_state("rnn_relu", _plain_cell(relu))


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
            state, out = _packed_direction(
                _CELLS[kind], x, exists, tuple(s[k] for s in hx), weights, side == 1
            )
            outputs.append(out)
            last.append(state)
        x = jnp.concatenate(outputs, -1)
    final = tuple(jnp.stack(parts) for parts in zip(*last, strict=True))
    return (jnp.swapaxes(x, 0, 1) if batch_first else x), *final


def _packed_direction(cell: Any, x: Any, exists: Any, state: Any, weights: Any, reverse: bool) -> Any:
    w_ih, w_hh, b_ih, b_hh, w_hr = weights

    def step(carry, now):
        gates, here = now
        moved = cell(carry, gates, (w_hh, b_hh, w_hr))
        carry = tuple(jnp.where(here, new, old) for new, old in zip(moved, carry, strict=True))
        return carry, jnp.where(here, carry[0], 0)

    gates_in = jnp.matmul(x, w_ih.T) + b_ih
    return lax.scan(step, _carried(state, gates_in, weights), (gates_in, exists), reverse=reverse)
