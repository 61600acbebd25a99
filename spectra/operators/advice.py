"""What users run into first, in words: Flax's state among the parameters, errors of a module's call, values
that a loss reads while JAX traces it, numbers beyond the range of their type."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import draws, trees
from spectra.base.errors import warn_user
from spectra.base.trees import PyTree
from spectra.operators.base import LinearOperator
from spectra.operators.doubled import in_double
from spectra.operators.jaxprs import KEPT, WITHOUT_NUMBERS

_STATE = ("batch_stats", "state")
"""What stands beside "params" in linen's variables, in those of `nnx_model`, and on the page about Haiku."""
_WORDS = {
    "ModifyScopeVariableError": "BatchNorm updates its running statistics here. For the network at "
    "inference make it use them, such as by train=False; for the statistics of the batch take "
    "spectra.linen_model(module, batch_stats='batch', train=True), which drops the update.",
    "ScopeCollectionNotFound": "A module's apply takes all collections: as params give the operator what "
    "module.init returned, with 'params' and all that is beside it, and wrt='params'.",
    "ScopeParamNotFoundError": "A module's apply takes all collections: as params give the operator what "
    "module.init returned, with 'params' and all that is beside it, and wrt='params'.",
    "InvalidRngError": "Make the module deterministic, such as by train=False or deterministic=True; or fix "
    "one mask, by rngs={'dropout': key}.",
    "CallCompactUnboundModuleError": "spectra.linen_model(module) is a function of (variables, inputs).",
    "TraceContextError": "A module that the loss closes over is changed: spectra.nnx_model(module) gives a "
    "function of (variables, inputs), with BatchNorm and dropout as in evaluation, and the variables.",
}


_VALUES_READ = {
    jax.errors.TracerArrayConversionError: "NumPy computes there with what JAX traces: use jax.numpy.",
    jax.errors.TracerBoolConversionError: "A branch there depends on values that JAX traces: use jnp.where "
    "or jax.lax.cond.",
    jax.errors.TracerIntegerConversionError: "An index or a size there depends on values that JAX traces: "
    "index a jax.numpy array, and keep sizes fixed.",
    jax.errors.NonConcreteBooleanIndexError: "A mask there chooses how many entries there are: use jnp.where "
    "or weights of 0 and 1.",
    jax.errors.ConcretizationTypeError: "A number is read there (float(), int() or .item()) or gives a size, "
    "while JAX traces it: keep it an array.",
    jax.errors.UnexpectedTracerError: f"It {KEPT}: {WITHOUT_NUMBERS}",
}
"""By class, the most special one first."""
_OLD_STATE = "Attempted to use old state"
"""How Equinox begins what it says of a state from which a layer has made a new one: a plain ValueError."""


def explain(error: Exception) -> str:
    """What to do about an error of Flax or Equinox, or where a value is read that JAX traces; nothing for
    others.

    After a space.
    """
    kind = type(error)
    words = _WORDS.get(kind.__name__) if kind.__module__.startswith("flax.") else None
    if str(error).startswith(_OLD_STATE):
        words = (
            "A layer of Equinox can update a state once only, and a loss is called more often: with "
            "params={'net': params, 'state': state} and wrt='net' it is given a copy of the state each time."
        )
    words = words or next((text for read, text in _VALUES_READ.items() if isinstance(error, read)), None)
    return f" {words}" if words else ""


def non_finite_data(data: PyTree, stream: Any) -> str:
    """`, and leaf 'x' of batch 3 holds NaN or infinite values`, the first that does; nothing if none does."""
    for name, batch in _batches(data, stream):
        for path, leaf in jax.tree.leaves_with_path(batch):
            if _has(leaf, jnp.inexact) and not trees.all_finite(leaf):
                return f", and leaf '{trees.path_str(path)}' of {name} holds NaN or infinite values"
    return ""


def explain_indices(data: PyTree, stream: Any) -> str:
    """What a label outside of the classes does, with the integers that the data hold; nothing without any."""
    ranges: dict[str, tuple[int, int]] = {}
    for _, batch in _batches(data, stream):
        for path, leaf in jax.tree.leaves_with_path(batch):
            if _has(leaf, jnp.integer) and leaf.size:
                low, high = ranges.get(trees.path_str(path), (int(leaf.min()), int(leaf.max())))
                ranges[trees.path_str(path)] = min(low, int(leaf.min())), max(high, int(leaf.max()))
    if not ranges:
        return ""
    found = ", ".join(f"from {low} to {high} in leaf '{path}'" for path, (low, high) in ranges.items())
    return (
        " An index outside of an array, such as a label beyond the classes, gives NaN: they count from 0, "
        f"and the integers of the data go {found}."
    )


def _batches(data: PyTree, stream: Any) -> Iterable[tuple[str, PyTree]]:
    """What there is of data, with its name: one batch, or those of a stream that have a weight."""
    if stream is None:
        return [("the data", data)]
    places = stream.places(len(stream.weights) - 1)
    return ((f"batch {i}", batch) for i, batch in places if stream.weights[i] > 0)


def _has(leaf: Any, kind: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray) and jnp.issubdtype(cast("Any", leaf).dtype, kind)


def explain_overflow(op: LinearOperator) -> str:
    """What to do where loss and products are finite in float64 alone; nothing where one is not, or not known.

    A NaN that the parameters do not reach, as for a label outside of the classes, leaves products finite.
    """
    exact = in_double(op)
    if exact is None:
        return ""
    product = exact.unrounded(draws.unit_vector(jax.random.key(0), op))
    if not (np.isfinite(product).all() and np.isfinite(exact.loss())):
        return ""
    return (
        "In float64 all is finite, and the largest number of a product with a unit vector is "
        f"{np.abs(product).max():.1g}: numbers on the way to it are beyond the range of the type that they "
        "are computed in (overflow). Multiply the loss by a power of two, such as 2.0**-60, and divide what "
        "comes of it, scale the data, or compute in a type of a larger range."
    )


def warn_of_state(params: PyTree) -> None:
    """Warn where running statistics would vary, since nothing says what does."""
    count = 0
    if isinstance(params, Mapping) and "params" in params:
        beside = cast("Mapping[str, Any]", params)
        count = sum(_numbers(beside[name]) for name in _STATE if name in beside)
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and not count:
        state = nnx.BatchStat, nnx.Cache
        nodes = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, state))
        count = sum(_numbers(node) for node in nodes if isinstance(node, state))
    if count:
        warn_user(
            f"{count:,} numbers of the model's state (running statistics, say) are taken as parameters: "
            "pass wrt='params' to keep them constant, for an nnx module after spectra.nnx_model(module); or "
            "wrt='*' if they shall vary."
        )


def _numbers(tree: PyTree) -> int:
    """How many floating numbers a tree holds in arrays."""
    leaves = (leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype"))
    return sum(leaf.size for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating))
