"""The checked graph in memory, and nested inputs and outputs as JSON trees."""

from collections import namedtuple
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from keyword import iskeyword
from typing import Any

from spectra.bridge.dtypes import Exporter
from spectra.bridge.errors import BridgeError


def leaf(index: int) -> dict[str, Any]:
    """Return the tree of one array."""
    return {"type": "leaf", "index": index}


def constant(value: Any) -> dict[str, Any]:
    """Return the tree of a value that is fixed in the graph."""
    return {"type": "constant", "value": value}


def check(tree: Any, num_leaves: int, where: str) -> None:
    """Raise BridgeError unless `tree` is well formed and names each leaf exactly once."""
    seen: list[int] = []
    _collect(tree, seen, where)
    if sorted(seen) != list(range(num_leaves)):
        raise BridgeError(f"{where}: the leaves {seen[:8]} are not 0 to {num_leaves - 1}, once each")


def _collect(tree: Any, seen: list[int], where: str) -> None:
    kind = tree.get("type") if isinstance(tree, dict) else None
    fields = {
        "leaf": {"index"},
        "constant": {"value"},
        "tuple": {"items"},
        "list": {"items"},
        "dict": {"keys", "items"},
        "namedtuple": {"name", "keys", "items"},
    }
    if not isinstance(kind, str) or kind not in fields or set(tree) != fields[kind] | {"type"}:
        raise BridgeError(f"{where}: {str(tree)[:80]!r} is not a tree of inputs or outputs")
    if kind == "leaf":
        if type(tree["index"]) is not int:
            raise BridgeError(f"{where}: a leaf index must be an integer, got {tree['index']!r}")
        seen.append(tree["index"])
    elif kind == "constant":
        if not isinstance(tree["value"], (bool, int, float, str, type(None))):
            raise BridgeError(f"{where}: a constant must be a plain value")
    else:
        items = tree["items"]
        if not isinstance(items, list):
            raise BridgeError(f"{where}: items must be a list")
        if kind in ("dict", "namedtuple"):
            _check_keys(tree["keys"], len(items), where)
        if kind == "namedtuple" and not all(map(_is_field, [tree["name"], *tree["keys"]])):
            raise BridgeError(f"{where}: a named tuple's name and fields must be identifiers")
        for item in items:
            _collect(item, seen, where)


def _check_keys(keys: Any, count: int, where: str) -> None:
    if not isinstance(keys, list) or not all(map(_is_key, keys)):
        raise BridgeError(f"{where}: dictionary keys must be strings or integers")
    if len(keys) != count or len(set(keys)) != count:
        raise BridgeError(f"{where}: {len(keys)} keys for {count} items, or a key twice")


def _is_key(key: Any) -> bool:
    return isinstance(key, str) or type(key) is int


def _is_field(name: Any) -> bool:
    """What `collections.namedtuple` accepts, which makes a class of it."""
    plain = isinstance(name, str) and name.isascii() and name.isidentifier()
    return plain and not iskeyword(name) and not name.startswith("_")


def flatten(tree: Mapping[str, Any], value: Any, where: str, out: dict[int, Any]) -> None:
    """Put the leaves of `value` into `out` by index, or raise BridgeError naming the place."""
    kind = tree["type"]
    if kind == "leaf":
        out[tree["index"]] = value
    elif kind == "constant":
        if type(value) is not type(tree["value"]) or value != tree["value"]:
            raise BridgeError(
                f"{where} was {tree['value']!r} when the module was exported and is part of the "
                f"graph; got {value!r}. Export again with the value you need."
            )
    elif kind == "dict":
        items = dict(zip(tree["keys"], tree["items"], strict=True))
        # What was fixed at export need not be given again.
        needed = {key for key, item in items.items() if item["type"] != "constant"}
        if not isinstance(value, Mapping) or not needed <= set(value) <= set(items):
            got = sorted(value, key=str) if isinstance(value, Mapping) else type(value).__name__
            wanted = sorted(needed, key=str)
            raise BridgeError(f"{where} must be a mapping with keys {wanted}, got {got}")
        for key in value:
            flatten(items[key], value[key], f"{where}[{key!r}]", out)
    else:
        items = tree["items"]
        if not isinstance(value, Sequence) or len(value) != len(items):
            got = len(value) if isinstance(value, Sequence) else type(value).__name__
            raise BridgeError(f"{where} must be a {kind} of length {len(items)}, got {got}")
        for i, item in enumerate(items):
            flatten(item, value[i], f"{where}[{i}]", out)


