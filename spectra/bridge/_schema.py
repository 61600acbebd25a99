"""The file `graph.json`, version 1: its documentation, its parser, its checks.

One JSON object with exactly these fields:

    format      "spectra-graph"
    version     1
    digest      SHA-256 (hex) of the object without this field, as JSON with sorted keys and
                no spaces
    weights     SHA-256 (hex) of the file `weights.safetensors` beside it
    producer    {"torch": version}: where releases differ in a derivative, the exporting one's is kept
    default     PyTorch's default dtype when the module was exported, "float32" or "float64"
    symbols     [{"name": str, "example": int}]: sizes that a caller may change
    tensors     [{"name", "key", "kind", "dtype", "shape", "trainable"}]: values from the weights
                file; kind is "parameter", "buffer" or "constant", key the entry in the weights file
    aliases     {name: key}: other state-dict names of a tied parameter
    inputs      [{"name", "dtype", "shape"}]: a dimension is an integer or the name of a symbol
    input_tree  how (positional, keyword) arguments hold the inputs (see `_structure`)
    nodes       [{"name", "op", "args", "kwargs", "module", "dtype", "shape"}] in order of
                evaluation; module is the dotted path for messages; dtype and shape describe the
                result of nodes that give one array (a size that depends on a symbol is null), and
                are null otherwise
    outputs     [argument]: what the graph returns
    output_tree how the outputs are held

An argument is null, a boolean, an integer, a string, a finite float, a list of arguments, or

    {"ref": name}     the value of an earlier node, tensor or input
    {"dtype": name}   a dtype
    {"float": text}   "inf", "-inf" or "nan"
    {"complex": [re, im]}   two floats
    {"graph": {"inputs": [name], "nodes", "outputs"}}   a branch, which sees nothing but its inputs

Sizes that depend on the batch are nodes as well: `aten.sym_size.int` of an input, and `size.add`,
`size.mul`, `size.floordiv`, ... of sizes. Since an argument can only name what stands before it,
there are no cycles. Operators are keys of the table in `_registry`; nothing else is ever called.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from spectra import _json
from spectra.bridge import _structure
from spectra.bridge._checker import Checker
from spectra.bridge._errors import BridgeError
from spectra.bridge._graph import Graph

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
        document = _json.parse(
            data,
            max_bytes=MAX_MEMORY,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            object_pairs_hook=_unique_keys,
        )
    except _json.JsonError as error:
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
    _structure.check(document["input_tree"], len(inputs), f"{where}: input_tree")
    _structure.check(document["output_tree"], len(outputs), f"{where}: output_tree")
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
