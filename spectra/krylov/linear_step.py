"""One step of the solver of A x = b: conjugate gradients, MINRES and what judges them, as one pure function.

A step is given the product of A with `state.go` and says what to multiply next, so that one body serves a
compiled loop, `vmap` over right-hand sides, and products that are driven from the host. What the product is
for is the state's `mode`:

* CG, on the direction p. It ends where pᵀAp is not above rounding: A is indefinite, or singular.
* MINRES (Paige and Saunders, doi:10.1137/0712047), on a vector of the preconditioned Lanczos recurrence.
* CHECK, on the iterate itself: the residual b - A x as it is, where a recurrence says that it is small. A
  method resumes from there where that is not so, which makes good what short recurrences lose to rounding:
  MINRES alone is off by κ² roundings (Sleijpen, van der Vorst and Modersitzki,
  doi:10.1137/S0895479897323087).
* NULL, on the residual: where A r vanishes and r does not, b is outside of the range. MINRES is not driven
  far into that, since what x has along the null space grows like |r| / |A r|: a run from the true residual
  clears what b - A x has lost to rounding, and tells the two apart.

Everything is in units, powers of two: b / unit_b, A / unit_a from the first product, P / unit_p. Squares
neither under- nor overflow then, and c A with c b go through the same numbers.

The first directions of conjugate gradients are kept, so that rounding does not bring them back. In exact
arithmetic each direction is conjugate to all before it. Rounding loses that as soon as the eigenvectors of
the largest eigenvalues have converged, and the iteration finds these once more, as Lanczos without
reorthogonalisation finds copies. They converge first, so the first directions suffice. On the Gauss-Newton
matrix of a CNN of 21,386 parameters in float32, with a damping of 1e-3 λ₁, one right-hand side takes 31
products, not 57, if those of 16 steps are kept, and a block of 8 takes 13 for each, not 22, with those of 6.
Float64 takes 43 and 14 without. Residuals are not touched: they stay those of x.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from spectra.base import host, stacks, trees
from spectra.base.trees import PyTree
from spectra.krylov.layout import Layout
from spectra.krylov.linear_short import begin_cg, begin_minres, cg, is_definite, minres, turn
from spectra.krylov.linear_state import (
    SHORT_VECTORS,
    Mode,
    Problem,
    Short,
    State,
    Step,
    Verdict,
    choose,
    merge,
    norm_of,
    to_check,
    zeros_beside,
)
from spectra.operators.base import LinearOperator

HALF = 0.5
"""A cycle that takes less than this off the true residual is stale."""
STALE = 1
"""Stale cycles in a row that are allowed; beyond, the precision's floor is met."""
KEPT = 64
"""Directions that are kept, of `LEAST` to `MOST` steps."""
LEAST, MOST = 2, 32

Kept = tuple[PyTree, PyTree]
"""Stacks of the directions S and of (SᵀAS)⁻¹AS; the rows of a step follow those of the one before."""


def start(problem: Problem, dtype: jnp.dtype, method: Mode) -> State:
    """The state before the first product, from x = 0."""
    zero, zeros = jnp.zeros((), dtype), zeros_beside(problem.b)
    count = jnp.zeros((), jnp.int32)
    short = None if problem.only_cg else _no_short(zeros, zero)
    state = State(
        mode=jnp.int32(method),
        verdict=jnp.int32(Verdict.OPEN),
        method=jnp.int32(method),
        x=zeros,
        r=problem.b,
        go=problem.b,
        short=short,
        unit_a=jnp.ones((), dtype),
        norm_a=zero,
        scale=zero,
        rz=zero,
        size=zero,
        step=zero,
        couple=zero,
        norm_r=norm_of(problem.b),
        best=zero,
        idle=count,
        steps=count,
        resume=jnp.zeros((), bool),
        stale=count,
        products=count,
    )
    begin = begin_minres if method is Mode.MINRES else begin_cg
    state = begin(state, zeros, problem.b, problem.precondition(problem.b))
    # Nothing to do for b = 0.
    none = state.norm_r <= problem.target
    return merge(state, none, mode=jnp.int32(Mode.DONE), verdict=jnp.int32(Verdict.CONVERGED))


