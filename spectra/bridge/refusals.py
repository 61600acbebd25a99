"""What to say when PyTorch cannot export a module, or a graph differs from it: cause, line, remedy."""

import contextlib
import inspect
import io
import logging
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import numpy as np
import torch
import torch.fx.experimental.symbolic_shapes
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as torch_pytree

from spectra.bridge.errors import BridgeError

_OURS = str(Path(__file__).parents[1])
_LIBRARIES = (str(Path(torch.__file__).parent), _OURS, sysconfig.get_paths()["stdlib"])
_PACKAGES = tuple({sysconfig.get_paths()[name] for name in ("purelib", "platlib")})


def _rank(file: str) -> int:
    """2 for the user's files, 1 for other packages', 0 for PyTorch's, Python's and ours."""
    if file.startswith(_PACKAGES) and not file.startswith(_LIBRARIES[:2]):
        return 1
    return 0 if file.startswith(_LIBRARIES) or file.startswith("<") else 2


def place_of(error: BaseException) -> str:
    """Return ` (FILE, line N: CODE)`, the deepest line of the user's in the traceback, or nothing.

    Without one, the deepest line of a package that is neither PyTorch nor this one.
    """
    found: list[tuple[int, traceback.FrameSummary]] = []
    link: Any = error
    while link is not None:
        found += [(_rank(f.filename), f) for f in traceback.extract_tb(link.__traceback__)]
        link = link.__cause__ or link.__context__
    return _describe(found)


def current_place(frame: FrameType | None) -> str:
    """Return the same of a running frame and its callers, outermost first."""
    return _describe([(_rank(f.filename), f) for f in traceback.extract_stack(frame)])


_RECORDED = re.compile(r'File "(.+)", line (\d+), in (\S+)(?:\n +(.+))?')


def recorded_place(trace: str) -> str:
    """Return the same of a stack that `torch.export` has written down for a node of its graph."""
    frames = (
        traceback.FrameSummary(file, int(number), function, line=code, lookup_line=False)
        for file, number, function, code in _RECORDED.findall(trace)
    )
    return _describe((_rank(f.filename), f) for f in frames)


def _describe(found: Iterable[tuple[int, traceback.FrameSummary]]) -> str:
    found = list(found)
    best = max((rank for rank, _ in found), default=0)
    if best == 0:
        return ""
    frame = [f for rank, f in found if rank == best][-1]
    code = f": {frame.line}" if frame.line else ""
    return f" ({frame.filename}, line {frame.lineno}{code})"


_STRAIGHT = (
    "In plain operations, `y + (f(y) - y).detach()` has the value of f(y) and the derivative of y, and "
    "`c * y + ((1 - c) * y).detach()` the value of y and c times its derivative."
)


def likely_cause(module: torch.nn.Module, inner: torch.nn.Module, args: Any, kwargs: Any) -> str:
    """Say in a sentence or two what probably makes the difference, and what to write instead."""
    found = list(_of_layers(inner))
    watch = Watch()
    try:
        with torch.inference_mode(False), torch.enable_grad(), watch:
            outputs = torch_pytree.tree_leaves(module(*args, **kwargs))
        found += watch.found + [f"{text}. {_STRAIGHT}" for text in _functions(outputs)]
    except Exception:  # the comparison has failed already: a name for it is all that is wanted here
        found += watch.found
    found = list(dict.fromkeys(found))
    if not found:
        return (
            "No cause was found. If the module's first call does what later ones don't (it rescales or sets "
            "up weights), call it once on the example and export it then. Otherwise look for hooks, a custom "
            "autograd.Function, in-place changes under torch.no_grad() or of a detached tensor, numbers that "
            "NumPy or Python draws, and branches on torch.compiler.is_exporting(); if there is none, an "
            "operator is converted wrongly, which is a defect to report."
        )
    return "Likely cause: " + "; ".join(found[:3])


def _of_layers(module: torch.nn.Module) -> Iterator[str]:
    for name, layer in module.named_modules():
        label = f"{type(layer).__name__} {name!r}" if name else type(layer).__name__
        if getattr(layer, "max_norm", None) is not None:
            yield max_norm_advice(label)
        if layer._backward_hooks or layer._backward_pre_hooks:
            yield (
                f"a backward hook on {label}, which changes gradients only. Remove it, or state in the "
                f"forward pass what it does. {_STRAIGHT}"
            )
    for name, parameter in module.named_parameters():
        if parameter._backward_hooks:
            yield (
                f"a hook on the parameter {name!r}, which changes its gradient only. Remove it; a mask on a "
                "gradient is the choice of a block of parameters (wrt=), or a product in the forward pass"
            )


