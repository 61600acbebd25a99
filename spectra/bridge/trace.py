"""From a PyTorch module to a graph document, by `torch.export`. Needs PyTorch, as `lower` does."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import _decomp
from torch.utils import _pytree as torch_pytree

from spectra.base.errors import warn_user
from spectra.bridge import agreement
from spectra.bridge.adapter import Adapter, experts_by, has_experts, preserved, traceable
from spectra.bridge.errors import BridgeError, StaticBatchWarning
from spectra.bridge.lower import lower
from spectra.bridge.model import TorchModel
from spectra.bridge.operators.registry import OPERATORS
from spectra.bridge.other_sizes import other_at_one, other_branch
from spectra.bridge.refusals import explain, first_line, prepare, quiet, recorded_place
from spectra.bridge.stand_ins import StandIns, write_out_attributes, write_out_sparse, written_out
from spectra.operators.batches import to_numpy

_ATEN = torch.ops.aten
_NO_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled

# Composite operators that stay whole. Decomposed they would cost speed (a linear layer on a
# transposed input becomes a batched product with a copied weight), the batch's freedom (recurrent
# layers unroll over time), or exactness (attention's rows without any allowed key; the derivative of
# the hard activations at their kinks, where a clamp in their place has another; what takes one of two forms,
# where the derivative of the other is infinite; squares that are taken of |x|; roots of zero; a negative
# index, which is refused where the brackets in its place count from the end).
_KEPT = (
    _ATEN.linear.default,
    _ATEN.matmul.default,
    _ATEN.einsum.default,
    _ATEN.scaled_dot_product_attention.default,
    _ATEN.lstm.input,
    _ATEN.gru.input,
    _ATEN.rnn_tanh.input,
    _ATEN.rnn_relu.input,
    _ATEN.hardsigmoid.default,
    _ATEN.hardswish.default,
    _ATEN.relu6.default,
    _ATEN.binary_cross_entropy.default,
    _ATEN.special_log_ndtr.default,
    _ATEN.softplus.default,
    _ATEN.celu.default,
    _ATEN.huber_loss.default,
    _ATEN.smooth_l1_loss.default,
    _ATEN.linalg_vector_norm.default,
    _ATEN.std.correction,
    _ATEN.std_mean.correction,
    _ATEN.index_add.default,
)


@torch.library.custom_op("spectra_bridge::stop_gradient", mutates_args=())
def _stop_gradient(x: torch.Tensor) -> torch.Tensor:
    """Mark where PyTorch stops derivatives: its own decompositions drop the mark."""
    return x.clone()


@_stop_gradient.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


_FIXED = (
    ", which its code treats as a fixed number: x.shape[0] stays free where it reads the size, len(x) and "
    "int(x.shape[0]) do not"
)

Axes = tuple[torch.Tensor, tuple[int, ...]]  # a tensor of the example and the axes that may change


@dataclass(frozen=True)
class Traced:
    """A module as a document (without digests) and arrays, and the comparison of a model with the module.

    `place` says which line of the user's a node of the document comes from.
    """

    document: dict[str, Any]
    arrays: dict[str, np.ndarray]
    check: Callable[[TorchModel], None]
    place: Callable[[str], str]


def trace(module: torch.nn.Module, example_inputs: Any, batch_axis: Any, train: bool) -> Traced:
    """Record a module for `export` and `from_torch`."""
    module = prepare(module)
    adapter = Adapter(module)
    args, kwargs = _arguments(example_inputs)
    args, kwargs, axes = _batched(args, kwargs, batch_axis)
    with preserved(adapter, train), warnings.catch_warnings(), quiet():
        # Deprecations inside torch.export and notices about its own tracing: not the caller's.
        warnings.simplefilter("ignore")
        document, tensors, stacks, problem = _record(adapter, args, kwargs, axes)
    if axes and not document["symbols"]:
        warn_user(
            "the module could only be exported for the example's batch size"
            + (f": {problem}" if problem else _FIXED),
            StaticBatchWarning,
        )
    elif problem:
        warn_user(f"the model is the module for sizes of two and more: {problem}", StaticBatchWarning)

    def check(model: TorchModel) -> None:
        with preserved(adapter, train), warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")
            agreement.check(adapter, args, kwargs, model)

    arrays = {key: to_numpy(tensor) for key, tensor in tensors.items()}
    return Traced(document, arrays, check, lambda node: recorded_place(stacks[node]))


def _record(adapter: Adapter, args: Any, kwargs: Any, axes: Any) -> Any:
    """What `lower` returns, and why or where sizes are not free; with experts in a form that has a graph."""
    try:
        return _recorded(adapter, args, kwargs, axes)
    except BridgeError:
        if not has_experts(adapter):
            raise
    with experts_by("batched_mm", adapter):
        return _recorded(adapter, args, kwargs, axes)


def _recorded(adapter: Adapter, args: Any, kwargs: Any, axes: Any) -> Any:
    write_out_attributes(adapter)
    dense = {id(x): written_out(x) for x in torch_pytree.tree_leaves((args, kwargs))}
    args, kwargs = torch_pytree.tree_map(lambda x: dense[id(x)], (args, kwargs))
    axes = [(dense[id(tensor)], free) for tensor, free in axes]
    with traceable():
        with StandIns():
            program, problem = _trace(adapter, args, kwargs, axes)
        write_out_sparse(program)
        _mark_stopped_gradients(program.graph_module)
        try:
            program = program.run_decompositions(_decompositions())
        except Exception as error:
            failed = "PyTorch cannot decompose the module's graph"
            raise explain(error, adapter, args, kwargs, failed) from error
    return *lower(program, adapter.module), problem


def _arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    raise BridgeError(
        f"example_inputs must be a tensor, a tuple or a mapping, got {type(example_inputs).__name__}"
    )


def _batched(args: Any, kwargs: Any, batch_axis: Any) -> tuple[Any, Any, list[Axes]]:
    """Return the arguments with every batch of one doubled, and the free axes of each tensor that has any.

    torch.export takes a size of 1 for a constant, so a batch of one could not become dynamic.
    """
    leaves, spec = torch_pytree.tree_flatten((args, kwargs))
    # A copy of each, so that one tensor passed twice is two entries of the shape table.
    leaves = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in leaves]
    places = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)]
    tensors = [leaves[i] for i in places]
    if isinstance(batch_axis, (list, tuple)):
        if len(batch_axis) != len(tensors):
            raise BridgeError(f"batch_axis has {len(batch_axis)} entries, {len(tensors)} tensors")
        chosen = list(batch_axis)
    else:
        sizes = [_size(t, batch_axis) for t in tensors]
        batch = next((s for s in sizes if s is not None), None)
        chosen = [batch_axis if s is not None and s == batch else None for s in sizes]
    found = []
    for i, entry in zip(places, chosen, strict=True):
        axes = entry if isinstance(entry, (list, tuple)) else [] if entry is None else [entry]
        for axis in axes:
            if _size(leaves[i], axis) is None:
                raise BridgeError(f"batch_axis {axis} does not exist in shape {tuple(leaves[i].shape)}")
            if leaves[i].shape[axis] == 1:
                leaves[i] = torch.cat([leaves[i], leaves[i]], axis)
        if axes:
            found.append((leaves[i], tuple(axis % leaves[i].ndim for axis in axes)))
    args, kwargs = torch_pytree.tree_unflatten(leaves, spec)
    return args, kwargs, found


def _with_time(module: torch.nn.Module, axes: list[Axes]) -> list[Axes]:
    """Free the time axis too where the module has recurrent layers, which run over any number of steps.

    It is the other one of the first two axes of a batch of sequences.
    """
    if not any(isinstance(m, torch.nn.RNNBase) for m in module.modules()):
        return axes
    return [(t, (0, 1) if _is_sequence(t) and set(free) in ({0}, {1}) else free) for t, free in axes]


def _is_sequence(tensor: torch.Tensor) -> bool:
    """Features over time, or tokens, of more than one step."""
    return min(tensor.shape[:2]) > 1 and tensor.ndim >= (3 if tensor.is_floating_point() else 2)


def _size(tensor: torch.Tensor, axis: int | None) -> int | None:
    if axis is None or not -tensor.ndim <= axis < tensor.ndim:
        return None
    return tensor.shape[axis]


def _trace(
    module: torch.nn.Module, args: Any, kwargs: Any, axes: list[Axes]
) -> tuple[torch.export.ExportedProgram, str]:
    """Export with free sizes, and say where the module is another function; where that fails or makes another
    function of it, export with the example's sizes, and say why."""
    problem = ""
    with_time = _with_time(module, axes)
    for free in [with_time, axes] if with_time != axes else [axes] if axes else []:
        shapes = torch.export.ShapesCollection()
        for tensor, dims in free:
            shapes[tensor] = dict.fromkeys(dims, torch.export.Dim.AUTO)
        try:
            dynamic = shapes.dynamic_shapes(module, args, kwargs)
            program = torch.export.export(module, args, kwargs, dynamic_shapes=dynamic)
        except Exception as error:  # torch.export has no common base class for its refusals
            problem = first_line(error)
            continue
        problem = other_branch(program, module, (args, kwargs))
        if not problem:
            return program, other_at_one(program, module, (args, kwargs))
    try:
        return torch.export.export(module, args, kwargs), problem
    except BridgeError:
        raise
    except Exception as error:
        raise explain(error, module, args, kwargs) from error


