"""What an operator on data is given, checked: options, functions and how they are called, values."""

# pyright: reportPrivateUsage=false
# Operators have parts that only this package uses.

import inspect
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast

import jax
import numpy as np

from spectra.base import paths, trees
from spectra.base.errors import DataError, SpectraError, StructureError
from spectra.base.trees import PyTree
from spectra.operators import advice, differentiate
from spectra.operators.batches import Shared, as_batch, describe
from spectra.operators.streams import Stream, are_arrays, is_stream

if TYPE_CHECKING:
    from spectra.operators.data import DataOperator


_PRECISIONS = ("float32", "highest", "high", "tensorfloat32", "bfloat16", "default")


class DataOptions(TypedDict, total=False):
    """Keyword arguments of every operator on data; see `DataOperator`."""

    wrt: paths.Select | None
    mode: str
    microbatch: int | None
    linearize: bool | Literal["auto"]
    matmul_precision: str
    weight_fn: Callable[[PyTree], Any] | None
    shared: Shared
    num_batches: int | None
    subsample_key: jax.Array | None
    check_data: bool


def check_options(mode: str, microbatch: Any, linearize: Any, matmul_precision: str) -> None:
    """Raise a `SpectraError` for a value that none of them has."""
    if mode not in ("auto", *differentiate.MODES):
        raise SpectraError(f"mode={mode!r}: use 'auto' or one of {sorted(differentiate.MODES)}.")
    if linearize not in (True, False, "auto"):
        raise SpectraError(f"linearize={linearize!r}: use True, False or 'auto'.")
    if microbatch is not None and not (isinstance(microbatch, int) and microbatch > 0):
        raise SpectraError(f"microbatch={microbatch}: use a positive number of examples, or None.")
    if matmul_precision not in _PRECISIONS:
        raise SpectraError(f"matmul_precision={matmul_precision!r}: use one of {_PRECISIONS}.")


def check_functions(functions: Mapping[str, Any]) -> None:
    """Raise a `StructureError` for an argument that should be a function and is not."""
    for name, function in functions.items():
        may_be_none = name not in ("model_fn", "loss_fn")
        if name.endswith("_fn") and not callable(function) and not (function is None and may_be_none):
            raise StructureError(f"{name} is a {type(function).__name__}; pass a function.")
        if trees.is_torch(function):
            raise StructureError(
                f"{name} is a module of PyTorch, {type(function).__name__}, and spectra differentiates JAX "
                "functions: model = spectra.from_torch(module, example_inputs), then "
                "spectra.bridge.make_loss(model, 'cross_entropy') as loss_fn and model.params as params."
            )


def explain_non_finite(op: Any) -> str:
    """Name the parameter leaf, the loss or the gradient leaf that is not finite, and tell overflow."""
    for path, leaf in jax.tree.leaves_with_path(op.like):
        if not trees.all_finite(leaf):
            return f"The parameter leaf '{trees.path_str(path)}' holds NaN or infinite values."
    loss, words = float(op.loss()), advice.explain_overflow(op)
    if not np.isfinite(loss):
        found = advice.non_finite_data(op.data, op.stream)
        indices = "" if found else advice.explain_indices(op.data, op.stream)
        words = words or f"Check the data and the loss function.{indices}"
        return f"The loss is {loss} at these parameters{found}. {words}"
    for path, leaf in jax.tree.leaves_with_path(op.gradient()):
        if not trees.all_finite(leaf):
            words = words or (
                "Look for sqrt, log, norm or division at zero, also in a branch of jnp.where that is not "
                "taken (zero times infinity is NaN): give the function there a harmless number, by another "
                "jnp.where inside of it."
            )
            return f"The loss is finite but its gradient is not, in leaf '{trees.path_str(path)}'. {words}"
    words = words or "Look for sqrt, norm or jnp.where with a branch that overflows."
    return f"Loss and gradient are finite, second derivatives are not, or products of gradients. {words}"


