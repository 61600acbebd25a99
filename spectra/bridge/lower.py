"""From an exported PyTorch program to the fields of a graph document."""

import math
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.export.graph_signature import InputKind, OutputKind

from spectra.bridge import graph
from spectra.bridge.adapter import PREFIX
from spectra.bridge.dtypes import DTYPES
from spectra.bridge.errors import BridgeError, UnsupportedOperatorError
from spectra.bridge.graph import CONSTANTS
from spectra.bridge.operators.registry import ABSENT, OPERATORS
from spectra.bridge.refusals import recorded_place
from spectra.bridge.schema import FORMAT, VERSION, reachable
from spectra.bridge.stand_ins import written_out

_SIZE_FUNCTIONS = {
    operator.getitem: "getitem",
    operator.add: "size.add",
    operator.sub: "size.sub",
    operator.mul: "size.mul",
    operator.floordiv: "size.floordiv",
    operator.truediv: "size.truediv",
    operator.mod: "size.mod",
    operator.neg: "size.neg",
    operator.pow: "size.pow",
    operator.eq: "size.eq",
    operator.ne: "size.ne",
    operator.lt: "size.lt",
    operator.le: "size.le",
    operator.gt: "size.gt",
    operator.ge: "size.ge",
    operator.and_: "size.and",
    operator.or_: "size.or",
    math.floor: "size.floor",
    math.ceil: "size.ceil",
    math.trunc: "size.int",
    torch.sym_max: "size.max",
    torch.sym_min: "size.min",
    torch.sym_not: "size.not",
    torch.sym_float: "size.float",
    torch.sym_int: "size.int",
    torch.sym_ite: "size.ite",
    torch.sym_sum: "size.sum",
}
_RENAMED = {"spectra_bridge.stop_gradient.default": "spectra.stop_gradient", "cond": "spectra.cond"}
# Placement of storage: without meaning in JAX.
_IGNORED_KEYWORDS = {"layout", "device", "pin_memory", "memory_format", "non_blocking", "generator"}


def lower(
    program: torch.export.ExportedProgram, module: torch.nn.Module
) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, str]]:
    """Return the document (without digests), the tensors it needs by key, and the call stack of each node.

    The program is that of an `Adapter`, the names are those of the `module` in it.

    Raises:
        UnsupportedOperatorError: operators outside the table, each with its module paths.
    """
    names = _Names(module, program)
    placeholders = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    inputs, leaf_trees = [], []
    specs: list[Any] = program.graph_signature.input_specs
    for spec in specs:
        if spec.kind is InputKind.TOKEN:
            continue  # orders assertions, which a pure function leaves out
        if spec.kind is not InputKind.USER_INPUT:
            names.add_tensor(spec)
        elif type(spec.arg).__name__ == "ConstantArgument":
            leaf_trees.append(graph.constant(spec.arg.value))
        else:
            leaf_trees.append(graph.leaf(len(inputs)))
            inputs.append(_input(placeholders[spec.arg.name], names.symbols))
    nodes, outputs = [], []
    for node in program.graph.nodes:
        if node.op == "call_function":
            nodes.append(_node(node, names))
        elif node.op == "output":
            outputs = [_argument(x, names) for x in _user_outputs(program, node)]
    nodes = reachable(nodes, outputs)
    _refuse_unknown(nodes)
    document = {
        "format": FORMAT,
        "version": VERSION,
        "digest": "",
        "weights": "",
        "producer": {"torch": torch.__version__},
        "default": _default_dtype(),
        "symbols": [{"name": k, "example": v} for k, v in names.symbols.items()],
        "tensors": names.tensors,
        "aliases": names.aliases,
        "inputs": inputs,
        "input_tree": graph.of_spec(program.call_spec.in_spec, iter(leaf_trees)),
        "nodes": nodes,
        "outputs": outputs,
        "output_tree": graph.of_spec(
            program.call_spec.out_spec, (graph.leaf(i) for i in range(len(outputs)))
        ),
    }
    return document, names.values, {node.name: _stack(node) for node in program.graph.nodes}


