"""What to say when PyTorch cannot export a module: the cause, the line, the remedy."""

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import numpy as np
import torch
import torch.fx.experimental.symbolic_shapes  # its logger has to exist before it can be silenced
from torch.utils import _pytree as torch_pytree

from spectra.bridge._errors import BridgeError
from spectra.bridge._frames import place_of
from spectra.bridge._suspects import Watch

_VALUES = (
    "A branch, a loop or a shape there depends on a tensor's values: choose with torch.where or by a mask, "
    "and keep shapes fixed."
)
_JAX_WAY = (
    "The forward pass differentiates{place}, and torch.export does not trace that. Export the network alone "
    "and differentiate it in JAX, inside the loss: `u = lambda x: model.apply(params, x[None])[0, 0]`, then "
    "`jax.vmap(jax.grad(u))(batch)`; second derivatives nest in the same way."
)
# Parts of PyTorch's messages, and what the user can do about it.
_HINTS = {
    "data-dependent": _VALUES,
    "data dependent": _VALUES,
    "dynamic shape": _VALUES,
    "not a known type": "Return tensors in tuples, lists, dictionaries, named tuples or data classes.",
    ".numpy() is not supported": "NumPy sees no tensors that are traced: compute it with torch there.",
    "fake tensor in the exported program constant": (
        "A tensor leaves the graph{data}, as by `.data` or torch.tensor(a tensor): use .detach()."
    ),
}


def prepare(module: Any) -> torch.nn.Module:
    """Return the module to trace, or raise BridgeError where no Python code stands behind it."""
    if isinstance(module, torch.export.ExportedProgram):
        module = module.module()
    if not isinstance(module, torch.nn.Module):
        raise BridgeError(f"expected a torch.nn.Module, got {type(module).__name__}")
    module = getattr(module, "_orig_mod", module)  # torch.compile's wrapper
    if isinstance(module, torch.jit.ScriptModule):
        raise BridgeError(
            "a TorchScript module cannot be exported: pass the nn.Module that was given to torch.jit.script "
            "or torch.jit.trace, with its weights loaded (module.load_state_dict(scripted.state_dict()))."
        )
    if isinstance(module, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
        raise BridgeError(f"{type(module).__name__} spreads a module over devices: pass its .module.")
    lazy = [k for k, p in module.named_parameters() if torch.nn.parameter.is_lazy(p)]
    if lazy:
        raise BridgeError(
            f"{lazy[:4]} have no shape yet: run the module once on the example, then export it."
        )
    return module


def explain(error: Exception, module: torch.nn.Module, args: Any, kwargs: Any) -> BridgeError:
    """Return what to raise for an export that failed with `error`; the module is run once for it."""
    watch = Watch()
    try:
        with torch.enable_grad(), watch:
            module(*args, **kwargs)
    except Exception as own:
        return rejection(own, args, kwargs)
    if watch.derivatives:
        return BridgeError(_JAX_WAY.format(place=watch.derivatives[0]))
    text = f"{type(error).__name__} {error}".lower()
    hint = next((advice for part, advice in _HINTS.items() if part in text), "")
    if "{data}" in hint:
        hint = hint.format(data=next(iter(watch.data), ""))
    return BridgeError(
        f"torch.export cannot trace the module{place_of(error)}: {first_line(error)}. {hint}".rstrip()
    )


def rejection(error: Exception, args: Any, kwargs: Any) -> BridgeError:
    """Return what to raise where the module raised `error` by itself, without any export."""
    return BridgeError(
        f"torch.export cannot trace the module: the module itself rejects the example{place_of(error)}: "
        f"{first_line(error)}.{_numpy(args, kwargs)}"
    )


def _numpy(args: Any, kwargs: Any) -> str:
    leaves = torch_pytree.tree_leaves((args, kwargs))
    if any(isinstance(x, np.ndarray) for x in leaves):
        return " The example holds NumPy arrays: pass tensors (torch.from_numpy)."
    return ""


def first_line(error: BaseException) -> str:
    """The type of an error and the first line of its text, without a full stop."""
    text = str(error).strip()
    line = text.splitlines()[0] if text else ""
    line = line if len(line) <= 240 else f"{line[:240]} …"
    return f"{type(error).__name__}: {line.rstrip('. ')}" if line else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Keep PyTorch's dumps of a graph that it cannot trace off the user's screen, unless asked for."""
    if os.environ.get("TORCH_LOGS"):
        yield
        return
    names = [n for n in logging.root.manager.loggerDict if n.partition(".")[0] == "torch"]
    loggers = [logger for logger in map(logging.getLogger, names) if not logger.disabled]
    for logger in loggers:
        logger.disabled = True
    try:
        with contextlib.redirect_stderr(_WithoutGraphs(sys.stderr)):
            yield
    finally:
        for logger in loggers:
            logger.disabled = False


class _WithoutGraphs(io.TextIOBase):
    """A stream that passes on all but graphs: `torch.export` prints there what it has before an error."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._after_graph = False

    def write(self, text: str, /) -> int:
        is_graph = "def forward(self" in text and "torch.ops." in text
        dropped = is_graph or (self._after_graph and text == "\n")  # print writes it apart
        self._after_graph = is_graph
        return len(text) if dropped else self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()
