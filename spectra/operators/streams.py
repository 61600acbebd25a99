"""Where batches come from: one pytree in memory, or a source that is re-read for every product.

A tuple, dict, array or other pytree is one batch. A list, a DataLoader or any re-iterable is a stream of
batches, and so is a function without arguments that returns an iterator (a generator function). The outputs
of a model on a stream are those of all its batches, one after another along the first axis.
"""

import dataclasses
import inspect
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import PyTreeDef

from spectra.base import trees
from spectra.base.errors import DataError, StructureError
from spectra.base.files import array_digest
from spectra.base.trees import PyTree
from spectra.operators.batches import Shared, as_batch, batch_size, describe, weigh
from spectra.operators.marks import Mark, far_apart, marks_of

Kind = tuple[PyTreeDef, trees.Kinds]  # the tree of a batch, and the shape and dtype of each leaf


def is_stream(data: Any) -> bool:
    """Whether `data` is a source of batches rather than one batch."""
    if data is None or isinstance(data, (tuple, Mapping, np.ndarray, jax.Array, str, bytes)):
        return False
    if isinstance(data, (list, Iterator)) or callable(data):  # JAX refuses to see iterators as leaves
        return True
    leaves = jax.tree.leaves(data)  # a registered pytree node is a batch, an opaque object is not
    opaque = len(leaves) == 1 and leaves[0] is data
    return opaque and hasattr(data, "__iter__") and not hasattr(data, "__array__")


def are_arrays(items: list[Any]) -> bool:
    """Whether a list may be one batch: its items are arrays, or differ in structure."""
    return bool(items) and (len({jax.tree.structure(x) for x in items}) > 1 or hasattr(items[0], "shape"))


def _takes_nothing(source: Callable[..., Any]) -> bool:
    try:
        inspect.signature(source).bind()
    except TypeError:
        return False
    except ValueError:  # of C, without a signature
        pass
    return True