def unflatten(tree: Mapping[str, Any], leaves: Sequence[Any]) -> Any:
    """Rebuild the value from its leaves."""
    kind = tree["type"]
    if kind == "leaf":
        return leaves[tree["index"]]
    if kind == "constant":
        return tree["value"]
    items = [unflatten(item, leaves) for item in tree["items"]]
    if kind == "dict":
        return dict(zip(tree["keys"], items, strict=True))
    if kind == "namedtuple":
        return _record(tree["name"], tuple(tree["keys"]))(*items)
    return tuple(items) if kind == "tuple" else items


@lru_cache
def _record(name: str, fields: tuple[str, ...]) -> Any:
    """One class for each name and fields: JAX tells trees apart by their classes."""
    return namedtuple(name, fields)


def of_spec(spec: Any, leaves: Any) -> dict[str, Any]:
    """Turn PyTorch's description of nested containers (a `TreeSpec`) into a JSON tree."""
    if spec.is_leaf():
        return next(leaves)
    kind, context = spec.type, spec.context
    items = [of_spec(child, leaves) for child in spec.children()]
    if kind in (tuple, list):
        return {"type": kind.__name__, "items": items}
    if kind is namedtuple:
        name = context.__name__.lstrip("_")
        if all(map(_is_field, [name, *context._fields])):
            return {"type": "namedtuple", "name": name, "keys": list(context._fields), "items": items}
        return {"type": "tuple", "items": items}
    if isinstance(kind, type) and issubclass(kind, tuple):
        return {"type": "tuple", "items": items}
    keys = _keys(kind, context)
    if keys is None or len(keys) != len(items) or not all(map(_is_key, keys)):
        raise BridgeError(
            f"the container {getattr(kind, '__name__', kind)} in the module's inputs or outputs is "
            "not a tuple, a list or a dictionary with strings or integers for keys"
        )
    return {"type": "dict", "keys": list(keys), "items": items}


def _keys(kind: Any, context: Any) -> Any:
    """The keys of a dictionary; of the dataclass-like outputs of `transformers` too."""
    if not (isinstance(kind, type) and issubclass(kind, dict)):
        return None
    if isinstance(context, (list, tuple)) and context and isinstance(context[0], (list, tuple)):
        return context[0]
    if isinstance(context, (list, tuple)) and len(context) == 2 and isinstance(context[1], list):
        return context[1]  # defaultdict: (default factory, keys)
    return context


MAX_ELEMENTS = 2**36
CONSTANTS = "constants/"  # what tensors of the forward pass are called in the weights file


@dataclass(frozen=True)
class Ref:
    """The value of an earlier node, tensor or input."""

    name: str


@dataclass(frozen=True)
class DType:
    """A dtype by name; which JAX dtype it becomes depends on x64 at run time."""

    name: str


@dataclass(frozen=True)
class Tensor:
    """A value from the weights file."""

    name: str
    key: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    trainable: bool


@dataclass(frozen=True)
class Input:
    """An argument of the graph; a string in `shape` is a symbol."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Node:
    """One call of an operator; `dtype` and `shape` are what PyTorch's result had."""

    name: str
    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    module: str
    dtype: str | None
    shape: tuple[int | None, ...] | None


@dataclass(frozen=True)
class Branch:
    """A graph inside of a node, which sees nothing but its inputs."""

    inputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[Any, ...]


@dataclass(frozen=True)
class Graph:
    """A checked graph: every name is known, every operator is in the table."""

    exporter: Exporter
    symbols: dict[str, int]
    tensors: tuple[Tensor, ...]
    aliases: dict[str, str]
    inputs: tuple[Input, ...]
    input_tree: dict[str, Any]
    nodes: tuple[Node, ...]
    outputs: tuple[Any, ...]
    output_tree: dict[str, Any]
    weights_digest: str
