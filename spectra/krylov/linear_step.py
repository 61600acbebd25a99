"""One step of the solver of A x = b: conjugate gradients, MINRES and what judges them, as one pure function.

A step is given the product of A with `state.go` and says what to multiply next, so that one body serves a
compiled loop, `vmap` over right-hand sides, and products that are driven from the host. What the product is
for is the state's `mode`:

* CG, on the direction p. It ends where pᵀAp is not above rounding: A is indefinite, or singular.
* MINRES (Paige and Saunders, doi:10.1137/0712047), on a vector of the preconditioned Lanczos recurrence.
* CHECK, on the iterate itself: the residual b - A x as it is, where a recurrence says that it is small. A
  method goes on from there where that is not so, which makes good what short recurrences lose to rounding:
  MINRES alone is off by κ² roundings (Sleijpen, van der Vorst and Modersitzki,
  doi:10.1137/S0895479897323087).
* NULL, on the residual: where A r vanishes and r does not, b is outside of the range. MINRES is not driven
  far into that, since what x has along the null space grows like |r| / |A r|: a run from the true residual
  clears what b - A x has lost to rounding, and tells the two apart.

Everything is in units, powers of two: b / unit_b, A / unit_a from the first product, P / unit_p. Squares
neither under- nor overflow then, and c A with c b go through the same numbers.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from spectra.base import trees
from spectra.base.trees import PyTree
from spectra.krylov.linear_state import (
    Mode,
    Problem,
    Short,
    State,
    Verdict,
    choose,
    merge,
    norm_of,
    refuse_inverse,
    to_check,
    to_null,
)

PATIENCE = 30
"""Steps of MINRES without progress before the residual is looked at, and a quarter of the steps so far."""
PROGRESS = 0.99
HALF = 0.5
"""A cycle that takes less than this off the true residual is stale."""
STALE = 1
"""Stale cycles in a row that are allowed; beyond, the precision's floor is met."""


def start(problem: Problem, dtype, method: Mode) -> State:
    """The state before the first product, from x = 0."""
    zero, zeros = jnp.zeros((), dtype), jax.tree.map(jnp.zeros_like, problem.b)
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
    begin = _begin_minres if method is Mode.MINRES else _begin_cg
    state = begin(problem, state, zeros, problem.b)
    # Nothing to do for b = 0.
    none = state.norm_r <= problem.target
    return merge(state, none, mode=jnp.int32(Mode.DONE), verdict=jnp.int32(Verdict.CONVERGED))


def _no_short(zeros: PyTree, zero: jax.Array) -> Short:
    """What MINRES holds before it begins."""
    vectors = ("v", "before", "d1", "d2", "u")
    numbers = ("beta", "phi", "cs", "sn", "dbar", "eps", "trigger")
    return Short(**dict.fromkeys(vectors, zeros), **dict.fromkeys(numbers, zero), ranged=zero > 0)


def absorb(problem: Problem, state: State, product: PyTree) -> State:
    """The state after the product of A with `state.go`."""
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
    branches = [
        _cg,
        _ended if problem.only_cg else _minres,
        _check,
        _ended if problem.only_cg else _null,
        _ended,
    ]
    after = lax.switch(state.mode, [partial(branch, problem) for branch in branches], state, w)
    going = state.mode != Mode.DONE
    after = merge(
        after, going & ~jnp.isfinite(image), mode=jnp.int32(Mode.DONE), verdict=jnp.int32(Verdict.NONFINITE)
    )
    iterating = (after.mode == Mode.CG) | (after.mode == Mode.MINRES)
    spent = going & iterating & (after.products >= problem.limit - 1)
    return to_check(after, spent, verdict=Verdict.BUDGET)


def _ended(problem: Problem, state: State, w: PyTree) -> State:
    """The state as it is; also in place of modes that a run never has."""
    del problem, w
    return state


# Conjugate gradients (Hestenes and Stiefel, doi:10.6028/jres.049.044).


def _begin_cg(problem: Problem, state: State, x: PyTree, r: PyTree) -> State:
    z = problem.precondition(r)
    rz = trees.vdot(r, z)
    zero = jnp.zeros_like(rz)
    state = dataclasses.replace(
        state,
        mode=jnp.int32(Mode.CG),
        method=jnp.int32(Mode.CG),
        x=x,
        r=r,
        go=z,
        rz=rz,
        size=rz,
        step=zero,
        couple=zero,
        steps=jnp.zeros_like(state.steps),
    )
    return refuse_inverse(state, rz, r)