def max_norm_advice(label: str) -> str:
    """What to do about a layer that renormalises its rows."""
    return (
        f"{label} has max_norm=, by which it changes its own rows when it reads them. Bring them to that "
        "norm before the export (`layer.weight.data.renorm_(layer.norm_type, 0, layer.max_norm)`), and set "
        "`layer.max_norm = None`"
    )


class Watch(TorchFunctionMode):
    """Notes what a graph does not hold, with the user's line.

    Attributes:
        found: what autograd does not record, in words.
        derivatives: where the forward pass takes derivatives itself.
        data: where it takes a tensor's `.data`.
        mapped: what it does under `torch.vmap`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.derivatives: list[str] = []
        self.data: list[str] = []
        self.mapped: list[str] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        place = sys._getframe(1)
        if func == _DATA:
            self.data.append(current_place(place))
        elif _transform() == _KINDS.Vmap:
            self.mapped.append(current_place(place))
        elif func is torch.autograd.grad or _differentiating():
            self.derivatives.append(current_place(place))
        elif text := _unrecorded(getattr(func, "__name__", ""), args, kwargs):
            self.found.append(text.format(place=current_place(place)))
        return func(*args, **(kwargs or {}))


_DATA: Any = vars(torch._C.TensorBase)["data"].__get__


_FUNCTORCH: Any = sys.modules["torch._C._functorch"]
_KINDS = _FUNCTORCH.TransformType


def _transform() -> Any:
    """Which transformation of torch.func's is being taken; None outside of them."""
    interpreter = _FUNCTORCH.peek_interpreter_stack()
    return None if interpreter is None else interpreter.key()


def _differentiating() -> bool:
    """Whether a derivative of torch.func's is being taken (vmap alone is none)."""
    return _transform() in (_KINDS.Grad, _KINDS.Jvp)


def _unrecorded(name: str, args: Any, kwargs: Any) -> str:
    if name == "register_hook":
        return f"a hook on a tensor{{place}}, which changes gradients only. {_STRAIGHT}"
    if name == "cosine_similarity" and _has_short(*args, **(kwargs or {})):
        return (
            "cosine_similarity{place} of a vector shorter than its eps=, where PyTorch's gradient is not the "
            "derivative. Use a smaller eps, or an example of longer vectors"
        )
    if torch.is_inference_mode_enabled():
        return (
            "torch.inference_mode(){place}: autograd sees a constant there, the graph a function. Use "
            "torch.no_grad() or .detach(), which are recorded"
        )
    if not torch.is_grad_enabled() and _in_place(name, kwargs) and _tracked(args):
        return (
            "an in-place change under torch.no_grad(){place}, which moves the value and not its "
            "derivative. For the same without it: `h = h + (new - h).detach()`"
        )
    return ""


def _has_short(x1: Any, x2: Any, dim: int = 1, eps: float = 1e-8) -> bool:
    """Whether the length of a vector is below `eps`, as `cosine_similarity` takes these."""
    with torch.no_grad():
        return any(bool((torch.linalg.vector_norm(x, dim=dim) < eps).any()) for x in (x1, x2))


def _in_place(name: str, kwargs: Any) -> bool:
    plain = name.endswith("_") and not name.endswith("__")
    return (
        plain
        or name in ("__setitem__", "__iadd__", "__imul__", "__isub__", "__itruediv__")
        or (bool(kwargs) and kwargs.get("out") is not None)
    )


def _tracked(args: Any) -> bool:
    return bool(args) and isinstance(args[0], torch.Tensor) and args[0].requires_grad


