"""The sweep over PyTorch's functions; writes benchmarks/results/bridge-functions.md.

Made by `python -m benchmarks.bridge_report functions`. Each function stands in a module of its own, whose
parameters are its arguments, and is exported alone, in float64. Errors are relative, in the Euclidean norm,
the largest of value, gradient and Hessian product; the truth of the product is PyTorch's double backward, and
where PyTorch has none (marked by *) symmetric differences of its gradient. What draws random numbers or has
a shape that depends on values is represented by a few functions each, and so are special functions and
factorisations that PyTorch itself cannot differentiate.
"""

from pathlib import Path

import jax
import torch
from function_sweep import Outcome, sweep
from torch_functions import FUNCTIONS
from torch_layers import LAYERS

TOLERANCE = 1e-9


def page(about: str) -> list[str]:
    """The lines of the page, measured family by family."""
    families: dict[str, dict[str, Outcome]] = {}
    torch.set_default_dtype(torch.float64)
    with jax.enable_x64(True):
        for family, functions in {**FUNCTIONS, **LAYERS}.items():
            families[family] = sweep(functions)
            print(f"{family}: {len(functions)}", flush=True)
    torch.set_default_dtype(torch.float32)
    everything = [outcome for family in families.values() for outcome in family.values()]
    measured = [outcome.errors for outcome in everything if outcome.errors is not None]
    right = sum(max(errors) < TOLERANCE for errors in measured)
    lines = ["# PyTorch bridge: its functions one by one", "", about, ""]
    lines += [(__doc__ or "").split("\n\n", 1)[1].strip(), ""]
    lines.append(
        f"{len(everything)} functions: {right} agree to {TOLERANCE:.0e}, {len(measured) - right} do not, "
        f"{len(everything) - len(measured)} are refused."
    )
    head = "| function | family | reason |"
    lines += ["", "## Refused", "", head, "|---|---|---|"]
    for family, outcomes in families.items():
        for name, outcome in outcomes.items():
            if outcome.errors is None:
                lines.append(f"| {name} | {family} | {_reason(outcome.refusal)} |")
    head = "| family | functions | largest error of value | gradient | product |"
    lines += ["", "## Measured", "", head, "|---|---|---|---|---|"]
    for family, outcomes in families.items():
        errors = [outcome.errors for outcome in outcomes.values() if outcome.errors is not None]
        if errors:
            cells = " | ".join(f"{max(column):.1e}" for column in zip(*errors, strict=True))
            lines.append(f"| {family} | {len(errors)} | {cells} |")
    for family, outcomes in families.items():
        names = [
            f"{name}{'*' if outcome.by_differences else ''} {max(outcome.errors):.0e}"
            for name, outcome in outcomes.items()
            if outcome.errors is not None
        ]
        if names:
            lines += ["", f"**{family}**: {', '.join(names)}."]
    return lines


def _reason(refusal: str) -> str:
    """The operator and its reason, without the frame of the message."""
    text = refusal.removeprefix("these operators have no JAX counterpart in the bridge: ")
    return text.split(" in module ")[0].split(" Replace them")[0].replace("|", "/")[:200]


def write(path: Path, about: str) -> None:
    """Measure and write the page."""
    path.write_text("\n".join(page(about)) + "\n")