def _mark_stopped_gradients(graph_module: torch.fx.GraphModule) -> None:
    """Mark `detach` and what leaves a `torch.no_grad()` region, in nested graphs too."""
    for submodule in list(graph_module.modules()):
        if not isinstance(submodule, torch.fx.GraphModule):
            continue
        graph = submodule.graph
        for node in list(graph.nodes):
            if node.target in (_ATEN.detach.default, _ATEN.detach_.default):
                node.target = torch.ops.spectra_bridge.stop_gradient.default
            elif node.target is _NO_GRAD and node.args[0] is False:
                _mark_results(graph, node)
        submodule.recompile()


def _mark_results(graph: torch.fx.Graph, region: torch.fx.Node) -> None:
    for item in list(region.users):
        value = item.meta.get("val")
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            continue
        with graph.inserting_after(item):
            mark = graph.call_function(torch.ops.spectra_bridge.stop_gradient.default, (item,))
        mark.meta = dict(item.meta)
        item.replace_all_uses_with(mark, delete_user_cb=lambda user, mark=mark: user is not mark)


def _decompositions() -> dict[Any, Any]:
    """PyTorch's default table, less what stays whole, plus all it has for what is not covered."""
    table = torch.export.default_decompositions()
    for operator in _KEPT:
        table.pop(operator, None)
    result = dict(table.items())
    for operator, function in _decomp.decomposition_table.items():
        known = str(operator) in OPERATORS or operator in result
        if not known and isinstance(operator, torch._ops.OpOverload):
            result[operator] = function
    return result
