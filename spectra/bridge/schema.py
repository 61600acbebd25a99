"""The file `graph.json`, version 1: its documentation, its parser, its checks."""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any, NoReturn

from spectra.base import files
from spectra.bridge import graph
from spectra.bridge.dtypes import DTYPES, Exporter
from spectra.bridge.errors import BridgeError, UnsupportedOperatorError
from spectra.bridge.graph import MAX_ELEMENTS, Branch, DType, Graph, Input, Node, Ref, Tensor
from spectra.bridge.operators.registry import ABSENT, OPERATORS, SIGNATURES

_RELEASE = re.compile(r"(\d{1,4})\.(\d{1,4})(\D.{0,80})?")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,255}")


class Checker:
    """Checks one field after the other, keeping the names defined so far."""

    def __init__(self, where: str):
        self.where = where
        self.names: set[str] = set()
        self.known_symbols: set[str] = set()

    def fail(self, place: str, problem: str, value: Any) -> NoReturn:
        """Refuse the file: what is wrong at which place, and what stands there."""
        raise BridgeError(f"{self.where}: {place}: {problem}, got {str(value)[:80]}")

    def items(self, value: Any, place: str) -> list[Any]:
        """A list, as it is."""
        if not isinstance(value, list):
            self.fail(place, "must be a list", value)
        return value

    def record(self, value: Any, fields: set[str], place: str) -> dict[str, Any]:
        """An object with exactly these fields."""
        if not isinstance(value, dict) or set(value) != fields:
            self.fail(place, f"must be an object with the fields {sorted(fields)}", value)
        return value

    def define(self, name: Any, place: str) -> str:
        """A new name, known from here on."""
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            self.fail(place, "a name must be an identifier", name)
        if name in self.names:
            self.fail(place, "a name is defined twice", name)
        self.names.add(name)
        return name

    def dtype(self, value: Any, place: str) -> str:
        """The name of a dtype that is known."""
        if value not in DTYPES:
            self.fail(place, "unknown dtype", value)
        return value

    def integer(self, value: Any, place: str, low: int, high: int) -> int:
        """An integer between two bounds."""
        if type(value) is not int or not low <= value <= high:
            self.fail(place, f"must be an integer from {low} to {high}", value)
        return value

    def exporter(self, producer: Any, default: Any) -> Exporter:
        """The release and the default dtype of the program that exported the graph."""
        release = self.record(producer, {"torch"}, "producer")["torch"]
        numbers = _RELEASE.fullmatch(release) if isinstance(release, str) else None
        if numbers is None:
            self.fail("producer", "torch must be a version of PyTorch", release)
        if default not in ("float32", "float64"):
            self.fail("default", "must be float32 or float64", default)
        return Exporter((int(numbers[1]), int(numbers[2])), default)

    def symbols(self, value: Any) -> dict[str, int]:
        """The symbolic sizes, each with its value in the example."""
        result = {}
        for item in self.items(value, "symbols"):
            item = self.record(item, {"name", "example"}, "symbols")
            name = self.define(item["name"], "symbols")
            result[name] = self.integer(item["example"], f"symbol {name}", 1, 2**31)
        self.known_symbols = set(result)
        self.names.clear()
        return result

    def shape(self, value: Any, place: str, extra: tuple[type, ...] = ()) -> tuple[Any, ...]:
        """A shape whose product is bounded; `extra` are types that may take the place of a number."""
        dims = self.items(value, place)
        if len(dims) > 32:
            self.fail(place, "an array has at most 32 dimensions", len(dims))
        for dim in dims:
            if isinstance(dim, extra):
                if isinstance(dim, str) and dim not in self.known_symbols:
                    self.fail(place, "unknown symbol", dim)
            else:
                self.integer(dim, place, 0, MAX_ELEMENTS)
        if math.prod(d for d in dims if isinstance(d, int)) > MAX_ELEMENTS:
            self.fail(place, f"an array has at most {MAX_ELEMENTS} elements", dims)
        return tuple(dims)

    def tensor(self, value: Any) -> Tensor:
        """A parameter, a buffer or a constant."""
        fields = {"name", "key", "kind", "dtype", "shape", "trainable"}
        value = self.record(value, fields, "tensors")
        name = self.define(value["name"], "tensors")
        if value["kind"] not in ("parameter", "buffer", "constant"):
            self.fail(f"tensor {name}", "unknown kind", value["kind"])
        if not isinstance(value["key"], str) or type(value["trainable"]) is not bool:
            self.fail(f"tensor {name}", "key must be a string and trainable a boolean", value)
        dtype, shape = self.dtype(value["dtype"], name), self.shape(value["shape"], name)
        return Tensor(name, value["key"], value["kind"], dtype, shape, value["trainable"])

    def input(self, value: Any) -> Input:
        """An input, whose sizes may be symbols."""
        value = self.record(value, {"name", "dtype", "shape"}, "inputs")
        name = self.define(value["name"], "inputs")
        return Input(name, self.dtype(value["dtype"], name), self.shape(value["shape"], name, (str,)))

    def operators(self, nodes: list[Any]) -> None:
        """Refuse every operator outside the table, all in one message."""
        unknown: dict[str, list[str]] = {}
        for node in nodes:
            op = node.get("op") if isinstance(node, dict) else None
            if isinstance(op, str) and op not in OPERATORS:
                paths = unknown.setdefault(op, [])
                if (path := str(node.get("module"))) not in paths:
                    paths.append(path)
        if unknown:
            raise UnsupportedOperatorError(unknown, ABSENT)

    def node(self, value: Any) -> Node:
        """A call of an operator, with arguments that fit its signature."""
        fields = {"name", "op", "args", "kwargs", "module", "dtype", "shape"}
        value = self.record(value, fields, "nodes")
        op, place = value["op"], f"node {str(value['name'])[:80]}"
        if not isinstance(op, str) or not isinstance(value["module"], str):
            self.fail(place, "op and module must be strings", op)
        args = tuple(self.arguments(value["args"], place))
        if not isinstance(value["kwargs"], dict):
            self.fail(place, "kwargs must be an object", value["kwargs"])
        kwargs = {k: self.argument(v, place) for k, v in value["kwargs"].items()}
        try:
            SIGNATURES[op].bind(*args, **kwargs)
        except TypeError as error:
            self.fail(place, f"arguments do not fit {op}", error)
        dtype = None if value["dtype"] is None else self.dtype(value["dtype"], place)
        shape = value["shape"]
        shape = None if shape is None else self.shape(shape, place, (type(None),))
        name = self.define(value["name"], place)
        return Node(name, op, args, kwargs, value["module"], dtype, shape)

    def arguments(self, value: Any, place: str) -> list[Any]:
        """The arguments in a list."""
        return [self.argument(item, place) for item in self.items(value, place)]

    def argument(self, value: Any, place: str) -> Any:
        """A number, a text, a reference, a dtype, a branch, or a list of these."""
        if value is None or isinstance(value, (bool, float, str)):
            return value
        if isinstance(value, int):
            return self.integer(value, place, -(2**63), 2**63 - 1)
        if isinstance(value, list):
            return self.arguments(value, place)
        if isinstance(value, dict) and len(value) == 1:
            ((kind, content),) = value.items()
            if kind == "ref":
                if not isinstance(content, str) or content not in self.names:
                    self.fail(place, "refers to a name that is not defined before it", content)
                return Ref(content)
            if kind == "dtype":
                return DType(self.dtype(content, place))
            if kind == "float" and content in ("inf", "-inf", "nan"):
                return float(content)
            if kind == "graph":
                return self.branch(content, place)
            if kind == "complex" and isinstance(content, list) and len(content) == 2:
                parts = self.arguments(content, place)
                if all(isinstance(part, float) for part in parts):
                    return complex(*parts)
        return self.fail(place, "not an argument", value)

    def branch(self, value: Any, place: str) -> Branch:
        """A graph in an argument: it has names of its own, and none from outside."""
        value = self.record(value, {"inputs", "nodes", "outputs"}, place)
        outside, self.names = self.names, set()
        inputs = tuple(self.define(name, place) for name in self.items(value["inputs"], place))
        raw_nodes = self.items(value["nodes"], place)
        self.operators(raw_nodes)
        nodes = tuple(self.node(item) for item in raw_nodes)
        outputs = tuple(self.arguments(value["outputs"], place))
        self.names = outside
        return Branch(inputs, nodes, outputs)


