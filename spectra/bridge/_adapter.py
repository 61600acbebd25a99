"""A module as `torch.export` takes it: outputs in plain containers, code that it can trace."""

import dataclasses
import functools
from collections import namedtuple
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from spectra.bridge._recurrent import whole_layers

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
    """Trace recurrent layers whole, and leave out the checks of distributions, which look at values."""
    kind = torch.distributions.Distribution
    before = kind._validate_args
    kind.set_default_validate_args(False)
    try:
        with whole_layers():
            yield
    finally:
        kind.set_default_validate_args(before)


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