def _stack(node: torch.fx.Node) -> str:
    return node.meta.get("stack_trace") or ""


class _Names:
    """Tensors under PyTorch's dotted names, each once however often it is tied."""

    def __init__(self, module: torch.nn.Module, program: torch.export.ExportedProgram):
        self.program = program
        self.parameters = dict(module.named_parameters(remove_duplicate=False))
        self.buffers = dict(module.named_buffers(remove_duplicate=False))
        self.first: dict[int, str] = {}
        self.aliases: dict[str, str] = {}
        for name, value in [*self.parameters.items(), *self.buffers.items()]:
            key = self.first.setdefault(id(value), name)
            if key != name:
                self.aliases[name] = key
        self.tensors: list[dict[str, Any]] = []
        self.values: dict[str, torch.Tensor] = {}
        self.renamed: dict[str, str] = {}
        self.placeholder_of: dict[str, str] = {}
        self.symbols: dict[str, int] = {}

    def add_tensor(self, spec: Any) -> None:
        target, name = spec.target.removeprefix(PREFIX), getattr(spec.arg, "name", "")
        trainable = False
        if spec.kind is InputKind.PARAMETER:
            value: Any = self.parameters[target]
            kind = "parameter"
            trainable = value.requires_grad
        elif spec.kind is InputKind.BUFFER:
            value, kind = self.buffers[target], "buffer"
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            value, kind = self.program.constants[spec.target], "constant"
        else:
            raise BridgeError(f"the program needs a {spec.kind.name} ({target}), which has no file form")
        key = f"{CONSTANTS}{target}" if kind == "constant" else self.first[id(value)]
        if key in self.placeholder_of:
            self.renamed[name] = self.placeholder_of[key]
            return
        self.placeholder_of[key] = name
        self.values[key] = written_out(value)
        self.tensors.append(
            {
                "name": name,
                "key": key,
                "kind": kind,
                "dtype": _dtype(value.dtype),
                "shape": list(value.shape),
                "trainable": trainable,
            }
        )


def _default_dtype() -> str:
    name = _dtype(torch.get_default_dtype())
    if name not in ("float32", "float64"):
        raise BridgeError(f"torch.get_default_dtype() is {name}: export under float32 or float64")
    return name