def _cg(problem: Problem, state: State, w: PyTree) -> State:
    p, rz = state.go, state.rz
    curvature = trees.vdot(p, w)
    scale = jnp.maximum(state.scale, curvature / state.size)
    definite = curvature > problem.noise * scale * state.size
    inverse = curvature / rz  # 1 / step length
    length = jnp.where(definite, rz / jnp.where(definite, curvature, 1), 0)
    x = trees.axpy(length, p, state.x)
    r = trees.axpy(-length, w, state.r)
    z = problem.precondition(r)
    new = trees.vdot(r, z)
    beta = new / rz
    # The row of T that belongs to this step: its sum bounds nothing, but is near |A| from the first steps on.
    couple = jnp.sqrt(jnp.maximum(beta, 0)) * inverse
    scale = jnp.where(definite, jnp.maximum(scale, inverse + state.step + couple + state.couple), scale)
    norm_a = jnp.maximum(state.norm_a, scale) if problem.inverse is None else state.norm_a
    after = dataclasses.replace(
        state,
        x=x,
        r=r,
        go=trees.axpy(beta, p, z),
        rz=new,
        size=new + beta**2 * state.size,
        scale=scale,
        norm_a=norm_a,
        step=beta * inverse,
        couple=couple,
        steps=state.steps + 1,
    )
    after = refuse_inverse(after, new, r)
    after = dataclasses.replace(after, resume=jnp.zeros((), bool))
    after = to_check(after, (norm_of(r) <= problem.target) | (new == 0))
    failed = dataclasses.replace(state, scale=scale, norm_a=norm_a)
    if problem.only_cg:
        failed = to_check(failed, jnp.ones((), bool), verdict=Verdict.INDEFINITE)
        return choose(definite, after, failed)
    # What CG has found is worth keeping unless it is all rounding.
    norm_x, norm_r = norm_of(state.x), norm_of(state.r)
    keep = (norm_r <= problem.target * 1e3) | (norm_r <= 0.1 * norm_of(problem.b))
    keep &= problem.noise * state.norm_a * norm_x <= problem.target
    x = choose(keep, state.x, jax.tree.map(jnp.zeros_like, state.x))
    r = choose(keep, state.r, problem.b)
    return lax.cond(definite, lambda: after, lambda: _begin_minres(problem, failed, x, r))


# MINRES.


def _begin_minres(problem: Problem, state: State, x: PyTree, r: PyTree, image: PyTree | None = None) -> State:
    """MINRES from the residual r of x; from A r, given as `image`, where r is all but in the null space.

    On the Krylov space of A r x has no part in the null space that could grow (Hanke's MR-II, Conjugate
    Gradient Type Methods for Ill-Posed Problems, 1995, section 6.1).
    """
    assert state.short is not None
    first = r if image is None else image
    z = problem.precondition(first)
    square = trees.vdot(first, z)
    size = jnp.sqrt(jnp.maximum(square, 0))
    inverse = jnp.where(size > 0, 1 / jnp.where(size > 0, size, 1), 0)
    v, q = trees.scale(inverse, first), trees.scale(inverse, z)
    zeros, zero = jax.tree.map(jnp.zeros_like, r), jnp.zeros_like(square)
    short = Short(
        v=v,
        before=zeros,
        d1=zeros,
        d2=zeros,
        u=v,
        beta=zero,
        phi=size if image is None else trees.vdot(q, r),
        cs=zero - 1,
        sn=zero,
        dbar=zero,
        eps=zero,
        trigger=zero,
        ranged=jnp.full((), image is not None),
    )
    state = dataclasses.replace(
        state,
        mode=jnp.int32(Mode.MINRES),
        method=jnp.int32(Mode.MINRES),
        x=x,
        r=r,
        go=q,
        short=short,
        best=norm_of(r),
        idle=jnp.zeros_like(state.idle),
        steps=jnp.zeros_like(state.steps),
    )
    return refuse_inverse(state, square, first)


