"""The table of operators: the only functions that a graph file can reach.

A name in a graph file is a key of a dictionary and nothing more. A function registered here takes
arrays and plain Python values under the argument names of the ATen schema, and is pure.
"""

import inspect
from collections.abc import Callable
from typing import Any

OPERATORS: dict[str, Callable[..., Any]] = {}
SIGNATURES: dict[str, inspect.Signature] = {}

RANDOM = "it draws random numbers, and a loss must be a deterministic function"
_DATA_DEPENDENT = "its output's shape or a Python branch depends on the values"
_ESTIMATE = "its backward is a straight-through estimate, not the derivative of what it computes"
_NO_FUNCTION = "JAX has no such function; where it is one of constants, make it a buffer"

_FAMILIES = {
    RANDOM: (
        "native_dropout", "bernoulli", "rand", "rand_like", "randn", "randn_like", "randint", "randint_like",
        "randperm", "normal", "normal_functional", "multinomial", "poisson", "binomial", "uniform",
        "exponential", "geometric", "cauchy", "log_normal", "_standard_gamma", "_sample_dirichlet",
        "fractional_max_pool2d", "fractional_max_pool3d", "alpha_dropout", "dropout",
    ),
    _DATA_DEPENDENT: (
        "nonzero", "_local_scalar_dense", "item", "masked_select", "_unique2", "unique_dim",
        "unique_consecutive", "equal", "_ctc_loss",
    ),
    _ESTIMATE: (
        "fake_quantize_per_tensor_affine_cachemask", "fake_quantize_per_channel_affine_cachemask",
        "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
        "_fake_quantize_learnable_per_tensor_affine", "_fake_quantize_learnable_per_channel_affine",
    ),
    _NO_FUNCTION: (
        "special_airy_ai", "special_bessel_j0", "special_bessel_j1", "special_bessel_y0", "special_bessel_y1",
        "special_modified_bessel_k0", "special_modified_bessel_k1", "special_scaled_modified_bessel_k0",
        "special_scaled_modified_bessel_k1", "linalg_ldl_factor_ex", "geqrf",
    ),
}  # fmt: skip

# Reasons for the absence of the operators that people meet first, by name without the overload.
ABSENT: dict[str, str] = {f"aten.{name}": reason for reason, names in _FAMILIES.items() for name in names}
# PyTorch's decompositions turn some of them into operators of its other namespace.
ABSENT |= {"prims.normal": RANDOM, "prims.bessel_j0": _NO_FUNCTION, "prims.bessel_j1": _NO_FUNCTION}


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