def _dtype(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise BridgeError(f"dtype {dtype} has no counterpart in the bridge; it has {DTYPES}")
    return name


def _input(node: torch.fx.Node, symbols: dict[str, int]) -> dict[str, Any]:
    value = node.meta["val"]
    shape: list[int | str] = []
    for size in value.shape:
        if isinstance(size, int):
            shape.append(size)
            continue
        expression = size.node.expr
        if expression.is_number:
            shape.append(int(size))
            continue
        if not expression.is_Symbol:
            raise BridgeError(
                f"input {node.name} has the size {expression}, which depends on another input's: "
                "choose `batch_axis` for each tensor"
            )
        symbols[str(expression)] = int(size.node.hint)
        shape.append(str(expression))
    return {"name": node.name, "dtype": _dtype(value.dtype), "shape": shape}


def _node(node: torch.fx.Node, names: _Names) -> dict[str, Any]:
    target: Any = node.target
    if target is torch.ops.spectra_bridge.recurrent.default:
        return _recurrent(node, names)
    op = _SIZE_FUNCTIONS.get(target) or str(target)
    value = node.meta.get("val")
    single = isinstance(value, torch.Tensor)
    kwargs = {k: v for k, v in node.kwargs.items() if k not in _IGNORED_KEYWORDS}
    known = _RENAMED.get(op, op)
    unknown = known not in OPERATORS
    return {
        "name": node.name,
        "op": known,
        **({"place": recorded_place(_stack(node))} if unknown else {}),
        # The operands of an unknown operator may have no JSON form; its name is reported instead.
        "args": _references(node) if unknown else [_argument(x, names) for x in node.args],
        "kwargs": {} if unknown else {k: _argument(v, names) for k, v in kwargs.items()},
        "module": _module_path(node),
        "dtype": _dtype(value.dtype) if single and not unknown else None,
        "shape": [_fixed(s) for s in value.shape] if single else None,
    }


def _recurrent(node: torch.fx.Node, names: _Names) -> dict[str, Any]:
    """A recurrent layer: ATen's own operator, or that of packed sequences where there are lengths."""
    kind, input, lengths, hx, *rest = node.args
    if lengths is None:
        op, args = f"aten.{kind}.input", [input, hx if kind == "lstm" else hx[0], *rest]  # type: ignore[index]
    else:
        op, args = "spectra.packed", list(node.args)
    return {
        "name": node.name,
        "op": op,
        "args": [_argument(x, names) for x in args],
        "kwargs": {},
        "module": _module_path(node),
        "dtype": None,
        "shape": None,
    }


def _fixed(size: Any) -> int | None:
    """The size as a number, or None where it depends on a symbol."""
    return int(size) if isinstance(size, int) or size.node.expr.is_number else None


def _references(node: torch.fx.Node) -> list[Any]:
    return [{"ref": n.name} for n in node.all_input_nodes]


def _module_path(node: torch.fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values() if isinstance(path, str)]
    path = paths[-1].split("@")[0] if paths else ""
    return (
        "" if path.startswith("_empty_nn_module_stack") else f"{path}.".removeprefix(PREFIX).removesuffix(".")
    )


def _argument(value: Any, names: _Names) -> Any:
    if isinstance(value, torch.fx.Node) and value.op == "get_attr":
        return {"graph": _branch(getattr(value.graph.owning_module, str(value.target)), names)}
    if isinstance(value, torch.fx.Node):
        return {"ref": names.renamed.get(value.name, value.name)}
    if isinstance(value, (list, tuple)):
        return [_argument(item, names) for item in value]
    if isinstance(value, torch.dtype):
        return {"dtype": _dtype(value)}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"}
    if isinstance(value, complex):
        return {"complex": [_argument(value.real, names), _argument(value.imag, names)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise BridgeError(f"an operator's argument {value!r} has no form in a graph file")


def _branch(module: Any, names: _Names) -> dict[str, Any]:
    """A graph that is an operator's argument: its names are its own."""
    renamed, names.renamed = names.renamed, {}
    nodes = [_node(node, names) for node in module.graph.nodes if node.op == "call_function"]
    outputs = [_argument(x, names) for x in module.graph.output_node().args[0]]
    names.renamed = renamed
    inputs = [node.name for node in module.graph.nodes if node.op == "placeholder"]
    return {"inputs": inputs, "nodes": reachable(nodes, outputs), "outputs": outputs}


def _user_outputs(program: torch.export.ExportedProgram, node: torch.fx.Node) -> list[Any]:
    """Updated buffers come first among the outputs; a pure function leaves them out."""
    specs = program.graph_signature.output_specs
    values: Any = node.args[0]
    return [v for v, s in zip(values, specs, strict=True) if s.kind is OutputKind.USER_OUTPUT]


def _with_branches(nodes: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for node in nodes:
        yield node
        for argument in node["args"]:
            if isinstance(argument, dict) and "graph" in argument:
                yield from _with_branches(argument["graph"]["nodes"])


def _refuse_unknown(nodes: list[dict[str, Any]]) -> None:
    unknown: dict[str, list[str]] = {}
    places: dict[tuple[str, str], str] = {}
    for node in _with_branches(nodes):
        if node["op"] not in OPERATORS:
            paths = unknown.setdefault(node["op"], [])
            if (path := node["module"] or "(top)") not in paths:
                paths.append(path)
                places[node["op"], path] = node["place"]
    if unknown:
        raise UnsupportedOperatorError(unknown, ABSENT, places)
