"""Conjugate gradients (Hestenes and Stiefel, doi:10.6028/jres.049.044), one product at a time.

What a product is for, and what follows where the curvature is not positive, is explained in `linear_step`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from spectra.base import trees
from spectra.base.trees import PyTree
from spectra.krylov.linear_minres import begin_minres
from spectra.krylov.linear_state import (
    Mode,
    Problem,
    State,
    Verdict,
    choose,
    norm_of,
    refuse_inverse,
    to_check,
)


def begin_cg(problem: Problem, state: State, x: PyTree, r: PyTree) -> State:
    """CG from the residual r of x."""
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


def cg(problem: Problem, state: State, w: PyTree) -> State:
    """The step of CG that A p = w allows."""
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
    return lax.cond(definite, lambda: after, lambda: begin_minres(problem, failed, x, r))