Weight = Callable[[PyTree], Any]
_LIBRARIES = str(Path(jax.__file__).parent), str(Path(__file__).parents[1])


def loss_weight(function: Any) -> Weight | None:
    """The weight that a loss brings for its batches, its attribute `weight`.

    A method of such a loss, and what `jax.jit` or `functools.partial` made of one, bring it too.
    """
    for _ in range(8):
        weight = getattr(function, "weight", None)
        if callable(weight):
            return weight
        inner = (getattr(function, name, None) for name in ("__self__", "__wrapped__", "func"))
        function = next((found for found in inner if found is not None), None)
        if function is None or inspect.ismodule(function):
            return None
    return None


def check_signatures(functions: Mapping[str, Any], batch: PyTree) -> None:
    """Raise where a function does not take the two arguments that it will be called with.

    Raises:
        StructureError: the message says how the function is called, with which batch, and how to adapt it.
    """
    if "model_fn" not in functions:
        _check_signature("loss_fn", functions["loss_fn"], ("params", "batch"), batch)
        return
    _check_signature("model_fn", functions["model_fn"], ("params", "inputs"), batch)
    _check_signature("loss_fn", functions["loss_fn"], ("outputs", "targets"), batch)


def _check_signature(name: str, function: Any, arguments: tuple[str, str], batch: PyTree) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of C, without one
        return
    if _takes(signature, *arguments):
        return
    first, second = arguments
    given = batch if second == "batch" else _half(batch, second)
    words = ""
    if isinstance(given, (tuple, list)) and _takes(signature, first, *given):
        words = f" Write lambda {first}, {second}: {name}({first}, *{second})."
    elif _takes(signature, first):
        words = f" Write lambda {first}, {second}: {name}({first})."
        if name == "model_fn":  # of the inputs alone: it holds its parameters
            words = (
                " It has to take the parameters, too: spectra.nnx_model(module) makes such a function of a "
                "module of Flax nnx, and lambda module, inputs: jax.vmap(module)(inputs) is one for Equinox."
            )
    elif isinstance(given, dict) and all(isinstance(key, str) for key in cast("dict[Any, Any]", given)):
        try:
            signature.bind(first, **given)
            words = f" Write lambda {first}, {second}: {name}({first}, **{second})."
        except TypeError:
            pass
    words = words or f" Close over all else: lambda {first}, {second}: {name}({first}, {second}, ...)."
    raise StructureError(
        f"{name}{signature} is called as {name}({first}, {second}), where {second} is one argument"
        f"{'' if given is None else ', here ' + describe(given)}.{words}"
        + (" data=None gives None as the batch." if given is None and second == "batch" else "")
    )


def _half(batch: PyTree, name: str) -> PyTree:
    items = cast("list[Any]", batch) if isinstance(batch, (tuple, list)) else []
    pair = items if len(items) == 2 else (None, None)
    return pair[0] if name == "inputs" else pair[1] if name == "targets" else None


def _takes(signature: inspect.Signature, *arguments: Any) -> bool:
    try:
        signature.bind(*arguments)
    except TypeError:
        return False
    return True


def require_call(
    op: "DataOperator",
    where: str = "The batch",
    call: Callable[["DataOperator"], Any] = differentiate.loss.eval_shape,
) -> None:
    """Trace the loss by `call` on the operator's batch, which is called `where`.

    Raises:
        StructureError: it raised; the message has its words, its line, and the batch that it was given.
    """
    try:
        call(op)
    except SpectraError:
        raise
    except Exception as error:
        model = hasattr(op, "model_fn")
        name = "loss_fn(model_fn(params, inputs), targets)" if model else "loss_fn(params, batch)"
        if not model and _takes_exchanged(op):
            raise StructureError(
                "the loss can be called with params and data exchanged only: it is called as "
                "loss_fn(params, batch), and an operator takes (loss_fn, params, data), in this order."
            ) from error
        raise raised_by(name, error, op.data, where) from error