def _iterator(source: Any) -> Iterator[PyTree]:
    """A fresh pass over a source."""
    if callable(source) and not _takes_nothing(source):
        raise DataError(
            "data is a function that needs arguments, and a source of batches is called without any: pass "
            "lambda: batches(...), which gives them."
        )
    batches: Any = source() if callable(source) else source
    if callable(source) and (not hasattr(batches, "__iter__") or isinstance(batches, (Mapping, str))):
        kind = type(cast("Any", batches)).__name__
        raise DataError(
            f"data is a function that returned {kind}: a function is a source of batches, and returns a "
            "fresh iterator over them, as a generator function does."
        )
    return iter(batches)


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """A re-iterable source of batches whose passes were found to be equal.

    Iterating yields (weight, batch) with weights that sum to one; every pass is compared with the first
    in number and shapes of batches, so a source that ends early is noticed, and one that shuffles batches of
    several sizes.
    """

    source: Iterable[PyTree] | Callable[[], Iterator[PyTree]]
    weights: tuple[float, ...]
    indices: tuple[int, ...] | None  # batches that are used, ascending; None for all
    digests: tuple[int, ...]  # checksums of these batches
    kinds: tuple[Kind, ...]  # what these batches look like
    marks: tuple[tuple[Mark | None, ...], ...]  # what may say that some of their terms do not count

    @classmethod
    def open(
        cls,
        source: Any,
        weight_fn: Callable[[PyTree], Any] | None = None,
        num_batches: int | None = None,
        subsample_key: jax.Array | None = None,
        *,
        check: bool = True,
        shared: Shared = None,
    ) -> "Stream":
        """Read the source once for its weights, and a second time to see that nothing changes.

        With `num_batches` only the first ones are read, so the source may be endless; with a key as
        many are drawn without replacement, for which the source is counted. `shared` names leaves
        without an axis of examples, by which batches are weighted where there is no `weight_fn`.

        Raises:
            DataError: the source is empty, can be read only once, or gives other batches on the second
                pass (a shuffling loader, random augmentation).
        """
        if isinstance(source, Iterator):
            raise DataError(
                f"the data source is a {type(cast(Any, source)).__name__}, which can be read only once, but "
                "every product reads all data. Pass a list, a loader, or the generator function itself."
            )
        if num_batches is not None and num_batches < 1:
            raise DataError(f"num_batches={num_batches}: at least one batch is needed.")
        if num_batches is None and subsample_key is not None:
            raise DataError("subsample_key draws num_batches batches: pass num_batches.")
        stop = num_batches if subsample_key is None else None
        first, digests, kinds, marks = cls._survey(source, weight_fn, shared, stop)
        if not first:
            raise DataError("the data source is empty: it gives no batches.")
        if num_batches is not None and len(first) < num_batches:
            raise DataError(f"num_batches={num_batches}, but the data source has only {len(first)} batches.")
        if check:
            again = [_digest(batch) for batch in cls._read(source, stop)]
            if not again:
                raise DataError(
                    "the data source gives no batches on the second pass: it can be read only once. "
                    "Pass a list, or a function that returns a fresh iterator."
                )
            if digests != again:
                index = next(
                    (i for i, pair in enumerate(zip(digests, again, strict=False)) if len(set(pair)) > 1),
                    min(len(digests), len(again)),
                )
                raise DataError(
                    f"the data source is not deterministic: batch {index} differs between two passes. "
                    "Switch shuffling and random augmentation off (shuffle=False), or pass a list of "
                    "batches drawn once."
                )
        indices = None if num_batches is None else tuple(range(num_batches))
        if num_batches is not None and subsample_key is not None:
            drawn = jax.random.choice(subsample_key, len(first), (num_batches,), replace=False)
            indices = tuple(sorted(map(int, drawn)))
        chosen = range(len(first)) if indices is None else indices
        used = [first[i] for i in chosen]
        weights = np.array(used, np.float64)
        if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
            raise DataError(
                f"weight_fn gave weights {weights[:8]}...; they must be >= 0 and not all 0. Without it "
                "they are those of the loss, loss_fn.weight."
            )
        share = tuple(weights / weights.sum())
        own_digests, own_kinds = tuple(digests[i] for i in chosen), tuple(kinds[i] for i in chosen)
        return cls(source, share, indices, own_digests, own_kinds, tuple(marks[i] for i in chosen))

    @staticmethod
    def _read(source: Any, stop: int | None = None) -> Iterator[PyTree]:
        for index, batch in enumerate(itertools.islice(_iterator(source), stop)):
            yield as_batch(batch, f"data batch {index}")

    @classmethod
    def _survey(
        cls, source: Any, weight_fn: Callable[[PyTree], Any] | None, shared: Shared, stop: int | None
    ) -> tuple[list[float], list[int], list[Kind], list[tuple[Mark | None, ...]]]:
        """Weight, digest, kind and marks of each batch; a single one weighs 1, whatever it holds."""
        weights: list[float] = []
        digests: list[int] = []
        kinds: list[Kind] = []
        marks: list[tuple[Mark | None, ...]] = []
        known: dict[Kind, Kind] = {}  # of each one object, for however many batches
        alone: PyTree = None
        for index, batch in enumerate(cls._read(source, stop)):
            digests.append(_digest(batch))
            marks.append(marks_of(batch))
            kinds.append(known.setdefault(kind := _kind(batch), kind))
            if index == 0:
                alone = batch
                continue
            if alone is not None:
                weights.append(_weight(alone, weight_fn, shared, 0))
                alone = None
            weights.append(_weight(batch, weight_fn, shared, index))
        return weights if alone is None else [1.0], digests, kinds, marks

    def unlike(self) -> dict[int, PyTree]:
        """Shapes of the batches that differ from the first, by their place: one of each form, which is all
        but the number of examples, and one that has another number in the first one's form."""
        first = self.kinds[0]
        seen = {(_form(first), True)}
        found: dict[int, PyTree] = {}
        for place, (kind, weight) in enumerate(zip(self.kinds, self.weights, strict=True)):
            key = _form(kind), kind == first
            if weight > 0 and key not in seen:
                seen.add(key)
                found[place] = kind[0].unflatten([jax.ShapeDtypeStruct(*leaf) for leaf in kind[1]])
        return found

    def unlike_marks(self) -> list[tuple[int, int]]:
        """Pairs of batches, by their place, of which one has far more of some mark; the furthest apart first.

        Batches of one form only, whose leaves are those of the first.
        """
        forms = [_form(kind) for kind in self.kinds]
        weights = [w if form == forms[0] else 0 for w, form in zip(self.weights, forms, strict=True)]
        pairs = list(zip(self.marks, weights, strict=True))
        leaves = ([m[i] if w > 0 else None for m, w in pairs] for i in range(len(self.marks[0])))
        found = [each for leaf in leaves for each in far_apart(leaf)]
        return [(a, b) for _, a, b in sorted(found, reverse=True)]

    def places(self, last: int) -> Iterator[tuple[int, PyTree]]:
        """The batches that are used, with their places, to that place."""
        return zip(range(last + 1), self._used(), strict=False)

    def part(self, chosen: Sequence[int], weights: np.ndarray) -> "Stream":
        """Some of the batches, with weights of their own."""
        indices = range(len(self.weights)) if self.indices is None else self.indices
        return Stream(
            self.source,
            tuple(weights / weights.sum()),
            tuple(indices[i] for i in chosen),
            tuple(self.digests[i] for i in chosen),
            tuple(self.kinds[i] for i in chosen),
            tuple(self.marks[i] for i in chosen),
        )

    def split(self, count: int) -> "list[Stream]":
        """Every `count`-th batch, from each of the first `count` on: disjoint parts of the source."""
        total = len(self.weights)
        if total < count:
            raise DataError(f"{total} batches cannot be split into {count} parts.")
        parts: list[Stream] = []
        for first in range(count):
            weights = np.array(self.weights[first::count])
            if not weights.sum() > 0:
                raise DataError(f"part {first} of {count} has no weight: its batches are padding only.")
            parts.append(self.part(range(first, total, count), weights))
        return parts

    def first(self) -> PyTree:
        """The first batch that is used."""
        for batch in self._used():
            return batch
        raise DataError(f"the data source ended after 0 of {len(self.weights)} batches.")

    def __iter__(self) -> Iterator[tuple[float, PyTree]]:
        count = 0
        for batch in self._used():
            if count >= len(self.weights):
                raise DataError(f"the data source gave more than its {len(self.weights)} batches.")
            if _kind(batch) != self.kinds[count]:
                raise DataError(
                    f"batch {count} of the data source is {describe(batch)}, and was another one when it was "
                    "first read: the source is not deterministic. Switch shuffling off (shuffle=False), or "
                    "pass a list of batches drawn once."
                )
            if self.weights[count] > 0:  # a batch of padding may have no mean at all
                yield self.weights[count], batch
            count += 1
        if count != len(self.weights):
            raise DataError(f"the data source ended after {count} of {len(self.weights)} batches.")

    def _used(self) -> Iterator[PyTree]:
        if self.indices is None:
            return self._read(self.source)
        kept = set(self.indices)
        batches = enumerate(self._read(self.source, self.indices[-1] + 1))
        return (batch for index, batch in batches if index in kept)


def _weight(batch: PyTree, weight_fn: Callable[[PyTree], Any] | None, shared: Shared, index: int) -> float:
    if weight_fn is None:
        return float(batch_size(batch, shared, f"data batch {index}"))
    return float(weigh(weight_fn, batch))


def _kind(batch: PyTree) -> Kind:
    leaves, treedef = jax.tree.flatten(batch)
    return treedef, tuple((np.shape(x), x.dtype) for x in leaves)


def _form(kind: Kind) -> tuple[Any, ...]:
    """What batches of any number of examples have in common."""
    treedef, leaves = kind
    return treedef, *((len(shape), shape[1:], dtype) for shape, dtype in leaves)


def _digest(batch: PyTree) -> int:
    digest = 0
    for leaf in jax.tree.leaves(batch):
        if isinstance(leaf, jax.Array):  # where it lies: no host may hold all of it
            leaf = np.uint32(array_digest(leaf))
        digest = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), digest)
    return digest


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