def _functions(outputs: list[Any]) -> Iterator[str]:
    """The custom autograd.Functions behind the outputs."""
    pending = [t.grad_fn for t in outputs if isinstance(t, torch.Tensor) and t.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        owner: Any = getattr(node, "_forward_cls", None)
        if owner is not None and owner.__module__.partition(".")[0] != "torch":
            where = _source(owner)
            yield f"the autograd.Function {owner.__name__}{where}, whose backward is another function"
        following = {parent for parent, _ in node.next_functions if parent is not None} - seen
        seen |= following
        pending += following


def _source(owner: Any) -> str:
    try:
        return f" ({inspect.getsourcefile(owner)}, line {inspect.getsourcelines(owner)[1]})"
    except (OSError, TypeError):
        return ""


_VALUES = (
    "A branch, a loop or a shape there depends on a tensor's values: choose with torch.where or by a mask, "
    "and keep shapes fixed."
)
_MAPPED = (
    "torch.export does not trace all that torch.vmap maps{place}: map the first axis of everything "
    "(in_dims=0, out_dims=0, with x.movedim around it), or write it out, as by torch.einsum('bmi,mio->bmo', "
    "x, weights)."
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
    "_ctc_loss": (
        "What PyTorch computes for CTC has a size that depends on the lengths' values: export the network "
        "without the loss, and compute it in JAX (optax.ctc_loss) from `model.apply(params, inputs)`."
    ),
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
        hint = ""
        if isinstance(module, type):
            hint = f" {module.__name__} is a class: pass the module that it makes when it is called."
        elif isinstance(module, Mapping):
            hint = (
                " A state dict holds weights alone: give it to load_state_dict of its module, and pass that."
            )
        raise BridgeError(f"expected a torch.nn.Module, got {type(module).__name__}.{hint}")
    module = getattr(module, "_orig_mod", module)  # torch.compile's wrapper
    if isinstance(module, torch.jit.ScriptModule):
        raise BridgeError(
            "a TorchScript module cannot be exported: pass the nn.Module that was given to torch.jit.script "
            "or torch.jit.trace, with its weights loaded (module.load_state_dict(scripted.state_dict()))."
        )
    if isinstance(module, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
        raise BridgeError(f"{type(module).__name__} spreads a module over devices: pass its .module.")
    integers = [k for k, part in module.named_modules() if _is_quantized(part)]
    if integers:
        raise BridgeError(
            f"{integers[:4]} are quantized: integers have no derivatives. Pass the float module that was "
            "quantized, or quantize copies of it."
        )
    lazy = [k for k, p in module.named_parameters() if torch.nn.parameter.is_lazy(p)]
    if lazy:
        raise BridgeError(
            f"{lazy[:4]} have no shape yet: run the module once on the example, then export it."
        )
    sparse = [k for k, p in module.named_parameters() if p.layout is not torch.strided]
    if sparse:
        raise BridgeError(
            f"{sparse[:4]} are sparse: a vector of the curvature has an entry for each entry of a parameter. "
            "Keep the values alone as the parameter, and build the matrix of them in the forward pass "
            "(torch.sparse_coo_tensor(indices, values, size)), or multiply a dense parameter by a mask."
        )
    empty = [k for k, x in (*module.named_parameters(), *module.named_buffers()) if x.is_meta]
    if empty:
        raise BridgeError(
            f"{empty[:4]} are on the meta device, which holds no numbers: give them memory "
            '(module.to_empty(device="cpu")) and load the weights, then export the module.'
        )
    return module


def _is_quantized(module: torch.nn.Module) -> bool:
    parts = type(module).__module__.split(".")
    return parts[0] == "torch" and "quantized" in parts


def explain(
    error: Exception,
    module: torch.nn.Module,
    args: Any,
    kwargs: Any,
    failed: str = "torch.export cannot trace the module",
) -> BridgeError:
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
        leaves = watch.data or not watch.mapped
        hint = (
            hint.format(data=next(iter(watch.data), "")) if leaves else _MAPPED.format(place=watch.mapped[0])
        )
    return BridgeError(f"{failed}{place_of(error)}: {first_line(error)}. {hint}".rstrip())


def rejection(error: Exception, args: Any, kwargs: Any) -> BridgeError:
    """Return what to raise where the module raised `error` by itself, without any export."""
    return BridgeError(
        f"torch.export cannot trace the module: the module itself rejects the example{place_of(error)}: "
        f"{first_line(error)}.{_sparse(error)}{_numpy(args, kwargs)}"
    )


def _sparse(error: Exception) -> str:
    """What to do where a sparse matrix is asked for what the dense one in its place has not."""
    if not any(part in str(error) for part in ("sparse", "aten::_indices", "aten::_values", "aten::_nnz")):
        return ""
    return (
        " Sparse matrices are written out for the export: use them in products alone, and keep their indices "
        "and values as buffers of their own."
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
