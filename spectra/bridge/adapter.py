"""A module as `torch.export` takes it: plain containers, code that it can trace, its state left as it was.

Recurrent layers are traced for any number of steps, and packed sequences too.
"""

import dataclasses
import functools
import random
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from itertools import chain
from typing import Any, cast

import numpy as np
import torch
import torch.utils.checkpoint
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


_FRESH = random.Random(0)


class _Checkpointed:
    """In the place of the function behind `torch.utils.checkpoint.checkpoint(..., use_reentrant=True)`."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


@contextmanager
def preserved(module: torch.nn.Module, train: bool) -> Iterator[None]:
    """Set training or evaluation mode, and put back whatever running the module may move.

    That is buffers (BatchNorm's statistics), parameters that a layer changes in place (`max_norm=`),
    attributes that the forward pass sets, every submodule's own mode, and the random states of torch, NumPy
    and Python. Gradients are never accumulated here, so `.grad` needs no care. Checkpointed regions are run
    as they are: PyTorch's reentrant form computes them where no derivative is recorded.
    """
    attributes: list[tuple[Any, dict[str, Any]]] = [
        (holder, dict(holder)) for m in module.modules() for holder in (m.__dict__, m._parameters, m._buffers)
    ]
    held = chain(module.parameters(), module.buffers())
    tensors = [t for t in held if not t.is_inference() and t.layout is torch.strided]
    values = [(t, t.detach().clone()) for t in tensors]
    numbers, python = np.random.get_state(), random.getstate()  # noqa: NPY002
    checkpointed = torch.utils.checkpoint.CheckpointFunction
    devices = {t.device.index for t in tensors if t.device.type == "cuda"}
    with suppress(NotImplementedError):  # an exported program keeps the mode that it was exported in
        module.train(train)
    try:
        with torch.random.fork_rng(devices=devices):
            # Another state each time: a number drawn in the forward pass, which a graph holds as a
            # constant, differs when the module is run beside it.
            np.random.seed(_FRESH.randrange(2**32))  # noqa: NPY002
            random.seed(_FRESH.random())
            torch.utils.checkpoint.CheckpointFunction = _Checkpointed  # type: ignore[misc]
            yield
    finally:
        torch.utils.checkpoint.CheckpointFunction = checkpointed  # type: ignore[misc]
        np.random.set_state(numbers)  # noqa: NPY002
        random.setstate(python)
        for holder, items in attributes:
            holder.clear()
            holder.update(items)
        with torch.no_grad():
            for tensor, value in values:
                if not torch.equal(tensor, value):  # kernels of norms move buffers without a new version
                    tensor.copy_(value)


PREFIX = "module."  # of the names of what the adapter holds


class Adapter(torch.nn.Module):
    """The module, whose outputs become tensors in tuples, lists, dictionaries and named tuples.

    Data classes become dictionaries, distributions the dictionary of their parameters; caches of keys and
    values, which a decoder returns for the next token, are left out.
    """

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.module = module

        @functools.wraps(module.forward)  # the names of its arguments are those of the graph's inputs
        def forward(*args: Any, **kwargs: Any) -> Any:
            return _plain(module(*args, **kwargs))

        self.forward = forward


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (torch.Tensor, bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items() if not _is_cache(v)}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, tuple):
        items = [_plain(item) for item in value]
        fields = getattr(value, "_fields", None)
        return tuple(items) if fields is None else _record(type(value).__name__, tuple(fields))(*items)
    if isinstance(value, torch.distributions.Distribution):
        return _parameters(value)
    if _is_cache(value):
        return None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value)]
        return {n: _plain(getattr(value, n)) for n in names if not _is_cache(getattr(value, n))}
    return value  # PyTorch knows it, or says that it does not


@functools.lru_cache
def _record(name: str, fields: tuple[str, ...]) -> Any:
    return namedtuple(name, fields)


def _is_cache(value: Any) -> bool:
    """A decoder's keys and values of earlier tokens (`transformers.Cache` and what inherits from it)."""
    return any(
        kind.__name__.endswith("Cache") and kind.__module__.startswith("transformers")
        for kind in type(value).__mro__
    )


_PARTS = ("base_dist", "_mixture_distribution", "_component_distribution")


def _parameters(value: torch.distributions.Distribution) -> dict[str, Any]:
    names = [name for name in (*value.arg_constraints, *_PARTS) if name in value.__dict__]
    return {name.removeprefix("_"): _plain(getattr(value, name)) for name in names}


@contextmanager
def traceable() -> Iterator[None]:
    """Trace recurrent layers whole, without what looks at values: the checks of distributions, and the order
    in which PyTorch contracts three factors and more, which fixes the batch size."""
    kind, orders = torch.distributions.Distribution, cast("Any", torch.backends.opt_einsum)
    before = kind._validate_args, orders.enabled
    kind.set_default_validate_args(False)
    orders.enabled = False
    try:
        with whole_layers():
            yield
    finally:
        kind.set_default_validate_args(before[0])
        orders.enabled = before[1]


def has_experts(module: torch.nn.Module) -> bool:
    """Whether mixtures of experts in it compute by a choice of implementations (`transformers`)."""
    return bool(_choosers(module))


@contextmanager
def experts_by(implementation: str, module: torch.nn.Module) -> Iterator[None]:
    """Compute mixtures of experts by another of their implementations.

    "batched_mm" has a graph: the default one loops over the experts that were chosen. "eager" runs in every
    precision.
    """
    with ExitStack() as stack:
        for model in _choosers(module):
            stack.callback(model.set_experts_implementation, model.get_experts_implementation())
            model.set_experts_implementation(implementation)
        yield


def _choosers(module: torch.nn.Module) -> list[Any]:
    names = ("get_experts_implementation", "set_experts_implementation")
    found = [m for m in module.modules() if all(hasattr(m, name) for name in names)]
    return found[:1]  # the outermost sets those inside
