"""Evaluation of a checked graph: a pure function of arrays, written for `jit` and every derivative.

Beside it the outputs and the pullback of the gradient, node by node.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from spectra.bridge import written_attention
from spectra.bridge.dtypes import Exporter, canonical, exported_by
from spectra.bridge.errors import BridgeError, NodeError, limited
from spectra.bridge.graph import MAX_ELEMENTS, Branch, DType, Graph, Node, Ref
from spectra.bridge.operators.registry import OPERATORS

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
        return _run(graph if check else written_attention.with_attention(graph), values, check)


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
        if node.op == written_attention.FUSED:
            return written_attention.evaluate(*args)
        return OPERATORS[node.op](*args, **kwargs)
    except RecursionError:
        raise
    except VALUES_WANTED as error:
        problem = (
            "gives an array whose size depends on values (an index by a mask?): keep the size, and choose "
            "with torch.where or weights of 0 and 1"
        )
        raise _refused(node, problem) from error
    except Exception as error:
        raise _refused(node, f"failed: {error}") from error


def _refused(node: Node, problem: str) -> NodeError:
    return NodeError(f"{node.op} at node {node.name} of module {node.module or '(top)'} {problem}", node.name)


def resolve(argument: Any, values: Mapping[str, Any], check: Check | None = None) -> Any:
    """Put values in place of names, dtypes of their names and functions of branches."""
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
    except NodeError as error:
        raise NodeError(f"{where}: {error}", error.node) from error.__cause__
    except BridgeError as error:
        raise BridgeError(f"{where}: {error}") from error.__cause__
    except Exception as error:
        raise BridgeError(f"{where}: the graph cannot be evaluated: {error}") from error


def _check_result(node: Node, result: Any) -> None:
    for part in result if isinstance(result, (tuple, list)) else [result]:
        if isinstance(part, jax.Array) and part.size > MAX_ELEMENTS:
            raise _refused(node, f"makes an array of shape {part.shape}, more than {MAX_ELEMENTS} elements")
    if node.dtype is None or node.shape is None:
        return
    if not isinstance(result, jax.Array):
        raise _refused(node, f"gave a {type(result).__name__}, PyTorch an array")
    fits = len(node.shape) == result.ndim and all(
        d is None or d == n for d, n in zip(node.shape, result.shape, strict=True)
    )
    if not fits or jnp.dtype(canonical(node.dtype)) != result.dtype:
        gave = f"gave {result.dtype}{list(result.shape)}, PyTorch {node.dtype}{list(node.shape)}"
        raise _refused(node, gave)


# Each program runs a few times: to optimise it costs more than it saves.
_UNOPTIMISED = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
_SIZES = ("size.", "aten.sym_")  # they give Python numbers

Pullback = Callable[[Sequence[Any]], dict[str, jax.Array]]


class _Statics:
    """The operands that are no arrays, compared by type and value: True, 1 and 1.0 are three things."""

    def __init__(self, values: tuple[Any, ...]):
        self.values = values
        self.key = tuple((type(v), repr(v)) for v in values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Statics) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


_ARRAY = object()
STOPS = "spectra.stop_gradient"
"""What follows it alone is not differentiated: some functions of detached tensors have no derivative."""


def run(
    graph: Graph, tensors: Mapping[str, jax.Array], inputs: Sequence[Any], wanted: Sequence[str]
) -> tuple[list[Any], Pullback]:
    """Evaluate a graph, and return its outputs and the pullback to the `wanted` tensors.

    The pullback takes one cotangent for each output, or None, and gives gradients by key. Every
    intermediate value is kept until it is dropped.
    """
    values: dict[str, Any] = {t.name: tensors[t.key] for t in graph.tensors}
    values.update(zip((i.name for i in graph.inputs), inputs, strict=True))
    # Which values the wanted tensors reach; all of them stay alive, so that an id names one array.
    moving = {id(tensors[key]) for key in wanted}
    tape: list[tuple[Callable[..., Any], list[Any], list[int], list[Any]]] = []
    with exported_by(graph.exporter):
        for node in graph.nodes:
            values[node.name] = _step(node, values, graph.exporter, moving, tape)
    outputs = [resolve(output, values) for output in graph.outputs]
    return outputs, partial(_pull, graph.exporter, tape, outputs, {k: tensors[k] for k in wanted})


def _step(node: Node, values: Any, exporter: Exporter, moving: set[int], tape: list[Any]) -> Any:
    operands = resolve(node.args, values), {k: resolve(v, values) for k, v in node.kwargs.items()}
    leaves, tree = jax.tree.flatten(operands)
    arrays = [x for x in leaves if isinstance(x, jax.Array)]
    if not arrays or node.op.startswith(_SIZES):
        args, kwargs = operands
        return OPERATORS[node.op](*args, **kwargs)
    statics = _Statics(tuple(_ARRAY if isinstance(x, jax.Array) else x for x in leaves))
    places = tuple(i for i, x in enumerate(arrays) if id(x) in moving and _inexact(x))
    forward, backward = _programs(node.op, tree, statics, exporter, places)
    try:
        result = forward(arrays)
    except VALUES_WANTED:
        # Its shape depends on the values, say of a mask: not compiled.
        call = partial(_call_flat, node.op, tree, statics)
        forward, backward = call, partial(_backward, call, places)
        result = forward(arrays)
    found = [x for x in jax.tree.leaves(result) if isinstance(x, jax.Array) and _inexact(x)]
    if places and found and node.op != STOPS:
        moving.update(map(id, found))
        tape.append((backward, arrays, list(places), found))
    return result


def _inexact(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


@lru_cache(maxsize=1024)
def _programs(op: str, tree: Any, statics: _Statics, exporter: Exporter, places: tuple[int, ...]) -> Any:
    call = partial(_call_flat, op, tree, statics)
    compiled = partial(jax.jit, compiler_options=_UNOPTIMISED)
    return compiled(call), compiled(partial(_backward, call, places))


def _call_flat(op: str, tree: Any, statics: _Statics, arrays: Sequence[Any]) -> Any:
    remaining = iter(arrays)
    leaves = [next(remaining) if x is _ARRAY else x for x in statics.values]
    args, kwargs = tree.unflatten(leaves)
    return OPERATORS[op](*args, **kwargs)


def _backward(call: Any, places: Sequence[int], arrays: Sequence[Any], cotangents: Sequence[Any]) -> Any:
    def of_moving(chosen):
        operands = list(arrays)
        for place, value in zip(places, chosen, strict=True):
            operands[place] = value
        leaves = jax.tree.leaves(call(operands))
        return [x for x in leaves if isinstance(x, jax.Array) and _inexact(x)]

    return jax.vjp(of_moving, [arrays[i] for i in places])[1](list(cotangents))[0]


def _pull(
    exporter: Exporter, tape: Any, outputs: Any, wanted: Mapping[str, jax.Array], cotangents: Sequence[Any]
) -> dict[str, jax.Array]:
    collected: dict[int, jax.Array] = {}

    def add(array, cotangent):
        known = collected.get(id(array))
        collected[id(array)] = cotangent if known is None else known + cotangent

    for output, cotangent in zip(outputs, cotangents, strict=True):
        if cotangent is not None:
            add(output, cotangent)
    with exported_by(exporter):
        for backward, arrays, places, results in reversed(tape):
            given = [collected.pop(id(x), None) for x in results]
            if all(c is None for c in given):
                continue
            given = [jnp.zeros_like(x) if c is None else c for c, x in zip(given, results, strict=True)]
            for place, cotangent in zip(places, backward(arrays, given), strict=True):
                add(arrays[place], cotangent)
    return {k: collected.get(id(x), jnp.zeros_like(x)) for k, x in wanted.items()}
