"""Which parts of the data may count for less than others: where labels and masks are unlike.

What says that a term does not count is a number of its own, mostly the smallest or the largest label, or the
zeros of a mask. A loss that takes no notice of it in its mean is found where such numbers are, which may be
in one piece of a hundred: the last batch, padded to be as long as the others.
"""

# pyright: reportPrivateUsage=false
# Operators have parts that only this package uses.

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base.errors import DataError
from spectra.base.trees import PyTree
from spectra.operators.batches import batch_size, owned_leaves
from spectra.operators.redraws import joined, rows

if TYPE_CHECKING:
    from spectra.operators.data import DataOperator

FAR = 6
"""Standard deviations, of counts by chance, beyond which a batch of a stream is read again for its marks."""
MOST = 2**24
"""Numbers of a leaf that are looked at on the host, where they lie on a device."""


class Mark(NamedTuple):
    """The smallest and the largest number of a leaf, and how often each occurs; of floats, zeros alone."""

    smallest: float
    few: int
    largest: float
    many: int
    size: int


def marks_of(batch: PyTree) -> tuple[Mark | None, ...]:
    """Of each leaf that may hold labels or a mask; None for the others."""
    return tuple(map(_mark, jax.tree.leaves(batch)))


def _mark(leaf: Any) -> Mark | None:
    if (x := _numbers(leaf)) is None:
        return None
    if jnp.issubdtype(x.dtype, jnp.floating):
        return Mark(0.0, int(np.sum(x == 0)), np.inf, 0, x.size)
    low, high = x.min(), x.max()
    return Mark(float(low), int(np.sum(x == low)), float(high), int(np.sum(x == high)), x.size)


def _numbers(leaf: Any) -> np.ndarray | None:
    """A leaf as it may hold labels, a mask, or weights: whole numbers, or floats of at most two axes."""
    kind = leaf.dtype
    whole = jnp.issubdtype(kind, jnp.integer) or jnp.issubdtype(kind, jnp.bool_)
    if not (whole or (jnp.issubdtype(kind, jnp.floating) and leaf.ndim <= 2)) or not (
        leaf.size and leaf.ndim
    ):
        return None
    if not isinstance(leaf, np.ndarray) and (leaf.size > MOST or not leaf.is_fully_addressable):
        return None
    return np.asarray(cast("Any", leaf))


def unlike_pieces(op: "DataOperator", size: int | None) -> Iterator[tuple[PyTree, PyTree, PyTree]]:
    """Pieces of the operator's data whose marks differ most, in pairs: both together, and each."""
    size = 1 if op.takes_single_examples else size or op.microbatch
    if op.stream is None:
        yield from _of_batch(op, op.data, op.data, size)
    elif len(op.stream.weights) > 1:
        for few, many in _unlike_batches(op):
            yield from _of_batch(op, few, many, size)


def _of_batch(op: "DataOperator", few: PyTree, many: PyTree, size: int | None) -> Iterator[Any]:
    """A piece of one batch where it has few marks, and of another, or of the same, where it has many."""
    try:
        n = min(batch_size(batch, op.shared) for batch in (few, many))
    except DataError:  # it is never cut
        return
    if few is many and (size is None or size >= n):
        return
    length = size if size is not None and size < n else max(n // 2, 1)
    found: list[tuple[float, int, int]] = []
    for a, b in zip(_owned(op, few), _owned(op, many), strict=True):
        x, y = _numbers(a), _numbers(b)
        if x is None or y is None or x.shape[1:] != y.shape[1:]:
            continue
        for value in _extremes(x, y):
            here, there = (_windows(u == value, length) for u in (x, y))
            i, j = min(here, key=here.__getitem__), max(there, key=there.__getitem__)
            found.append((there[j] - here[i], i, j))
    for share, i, j in sorted(found, reverse=True):
        first, second = rows(op, few, i, i + length), rows(op, many, j, j + length)
        if share > 0:
            yield joined(op, first, second), first, second


def _owned(op: "DataOperator", batch: PyTree) -> list[Any]:
    return owned_leaves(batch, op.shared)


def _extremes(x: np.ndarray, y: np.ndarray) -> list[Any]:
    if jnp.issubdtype(x.dtype, jnp.floating):
        return [0]
    return [min(x.min(), y.min()), max(x.max(), y.max())]


def _windows(marked: np.ndarray, length: int) -> dict[int, float]:
    """The share of marked numbers in each piece of `length` examples, by its start; the last ends last."""
    n = len(marked)
    totals = np.concatenate([[0], np.cumsum(marked.reshape(n, -1).mean(1))])
    starts = [*range(0, n - length + 1, length), n - length]
    return {i: float(totals[i + length] - totals[i]) / length for i in starts}


def _unlike_batches(op: "DataOperator") -> Iterator[tuple[PyTree, PyTree]]:
    """Pairs of batches of one form of which one has far more of some mark than another."""
    assert op.stream is not None
    wanted = op.stream.unlike_marks()
    last = max((i for pair in wanted for i in pair), default=-1)
    kept: dict[int, PyTree] = {}
    for place, batch in op.stream.places(last):
        if any(place in pair for pair in wanted):
            kept[place] = batch
    for a, b in wanted:
        if a in kept and b in kept:
            yield kept[a], kept[b]


def far_apart(marks: list[Mark | None]) -> list[tuple[float, int, int]]:
    """Of the marks of one leaf over batches: how far apart the extreme counts are, and of which batches."""
    known = [(i, mark) for i, mark in enumerate(marks) if mark is not None]
    if len(known) < 2:
        return []
    found: list[tuple[float, int, int]] = []
    low, high = min(m.smallest for _, m in known), max(m.largest for _, m in known)
    counts = (
        [(m.few if m.smallest == low else 0) / m.size for _, m in known],
        [(m.many if m.largest == high else 0) / m.size for _, m in known],
    )
    for shares in counts:
        a, b = int(np.argmin(shares)), int(np.argmax(shares))
        usual, size = float(np.median(shares)), known[b][1].size
        chance = np.sqrt(max(usual * (1 - usual), 0) / size)
        if shares[b] > shares[a] + FAR * chance:
            found.append((shares[b] - shares[a], known[a][0], known[b][0]))
    return found
