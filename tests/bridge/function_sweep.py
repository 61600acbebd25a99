"""PyTorch's functions one by one: value, gradient and Hessian product against PyTorch's, in float64.

Each stands in a module of its own, whose parameters are its arguments. `together` exports several at once;
`sweep` each alone, and says which are refused. The scalar is that of `bridge_reference`.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import bridge_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

from spectra import bridge

Functions = dict[str, Callable[..., Any]]

# What PyTorch differentiates only in another form of the same, or there more exactly: its backward of
# hardsigmoid holds 1/6 in float32.
TWINS: Functions = {
    "hardsigmoid": lambda x: torch.nn.functional.relu6(x + 3) / 6,
    "torch.cond": lambda x: x.sin() if x.sum() > 0 else x.exp(),
    "vander": lambda v: torch.stack([v * v, v, torch.ones_like(v)], 1),
    "linalg.vander": lambda v: torch.stack([torch.ones_like(v), v, v * v], 1),
    "linalg.cond": lambda a: [
        (lambda s: s[0] / s[2])(torch.linalg.svdvals(a)),
        torch.linalg.matrix_norm(a) * torch.linalg.matrix_norm(torch.linalg.inv(a)),
        torch.linalg.matrix_norm(a, 1) * torch.linalg.matrix_norm(torch.linalg.inv(a), 1),
    ],
}


def arguments() -> dict[str, torch.Tensor]:
    """The tensors that the names of `torch_functions` stand for, the same in every call."""
    draw = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=draw)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(3, 4, dtype=torch.float64, generator=draw)

    return {
        "x": normal(3, 4), "y": normal(3, 4), "p": uniform(0.3, 1.3), "q": uniform(0.3, 1.3),
        "u": uniform(-0.8, 0.8), "v": normal(5), "w": normal(5), "a": normal(3, 3), "b": normal(3, 2),
        "t": normal(4, 3), "l": normal(2, 4, 8), "i": normal(2, 4, 6, 6), "c": normal(1, 2, 4, 4, 4),
    }  # fmt: skip


class Swept(nn.Module):
    """A function of parameters, which a number multiplies: the one input."""

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function
        self.names = tuple(inspect.signature(function).parameters)
        values = arguments()
        self.values = nn.ParameterDict({name: nn.Parameter(values[name]) for name in self.names})

    def forward(self, one: torch.Tensor) -> Any:
        return self.function(*(self.values[name] * one for name in self.names))


class Together(nn.Module):
    """Several functions, each of parameters of its own: one export and one program for all of them."""

    def __init__(self, functions: Functions):
        super().__init__()
        self.parts = nn.ModuleList(Swept(function) for function in functions.values())

    def forward(self, one: torch.Tensor) -> list[Any]:
        return [part(one) for part in self.parts]


def together(functions: Functions) -> dict[str, float]:
    """The largest relative error among value, gradient and product of each function."""
    module, one = Together(functions), torch.ones((), dtype=torch.float64)
    model = bridge.from_torch(module, (one,), batch_axis=None)
    rng = np.random.default_rng(0)
    vector = {k: rng.standard_normal(p.shape) for k, p in model.params.items()}
    outputs, *derivatives = reference.jax_derivatives(model, (one.numpy(),), vector)
    errors, start = {}, 0
    for index, (name, part) in enumerate(zip(functions, module.parts, strict=True)):
        own, *ours = (_of_part(tree, index) for tree in (vector, *derivatives))
        theirs, _ = _truth(name, part, one, own)
        stop = start + len(theirs[0])
        pairs = zip((outputs[start:stop], *ours), theirs, strict=True)
        errors[name], start = max(_relative(a, b) for a, b in pairs), stop
    assert start == len(outputs)
    return errors


def _of_part(tree: dict[str, Any], index: int) -> dict[str, Any]:
    prefix = f"parts.{index}."
    return {k.removeprefix(prefix): v for k, v in tree.items() if k.startswith(prefix)}


@dataclass(frozen=True)
class Outcome:
    """Relative errors of value, gradient and product, or why there are none."""

    errors: tuple[float, float, float] | None
    refusal: str = ""
    by_differences: bool = False


def sweep(functions: Functions) -> dict[str, Outcome]:
    """The outcome of each function. Call it under x64 and a default dtype of float64."""
    found: dict[str, Outcome] = {}
    models, vectors, truths = {}, {}, {}
    one = torch.ones((), dtype=torch.float64)
    for name, function in functions.items():
        module = Swept(function)
        try:
            model = bridge.from_torch(module, (one,), batch_axis=None)
        except bridge.BridgeError as error:
            found[name] = Outcome(None, " ".join(str(error).split()))
            continue
        rng = np.random.default_rng(0)
        vectors[name] = {k: rng.standard_normal(p.shape) for k, p in model.params.items()}
        models[name], truths[name] = model, _truth(name, module, one, vectors[name])
    for name, ours in _products(models, vectors).items():
        theirs, by_differences = truths[name]
        pairs = zip(ours, theirs, strict=True)
        found[name] = Outcome(tuple(_relative(a, b) for a, b in pairs), "", by_differences)
    return {name: found[name] for name in functions}


def _products(models: dict[str, bridge.TorchModel], vectors: dict[str, Any]) -> dict[str, Any]:
    """Value, gradient and product of every model, in one program."""

    def run(params, vectors, one):
        results = {}
        for name, model in models.items():

            def loss(p, model=model):
                outputs = reference.floating(model.apply(p, one))
                return reference.scalar(outputs), outputs

            tangents = ((params[name],), (vectors[name],))
            (gradient, outputs), (product, _) = jax.jvp(jax.grad(loss, has_aux=True), *tangents)
            results[name] = outputs, gradient, product
        return results

    operands = ({k: m.params for k, m in models.items()}, vectors, jnp.ones(()))
    return jax.jit(run).lower(*operands).compile(reference.FAST)(*operands)


def _truth(name: str, module: Swept, one: torch.Tensor, vector: dict[str, np.ndarray]) -> tuple[Any, bool]:
    """PyTorch's value, gradient and double backward; differences of its gradient where it has no other."""
    twin = Swept(TWINS[name]) if name in TWINS else module
    try:
        return reference.torch_derivatives(twin, (one,), vector), False
    except RuntimeError as error:
        if "not implemented" not in str(error):
            raise

    def gradient(step: float) -> tuple[Any, dict[str, np.ndarray]]:
        moved = Swept(module.function)
        with torch.no_grad():
            for key, parameter in moved.named_parameters():
                parameter += step * torch.tensor(vector[key])
        params = dict(moved.named_parameters())
        outputs = reference.torch_outputs(moved, (one,))
        grads = torch.autograd.grad(reference.torch_loss(outputs), list(params.values()))
        return reference.numpy_tree((outputs, dict(zip(params, grads, strict=True))))

    # Of these functions, piecewise linear or quadratic, symmetric differences have no error but rounding,
    # 1e-16 / 1e-4 relative, as long as the step crosses no kink.
    step = 1e-4
    (_, plus), (_, minus) = gradient(step), gradient(-step)
    product = {k: (plus[k] - minus[k]) / (2 * step) for k in plus}
    return (*gradient(0.0), product), True


def _relative(ours: Any, theirs: Any) -> float:
    """The relative error; the error itself where the truth is 0."""
    scale = math.sqrt(sum(float(np.sum(np.square(x))) for x in jax.tree.leaves(theirs)))
    if scale == 0:
        return max((float(np.max(np.abs(x), initial=0)) for x in jax.tree.leaves(ours)), default=0.0)
    return reference.relative(ours, theirs)
