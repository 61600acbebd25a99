"""Recurrent layers while a module is traced: any number of steps, and packed sequences.

PyTorch traces a recurrent layer step by step, which fixes their number, and packs sequences into an array
whose size depends on their lengths. During an export the layers call one opaque operator instead, and a
`PackedSequence` holds the padded batch (time first), with its usual numbers of sequences at each step.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

KINDS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_LENGTHS: ContextVar[torch.Tensor | None] = ContextVar("lengths", default=None)


@torch.library.custom_op("spectra_bridge::recurrent", mutates_args=())
def _recurrent(
    kind: str,
    input: torch.Tensor,
    lengths: torch.Tensor | None,
    hx: list[torch.Tensor],
    params: list[torch.Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> list[torch.Tensor]:
    """Stand for a recurrent layer in a graph; only its shapes are ever computed by PyTorch."""
    raise NotImplementedError("a mark in a graph, not to be run")


@_recurrent.register_fake
def _(kind, input, lengths, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first):
    width = hx[0].shape[2] * (2 if bidirectional else 1)
    return [input.new_empty((*input.shape[:2], width)), *(torch.empty_like(h) for h in hx)]


@contextmanager
def whole_layers() -> Iterator[None]:
    """Trace recurrent layers as one operator each, and packed sequences as padded ones."""
    calls: dict[str, Callable[..., Any]] = {kind: _call_of(kind) for kind in KINDS}
    calls |= {"_pack_padded_sequence": _pack, "_pad_packed_sequence": _pad}
    functions: Any = vars(torch._VF)
    with ExitStack() as stack:
        for name, call in calls.items():
            # PyTorch's module asks its C library for names that it does not have itself.
            stack.callback(functions.pop, name, None)
            functions[name] = call
        for layer in (nn.LSTM, nn.GRU, nn.RNN):
            stack.callback(setattr, layer, "forward", layer.forward)
            layer.forward = _forward_of(layer.forward)
        yield


def _call_of(kind: str) -> Callable[..., Any]:
    def call(input: torch.Tensor, hx: Any, *options: Any) -> tuple[torch.Tensor, ...]:
        states = list(hx) if isinstance(hx, (tuple, list)) else [hx]
        params, *rest = options
        return tuple(
            torch.ops.spectra_bridge.recurrent(kind, input, _LENGTHS.get(), states, list(params), *rest)
        )

    return call


def _forward_of(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: nn.RNNBase, input: Any, hx: Any = None) -> Any:
        if not isinstance(input, PackedSequence):
            return original(self, input, hx)
        data, batch_sizes, order, back = input
        hx = _reordered(hx, order)
        token = _LENGTHS.set(_lengths(data, batch_sizes))
        try:
            output, hidden = original(self, data.transpose(0, 1) if self.batch_first else data, hx)
        finally:
            _LENGTHS.reset(token)
        output = output.transpose(0, 1) if self.batch_first else output
        return PackedSequence(output, batch_sizes, order, back), _reordered(hidden, back)

    return forward


def _reordered(hidden: Any, order: torch.Tensor | None) -> Any:
    if hidden is None or order is None:
        return hidden
    if isinstance(hidden, tuple):
        return tuple(h.index_select(1, order) for h in hidden)
    return hidden.index_select(1, order)


def _pack(input: torch.Tensor, lengths: torch.Tensor, batch_first: bool) -> tuple[torch.Tensor, torch.Tensor]:
    data = input.transpose(0, 1) if batch_first else input
    steps = torch.arange(data.shape[0])
    # What PyTorch refuses, and a graph cannot, gives NaN, which the operators report.
    fits = (lengths > 0).all() & (lengths <= data.shape[0]).all() & (lengths[1:] <= lengths[:-1]).all()
    if data.is_floating_point():
        data = torch.where(fits, data, torch.nan)
    return data, (lengths > steps[:, None]).sum(1)


def _lengths(data: torch.Tensor, batch_sizes: torch.Tensor) -> torch.Tensor:
    return (batch_sizes[:, None] > torch.arange(data.shape[1])).sum(0)


def _pad(
    data: torch.Tensor, batch_sizes: torch.Tensor, batch_first: bool, padding_value: float, total: int
) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = _lengths(data, batch_sizes)
    exists = torch.arange(data.shape[0])[:, None] < lengths
    exists = exists.reshape(*exists.shape, *[1] * (data.ndim - 2))
    padded = torch.where(exists, data, padding_value)
    # Without total_length=, which only the caller knows, PyTorch's result ends with the longest sequence. An
    # array of that size depends on values: a batch that is padded further gives NaN.
    if sys._getframe(1).f_locals.get("total_length") is None:
        padded = torch.where(batch_sizes[-1] > 0, padded, torch.nan)
    elif total > data.shape[0]:
        padded = nn.functional.pad(
            padded, [0, 0] * (data.ndim - 1) + [0, total - data.shape[0]], value=padding_value
        )
    return (padded.transpose(0, 1) if batch_first else padded), lengths
