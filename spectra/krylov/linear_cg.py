"""Conjugate gradients (Hestenes and Stiefel, doi:10.6028/jres.049.044), one product at a time.

What a product is for, and what follows where the curvature is not positive, is explained in `linear_step`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from spectra.base import trees
from spectra.base.trees import PyTree
from spectra.krylov.linear_minres import begin_minres
from spectra.krylov.linear_state import (
    Mode,
    Problem,
    State,
    Step,
    Verdict,
    choose,
    norm_of,
    refuse_inverse,
    to_check,
)


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