def _no_short(zeros: PyTree, zero: jax.Array) -> Short:
    """What MINRES holds before it begins."""
    numbers = ("beta", "phi", "cs", "sn", "dbar", "eps", "trigger")
    return Short(**dict.fromkeys(SHORT_VECTORS, zeros), **dict.fromkeys(numbers, zero), ranged=zero > 0)


def absorb(problem: Problem, state: State, product: PyTree, *, alone: bool = False) -> State:
    """The state after the product of A with `state.go`; `alone` for one right-hand side, without `vmap`."""
    first = state.products == 0
    unit = jnp.where(first, trees.power_of_two(trees.largest(product)), state.unit_a)
    w = trees.scale(1 / unit, product)
    size, image = norm_of(state.go), norm_of(w)
    ratio = image / jnp.where(size > 0, size, 1)
    state = dataclasses.replace(
        state,
        unit_a=unit,
        norm_a=jnp.maximum(state.norm_a, jnp.where(jnp.isfinite(ratio), ratio, 0)),
        products=state.products + (state.mode != Mode.DONE),
    )
    along = trees.vdot(state.go, w)
    turned = (state.mode == Mode.CG) & ~is_definite(problem, state, along)
    which = jnp.where(turned, TURN, state.mode)
    at_once = partial(_at_once, problem)
    if alone:
        after = lax.platform_dependent(which, state, w, along, cpu=partial(_one_of, problem), default=at_once)
    else:
        after = at_once(which, state, w, along)
    going = state.mode != Mode.DONE
    after = merge(
        after, going & ~jnp.isfinite(image), mode=jnp.int32(Mode.DONE), verdict=jnp.int32(Verdict.NONFINITE)
    )
    # The last product is that of a check, unless x was checked by this one.
    spent = going & (after.mode != Mode.DONE) & (after.products >= problem.limit - 1)
    checked = state.mode == Mode.CHECK
    after = merge(after, spent & checked, mode=jnp.int32(Mode.DONE), verdict=jnp.int32(Verdict.BUDGET))
    return to_check(after, spent & ~checked & (after.mode != Mode.CHECK), verdict=Verdict.BUDGET)


TURN = len(Mode)
"""Beside the modes: CG that has met a curvature that is not positive."""


def _steps(problem: Problem) -> list[Callable[[Problem, State, PyTree, jax.Array], Step]]:
    """The step of each mode, and of a turn; for modes that a run never has, none."""
    if problem.only_cg:
        return [cg, _ended, _check, _ended, _ended, turn]
    return [cg, minres, _check, _null, _ended, turn]


def _one_of(problem: Problem, which: jax.Array, state: State, w: PyTree, along: jax.Array) -> State:
    """The step that is wanted, and no other: half the time on a CPU."""

    def alone(step: Callable[..., Step], state: State, w: PyTree, along: jax.Array) -> State:
        wanted, after = step(problem, state, w, along)
        return after(problem.precondition(wanted))

    return lax.switch(which, [partial(alone, step) for step in _steps(problem)], state, w, along)


def _at_once(problem: Problem, which: jax.Array, state: State, w: PyTree, along: jax.Array) -> State:
    """All steps, of which one is chosen, with one application of the preconditioner.

    On several GPUs a conditional with a sum over devices inside is decided on the host, which waits for the
    cards. On one it is fewer bytes than branches, which copy what they pass on.
    """
    wanted, after = zip(*(step(problem, state, w, along) for step in _steps(problem)), strict=True)
    if problem.inverse is not None:
        wanted = [problem.precondition(_select(which, wanted))] * len(wanted)
    return _select(which, [fn(z) for fn, z in zip(after, wanted, strict=True)])


def _select(which: jax.Array, trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: lax.select_n(which, *leaves), *trees)


def _ended(problem: Problem, state: State, w: PyTree, along: jax.Array) -> Step:
    """The state as it is; also in place of modes that a run never has."""
    del problem, along
    return w, lambda z: state