def _minres(problem: Problem, state: State, w: PyTree) -> State:
    s = state.short
    assert s is not None
    q = state.go
    alpha = trees.vdot(q, w)
    w = trees.axpy(-alpha, s.v, trees.axpy(-s.beta, s.before, w))
    z = problem.precondition(w)
    square = trees.vdot(w, z)
    beta = jnp.sqrt(jnp.maximum(square, 0))
    scale = jnp.maximum(state.scale, jnp.abs(alpha) + s.beta + beta)
    norm_a = jnp.maximum(state.norm_a, scale) if problem.inverse is None else state.norm_a
    # The QR factors of T grow by a column, with one rotation.
    delta, gbar = s.cs * s.dbar + s.sn * alpha, s.sn * s.dbar - s.cs * alpha
    eps, dbar = s.sn * beta, -s.cs * beta
    gamma = jnp.hypot(gbar, beta)
    least = problem.noise * scale
    root = jnp.hypot(gbar, dbar)  # |A r| / |r| of the residual before this step
    trigger = jnp.where(state.steps == 0, jnp.sqrt(problem.noise) * root, s.trigger)
    null = ~s.ranged & (root <= jnp.maximum(least, trigger)) | (gamma <= least)
    cs, sn = gbar / jnp.where(null, 1, gamma), beta / jnp.where(null, 1, gamma)
    ends = beta <= least
    inverse = jnp.where(ends, 0, 1 / jnp.where(ends, 1, beta))
    v, q_next = trees.scale(inverse, w), trees.scale(inverse, z)
    # vᵀr is zero where the run began from r, and is left at that: rounding makes it no better.
    along = jnp.where(s.ranged, trees.vdot(q_next, state.r), 0)
    step, phi = cs * s.phi + sn * along, sn * s.phi - cs * along
    d = trees.axpy(-delta, s.d2, trees.axpy(-s.eps, s.d1, q))
    d = trees.scale(1 / jnp.where(null, 1, gamma), d)
    x = trees.axpy(step, d, state.x)
    # A d = cs u + sn v, and what is left of u goes with the rest.
    r = trees.axpy(-step * cs, s.u, trees.axpy(-step * sn, v, state.r))
    u = jax.tree.map(lambda u, v: (sn * u - cs * v).astype(u.dtype), s.u, v)
    norm = norm_of(r)
    cleared = s.ranged & (jnp.abs(step) <= problem.noise / 2 * norm)
    better = norm < PROGRESS * state.best
    after = dataclasses.replace(
        state,
        x=x,
        r=r,
        go=q_next,
        short=Short(v, s.v, s.d2, d, u, beta, phi, cs, sn, dbar, eps, trigger, s.ranged),
        scale=scale,
        norm_a=norm_a,
        best=jnp.where(better, norm, state.best),
        idle=jnp.where(better, 0, state.idle + 1),
        steps=state.steps + 1,
    )
    kept = dataclasses.replace(state, scale=scale, norm_a=norm_a)
    idle = after.idle > jnp.maximum(PATIENCE, after.steps // 4)
    reached = (norm <= problem.target) | (ends & ~s.ranged)
    after = refuse_inverse(after, square, w)
    after = to_null(after, (cleared | (s.ranged & ends)) & ~reached, resume=False)
    after = to_null(after, idle & ~reached & (after.mode == Mode.MINRES), resume=True)
    return choose(null, to_null(kept, jnp.ones((), bool), resume=False), to_check(after, reached))


# What judges them.


def _check(problem: Problem, state: State, w: PyTree) -> State:
    """The true residual of x, and where to go on from it."""
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
        return choose(end, done, _begin_cg(problem, state, x, r))
    on = dataclasses.replace(state, mode=jnp.int32(Mode.MINRES), go=problem.precondition(state.short.v))
    again = lax.cond(
        state.method == Mode.CG,
        lambda: _begin_cg(problem, state, x, r),
        lambda: choose(resume, on, _begin_minres(problem, state, x, r)),
    )
    return choose(end, done, again)


def _null(problem: Problem, state: State, w: PyTree) -> State:
    """Whether the recurrence's residual r is in the null space, given A r, or what to do to find out."""
    assert state.short is not None
    singular = norm_of(w) <= 2 * problem.noise * state.norm_a * norm_of(state.r)
    verdict = jnp.where(singular, Verdict.SINGULAR, Verdict.OPEN).astype(jnp.int32)
    judged = to_check(dataclasses.replace(state, verdict=verdict), jnp.ones((), bool))
    clear = ~singular & ~state.resume & ~state.short.ranged
    return lax.cond(clear, lambda: _begin_minres(problem, state, state.x, state.r, w), lambda: judged)
