"""The same loss over other data and other random numbers: what shows whether it is a mean over examples."""

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from spectra.base.errors import DataError
from spectra.base.trees import PyTree
from spectra.operators.batches import batch_size, owned_leaves, replace_owned
from spectra.operators.jaxprs import drawn_shapes, draws, inner_jaxprs, scan_parts

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
        or (_is_entered(eqn) and all(_can_redraw(inner) for inner in inner_jaxprs(eqn)))
        for eqn in jaxpr.eqns
    )


def _draws_inside(eqn: Any) -> bool:
    return any(drawn_shapes(inner) for inner in inner_jaxprs(eqn))


def _is_entered(eqn: Any) -> bool:
    inner = inner_jaxprs(eqn)
    return eqn.primitive.name in ("scan", "while", "cond") or (
        len(inner) == 1 and len(inner[0].invars) == len(eqn.invars) and eqn.primitive.name != "shard_map"
    )


def redrawn(jaxpr: Any, salt: jax.Array, *leaves: Any) -> list[jax.Array]:
    """The results of a closed jaxpr at `leaves` with the numbers that belong to `salt`."""
    return _evaluate(jaxpr.jaxpr, jaxpr.consts, leaves, salt)


def _evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], salt: jax.Array) -> list[Any]:
    values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(var: Any) -> Any:
        return var.val if hasattr(var, "val") else values[var]  # a literal

    for eqn in jaxpr.eqns:
        inputs: list[Any] = [read(var) for var in eqn.invars]
        if draws(eqn):
            inputs[0] = _salted(inputs[0], salt)
        if _draws_inside(eqn):
            found = _enter(eqn, inputs, salt)
        else:
            found = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
        values.update(zip(eqn.outvars, found if eqn.primitive.multiple_results else [found], strict=True))
    return [read(var) for var in jaxpr.outvars]


def _salted(key: jax.Array, salt: jax.Array) -> jax.Array:
    data, impl = jax.random.key_data(key), jax.random.key_impl(key)
    return jax.random.wrap_key_data(data + salt, impl=impl)  # pyright: ignore[reportUnknownVariableType]


def _closed(jaxpr: Any, args: Sequence[Any], salt: jax.Array) -> list[Any]:
    """A closed jaxpr, or one without constants."""
    return _evaluate(getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ()), args, salt)


def _branch(jaxpr: Any, salt: jax.Array, *args: Any) -> list[Any]:
    return _closed(jaxpr, args, salt)


def _enter(eqn: Any, inputs: list[Any], salt: jax.Array) -> list[Any]:
    params = eqn.params
    if eqn.primitive.name == "scan":
        return _scan(eqn, inputs, salt)
    if eqn.primitive.name == "while":
        return _while(params, inputs, salt)
    if eqn.primitive.name == "cond":
        branches = [partial(_branch, b, salt) for b in params["branches"]]
        return lax.switch(inputs[0], branches, *inputs[1:])
    (inner,) = (x for x in params.values() if hasattr(getattr(x, "jaxpr", x), "eqns"))
    return _closed(inner, inputs, salt)


def _scan(eqn: Any, inputs: list[Any], salt: jax.Array) -> list[Any]:
    params, (consts, carry) = eqn.params, scan_parts(eqn)
    fixed, start, rows = inputs[:consts], inputs[consts : consts + carry], inputs[consts + carry :]

    def body(state: Any, row: Any) -> Any:
        out = _closed(params["jaxpr"], [*fixed, *state, *row], salt)
        return out[:carry], out[carry:]

    last, stacked = lax.scan(body, start, rows, length=params["length"], reverse=params["reverse"])
    return [*last, *stacked]


def _while(params: dict[str, Any], inputs: list[Any], salt: jax.Array) -> list[Any]:
    a, b = params["cond_nconsts"], params["body_nconsts"]
    asked, fixed, start = inputs[:a], inputs[a : a + b], inputs[a + b :]
    return lax.while_loop(
        lambda state: _closed(params["cond_jaxpr"], [*asked, *state], salt)[0],
        lambda state: _closed(params["body_jaxpr"], [*fixed, *state], salt),
        start,
    )


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
        return lax.dynamic_slice_in_dim(x, start, stop - start) if isinstance(x, jax.Array) else x[start:stop]

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
    pairs = zip(owned_leaves(a, op.shared), owned_leaves(b, op.shared), strict=True)
    return replace_owned(a, op.shared, [jnp.concatenate(pair) for pair in pairs])
