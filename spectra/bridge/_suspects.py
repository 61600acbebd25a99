"""Why an exported graph may differ from the module: what its forward pass does that a graph does not hold."""

import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as torch_pytree

from spectra.bridge._frames import current_place

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
            "No cause was found. Look for hooks, a custom autograd.Function, in-place changes under "
            "torch.no_grad() or of a detached tensor, numbers drawn by NumPy or Python, and branches on "
            "torch.compiler.is_exporting(); if there is none, an operator is converted wrongly, which is a "
            "defect to report."
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
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.derivatives: list[str] = []
        self.data: list[str] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        place = sys._getframe(1)
        if func == _DATA:
            self.data.append(current_place(place))
        elif func is torch.autograd.grad or _differentiating():
            self.derivatives.append(current_place(place))
        elif text := _unrecorded(getattr(func, "__name__", ""), args, kwargs):
            self.found.append(text.format(place=current_place(place)))
        return func(*args, **(kwargs or {}))


_DATA: Any = vars(torch._C.TensorBase)["data"].__get__


_FUNCTORCH: Any = sys.modules["torch._C._functorch"]


def _differentiating() -> bool:
    """Whether a derivative of torch.func's is being taken (vmap alone is none)."""
    interpreter = _FUNCTORCH.peek_interpreter_stack()
    kinds = _FUNCTORCH.TransformType
    return interpreter is not None and interpreter.key() in (kinds.Grad, kinds.Jvp)


def _unrecorded(name: str, args: Any, kwargs: Any) -> str:
    if name == "register_hook":
        return f"a hook on a tensor{{place}}, which changes gradients only. {_STRAIGHT}"
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
