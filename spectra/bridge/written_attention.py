"""Attention that a module writes out, softmax(Q Kᵀ scale + bias, masked) V, found in a graph.

Where one product of matrices leads to another through scaling, biases, masks and a softmax, and nothing else
reads what is between, the nodes become one. Beyond a length it is evaluated in blocks, as PyTorch's own
`scaled_dot_product_attention` is; below, and where shapes or dtypes are others than those of attention,
its nodes are evaluated one by one, as they are exported.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from spectra.bridge.graph import Branch, Graph, Node, Ref
from spectra.bridge.operators import products

FUSED = "written attention"
"""No name of the table of operators: no file can hold it."""
SURELY_HIDDEN = -1e9
"""A key whose logit is replaced by a number this low has no weight, and no derivative, to the last bit."""
_PASSED = ("aten.clone.default", "aten.alias.default", "aten.contiguous.default")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What happens between the two products, in the order in which it happens, and on which operands."""

    query: Ref
    key: Ref
    value: Ref
    transposed: bool  # whether `key` is (..., keys, width) already: `matmul` takes (..., width, keys)
    # ("scale", c, None), ("bias", x, ±1), ("mask", x, (number, whether x hides))
    steps: tuple[tuple[str, Any, Any], ...]

    @property
    def operands(self) -> tuple[Ref, ...]:
        """All arrays that it reads."""
        read = [x for kind, x, _ in self.steps if kind != "scale"]
        return tuple(dict.fromkeys((self.query, self.key, self.value, *read)))


def with_attention(graph: Graph) -> Graph:
    """The graph with each written-out attention as one node."""
    nodes = {node.name: node for node in graph.nodes}
    uses = Counter(_names([graph.outputs, *([n.args, list(n.kwargs.values())] for n in graph.nodes)]))
    fused, inside = {}, set()
    for node in graph.nodes:
        found = _Search(nodes, uses).attention(node)
        if found is None:
            continue
        recipe, names = found
        own = tuple(n for n in graph.nodes if n.name in names)
        given = tuple(name for name in dict.fromkeys(_names([[n.args, list(n.kwargs.values())] for n in own]))
                      if name not in names)  # fmt: skip
        inside |= names
        branch = Branch(given, own, (Ref(node.name),))
        args = (recipe, branch, [Ref(name) for name in given], list(recipe.operands))
        fused[node.name] = dataclasses.replace(node, op=FUSED, args=args, kwargs={})
    if not fused:
        return graph
    kept = (fused.get(n.name, n) for n in graph.nodes if n.name in fused or n.name not in inside)
    return dataclasses.replace(graph, nodes=tuple(kept))


def evaluate(
    recipe: Recipe, one_by_one: Callable[..., list[Any]], given: list[Any], operands: list[Any]
) -> Any:
    """In blocks where that is for the better and the same, else node by node."""
    values = dict(zip(recipe.operands, operands, strict=True))
    query, key, value = (values[x] for x in (recipe.query, recipe.key, recipe.value))
    key = key if recipe.transposed or key.ndim < 2 else jnp.swapaxes(key, -1, -2)
    parts = _parts(recipe, values) if _long(query, key, value) else None
    if parts is None or not _fit(query, key, *parts[1:3]):
        return one_by_one(*given)[0]
    scale, bias, mask, empty = parts
    return products.in_blocks(query, key, value, bias, mask, scale=scale, empty=empty)


def _long(query, key, value) -> bool:
    same = query.dtype == key.dtype == value.dtype and query.dtype in (jnp.float32, jnp.float64)
    if not same or query.ndim < 3 or key.shape != value.shape or query.shape[:-2] != key.shape[:-2]:
        return False
    return query.shape[-1] == key.shape[-1] and query.shape[-2] * key.shape[-2] > products.LONG


def _parts(recipe: Recipe, values: dict[Ref, Any]) -> tuple[float, Any, Any, float | None] | None:
    """Scale, bias, mask, and what a row without a key holds (None: the mean of all values); None for none."""
    scale, bias, mask, number = 1.0, None, None, None
    for kind, x, rest in recipe.steps:
        if kind == "scale":
            if mask is not None and x <= 0:
                return None
            scale, bias = scale * x, None if bias is None else bias * x
            number = None if number is None else number * x
        elif kind == "bias":
            if number is not None and number > -jnp.inf:
                return None  # where a row has no key the bias chooses among hidden ones
            added = rest * values[x]
            if added.dtype != values[recipe.query].dtype:
                return None
            bias = added if bias is None else bias + added
        else:
            given, (low, hides) = values[x], rest
            if given.dtype != jnp.bool_ or number not in (None, low):
                return None
            shown = ~given if hides else given
            mask, number = shown if mask is None else mask & shown, low
    if number is not None and not number <= SURELY_HIDDEN:  # NaN hides nothing: it is the output
        return None
    # Written out, a row of minus infinity alone is 0 / 0; one of a finite number averages.
    empty = float("nan") if number == -jnp.inf or (mask is None and bias is not None) else None
    return scale, bias, mask, empty