def _check(problem: Problem, state: State, w: PyTree, along: jax.Array) -> Step:
    """The true residual of x, and where to go on from it."""
    del along
    r = jax.tree.map(jnp.subtract, problem.b, w)
    norm, claimed = norm_of(r), norm_of(state.r)
    all_of_b = norm_of(problem.b)
    worse = norm > all_of_b
    x = choose(worse, jax.tree.map(jnp.zeros_like, state.x), state.x)
    r, norm = choose(worse, problem.b, r), jnp.minimum(norm, all_of_b)
    converged = norm <= problem.target
    ended = state.verdict != Verdict.OPEN
    resume = state.resume & (norm <= 2 * claimed) & ~worse
    floor = problem.noise / 8 * state.norm_a * norm_of(x)
    idle = ~resume & (norm > HALF * state.norm_r)
    stale = jnp.where(resume, state.stale, jnp.where(idle, state.stale + 1, 0))
    stuck = (norm <= floor) | (stale > STALE)
    state = dataclasses.replace(state, x=x, r=r, norm_r=norm, stale=stale, resume=jnp.zeros_like(resume))
    said = jnp.where(converged, Verdict.CONVERGED, jnp.where(ended, state.verdict, Verdict.STAGNATED))
    done = merge(state, jnp.ones((), bool), mode=jnp.int32(Mode.DONE), verdict=said.astype(jnp.int32))
    end = converged | ended | stuck
    if state.short is None:
        return r, lambda z: choose(end, done, begin_cg(state, x, r, z))
    by_cg = state.method == Mode.CG

    def after(z: PyTree) -> State:
        on = dataclasses.replace(state, mode=jnp.int32(Mode.MINRES), go=z)
        again = choose(resume, on, begin_minres(state, x, r, z))
        return choose(end, done, choose(by_cg, begin_cg(state, x, r, z), again))

    return choose(resume & ~by_cg, state.short.v, r), after


def _null(problem: Problem, state: State, w: PyTree, along: jax.Array) -> Step:
    """Whether the recurrence's residual r is in the null space, given A r, or what to do to find out."""
    del along
    assert state.short is not None
    size, lost = norm_of(state.r), problem.noise * state.norm_a
    singular = norm_of(w) <= 2 * lost * size
    # The part of b in the null space, or what b - A x0 has lost to rounding: no range is known from that.
    there = jnp.where(size > lost * problem.began * state.unit_a, Verdict.SINGULAR, Verdict.STAGNATED)
    verdict = jnp.where(singular, there, Verdict.OPEN).astype(jnp.int32)
    judged = to_check(dataclasses.replace(state, verdict=verdict), jnp.ones((), bool))
    clear = ~singular & ~state.resume & ~state.short.ranged
    return w, lambda z: choose(clear, begin_minres(state, state.x, state.r, z, w), judged)


def steps_kept(op: LinearOperator, sides: int) -> int:
    """Steps whose directions are kept: two vectors for each, in a quarter of a device's free memory."""
    wanted, free = min(max(LEAST, KEPT // sides), MOST), host.available_bytes(op.device)
    if free is None:
        return wanted
    step = 2 * sides * Layout.of(op.like).device_bytes()
    return min(wanted, free // 4 // step)


def nothing_kept(problem: Problem, steps: int) -> Kept:
    """Room for the directions of so many steps."""

    def zeros(x: jax.Array) -> jax.Array:
        return jnp.concatenate([x] * steps) if steps else x[:0]

    none: PyTree = jax.tree.map(zeros, zeros_beside(problem.b))
    return none, none


def stored(kept: Kept, directions: PyTree, images: PyTree, step: jax.Array, when: jax.Array) -> Kept:
    """With the directions of a step, if there is room for them."""
    sides = stacks.length(directions)
    start = step * sides
    when &= start < stacks.length(kept[0])

    def put(x: jax.Array, y: jax.Array) -> jax.Array:
        if not len(x):
            return x
        old = lax.dynamic_slice_in_dim(x, start, sides)
        return lax.dynamic_update_slice_in_dim(x, jnp.where(when, y.astype(x.dtype), old), start, 0)

    return jax.tree.map(put, kept[0], directions), jax.tree.map(put, kept[1], images)


def conjugate(kept: Kept, directions: PyTree, steps: jax.Array) -> PyTree:
    """New directions, conjugate to those that are kept of the first `steps` of this cycle."""
    ours, images = kept
    if not stacks.length(ours):
        return directions
    along = stacks.inner(images, directions)
    there = jnp.arange(len(along)) < steps * stacks.length(directions)
    return stacks.subtract(directions, stacks.combine(jnp.where(there[:, None], along, 0).T, ours))
