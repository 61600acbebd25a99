"""How the updates of an optimizer answer to gradients that alternate: its linearised update map."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import programs, trees
from spectra.base.errors import StructureError
from spectra.base.trees import PyTree
from spectra.operators.batches import describe

HALVINGS = 40
"""Of the error in the answer to an alternating gradient: 1e-12, below the rounding of float32."""
NORMAL = 2.0**10
"""In units of the smallest normal number of float32, or of a lower precision: what stands for zero."""
LONGEST = 1024
"""Calls without an update after which none is expected."""

_MORE = ("value", "grad")  # by the names of optax


class Seen(NamedTuple):
    """What an optimizer is given, or the change of it."""

    gradient: PyTree
    params: PyTree
    loss: jax.Array


class Answers:
    """Updates that answer alternating changes, in the optimizer's precision while that is enough.

    Adafactor has 1e-30 in place of the moments of what has seen no gradient, whose power -3/2, in the slope,
    is beyond float32; and it divides by the root mean square of a whole leaf, which has no slope at zero. In
    float64, with tiny numbers in place of zeros in gradients and parameters too, both are finite.
    """

    def __init__(self, update: Callable[..., Any], state: PyTree, point: Seen):
        self.update, self.point, self.wide = update, point, False
        self.more = _names_taken(update)
        _require_fit(update, self.more, state, point)
        self.state, self.calls = _cycle(update, self.more, state, point)

    def __call__(self, change: Seen) -> PyTree:
        """-1/2 times the updates that answer to these changes."""
        program = partial(_answer, self.update, self.more, self.calls)
        if not self.wide:
            answer = program(self.state, self.point, change)
            if trees.all_finite(answer):
                return answer
            self.wide = True
        with jax.enable_x64(True):
            point = jax.tree.map(_off_zero, self.point)
            found = program(*_wide((self.state, point, change)))
        return jax.tree.map(lambda x, v: jnp.asarray(np.asarray(x), v.dtype), found, change.params)


def _names_taken(update: Callable[..., Any]) -> tuple[str, ...]:
    """What of the loss and the gradient may be passed by name: optax's that use these take any name."""
    try:
        found = inspect.signature(update).parameters
    except (TypeError, ValueError):  # of what is not written in Python
        return ()
    every = any(p.kind is p.VAR_KEYWORD for p in found.values())
    first, rest = list(found)[:3], list(found)[3:]  # gradient, state and parameters, by any name
    return tuple(name for name in _MORE if name in rest or (every and name not in first))


def _require_fit(update: Callable[..., Any], more: tuple[str, ...], state: PyTree, point: Seen) -> None:
    """Raise a StructureError unless an update can be made, and is like the parameters."""
    try:
        updates, new = jax.eval_shape(partial(_called, update, more, point), state)
    except Exception as error:
        first = str(error).split("\n")[0]
        if isinstance(error, TypeError) and "argument" in first:
            raise StructureError(
                f"optimizer.update needs more than gradient, state, parameters and value=, the loss: {first}."
                " Pass optax.GradientTransformation(optimizer.init, f) with an f of the first three that "
                "gives it the rest."
            ) from error
        raise StructureError(
            f"optimizer.update fails on optimizer_state and the gradient of op ({type(error).__name__}: "
            f"{first}): pass the state of this optimizer for the parameters that op differentiates, which "
            "are those of wrt= where there is one."
        ) from error
    if jax.tree.structure(new) != jax.tree.structure(state):
        raise StructureError(
            f"optimizer_state is {describe(state)}, of which optimizer.update makes a state of another "
            "structure: pass what optimizer.init or an update has returned."
        )
    trees.check_structure(updates, point.params, "an update of the optimizer")


def _called(
    update: Callable[..., Any], more: tuple[str, ...], point: Seen, state: PyTree
) -> tuple[PyTree, PyTree]:
    known: dict[str, PyTree] = {"value": point.loss, "grad": point.gradient}
    options = {name: known[name] for name in more}
    return update(point.gradient, state, point.params, **options)