def _fit(query, key, *masks) -> bool:
    """Whether biases and masks broadcast to the logits, and not the logits to them."""
    logits = (*query.shape[:-1], key.shape[-2])
    shapes = [x.shape for x in masks if x is not None]
    return all(
        len(shape) <= len(logits)
        and all(a in (1, b) for a, b in zip(shape[::-1], logits[::-1], strict=False))
        for shape in shapes
    )


class _Search:
    """Backward from a product, through nodes that nothing else reads."""

    def __init__(self, nodes: dict[str, Node], uses: Counter):
        self.nodes, self.uses = nodes, uses

    def attention(self, last: Node) -> tuple[Recipe, set[str]] | None:
        """The recipe of a last product, and all nodes of it."""
        pair = _operands(last, "second")
        if pair is None:
            return None
        names, weights = {last.name}, pair[0]
        node = self._alone(weights)
        while node is not None and node.op in _PASSED:
            names.add(node.name)
            node = self._alone(node.args[0])
        if node is None or node.op != "aten._softmax.default" or node.kwargs or len(node.args) != 3:
            return None
        if node.args[2] is not False or node.args[1] not in (-1, len(node.shape or ()) - 1):
            return None
        names.add(node.name)
        found = self._logits(node.args[0])
        if found is None:
            return None
        query, key, transposed, steps, inner = found
        return Recipe(query, key, pair[1], transposed, tuple(steps)), names | inner

    def _alone(self, x: Any) -> Node | None:
        """The node of a value that has one reader."""
        return self.nodes.get(x.name) if isinstance(x, Ref) and self.uses[x.name] == 1 else None

    def _logits(self, x: Any):
        """(query, key, transposed, steps, nodes) of what ends in the logits `x`."""
        node = self._alone(x)
        if node is None:
            return None
        first = _operands(node, "first")
        if first is not None:
            return *first, node.op == "aten.einsum.default", [], {node.name}
        for inner, step in self._steps(node):
            if found := self._logits(inner):
                query, key, transposed, steps, names = found
                return query, key, transposed, [*steps, step], names | {node.name}
        return None

    def _steps(self, node: Node):
        """What a node may be as a step, with the logits that it takes."""
        args: list[Any] = list(node.args)
        op = node.op
        if node.kwargs or not args:
            return
        if op in ("aten.mul.Tensor", "aten.div.Tensor") and _number(args[1]):
            yield (
                args[0],
                ("scale", float(args[1]) if op.startswith("aten.mul") else 1 / float(args[1]), None),
            )
        elif op == "aten.mul.Tensor" and _number(args[0]):
            yield args[1], ("scale", float(args[0]), None)
        elif op == "aten.add.Tensor" and len(args) == 2 and all(isinstance(a, Ref) for a in args):
            yield args[0], ("bias", args[1], 1)
            yield args[1], ("bias", args[0], 1)
        elif op == "aten.sub.Tensor" and len(args) == 2 and isinstance(args[1], Ref):
            yield args[0], ("bias", args[1], -1)
        elif op == "aten.masked_fill.Scalar" and _number(args[2]):
            yield args[0], ("mask", args[1], (float(args[2]), True))
        elif op == "aten.where.self":
            for inner, other, hides in ((args[2], args[1], True), (args[1], args[2], False)):
                if (number := self._constant(other)) is not None:
                    yield inner, ("mask", args[0], (number, hides))

    def _constant(self, x: Any) -> float | None:
        node = self.nodes.get(x.name) if isinstance(x, Ref) else None
        if node is None:
            return None
        if node.op == "aten.scalar_tensor.default" and _number(node.args[0]):
            return float(node.args[0])
        if node.op == "aten.full.default" and _number(node.args[1]):
            return float(node.args[1])
        return None


def _operands(node: Node, which: str) -> tuple[Ref, Ref] | None:
    """The two factors of a product of matrices; of an einsum, if it is that of the first or second one."""
    args: list[Any] = list(node.args)
    if node.op in ("aten.matmul.default", "aten.bmm.default") and not node.kwargs:
        pair = args[:2]
    elif node.op == "aten.einsum.default" and not node.kwargs and len(args) == 2:
        letters = re.fullmatch(r"(\w+),(\w+)->(\w+)", args[0].replace(" ", ""))
        if letters is None or not _is_attention(letters[1], letters[2], letters[3], which):
            return None
        pair = tuple(args[1])
    else:
        return None
    return pair if len(pair) == 2 and all(isinstance(x, Ref) for x in pair) else None  # pyright: ignore


def _is_attention(a: str, b: str, out: str, which: str) -> bool:
    """Whether an einsum is ...qd,...kd->...qk or ...qk,...kd->...qd."""
    lead, rows, inner = a[:-2], a[-2:-1], a[-1:]
    if len({*lead, rows, inner}) != len(a) or b[:-2] != lead or len(a) != len(b) or len(a) < 3:
        return False
    other = b[-2:-1] if which == "first" else b[-1:]
    if other in a or (b[-1:] if which == "first" else b[-2:-1]) != inner:
        return False
    return out == lead + rows + other


def _number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and x != 0


def _names(argument: Any) -> list[str]:
    if isinstance(argument, Ref):
        return [argument.name]
    if isinstance(argument, (list, tuple)):
        return [name for item in argument for name in _names(item)]
    return []
