"""The outputs of several batches as one: batch after batch along the first axis, read from a stream."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp

from spectra.base import trees
from spectra.base.errors import StructureError
from spectra.base.trees import PyTree
from spectra.operators.streams import Stream, is_stream


@dataclasses.dataclass(frozen=True)
class StackedOutputs:
    """A stream of inputs, and how many rows of each leaf of the outputs belong to each batch."""

    stream: Stream
    lengths: tuple[tuple[int, ...], ...]  # of each batch, of each leaf

    def batches(self) -> Iterator[PyTree]:
        """One pass over the inputs."""
        return (batch for _, batch in self.stream)

    def stacked(self, parts: list[PyTree]) -> PyTree:
        """The outputs of all batches from those of each."""
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)

    def split(self, outputs: PyTree) -> Iterator[PyTree]:
        """The outputs of each batch."""
        leaves, treedef = jax.tree.flatten(outputs)
        starts = [0] * len(leaves)
        for lengths in self.lengths:
            own = [x[start : start + n] for x, start, n in zip(leaves, starts, lengths, strict=True)]
            starts = [start + n for start, n in zip(starts, lengths, strict=True)]
            yield treedef.unflatten(own)


def open_inputs(
    inputs: Any, evaluate: Callable[[PyTree], PyTree]
) -> tuple[StackedOutputs, PyTree, PyTree] | None:
    """The batches of a stream, the first of them, and the structure of all outputs; None for one batch.

    A list is one batch where the model takes it as its second argument, whole. `evaluate` gives the structure
    of the outputs of one batch.

    Raises:
        StructureError: the outputs of the batches cannot be stacked.
        DataError: the source is empty, can be read only once, or changes between passes.
    """
    if not is_stream(inputs) or (isinstance(inputs, list) and _accepts(evaluate, cast("PyTree", inputs))):
        return None
    stream = Stream.open(inputs, _one)
    first: PyTree = None
    found: list[PyTree] = []
    for _, batch in stream:
        first = batch if not found else first
        found.append(evaluate(batch))
    for i, outputs in enumerate(found):
        _require_alike(i, outputs, found[0])
    lengths = tuple(tuple(leaf.shape[0] for leaf in jax.tree.leaves(outputs)) for outputs in found)
    totals = [sum(column) for column in zip(*lengths, strict=True)]
    leaves, treedef = jax.tree.flatten(found[0])
    shapes = [
        jax.ShapeDtypeStruct((total, *leaf.shape[1:]), leaf.dtype)
        for total, leaf in zip(totals, leaves, strict=True)
    ]
    return StackedOutputs(stream, lengths), first, treedef.unflatten(shapes)


def _one(batch: PyTree) -> float:
    """Rows are rows: no batch counts more than another."""
    del batch
    return 1.0


def _accepts(evaluate: Callable[[PyTree], PyTree], inputs: PyTree) -> bool:
    try:
        evaluate(inputs)
    except Exception:  # whatever the model says to what is no input of its own
        return False
    return True


def _require_alike(index: int, outputs: PyTree, first: PyTree) -> None:
    """Raise unless outputs differ from those of the first batch in the length of the first axis only."""
    for path, leaf in jax.tree.leaves_with_path(outputs):
        if leaf.ndim == 0:
            raise StructureError(
                f"the model's output '{trees.path_str(path)}' is one number for a whole batch, and has no "
                "axis along which those of several batches could be stacked. Return a value for each example."
            )
    same = jax.tree.structure(outputs) == jax.tree.structure(first)
    mine, its = ([(x.shape[1:], x.dtype) for x in jax.tree.leaves(tree)] for tree in (outputs, first))
    if not same or mine != its:
        raise StructureError(
            f"outputs of batch {index} are {_shapes(outputs)}, those of batch 0 {_shapes(first)}: they can "
            "be stacked only if they differ in the length of their first axis alone."
        )


def _shapes(outputs: PyTree) -> str:
    return ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(outputs))
