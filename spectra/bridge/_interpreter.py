"""Evaluation of a checked graph: a pure function of arrays, written for `jit` and every derivative.

Each node looks its operator up in the table and calls it. Nothing here depends on values, only on
shapes, so tracing it once gives XLA the whole model.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from spectra.bridge import _written_attention
from spectra.bridge._budget import limited
from spectra.bridge._errors import BridgeError
from spectra.bridge._exporter import exported_by
from spectra.bridge._graph import MAX_ELEMENTS, Branch, DType, Graph, Node, Ref
from spectra.bridge._operators import OPERATORS
from spectra.bridge._promotion import canonical

Check = Callable[[Node, Any], None]
# What JAX raises where a shape or a branch needs the values of traced arrays.
VALUES_WANTED = (jax.errors.ConcretizationTypeError, jax.errors.NonConcreteBooleanIndexError)


def evaluate(
    graph: Graph,
    tensors: Mapping[str, jax.Array],
    inputs: Sequence[Any],
    check: Check | None = None,
) -> list[Any]:
    """Evaluate the nodes in order and return the list of outputs.

    Args:
        graph: a checked graph.
        tensors: the values of its tensors, by key.
        inputs: one array for each of `graph.inputs`.
        check: called with each node and its result, to compare with what PyTorch gave.

    Returns:
        The outputs: arrays, sizes and constants.

    Raises:
        BridgeError: an operator refused its operands; the message names the node and the module.
    """
    values: dict[str, Any] = {t.name: tensors[t.key] for t in graph.tensors}
    values.update(zip((i.name for i in graph.inputs), inputs, strict=True))
    with exported_by(graph.exporter):
        return _run(graph if check else _written_attention.with_attention(graph), values, check)


def _run(graph: Graph | Branch, values: dict[str, Any], check: Check | None) -> list[Any]:
    last_use = _last_uses(graph)
    for position, node in enumerate(graph.nodes):
        result = _call(node, values, check)
        if check is not None:
            check(node, result)
        values[node.name] = result
        for name in last_use.get(position, ()):
            del values[name]
    return [resolve(output, values, check) for output in graph.outputs]


def _branch(branch: Branch, check: Check | None, *operands: Any) -> list[Any]:
    return _run(branch, dict(zip(branch.inputs, operands, strict=True)), check)


def _call(node: Node, values: Mapping[str, Any], check: Check | None) -> Any:
    try:
        args = resolve(node.args, values, check)
        kwargs = {k: resolve(v, values, check) for k, v in node.kwargs.items()}
        if node.op == _written_attention.FUSED:
            return _written_attention.evaluate(*args)
        return OPERATORS[node.op](*args, **kwargs)
    except RecursionError:
        raise
    except VALUES_WANTED as error:
        raise BridgeError(
            f"{node.op} at node {node.name} of module {node.module or '(top)'} gives an array whose size "
            "depends on values (an index by a mask?): keep the size, and choose with torch.where or weights "
            "of 0 and 1"
        ) from error
    except Exception as error:
        raise BridgeError(
            f"{node.op} failed at node {node.name} of module {node.module or '(top)'}: {error}"
        ) from error


def resolve(argument: Any, values: Mapping[str, Any], check: Check | None = None) -> Any:
    """Put values in the place of names, dtypes of their names and functions of branches."""
    if isinstance(argument, Ref):
        return values[argument.name]
    if isinstance(argument, Branch):
        return partial(_branch, argument, check)
    if isinstance(argument, DType):
        return canonical(argument.name)
    if isinstance(argument, (list, tuple)):
        return [resolve(item, values, check) for item in argument]
    return argument


def _last_uses(graph: Graph | Branch) -> dict[int, list[str]]:
    """Return, for each position, the values that no later node reads, so that they can be freed."""
    kept = set(_references(graph.outputs))
    last: dict[str, int] = {}
    for position, node in enumerate(graph.nodes):
        last[node.name] = position
        for name in _references([node.args, list(node.kwargs.values())]):
            last[name] = position
    result: dict[int, list[str]] = {}
    for name, position in last.items():
        if name not in kept:
            result.setdefault(position, []).append(name)
    return result


def _references(argument: Any) -> list[str]:
    if isinstance(argument, Ref):
        return [argument.name]
    if isinstance(argument, (list, tuple)):
        return [name for item in argument for name in _references(item)]
    return []


def verify(graph: Graph, tensors: Mapping[str, Any], fixed: Mapping[str, Any], where: str) -> None:
    """Trace the graph on abstract inputs and compare each result with PyTorch's dtype and shape.

    No array is allocated. It finds everything that a structural check cannot: operands that do not
    fit, sizes beyond the limit, results that differ from the exported ones. The `fixed` tensors keep
    their values: a mask among them may select rows, whose number is then known.

    Raises:
        BridgeError: naming the first node that fails.
    """
    shapes = [tuple(graph.symbols[d] if isinstance(d, str) else d for d in i.shape) for i in graph.inputs]
    for shape, i in zip(shapes, graph.inputs, strict=True):
        if math.prod(shape) > MAX_ELEMENTS:
            raise BridgeError(f"{where}: input {i.name} has more than {MAX_ELEMENTS} elements")
    inputs = [
        jax.ShapeDtypeStruct(shape, canonical(i.dtype)) for shape, i in zip(shapes, graph.inputs, strict=True)
    ]
    structs = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in tensors.items()}

    def run(structs, inputs):
        outputs = evaluate(graph, {**fixed, **structs}, inputs, _check_result)
        for output in outputs:
            if not isinstance(output, (jax.Array, bool, int, float, str, type(None))):
                raise BridgeError(f"an output is a {type(output).__name__}, not an array")
        return [o for o in outputs if isinstance(o, jax.Array)]

    try:
        with limited(len(graph.nodes)):
            jax.eval_shape(run, structs, inputs)
    except BridgeError as error:
        raise BridgeError(f"{where}: {error}") from error.__cause__
    except Exception as error:
        raise BridgeError(f"{where}: the graph cannot be evaluated: {error}") from error


def _check_result(node: Node, result: Any) -> None:
    for part in result if isinstance(result, (tuple, list)) else [result]:
        if isinstance(part, jax.Array) and part.size > MAX_ELEMENTS:
            raise BridgeError(
                f"node {node.name} ({node.op}) makes an array of shape {part.shape}, more than "
                f"{MAX_ELEMENTS} elements"
            )
    if node.dtype is None or node.shape is None:
        return
    if not isinstance(result, jax.Array):
        raise BridgeError(f"node {node.name} ({node.op}) gave a {type(result).__name__}")
    fits = len(node.shape) == result.ndim and all(
        d is None or d == n for d, n in zip(node.shape, result.shape, strict=True)
    )
    if not fits or jnp.dtype(canonical(node.dtype)) != result.dtype:
        raise BridgeError(
            f"node {node.name} ({node.op}) of module {node.module or '(top)'} gave "
            f"{result.dtype}{list(result.shape)}, PyTorch {node.dtype}{list(node.shape)}"
        )
