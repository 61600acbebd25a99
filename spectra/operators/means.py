"""Whether a loss is the mean over examples that cutting its data takes for granted.

L is a (weighted) mean over examples exactly if L(A + B) = (w_A L(A) + w_B L(B)) / (w_A + w_B) for all pieces
A and B. One such pair shows a sum, a contrastive loss or batch statistics. Values may coincide at special
parameters, a last layer of zeros say, so a second pair is looked at with all parameters moved far.
"""

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spectra import _tree
from spectra._errors import DataError
from spectra.data import batch_size, owned_leaves, replace_owned
from spectra.operators import compiled
from spectra.operators.diagnose import coarsest_rounding, drawn_shapes

if TYPE_CHECKING:
    from spectra.operators.data_operator import DataOperator

PyTree = Any
MAX_KINDS = 64
FAR = 0.3
"""How far the second look goes, relative to each parameter: losses are themselves there, yet of their scale."""
MARGIN = 8
"""Multiple of the rounding that was measured. Both sides of the comparison round about as much as what is
measured, the largest of three differences: fewer than one in 10^4 sets of roundings exceed it by so much."""
PLACES = 3
"""Places in the data that are looked at: the first batch may be the one without padding."""
MAX_TRIED = 8
"""Pairs of pieces that are tried for those of which both weigh something."""
_means: set[Any] = set()  # operators by structure and shapes: the next checkpoint is not looked at


class Cut(NamedTuple):
    """Two ways of dividing the same examples, and the first way with its examples in another order."""

    here: list[PyTree]
    there: list[PyTree]
    turned: list[PyTree]


def require_mean(op: "DataOperator", size: int | None = None) -> None:
    """Raise if the operator cuts its data, and its loss on a piece is not the mean of that on two halves.

    Where nothing is cut, nothing is looked at; nor where values are out of reach (tracing, shapes alone), or
    the loss draws random numbers for a batch as a whole, which are others for its halves.

    Args:
        op: the operator.
        size: examples a piece, where the data are about to be cut that the operator takes whole.

    Raises:
        DataError: the loss is not a mean over examples.

    Cost: about eleven evaluations of the loss on two pieces, once for operators of the same structure.
    """
    if not _tree.has_values((op.params, op.data)) or _tree.is_traced((op.params, op.data)):
        return
    limit, kinds = None, []
    for places in (_places(op, size), _neighbours(op)):
        for whole, first, second in itertools.islice(places, MAX_TRIED):
            if not (_weight(op, first) > 0 and _weight(op, second) > 0):
                continue  # padding says nothing, and may have no mean at all
            kind = _kind(op, whole, first)
            if kind in _means:
                return
            for cut in _comparisons(op, whole, first, second):
                try:
                    limit = _compare(op, cut, limit)
                except _OtherSizesRefused:
                    continue
                kinds.append(kind)
                break
            if len(kinds) == PLACES:
                break
        if kinds:
            break
    if limit is not None:
        _remember(kinds[0])


def _remember(kind: Any) -> None:
    if len(_means) >= MAX_KINDS:
        _means.clear()
    _means.add(kind)


class _OtherSizesRefused(Exception):
    """The loss takes no batches of the size that the comparison needs."""


