"""The `Solution` of A x = b: its rounding, its bound and its status, from what a run has found."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import trees
from spectra.base.errors import Status
from spectra.base.trees import PyTree
from spectra.krylov import wanted
from spectra.krylov.linear_state import Mode, Verdict, noise_of
from spectra.operators.base import LinearOperator
from spectra.results import Interval, Solution

_STATUS = {
    Verdict.CONVERGED: Status.CONVERGED,
    Verdict.STAGNATED: Status.STAGNATED,
    Verdict.BUDGET: Status.BUDGET_EXHAUSTED,
    Verdict.INDEFINITE: Status.INDEFINITE,
    Verdict.SINGULAR: Status.SINGULAR,
}
"""From the best to the worst."""
UNBOUNDED = "nothing bounds the spectrum away from zero"


def judged(
    op: LinearOperator,
    b: PyTree,
    found: dict[str, Any],
    spent: int,
    bound: tuple[float, str] | None,
    verdicts: np.ndarray,
) -> Solution:
    """The solution with its rounding, bound and status."""
    x, noise = found["x"], noise_of(op)
    norms = np.asarray(sizes(x), np.float64)
    residual = np.asarray(found["residual"], np.float64)
    # Of the product, and of the difference and its norm.
    moved = noise * (np.asarray(found["norm_a"], np.float64) * norms + residual)
    if op.moved(jax.random.key(wanted.KEY)) is not None:
        here = op.prepare()
        for i in np.flatnonzero(np.isfinite(norms) & (norms > 0)):
            vector = jax.tree.map(lambda leaf, i=i: leaf[i], x)
            moved[i] = max(moved[i], wanted.change_of_product(op, vector, wanted.multiply(here, vector)))
    error = np.full(len(norms), np.inf)
    form = Interval(*[np.full(len(norms), np.nan)] * 3)
    known = np.isfinite(norms)
    basis = UNBOUNDED
    if bound is not None:
        error = np.where(known, (residual + moved) / bound[0], np.inf)
        basis = bound[1]
        if np.all(np.asarray(found["method"]) == Mode.CG):
            form = _quadratic_form(b, x, residual + moved, bound[0], op)
    worst = max(verdicts.tolist(), key=list(_STATUS).index)
    names = {Mode.CG: "cg", Mode.MINRES: "minres"}
    return Solution(
        x=x,
        residual_norm=residual,
        rounding=moved,
        error_bound=error,
        quadratic_form=form,
        converged=verdicts == Verdict.CONVERGED,
        num_matvecs=spent,
        preconditioner_matvecs=0,
        method=names[Mode(max(np.asarray(found["method"]).tolist()))],
        bound=basis,
        status=_STATUS[Verdict(worst)],
    )


def _quadratic_form(b: PyTree, x: PyTree, residual: np.ndarray, bound: float, op: LinearOperator) -> Interval:
    """bᵀA⁻¹b = bᵀx + xᵀr + rᵀA⁻¹r for r = b - Ax, of which the last two are bounded by norms.

    rᵀA⁻¹r may be negative: that CG has met no negative curvature does not make A definite.
    """
    value = np.asarray(_dots(b, x), np.float64)
    norms = np.asarray(sizes(x), np.float64)
    summed = noise_of(op) * norms * np.asarray(sizes(b), np.float64)
    slack = norms * residual + summed + residual**2 / bound
    return Interval(value - slack, value, value + slack)


def traced_solution(
    op: LinearOperator, x: PyTree, still: PyTree, found: dict[str, Any], method: str, bound: float | None
) -> Solution:
    """The same inside jit, vmap and grad, without looking at values; `still` is x with no derivative."""
    count = jax.tree.leaves(still)[0].shape[0]
    residual = found["residual"]
    moved = noise_of(op) * (found["norm_a"] * sizes(still) + residual)
    error = jnp.full(count, jnp.inf) if bound is None else (residual + moved) / bound
    return Solution(
        x=x,
        residual_norm=residual,
        rounding=moved,
        error_bound=error,
        quadratic_form=Interval(*[jnp.full(count, jnp.nan)] * 3),
        converged=found["verdict"] == Verdict.CONVERGED,
        num_matvecs=0,
        preconditioner_matvecs=0,
        method=method,
        bound="the given lower bound" if bound is not None else UNBOUNDED,
        status=Status.TRACED,
    )


@jax.jit
def sizes(x: PyTree) -> jax.Array:
    """|x| of each of several vectors."""
    return jax.vmap(trees.norm)(x)


@jax.jit
def _dots(a: PyTree, b: PyTree) -> jax.Array:
    return jax.vmap(trees.vdot)(a, b)


@jax.jit
def distances(a: PyTree, b: PyTree) -> jax.Array:
    """|a - b| of each of several pairs."""
    return jax.vmap(trees.norm)(jax.tree.map(jnp.subtract, a, b))


def in_form(found: Solution, several: bool, back: Callable[[PyTree], PyTree], built: int) -> Solution:
    """The solution in the form of the right-hand side; numbers where there is one."""

    def number(x: Any) -> Any:
        if several:
            return x
        return x[0].item() if isinstance(x, np.ndarray) else x[0]

    names = ("residual_norm", "rounding", "error_bound", "converged")
    numbers = {name: number(getattr(found, name)) for name in names}
    form = Interval(*map(number, found.quadratic_form))
    return dataclasses.replace(
        found, x=back(found.x), quadratic_form=form, preconditioner_matvecs=built, **numbers
    )
