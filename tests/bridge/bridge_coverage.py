"""Which operators the models of the registry reach, found by exporting them."""

import jax
import test_bridge_second_derivatives as second
import torch
from bridge_cases import CASES
from function_sweep import Swept
from torch_functions import FUNCTIONS
from torch_layers import LAYERS

from spectra import bridge


def covered_by_functions() -> set[str]:
    """The operators of functions whose results have a sign or a phase to choose, or that have branches."""
    found: set[str] = set()
    functions = {**FUNCTIONS["torch.linalg"], **LAYERS["control flow"]}
    with jax.enable_x64(True):
        for name in ("linalg.svd", "eigh", "eig", "torch.cond"):
            module = Swept(functions[name])
            model = bridge.from_torch(module, torch.ones((), dtype=torch.float64), batch_axis=None)
            found |= set(model.operators)
    return found


def covered_by_second_derivatives() -> set[str]:
    """The operators kept whole since PyTorch's second derivatives of them are not those of their parts."""
    with jax.enable_x64(True):
        module, one = second.Together(second.FUNCTIONS), torch.ones((), dtype=torch.float64)
        return set(bridge.from_torch(module, one).operators)


def covered_by_models() -> set[str]:
    """The operators of all cases that need nothing but PyTorch."""
    found: set[str] = set()
    for case in CASES.values():
        if case.build.__module__ == "bridge_cases" and case.build.__name__ != "build":
            torch.manual_seed(0)
            module = case.build()
            module.train(case.options.get("train", False))
            found |= set(bridge.from_torch(module, case.inputs(3), **case.options).operators)
    return found
