"""A graph's outputs and the pullback of its gradient, node by node.

The check of an export needs one gradient at one point. To compile the gradient of a whole graph takes
many times as long as to export it; here each node is a small program, and the nodes that are equal up to
their operands, which are most of a deep network's, share one.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from spectra.bridge._exporter import Exporter, exported_by
from spectra.bridge._graph import Graph, Node
from spectra.bridge._interpreter import VALUES_WANTED, resolve
from spectra.bridge._operators import OPERATORS

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
        call = partial(_call, node.op, tree, statics)
        forward, backward = call, partial(_backward, call, places)
        result = forward(arrays)
    found = [x for x in jax.tree.leaves(result) if isinstance(x, jax.Array) and _inexact(x)]
    if places and found:
        moving.update(map(id, found))
        tape.append((backward, arrays, list(places), found))
    return result


def _inexact(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


@lru_cache(maxsize=1024)
def _programs(op: str, tree: Any, statics: _Statics, exporter: Exporter, places: tuple[int, ...]) -> Any:
    call = partial(_call, op, tree, statics)
    compiled = partial(jax.jit, compiler_options=_UNOPTIMISED)
    return compiled(call), compiled(partial(_backward, call, places))


def _call(op: str, tree: Any, statics: _Statics, arrays: Sequence[Any]) -> Any:
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
