"""The checked graph in memory; `_schema` documents the file that it comes from."""

from dataclasses import dataclass
from typing import Any

from spectra.bridge._exporter import Exporter

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