FORMAT, VERSION = "spectra-graph", 1
FIELDS = {
    "format", "version", "digest", "weights", "producer", "default", "symbols", "tensors", "aliases",
    "inputs", "input_tree", "nodes", "outputs", "output_tree",
}  # fmt: skip
MAX_FILE_BYTES, MAX_MEMORY = 2**29, 5 * 2**27


def digest(document: dict[str, Any]) -> str:
    """Return the SHA-256 of the document without its own digest field."""
    body = {k: v for k, v in document.items() if k != "digest"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse(data: bytes, where: str) -> Graph:
    """Turn the bytes of a graph file into a checked Graph, or raise BridgeError."""
    try:
        document = files.parse(
            data,
            max_bytes=MAX_MEMORY,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            object_pairs_hook=_unique_keys,
        )
    except files.JsonError as error:
        raise BridgeError(f"{where} cannot be read ({error}): export the module again") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise BridgeError(f"{where} is not a {FORMAT} file")
    if document.get("version") != VERSION:
        raise BridgeError(
            f"{where} has schema version {str(document.get('version'))[:40]}, this package reads "
            f"{VERSION}: export the module again"
        )
    if set(document) != FIELDS:
        raise BridgeError(f"{where}: missing or unknown fields {sorted(set(document) ^ FIELDS)[:8]}")
    try:
        if document["digest"] != digest(document):
            raise BridgeError(f"{where} was changed or damaged after it was written: export it again")
        return build(document, where)
    except RecursionError:
        raise BridgeError(f"{where} is nested too deeply") from None


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is beyond the range of a float")
    return value


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result


def build(document: dict[str, Any], where: str) -> Graph:
    """Check the fields of a document and return the Graph."""
    checker = Checker(where)
    exporter = checker.exporter(document["producer"], document["default"])
    symbols = checker.symbols(document["symbols"])
    tensors = tuple(checker.tensor(item) for item in checker.items(document["tensors"], "tensors"))
    inputs = tuple(checker.input(item) for item in checker.items(document["inputs"], "inputs"))
    raw_nodes = checker.items(document["nodes"], "nodes")
    checker.operators(raw_nodes)
    nodes = tuple(checker.node(item) for item in raw_nodes)
    outputs = tuple(checker.arguments(document["outputs"], "outputs"))
    graph.check(document["input_tree"], len(inputs), f"{where}: input_tree")
    graph.check(document["output_tree"], len(outputs), f"{where}: output_tree")
    if not isinstance(document["weights"], str):
        checker.fail("weights", "must be a digest", document["weights"])
    keys = {t.key for t in tensors}
    if len(keys) != len(tensors):
        checker.fail("tensors", "two tensors share a key", sorted(t.key for t in tensors)[:8])
    aliases = document["aliases"]
    if not isinstance(aliases, dict) or not all(
        isinstance(v, str) and v in keys and k not in keys for k, v in aliases.items()
    ):
        checker.fail("aliases", "must map new names to keys of tensors", aliases)
    tree = document["input_tree"]
    halves = [t["type"] for t in tree.get("items", [])]
    if tree["type"] != "tuple" or halves != ["tuple", "dict"]:
        checker.fail("input_tree", "must hold a tuple and a dict", halves)
    return Graph(
        exporter, symbols, tensors, aliases, inputs, tree, nodes, outputs, document["output_tree"],
        document["weights"],
    )  # fmt: skip


def reachable(nodes: list[dict[str, Any]], outputs: list[Any]) -> list[dict[str, Any]]:
    """Keep the nodes that an output depends on: assertions and buffer updates go."""
    needed = set(_refs(outputs))
    kept = []
    for node in reversed(nodes):
        if node["name"] in needed:
            kept.append(node)
            needed.update(_refs([node["args"], node["kwargs"]]))
    return kept[::-1]


def _refs(value: Any) -> list[str]:
    if isinstance(value, dict):
        if set(value) == {"ref"}:
            return [value["ref"]]
        return [name for item in value.values() for name in _refs(item)]
    return [name for item in value for name in _refs(item)] if isinstance(value, list) else []
