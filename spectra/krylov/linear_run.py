"""The solver of A x = b as a run: its first states, the loop over products, and x in the user's units.

`linear_step` is one step for one right-hand side; here it runs for several of them side by side.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spectra.base import trees
from spectra.base.trees import PyTree
from spectra.krylov.linear_state import SHORT_VECTORS, Mode, Problem, State, Verdict, noise_of, norm_of
from spectra.krylov.linear_step import absorb, start
from spectra.operators.base import LinearOperator
from spectra.runs.watch import Journal

CHUNK = 256
"""Products of one compiled call: how often Ctrl-C is heard."""


def prepared(
    op: LinearOperator,
    b: PyTree,
    inverse: LinearOperator | None,
    method: str,
    tol: float,
    limit: int,
    reference: PyTree,
) -> tuple[Problem, State]:
    """The problem and its first state for every right-hand side; `reference` are those that tol refers to."""
    dtype = op.dtype

    def one(b: PyTree, reference: PyTree) -> tuple[Problem, State]:
        unit = trees.power_of_two(trees.largest(b)).astype(dtype)
        b = trees.scale(1 / unit, b)
        target = tol * trees.norm(reference) / unit
        unit_p = jnp.ones((), dtype)
        if inverse is not None:
            unit_p = trees.power_of_two(trees.largest(inverse.mv(b))).astype(dtype)
        numbers = (target.astype(dtype), jnp.int32(limit), jnp.asarray(noise_of(op), dtype))
        problem = Problem(b, inverse, unit, unit_p, *numbers, only_cg=method == "cg")
        return problem, start(problem, dtype, Mode.MINRES if method == "minres" else Mode.CG)

    axes = _axes(inverse, method)
    return jax.vmap(one, out_axes=(axes, 0))(b, reference)


def _axes(inverse: LinearOperator | None, method: str) -> Any:
    """Which parts of a problem are there for every right-hand side: zeros and None in place of arrays."""
    shared = None if inverse is None else jax.tree.map(lambda _: None, inverse)
    each: Any = 0
    return Problem(each, shared, each, each, each, each, each, only_cg=method == "cg")


begin = jax.jit(prepared, static_argnames=("method",))


def loop(op: LinearOperator, problem: Problem, state: State, stop: int | jax.Array) -> State:
    """Products until every right-hand side is done, `stop` of them for each at most."""

    def one(problem: Problem, state: State) -> State:
        def going(state: State) -> jax.Array:
            return (state.mode != Mode.DONE) & (state.products < stop)

        return lax.while_loop(going, lambda state: absorb(problem, state, op.mv(state.go)), state)

    axes = _axes(problem.inverse, "cg" if problem.only_cg else "auto")
    count = jax.tree.leaves(problem.b)[0].shape[0]
    if count == 1:  # branches stay branches without vmap
        alone = jax.tree.map(lambda x: x[0], dataclasses.replace(problem, inverse=None))
        state = one(dataclasses.replace(alone, inverse=problem.inverse), jax.tree.map(lambda x: x[0], state))
        return jax.tree.map(lambda x: x[None], state)
    return jax.vmap(one, in_axes=(axes, 0))(problem, state)


_chunk = jax.jit(loop, donate_argnames=("state",))


@jax.jit
def _absorb(problem: Problem, state: State, products: PyTree) -> State:
    axes = _axes(problem.inverse, "cg" if problem.only_cg else "auto")
    return jax.vmap(absorb, in_axes=(axes, 0, 0))(problem, state, products)


def drive(op: LinearOperator, problem: Problem, state: State, journal: Journal | None = None) -> State:
    """The loop from the host: in compiled chunks, or product by product where data are streamed or the run is
    watched. The program and its numbers are the same for a chunk of any length."""
    if journal is not None:
        return _recorded(op, problem, state, journal)
    stop = 0
    while not _ended(state):
        stop += CHUNK
        state = _products(op, problem, state, stop)
    return state


def _ended(state: State) -> bool:
    return bool((np.asarray(state.mode) == Mode.DONE).all())


def _products(op: LinearOperator, problem: Problem, state: State, stop: int) -> State:
    """Up to `stop` products of each right-hand side; one where data are streamed."""
    if op.on_host:
        return _absorb(problem, state, op.mv_batch(state.go))
    return _chunk(op, problem, state, stop)


def _recorded(op: LinearOperator, problem: Problem, state: State, journal: Journal) -> State:
    """The same product by product, each noted in the journal."""

    def step(state: State, start: int, stop: int) -> tuple[State, None]:
        del start
        state = _products(op, problem, state, stop)
        if journal.bar.bar is not None:
            journal.bar.note(f"residual {float(_excess(problem, state)):.1e} times the accepted one")
        return state, None

    parts = list(itertools.pairwise(range(int(np.max(problem.limit)) + 1)))
    like, count = _form(op.like, state), len(state.mode)
    return journal.fold(step, state, parts, carried=like, products=count, until=_ended)[0]


def _form(like: PyTree, state: State) -> State:
    """A state with the operator's vector in place of vectors, and zeros in place of numbers."""
    zeros = jax.tree.map(lambda _: 0.0, state)
    short = zeros.short and dataclasses.replace(zeros.short, **dict.fromkeys(SHORT_VECTORS, like))
    return dataclasses.replace(zeros, x=like, r=like, go=like, short=short)


@jax.jit
def _excess(problem: Problem, state: State) -> jax.Array:
    """The largest residual, as the recurrence has it, in units of what is accepted."""
    return jnp.max(jax.vmap(norm_of)(state.r) / problem.target)


@jax.jit
def outcome(problem: Problem, state: State, x0: PyTree | None) -> dict[str, Any]:
    """x and the numbers that judge it, in the user's units."""

    def one(b: PyTree, unit: jax.Array, state: State, x0: PyTree | None) -> dict[str, Any]:
        x = trees.scale(unit / state.unit_a, state.x)
        x = x if x0 is None else jax.tree.map(jnp.add, x0, x)
        known = (state.verdict != Verdict.SINGULAR) & (state.verdict != Verdict.NONFINITE)
        x = jax.tree.map(lambda leaf: jnp.where(known, leaf, jnp.nan), x)
        return {
            "x": x,
            "verdict": state.verdict,
            "method": state.method,
            "products": state.products,
            "residual": state.norm_r * unit,
            "norm_a": state.norm_a * state.unit_a,
        }

    return jax.vmap(one)(problem.b, problem.unit_b, state, x0)
