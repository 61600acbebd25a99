"""Models of the registry joined to one module: one export and one compiled program for all of them.

The scalar of a family is the sum of its members' scalars, whose parameters are their own. So its gradient
and its Hessian-vector product hold each member's, and every member is compared alone and named.
"""

from collections.abc import Mapping
from typing import Any

import bridge_reference as reference
import jax
import numpy as np
import torch
from bridge_cases import Case
from torch import nn

from spectra import bridge

TOLERANCES = {  # outputs, gradients, products: derived in test_bridge_models
    torch.float32: (1e-5, 1e-4, 1e-4),
    torch.float64: (1e-10, 1e-8, 1e-8),
}


def prepare(case: Case, dtype: torch.dtype, batch: int) -> tuple[nn.Module, Any]:
    module = case.build().to(dtype)
    module.train(case.options.get("train", False))
    return module, inputs_of(case, dtype, batch)


def inputs_of(case: Case, dtype: torch.dtype, batch: int) -> Any:
    def cast(tensor):
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return torch.utils._pytree.tree_map_only(torch.Tensor, cast, case.inputs(batch))


class Family(nn.Module):
    """Several modules, each with inputs of its own."""

    def __init__(self, modules: Mapping[str, nn.Module]):
        super().__init__()
        self.members = nn.ModuleDict(modules)

    def forward(self, inputs):
        return {name: reference.call(member, inputs[name]) for name, member in self.members.items()}


def problems(cases: Mapping[str, Case], dtype: torch.dtype, example: int, batch: int) -> dict[str, str]:
    """Export at one batch size, compare at another; return what is wrong, by member."""
    modules, examples, inputs = {}, {}, {}
    for name, case in cases.items():
        torch.manual_seed(0)
        modules[name], examples[name] = prepare(case, dtype, example)
        inputs[name] = inputs_of(case, dtype, batch)
    (options,) = {tuple(sorted(case.options.items())) for case in cases.values()}
    family = Family(modules)
    family.train(dict(options).get("train", False))
    model = bridge.from_torch(family, {"inputs": examples}, **dict(options))
    assert all(isinstance(i.shape[0], str) for i in model.graph.inputs), model.graph.inputs
    rng = np.random.default_rng(0)
    vector = {k: rng.standard_normal(p.shape).astype(p.dtype) for k, p in model.params.items()}
    ours = _derivatives(model, {"inputs": reference.numpy_tree(inputs)}, vector)
    found: dict[str, str] = {}
    for name, case in cases.items():
        own = [_of_member(tree, name) for tree in (vector, *ours[1:])]
        theirs = reference.torch_derivatives(modules[name], inputs[name], own[0], case.twin)
        kinds = ["outputs"] * len(theirs[0]) + ["gradient", "product"]
        bounds = [TOLERANCES[dtype][0]] * len(theirs[0]) + list(TOLERANCES[dtype][1:])
        pairs = zip([*ours[0][name], *own[1:]], [*theirs[0], *theirs[1:]], strict=True)
        wrong = [
            f"{kind} differ by {error:.1e}"
            for kind, bound, (a, b) in zip(kinds, bounds, pairs, strict=True)
            if not (error := reference.relative(a, b)) < bound
        ]
        if wrong:
            found[name] = ", ".join(wrong)
    return found


def _of_member(tree: Mapping[str, Any], name: str) -> dict[str, Any]:
    prefix = f"members.{name}."
    return {k.removeprefix(prefix): v for k, v in tree.items() if k.startswith(prefix)}


def _derivatives(model: bridge.TorchModel, inputs: Any, vector: Any):
    """Outputs by member, gradient and H·vector in one compilation."""
    arrays, rebuild = reference.split(inputs)

    def run(params, arrays, vector):
        def loss(p):
            results = model.apply(p, **rebuild(arrays))
            outputs = {name: reference.floating(result) for name, result in results.items()}
            return sum(reference.scalar(o) for o in outputs.values()), outputs

        primal, (product, _) = jax.jvp(jax.grad(loss, has_aux=True), (params,), (vector,))
        return primal[1], primal[0], product

    return (
        jax.jit(run).lower(model.params, arrays, vector).compile(reference.FAST)(model.params, arrays, vector)
    )