@partial(programs.jit, static_argnames=("update", "more"))
def _once(update, more, state: PyTree, point: Seen) -> tuple[jax.Array, PyTree]:
    """Whether there is an update, and the state after it."""
    updates, new = _called(update, more, point, state)
    return jnp.any(jnp.stack([jnp.any(x != 0) for x in jax.tree.leaves(updates)])), new


def _cycle(update, more: tuple[str, ...], state: PyTree, point: Seen) -> tuple[PyTree, int]:
    """The state that a whole cycle begins with, and its number of calls: one unless gradients are gathered.

    `optax.MultiSteps` and `optax.apply_every` give zero until they have seen enough gradients. What counts
    is the sum over a cycle, in which all gradients change alike, since parameters stay where they are.
    """
    if all(jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating) for x in jax.tree.leaves(state)):
        return state, 1  # nothing to count calls with
    begin, _ = _until_moved(update, more, state, point)
    if begin is None:
        return state, 1
    after, calls = _until_moved(update, more, begin, point)
    return (begin, calls) if after is not None and calls > 1 else (state, 1)


def _until_moved(update, more: tuple[str, ...], state: PyTree, point: Seen) -> tuple[PyTree, int]:
    """The state after the next update that is not zero, and the calls up to it; None if there is none."""
    for calls in range(1, LONGEST + 1):
        moved, state = _once(update, more, state, point)
        if moved:
            return state, calls
    return None, LONGEST


def _wide(tree: PyTree) -> PyTree:
    """Floats in float64."""

    def one(x):
        floating = jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)
        return jnp.asarray(np.asarray(x, np.float64)) if floating else x

    return jax.tree.map(one, tree)


@partial(programs.jit, static_argnames=("update", "more", "calls"))
def _answer(update, more, calls, state: PyTree, point: Seen, change: Seen) -> PyTree:
    """-1/2 times the updates that answer alternating changes, summed over the calls of a cycle."""
    leaves, treedef = jax.tree.flatten(state)
    moves = [i for i, x in enumerate(leaves) if jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)]

    def one(point: Seen, own: list[Any]) -> tuple[PyTree, list[Any]]:
        updates, new = _called(update, more, point, treedef.unflatten(own))
        new = jax.tree.leaves(new)
        return updates, [jnp.asarray(x, jnp.asarray(old).dtype) for x, old in zip(new, own, strict=True)]

    def step(point: Seen, floats: list[jax.Array]) -> tuple[PyTree, list[jax.Array]]:
        own = list(leaves)
        for i, x in zip(moves, floats, strict=True):
            own[i] = x
        total, own = one(point, own)
        if calls > 1:

            def add(_, carry):
                updates, own = one(point, carry[1])
                return jax.tree.map(jnp.add, carry[0], updates), own

            total, own = jax.lax.fori_loop(1, calls, add, (total, own))
        return total, [own[i] for i in moves]

    floats = [_off_zero(jnp.asarray(leaves[i])) for i in moves]
    tangents = jax.linearize(step, point, floats)[1]

    def settle(_, s):
        new = tangents(change, s)[1]
        return [(a - b) / 2 for a, b in zip(s, new, strict=True)]

    settled = jax.lax.fori_loop(0, HALVINGS, settle, [jnp.zeros_like(x) for x in floats])
    # The state before the step is the negative of the one after it.
    answer = tangents(change, settled)[0]
    return jax.tree.map(lambda x, v: (-x / 2).astype(v.dtype), answer, change.params)


def _off_zero(x: jax.Array) -> jax.Array:
    """A state without zeros: the root of a second moment that is zero, as under pixels that are always black
    or embeddings not met yet, has no slope, and 0 · inf is NaN. What takes its place is the smallest number
    whose products with decay rates are still normal; no eps of an optimizer is that small.
    """
    least = max(jnp.finfo(x.dtype).tiny, jnp.finfo(jnp.float32).tiny)
    return jnp.where(x == 0, NORMAL * least, x)
