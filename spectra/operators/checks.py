"""What an operator on data is given, checked: options, functions, what a loss returns, values not finite."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from spectra import _paths, _tree
from spectra._errors import SpectraError, StructureError
from spectra.data import Shared
from spectra.operators import products

PyTree = Any

_PRECISIONS = ("float32", "highest", "high", "tensorfloat32", "bfloat16", "default")


class DataOptions(TypedDict, total=False):
    """Keyword arguments of every operator on data; see `DataOperator`."""

    wrt: _paths.Select | None
    mode: str
    microbatch: int | None
    linearize: bool | Literal["auto"]
    matmul_precision: str
    weight_fn: Callable[[PyTree], Any] | None
    shared: Shared
    num_batches: int | None
    subsample_key: jax.Array | None
    check_data: bool


def check_options(mode: str, microbatch, linearize, matmul_precision: str) -> None:
    """Raise a `SpectraError` for a value that none of them has."""
    if mode not in ("auto", *products.MODES):
        raise SpectraError(f"mode={mode!r}: use 'auto' or one of {sorted(products.MODES)}.")
    if linearize not in (True, False, "auto"):
        raise SpectraError(f"linearize={linearize!r}: use True, False or 'auto'.")
    if microbatch is not None and not (isinstance(microbatch, int) and microbatch > 0):
        raise SpectraError(f"microbatch={microbatch}: use a positive number of examples, or None.")
    if matmul_precision not in _PRECISIONS:
        raise SpectraError(f"matmul_precision={matmul_precision!r}: use one of {_PRECISIONS}.")


def check_functions(functions: Mapping[str, Any]) -> None:
    """Raise a `StructureError` for an argument that should be a function and is not."""
    for name, function in functions.items():
        if name.endswith("_fn") and function is not None and not callable(function):
            raise StructureError(f"{name} is a {type(function).__name__}; pass a function.")


def check_scalar(value, name: str) -> jax.Array:
    """`value` if it is one real number; raises otherwise."""
    if not jax.tree_util.all_leaves((value,)):
        kind = type(value).__name__
    elif jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        kind = f"shape {jnp.shape(value)} and dtype {jnp.result_type(value)}"
    else:
        return value
    raise StructureError(
        f"{name} returned {kind}; it must return one real number, the mean over the batch (without "
        "auxiliary outputs)."
    )


def explain_non_finite(op) -> str:
    """Name the parameter leaf, the loss or the gradient leaf that is not finite."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(op.like):
        if not _tree.all_finite(leaf):
            return f"The parameter leaf '{_tree.path_str(path)}' holds NaN or infinite values."
    loss = float(op.loss())
    if not np.isfinite(loss):
        return f"The loss is {loss} at these parameters: check the data and the loss function."
    for path, leaf in jax.tree_util.tree_leaves_with_path(op.gradient()):
        if not _tree.all_finite(leaf):
            return (
                f"The loss is finite but its gradient is not, in leaf '{_tree.path_str(path)}': "
                "look for sqrt, log, norm or division at zero."
            )
    return (
        "Loss and gradient are finite, second derivatives are not: look for sqrt, norm or "
        "jnp.where with a branch that overflows."
    )