def _places(op: "DataOperator", size: int | None) -> Iterator[tuple[PyTree, PyTree, PyTree]]:
    """Some examples of the operator's data, and the two pieces of them into which they are cut.

    Those are the pieces that the operator cuts one batch into, else the halves of a batch of a stream.
    """
    size = 1 if op.takes_single_examples else size or op.microbatch
    for batch in _batches(op):
        n = batch_size(batch, op.shared)
        if size is not None and size < n:
            pairs = n // (2 * size) or 1
            for place in sorted({pairs * i // PLACES for i in range(PLACES)}):
                start = 2 * size * place
                yield _pair(op, batch, start, start + size, min(start + 2 * size, n))
        elif _is_mean_of_batches(op) and n > 1:
            yield _pair(op, batch, 0, n // 2, n // 2 * 2)


def _neighbours(op: "DataOperator") -> Iterator[tuple[PyTree, PyTree, PyTree]]:
    """Two batches of a stream of one shape, where halves of one say nothing: it is one example, say."""
    if _is_mean_of_batches(op):
        for first, second in itertools.pairwise(_batches(op)):
            if _alike(first, second):
                yield _joined(op, first, second), first, second


def _is_mean_of_batches(op: "DataOperator") -> bool:
    return op.stream is not None and len(op.stream.weights) > 1


def _batches(op: "DataOperator") -> Iterator[PyTree]:
    """The batches whose leaves have a common axis: others are weighted by weight_fn, and never cut."""
    for batch in [op.data] if op.stream is None else (batch for _, batch in op.stream):
        try:
            batch_size(batch, op.shared)
        except DataError:
            return
        yield batch


def _pair(op: "DataOperator", batch: PyTree, start: int, middle: int, stop: int) -> tuple:
    edges = (start, stop), (start, middle), (middle, stop)
    return tuple(_rows(op, batch, *pair) for pair in edges)


def _rows(op: "DataOperator", batch: PyTree, start: int, stop: int) -> PyTree:
    """Examples of a batch, by one program for all places of an array on a device."""

    def one(x):
        return lax.dynamic_slice_in_dim(x, start, stop - start) if isinstance(x, jax.Array) else x[start:stop]

    return replace_owned(batch, op.shared, [one(x) for x in owned_leaves(batch, op.shared)])


def _comparisons(op: "DataOperator", whole: PyTree, first: PyTree, second: PyTree) -> Iterator[Cut]:
    yield Cut([whole], [first, second], [_joined(op, second, first)])
    if _alike(first, second) and (n := batch_size(first, op.shared)) > 1:
        # For losses with the size of a batch written into them: the same sizes, other neighbours.
        h = n // 2
        heads, tails = ([_rows(op, x, a, b) for x in (first, second)] for a, b in ((0, h), (h, n)))
        mixed = [_joined(op, heads[0], tails[1]), _joined(op, heads[1], tails[0])]
        yield Cut([first, second], mixed, [_joined(op, t, x) for t, x in zip(tails, heads, strict=True)])


def _alike(a: PyTree, b: PyTree) -> bool:
    """Whether two batches have the same structure, shapes and dtypes."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.shape == y.shape and x.dtype == y.dtype for x, y in pairs)


def _joined(op: "DataOperator", a: PyTree, b: PyTree) -> PyTree:
    """The examples of two batches, with what the first one's examples share."""
    pairs = zip(owned_leaves(a, op.shared), owned_leaves(b, op.shared), strict=True)
    return replace_owned(a, op.shared, [jnp.concatenate(pair) for pair in pairs])


def _weight(op: "DataOperator", piece: PyTree) -> float:
    return float(batch_size(piece, op.shared) if op.weight_fn is None else op.weight_fn(piece))


def _on(op: "DataOperator", batch: PyTree, params: PyTree) -> "DataOperator":
    return op._with(data=batch, params=params, stream=None, microbatch=None)


def _kind(op: "DataOperator", whole: PyTree, first: PyTree) -> Any:
    leaves, treedef = jax.tree.flatten((_on(op, whole, op.params), first))
    return treedef, op.microbatch, *map(jax.typeof, leaves)


def _compare(op: "DataOperator", cut: Cut, limit: float | None) -> float | None:
    """Raise if the two ways differ by more than `limit`, which is measured where it is None and returned.

    None where there is nothing to compare.
    """
    try:
        traces = [compiled.loss.trace(_on(op, x, op.params)).jaxpr for x in (cut.here[0], cut.there[0])]
    except Exception as error:
        raise _OtherSizesRefused from error
    if len(cut.here) == 1 and drawn_shapes(traces[0]) != drawn_shapes(traces[1]):
        return None
    if limit is not None:
        _require_equal(op, cut, op.params, limit)
        return limit
    unit = max(coarsest_rounding(traces[0]), op.precision)
    far, rounded = _moved(op, FAR), _moved(op, unit)
    rounding = []
    for params, batches in ((op.params, cut.turned), (rounded, cut.here), (far, cut.turned)):
        there = op.params if params is rounded else params
        one, other = _mean(op, there, cut.here), _mean(op, params, batches)
        rounding.append(abs(one - other) / max(abs(one), abs(other)) if one or other else 0.0)
    limit = MARGIN * (unit / 2 + max([x for x in rounding if np.isfinite(x)], default=0.0))
    found = [_require_equal(op, cut, params, limit) for params in (op.params, far)]
    return limit if any(found) else None


def _require_equal(op: "DataOperator", cut: Cut, params: PyTree, limit: float) -> bool:
    """Raise if the two ways differ at these parameters; whether they have values that say so."""
    here, there = _mean(op, params, cut.here), _mean(op, params, cut.there)
    size = max(abs(here), abs(there))
    if not np.isfinite(size) or size == 0:
        return False
    if abs(here - there) > limit * size:
        raise DataError(_message(op, cut, here, there))
    return True


def _mean(op: "DataOperator", params: PyTree, batches: list[PyTree]) -> float:
    weights = np.array([_weight(op, batch) for batch in batches])
    values = jax.device_get([compiled.loss(_on(op, batch, params)) for batch in batches])
    return float(np.asarray(values, float) @ weights / weights.sum())


def _message(op: "DataOperator", cut: Cut, here: float, there: float) -> str:
    counts = [batch_size(piece, op.shared) for piece in cut.there]
    if len(cut.here) == 1:
        found = (
            f"on {sum(counts)} examples it is {here:.6g}, and the mean of its values on the first {counts[0]} and "
            f"the other {counts[1]} is {there:.6g}"
        )
    else:
        found = f"its mean on two pieces of {counts[0]} is {here:.6g}, and {there:.6g} as they exchange examples"
    batches = 0 if op.stream is None else len(op.stream.weights)
    if op.takes_single_examples:
        where, whole = "this operator takes the gradients of single examples", "there is no such matrix"
    elif batches > 1:
        where, whole = f"the operator takes the mean over {batches} batches", "pass all data as one batch"
    else:
        where, whole = "microbatch= cuts the batch", "leave microbatch= out"
    return (
        f"the loss is not a mean over examples: {found}. But {where}. If it is a sum, divide it by the number of "
        "examples; if its terms count otherwise (tokens, masks, class weights), give each piece's weight by "
        f"weight_fn=; if it sets examples against each other (contrastive losses, batch statistics), {whole}. If "
        "the mean of the pieces' own losses is what you want, pass check_data=False."
    )


def _moved(op: "DataOperator", amount: float) -> PyTree:
    """All parameters that vary moved by up to `amount` of themselves, zeros by that of their neighbours."""
    leaves, treedef = jax.tree.flatten(op.params)
    chosen = tuple(range(len(leaves))) if op.selected is None else op.selected
    new = _waves([leaves[i] for i in chosen], amount)
    for index, leaf in zip(chosen, new, strict=True):
        leaves[index] = leaf
    return treedef.unflatten(leaves)


@jax.jit
def _waves(leaves: list[jax.Array], amount) -> list[jax.Array]:
    """x_i + amount cos(2 i + leaf) |x_i|: needs no random numbers, whose programs are large."""
    sizes = [_tree.norm(_tree.lift(x)) / max(x.size, 1) ** 0.5 for x in leaves]
    largest = jnp.max(jnp.stack(sizes))

    def one(i, leaf):
        x = _tree.lift(leaf)
        wave = jnp.cos(2 * jnp.arange(x.size, dtype=x.dtype) + i).reshape(x.shape)
        neighbours = jnp.where(sizes[i] > 0, sizes[i], jnp.where(largest > 0, largest, 1))
        return (x + amount * wave * jnp.where(x == 0, neighbours, jnp.abs(x))).astype(leaf.dtype)

    return [one(i, leaf) for i, leaf in enumerate(leaves)]