def _takes_exchanged(op: "DataOperator") -> bool:
    """Whether the loss gives one number for the data in the place of the parameters, and the reverse."""
    try:
        return jax.eval_shape(cast("Any", op).loss_fn, op.data, op.params).shape == ()
    except Exception:  # whatever the loss says to what is not for it
        return False


def raised_by(call: str, error: Exception, batch: PyTree, where: str) -> StructureError:
    """What a user's function raised: its words and its line, and the batch that it was given."""
    words = (str(error).strip().splitlines() or ["no message"])[0].rstrip(".")
    return StructureError(
        f"{call} raised {type(error).__name__}{_line(error)}: {words}. {where} was {describe(batch)}."
        f"{_hint(batch)}{advice.explain(error)}"
    )


def _line(error: Exception) -> str:
    """Where in the user's own files an error was raised."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(_LIBRARIES) and not frame.filename.startswith("<")
    ]
    own = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    return f" in {own[-1].filename}, line {own[-1].lineno}" if own else ""


def _hint(batch: PyTree) -> str:
    items = list(cast("list[Any]", batch)) if isinstance(batch, (tuple, list)) else []
    if any(_are_numbers(item) for item in items):
        return " Each number in a list is an array of its own: make one array of a list, by np.asarray."
    if len(items) > 1 and not are_arrays(items):
        return " A tuple is one batch: for a stream of batches pass a list."
    if hasattr(cast("Any", batch), "shape"):
        return " A list is a stream of batches: for one batch of several arrays pass a tuple."
    return ""


def _are_numbers(item: Any) -> bool:
    leaves = jax.tree.leaves(cast("list[Any]", item)) if isinstance(item, list) else []
    return bool(leaves) and all(np.ndim(x) == 0 for x in leaves)


def open_data(
    op: "DataOperator", data: Any, num_batches: int | None, subsample_key: Any, *, check: bool
) -> dict[str, Any]:
    """The fields of an operator that has everything but its data: `data`, one batch, or `stream`.

    Raises:
        DataError: the data are empty, inconsistent, change between passes, or could be either.
    """
    chosen = num_batches is not None or subsample_key is not None
    streamed = is_stream(data)
    if streamed and isinstance(data, list) and not chosen:
        streamed = not is_one_batch(op, cast("list[Any]", data))
    if streamed:
        few = num_batches, subsample_key
        return {"stream": Stream.open(data, op.weight_fn, *few, check=check, shared=op.shared)}
    if chosen:
        raise SpectraError("num_batches and subsample_key choose batches of a stream; data is one batch.")
    return {"data": None if data is None else as_batch(data)}


def is_one_batch(op: "DataOperator", items: list[Any]) -> bool:
    """Whether a list is one batch, as PyTorch's default collate makes of a tuple, and not a stream.

    A list of tuples or dicts of one structure is a stream. Otherwise the loss decides: what it can be called
    with. The operator has everything but its data.

    Raises:
        DataError: it can be called with the list and with each of its items.
    """
    if not are_arrays(items):
        return False
    whole, each = _accepts(op, items), all(_accepts(op, item) for item in _distinct(items))
    if whole and each:
        raise DataError(
            f"data is a list, {describe(items)}, one batch or a stream of {len(items)}: the loss "
            "can be called with the list and with each of its items. For one batch pass a tuple, "
            "data=tuple(data) (PyTorch's default collate makes a list of it); for a stream pass a function "
            "that iterates over it, data=lambda: iter(batches)."
        )
    return whole


def _distinct(items: list[Any]) -> list[Any]:
    """One item of each shape."""
    kinds: dict[Any, Any] = {}
    for item in items:
        leaves, treedef = jax.tree.flatten(item)
        kinds.setdefault((treedef, *(str(getattr(x, "shape", x)) for x in leaves)), item)
    return list(kinds.values())


def _accepts(op: "DataOperator", batch: PyTree) -> bool:
    try:
        differentiate.loss.eval_shape(op._with(data=as_batch(batch), microbatch=None))
    except Exception:  # whatever the loss says to what is no batch of its own
        return False
    return True
