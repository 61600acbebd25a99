"""The table of operators: the only functions that a graph file can reach.

A name in a graph file is a key of a dictionary and nothing more. A function registered here takes
arrays and plain Python values under the argument names of the ATen schema, and is pure.
"""

import inspect
from collections.abc import Callable
from typing import Any

OPERATORS: dict[str, Callable[..., Any]] = {}
SIGNATURES: dict[str, inspect.Signature] = {}

_RANDOM = "it draws random numbers, and a loss must be a deterministic function"
_DATA_DEPENDENT = "its output's shape or a Python branch depends on the values"

# Reasons for the absence of the operators that people meet first.
ABSENT: dict[str, str] = {
    **dict.fromkeys(
        [
            "aten.native_dropout.default",
            "aten.bernoulli.p",
            "aten.bernoulli.default",
            "aten.rand.default",
            "aten.rand_like.default",
            "aten.randn.default",
            "aten.randn_like.default",
            "aten.randint.low",
            "aten.randperm.default",
            "aten.normal_functional.default",
        ],
        _RANDOM,
    ),
    **dict.fromkeys(
        [
            "aten.nonzero.default",
            "aten._local_scalar_dense.default",
            "aten.item.default",
            "aten.masked_select.default",
            "aten._unique2.default",
            "aten.unique_dim.default",
        ],
        _DATA_DEPENDENT,
    ),
}


def aten(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function under the names `aten.<name>` (overload included, e.g. `add.Tensor`)."""
    return register(*(f"aten.{name}" for name in names))


def register(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function under the given full names, refusing a name that is taken."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            if name in OPERATORS:
                raise AssertionError(f"operator {name} is registered twice")
            OPERATORS[name] = function
            SIGNATURES[name] = inspect.signature(function)
        return function

    return add
