"""The solver of A x = b as a run: its first states, the loop over products, and x in the user's units.

`linear_step` is one step for one right-hand side; here it runs for several of them side by side.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spectra.base import trees
from spectra.base.trees import PyTree
from spectra.krylov.linear_state import Mode, Problem, State, Verdict, noise_of
from spectra.krylov.linear_step import absorb, start
from spectra.operators.base import LinearOperator

CHUNK = 256
"""Products of one compiled call: how often Ctrl-C is heard."""


def prepared(op, b, inverse, method, tol, limit, reference) -> tuple[Problem, State]:
    """The problem and its first state for every right-hand side; `reference` are those that tol refers to."""
    dtype = op.dtype

    def one(b, reference):
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


def _axes(inverse, method: str) -> Any:
    """Which parts of a problem are there for every right-hand side: zeros and None in place of arrays."""
    shared = None if inverse is None else jax.tree.map(lambda _: None, inverse)
    each: Any = 0
    return Problem(each, shared, each, each, each, each, each, only_cg=method == "cg")


begin = jax.jit(prepared, static_argnames=("method",))


def loop(op: LinearOperator, problem: Problem, state: State, stop) -> State:
    """Products until every right-hand side is done, `stop` of them for each at most."""

    def one(problem, state):
        def going(state):
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


def drive(op: LinearOperator, problem: Problem, state: State) -> State:
    """The loop from the host: in compiled chunks, or product by product where data are streamed."""
    if op.on_host:
        while not (np.asarray(state.mode) == Mode.DONE).all():
            state = _absorb(problem, state, op.mv_batch(state.go))
        return state
    stop = 0
    while not (np.asarray(state.mode) == Mode.DONE).all():
        stop += CHUNK
        state = _chunk(op, problem, state, stop)
    return state


@jax.jit
def outcome(problem: Problem, state: State, x0: PyTree | None) -> dict[str, Any]:
    """x and the numbers that judge it, in the user's units."""

    def one(b, unit, state, x0):
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
