"""The solver of A x = b as a run: its first states, the loop over products, and x in the user's units.

`linear_step` is one step for one right-hand side; here it runs for several of them side by side.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spectra.base import programs, stacks, trees
from spectra.base.trees import PyTree
from spectra.krylov.layout import Layout
from spectra.krylov.linear_block import WIDEST, Block, absorb_block, begin_block, hand_over
from spectra.krylov.linear_rounding import noise_of
from spectra.krylov.linear_state import (
    SHORT_VECTORS,
    Mode,
    Problem,
    State,
    choose,
    norm_of,
    sides_of,
)
from spectra.krylov.linear_step import absorb, start, steps_kept
from spectra.krylov.plan import choose_together
from spectra.operators.base import LinearOperator, in_batches
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
    x0: PyTree | None = None,
) -> tuple[Problem, State]:
    """The problem and its first state for every right-hand side; `reference` are those that tol refers to.

    b is what x0 leaves of them.
    """
    dtype = op.dtype

    def one(b: PyTree, reference: PyTree, x0: PyTree | None) -> tuple[Problem, State]:
        unit = trees.power_of_two(trees.largest(b)).astype(dtype)
        b = trees.scale(1 / unit, b)
        target = tol * trees.norm(reference) / unit
        unit_p = jnp.ones((), dtype)
        if inverse is not None:
            unit_p = trees.power_of_two(trees.largest(inverse.mv(b))).astype(dtype)
        began = jnp.zeros((), dtype) if x0 is None else (trees.norm(x0) / unit).astype(dtype)
        numbers = (target.astype(dtype), jnp.int32(limit), jnp.asarray(noise_of(op), dtype), began)
        problem = Problem(b, inverse, unit, unit_p, *numbers, only_cg=method == "cg")
        return problem, start(problem, dtype, Mode.MINRES if method == "minres" else Mode.CG)

    none: Any = None
    axes = sides_of(Problem(none, inverse, none, none, none, none, none, none, only_cg=method == "cg"))
    return jax.vmap(one, out_axes=(axes, 0))(b, reference, x0)


begin = programs.jit(prepared, static_argnames=("method",))


def from_start(
    op: LinearOperator, b: PyTree, x0: PyTree, images: PyTree, tol: float
) -> tuple[PyTree, PyTree]:
    """What x0, with products `images`, leaves of b, and where to start: zero instead of a start that is
    farther off than zero, and so far that the rounding of its product alone misses the tolerance.

    The iteration is for dx, so rounding of A x0 stays in x0 + dx, and looks like a b outside of the range.
    """

    def one(b: PyTree, x0: PyTree, image: PyTree) -> tuple[PyTree, PyTree]:
        rest, all_of_b = jax.tree.map(jnp.subtract, b, image), trees.norm(b)
        lost = noise_of(op) / 8 * trees.norm(image)
        far = ~(trees.norm(rest) <= all_of_b) & (lost > tol * all_of_b)
        return choose(far, b, rest), choose(far, jax.tree.map(jnp.zeros_like, x0), x0)

    return jax.vmap(one)(b, x0, images)


begin_from = programs.jit(from_start)


def blocks(problem: Problem, method: str) -> list[tuple[int, int]]:
    """The right-hand sides, from start to stop, that begin as one block; with MINRES there is none."""
    count = stacks.length(problem.b)
    if method == "minres":
        return []
    parts = -(-count // WIDEST)
    return list(itertools.pairwise(count * i // parts for i in range(parts + 1)))


def part_of(problem: Problem, start: int, stop: int) -> Problem:
    """The problem of some of the right-hand sides."""
    own = jax.tree.map(lambda x: x[start:stop], dataclasses.replace(problem, inverse=None))
    return dataclasses.replace(own, inverse=problem.inverse)


def whole_run(op: LinearOperator, problem: Problem, state: State, method: str, limit: int) -> State:
    """The run as one program: blocks first, where there are several right-hand sides.

    One alone, of which a caller's vmap may make any number, keeps no directions here.
    """
    several = stacks.length(problem.b) > 1
    parts = [part_of(problem, *ends) for ends in blocks(problem, method)] if several else []
    found = [_handed_over(op, part, limit) for part in parts]
    return loop(op, problem, stacks.concatenate(found) if found else state, limit)


def _handed_over(op: LinearOperator, problem: Problem, limit: int) -> State:
    """What a block from its first product to its last hands over."""
    block = begin_block(problem, steps_kept(op, stacks.length(problem.b)))
    together, layout = choose_together(op, len(block.c)), Layout.of(op.like).anonymous()
    return hand_over(problem, block_loop(op, problem, block, limit, together, layout))


def block_loop(
    op: LinearOperator, problem: Problem, block: Block, stop: int | jax.Array, together: int, layout: Layout
) -> Block:
    """Products of a block, so many `together`, until it is done, `stop` for each right-hand side at most."""

    def going(block: Block) -> jax.Array:
        return ~block.done & (block.products < stop)

    def step(block: Block) -> Block:
        products = in_batches(op, layout.stack_in_order(block.go), together)
        return absorb_block(problem, block, layout.stack_in_order(products))

    return lax.while_loop(going, step, block)


_begin_block = programs.jit(begin_block, static_argnames=("kept",))
_block_chunk = programs.jit(block_loop, static_argnames=("together", "layout"), donate_argnames=("block",))
_absorb_block = programs.jit(absorb_block)
_hand_over = programs.jit(hand_over)


def loop(op: LinearOperator, problem: Problem, state: State, stop: int | jax.Array) -> State:
    """Products until every right-hand side is done, `stop` of them for each at most."""

    count = jax.tree.leaves(problem.b)[0].shape[0]

    def one(problem: Problem, state: State) -> State:
        def going(state: State) -> jax.Array:
            return (state.mode != Mode.DONE) & (state.products < stop)

        def step(state: State) -> State:
            return absorb(problem, state, op.mv(state.go), alone=count == 1)

        return lax.while_loop(going, step, state)

    axes = sides_of(problem)
    if count == 1:  # branches stay branches without vmap
        alone = jax.tree.map(lambda x: x[0], dataclasses.replace(problem, inverse=None))
        state = one(dataclasses.replace(alone, inverse=problem.inverse), jax.tree.map(lambda x: x[0], state))
        return jax.tree.map(lambda x: x[None], state)
    return jax.vmap(one, in_axes=(axes, 0))(problem, state)


_chunk = programs.jit(loop, donate_argnames=("state",))


@programs.jit
def _absorb(problem: Problem, state: State, products: PyTree) -> State:
    axes = sides_of(problem)
    return jax.vmap(absorb, in_axes=(axes, 0, 0))(problem, state, products)


def drive(
    op: LinearOperator, problem: Problem, state: State, method: str, journal: Journal | None = None
) -> State:
    """The run from the host: in compiled chunks, or product by product where data are streamed or the run is
    watched. The program and its numbers are the same for a chunk of any length."""
    found: list[State] = []
    for ends in blocks(problem, method):
        part, kept = part_of(problem, *ends), steps_kept(op, ends[1] - ends[0])
        if journal is not None:  # as before, since the free memory may have changed
            kept = int(journal.keep(lambda kept=kept: jnp.int32(kept), 0))
        block = _whole_block(op, part, _begin_block(part, kept), journal)
        found.append(_hand_over(part, block))
    state = stacks.concatenate(found) if found else state
    if journal is not None:
        return _recorded(op, problem, state, journal)
    stop = 0
    while not _ended(state):
        stop += CHUNK
        state = _products(op, problem, state, stop)
    return state


def _whole_block(op: LinearOperator, problem: Problem, block: Block, journal: Journal | None) -> Block:
    """A block until it is done."""
    if journal is not None:

        def step(block: Block, start: int, stop: int) -> tuple[Block, None]:
            del start
            block = _block_products(op, problem, block, stop)
            journal.bar.note(f"residual {float(_block_excess(problem, block)):.1e} times the accepted one")
            return block, None

        vectors = {"x": op.like, "q": op.like, "go": op.like, "kept": (op.like, op.like)}
        form = dataclasses.replace(jax.tree.map(lambda _: 0.0, block), **vectors)
        return _folded(journal, step, block, problem, 0, form, len(block.c), lambda block: bool(block.done))
    stop = 0
    while not bool(block.done):
        stop += CHUNK
        block = _block_products(op, problem, block, stop)
    return block


def _block_products(op: LinearOperator, problem: Problem, block: Block, stop: int) -> Block:
    if op.on_host:
        return _absorb_block(problem, block, op.mv_batch(block.go))
    together, layout = choose_together(op, len(block.c)), Layout.of(op.like).anonymous()
    return _block_chunk(op, problem, block, stop, together, layout)


def _folded(
    journal: Journal,
    step: Any,
    state: Any,
    problem: Problem,
    start: int,
    form: PyTree,
    count: int,
    ended: Callable[[Any], bool],
) -> Any:
    """The steps of a run, saved; those that end it for want of products are not, so that a call with a
    larger budget goes on as if it had been given at first."""
    limit = int(np.max(problem.limit))
    last = max(limit - 2, start)
    parts = list(itertools.pairwise(range(start, last + 1)))
    state = journal.fold(step, state, parts, carried=form, products=count, until=ended)[0]
    if not ended(state):
        journal.save()
    for stop in range(last + 1, limit + 1):
        if ended(state):
            break
        state = step(state, stop - 1, stop)[0]
        journal.count(count)
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

    going = np.asarray(state.mode) != Mode.DONE
    start = int(np.min(np.asarray(state.products), where=going, initial=np.max(problem.limit)))
    form, count = _form(op.like, state), len(state.mode)
    return _folded(journal, step, state, problem, start, form, count, _ended)


def _form(like: PyTree, state: State) -> State:
    """A state with the operator's vector in place of vectors, and zeros in place of numbers."""
    zeros = jax.tree.map(lambda _: 0.0, state)
    short = zeros.short and dataclasses.replace(zeros.short, **dict.fromkeys(SHORT_VECTORS, like))
    return dataclasses.replace(zeros, x=like, r=like, go=like, short=short)


@programs.jit
def _block_excess(problem: Problem, block: Block) -> jax.Array:
    return jnp.max(jnp.sqrt(jnp.sum(block.c**2, axis=0)) / problem.target)


@programs.jit
def _excess(problem: Problem, state: State) -> jax.Array:
    """The largest residual, as the recurrence has it, in units of what is accepted."""
    return jnp.max(jax.vmap(norm_of)(state.r) / problem.target)


@programs.jit
def outcome(problem: Problem, state: State, x0: PyTree | None) -> dict[str, Any]:
    """x and the numbers that judge it, in the user's units."""

    def one(b: PyTree, unit: jax.Array, state: State, x0: PyTree | None) -> dict[str, Any]:
        x = trees.scale(unit / state.unit_a, state.x)
        return {
            "x": x if x0 is None else jax.tree.map(jnp.add, x0, x),
            "verdict": state.verdict,
            "method": state.method,
            "products": state.products,
            "residual": state.norm_r * unit,
            "norm_a": state.norm_a * state.unit_a,
        }

    return jax.vmap(one)(problem.b, problem.unit_b, state, x0)
