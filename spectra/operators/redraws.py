"""The same loss over other data and other random numbers: what shows whether it is a mean over examples."""

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from spectra.base import stacks
from spectra.base.errors import DataError
from spectra.base.trees import PyTree
from spectra.operators.batches import batch_size, owned_leaves, replace_owned
from spectra.operators.evaluate import bind, can_enter, evaluate
from spectra.operators.jaxprs import drawn_shapes, draws, inner_jaxprs

if TYPE_CHECKING:
    from spectra.operators.data import DataOperator

KEYED = ("random_bits", "random_gamma")
"""Primitives that draw, with a key as their first operand."""


def can_redraw(jaxpr: Any) -> bool:
    """Whether all random numbers of a closed jaxpr are drawn where another key can be set."""
    return _can_redraw(jaxpr.jaxpr)


def _can_redraw(jaxpr: Any) -> bool:
    return all(
        eqn.primitive.name in KEYED
        if draws(eqn)
        else not _draws_inside(eqn)
        or (can_enter(eqn) and all(_can_redraw(inner) for inner in inner_jaxprs(eqn)))
        for eqn in jaxpr.eqns
    )


def _draws_inside(eqn: Any) -> bool:
    return any(drawn_shapes(inner) for inner in inner_jaxprs(eqn))


def redrawn(jaxpr: Any, salt: jax.Array, *leaves: Any) -> list[jax.Array]:
    """The results of a closed jaxpr at `leaves` with the numbers that belong to `salt`."""

    def rule(eqn: Any, inputs: list[Any]) -> list[Any]:
        if draws(eqn):
            inputs[0] = _salted(inputs[0], salt)
        return bind(eqn, inputs)

    return evaluate(jaxpr, leaves, rule, _draws_inside)


def _salted(key: jax.Array, salt: jax.Array) -> jax.Array:
    data, impl = jax.random.key_data(key), jax.random.key_impl(key)
    return jax.random.wrap_key_data(data + salt, impl=impl)  # pyright: ignore[reportUnknownVariableType]


def salts(count: int) -> jax.Array:
    """The first numbers that keys can be moved by; none leaves them where they are."""
    return jnp.arange(1, count + 1, dtype=jnp.uint32)


PLACES = 3
"""Places in the data that are looked at: the first batch may be the one without padding."""


class Cut(NamedTuple):
    """Two ways of dividing the same examples, and the first way with its examples in another order."""

    here: list[PyTree]
    there: list[PyTree]
    turned: list[PyTree]


def places(op: "DataOperator", size: int | None) -> Iterator[tuple[PyTree, PyTree, PyTree]]:
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


def neighbours(op: "DataOperator") -> Iterator[tuple[PyTree, PyTree, PyTree]]:
    """Two batches of a stream of one shape, where halves of one say nothing: it is one example, say."""
    if _is_mean_of_batches(op):
        for first, second in itertools.pairwise(_batches(op)):
            if _alike(first, second):
                yield joined(op, first, second), first, second


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


def _pair(op: "DataOperator", batch: PyTree, start: int, middle: int, stop: int) -> tuple[Any, ...]:
    edges = (start, stop), (start, middle), (middle, stop)
    return tuple(rows(op, batch, *pair) for pair in edges)


def rows(op: "DataOperator", batch: PyTree, start: int, stop: int) -> PyTree:
    """Examples of a batch, by one program for all places of an array on a device."""

    def one(x: Any) -> Any:
        return stacks.rows(x, start, stop) if isinstance(x, jax.Array) else x[start:stop]

    return replace_owned(batch, op.shared, [one(x) for x in owned_leaves(batch, op.shared)])


def comparisons(op: "DataOperator", whole: PyTree, first: PyTree, second: PyTree) -> Iterator[Cut]:
    """Two ways of dividing the examples of two pieces; the second is for losses that take no other sizes."""
    yield Cut([whole], [first, second], [joined(op, second, first)])
    if _alike(first, second) and (n := batch_size(first, op.shared)) > 1:
        # For losses with the size of a batch written into them: the same sizes, other neighbours.
        h = n // 2
        heads, tails = ([rows(op, x, a, b) for x in (first, second)] for a, b in ((0, h), (h, n)))
        mixed = [joined(op, heads[0], tails[1]), joined(op, heads[1], tails[0])]
        yield Cut([first, second], mixed, [joined(op, t, x) for t, x in zip(tails, heads, strict=True)])


def _alike(a: PyTree, b: PyTree) -> bool:
    """Whether two batches have the same structure, shapes and dtypes."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.shape == y.shape and x.dtype == y.dtype for x, y in pairs)


def joined(op: "DataOperator", a: PyTree, b: PyTree) -> PyTree:
    """The examples of two batches, with what the first one's examples share."""
    examples = stacks.concatenate([owned_leaves(a, op.shared), owned_leaves(b, op.shared)])
    return replace_owned(a, op.shared, examples)
