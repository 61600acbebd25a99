"""Which operators the models of the registry reach, found by exporting them."""

import torch
from bridge_cases import CASES

from spectra import bridge


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
