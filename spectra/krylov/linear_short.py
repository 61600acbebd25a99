"""The two short recurrences for A x = b, one product at a time.

Conjugate gradients (Hestenes and Stiefel, doi:10.6028/jres.049.044), and MINRES (Paige and Saunders,
doi:10.1137/0712047), which takes over where the curvature is not positive. What a product is for is
explained in `linear_step`.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from spectra.base import trees
from spectra.base.trees import PyTree
from spectra.krylov.linear_state import (
    Mode,
    Problem,
    Short,
    State,
    Step,
    Verdict,
    choose,
    norm_of,
    refuse_inverse,
    to_check,
    to_null,
    zeros_beside,
)

PATIENCE = 30
"""Steps of MINRES without progress before the residual is looked at, and a quarter of the steps so far."""
PROGRESS = 0.99


def begin_minres(state: State, x: PyTree, r: PyTree, z: PyTree, image: PyTree | None = None) -> State:
    """MINRES from the residual r of x; from A r, given as `image`, where r is all but in the null space.

    z is P times what it begins from.

    On the Krylov space of A r x has no part in the null space that could grow (Hanke's MR-II, Conjugate
    Gradient Type Methods for Ill-Posed Problems, 1995, section 6.1).
    """
    first = r if image is None else image
    square = trees.vdot(first, z)
    size = jnp.sqrt(jnp.maximum(square, 0))
    inverse = jnp.where(size > 0, 1 / jnp.where(size > 0, size, 1), 0)
    v, q = trees.scale(inverse, first), trees.scale(inverse, z)
    zeros, zero = zeros_beside(r), jnp.zeros_like(square)
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


def minres(problem: Problem, state: State, w: PyTree, alpha: jax.Array) -> Step:
    """The step of MINRES that A q = w allows, with alpha = qᵀ w."""
    assert state.short is not None
    s = state.short
    w = trees.axpy(-alpha, s.v, trees.axpy(-s.beta, s.before, w))
    return w, partial(_rotated, problem, state, s, w, alpha)


def _rotated(problem: Problem, state: State, s: Short, w: PyTree, alpha: jax.Array, z: PyTree) -> State:
    """The state after the next vector of the recurrence, in no unit: w, with z = P w."""
    q = state.go
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


def begin_cg(state: State, x: PyTree, r: PyTree, z: PyTree) -> State:
    """CG from the residual r of x, with z = P r."""
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


def is_definite(problem: Problem, state: State, curvature: jax.Array) -> jax.Array:
    """Whether pᵀAp is above rounding."""
    return curvature > problem.noise * _scale(state, curvature) * state.size


def _scale(state: State, curvature: jax.Array) -> jax.Array:
    return jnp.maximum(state.scale, curvature / state.size)


def cg(problem: Problem, state: State, w: PyTree, curvature: jax.Array) -> Step:
    """The step of CG that A p = w allows, where pᵀAp is positive."""
    p, rz = state.go, state.rz
    inverse = curvature / rz  # 1 / step length
    x = trees.axpy(rz / curvature, p, state.x)
    r = trees.axpy(-rz / curvature, w, state.r)

    def after(z: PyTree) -> State:
        new = trees.vdot(r, z)
        beta = new / rz
        # The row of T that belongs to this step: its sum bounds nothing, but is near |A| from the first on.
        couple = jnp.sqrt(jnp.maximum(beta, 0)) * inverse
        scale = jnp.maximum(_scale(state, curvature), inverse + state.step + couple + state.couple)
        after = dataclasses.replace(
            state,
            x=x,
            r=r,
            go=trees.axpy(beta, p, z),
            rz=new,
            size=new + beta**2 * state.size,
            scale=scale,
            norm_a=_norm_a(problem, state, scale),
            step=beta * inverse,
            couple=couple,
            steps=state.steps + 1,
            resume=jnp.zeros((), bool),
        )
        after = refuse_inverse(after, new, r)
        return to_check(after, (norm_of(r) <= problem.target) | (new == 0))

    return r, after


def _norm_a(problem: Problem, state: State, scale: jax.Array) -> jax.Array:
    return jnp.maximum(state.norm_a, scale) if problem.inverse is None else state.norm_a


def turn(problem: Problem, state: State, w: PyTree, curvature: jax.Array) -> Step:
    """From CG to MINRES, where pᵀAp is not positive; to the end where only CG is asked for."""
    del w
    scale = _scale(state, curvature)
    failed = dataclasses.replace(state, scale=scale, norm_a=_norm_a(problem, state, scale))
    if problem.only_cg:
        ended = to_check(failed, jnp.ones((), bool), verdict=Verdict.INDEFINITE)
        return state.r, lambda z: ended
    # What CG has found is worth keeping unless it is all rounding.
    norm_x, norm_r = norm_of(state.x), norm_of(state.r)
    keep = (norm_r <= problem.target * 1e3) | (norm_r <= 0.1 * norm_of(problem.b))
    keep &= problem.noise * state.norm_a * norm_x <= problem.target
    x = choose(keep, state.x, jax.tree.map(jnp.zeros_like, state.x))
    r = choose(keep, state.r, problem.b)
    return r, lambda z: begin_minres(failed, x, r, z)
