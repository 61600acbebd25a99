"""The state that the solver of A x = b carries from product to product, and the `Solution` that it ends with.

The modes, and what a product is for in each of them, are explained in `linear_step`.
"""

import dataclasses
import enum
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spectra.base import programs, trees
from spectra.base.errors import Status
from spectra.base.trees import PyTree
from spectra.krylov.linear_rounding import noise_of, rounding_of
from spectra.krylov.product_rounding import seen_norm_traced
from spectra.operators.base import LinearOperator
from spectra.results import Interval, Solution


class Mode(enum.IntEnum):
    """What the next product is for."""

    CG = 0
    MINRES = 1
    CHECK = 2
    NULL = 3
    DONE = 4


class Verdict(enum.IntEnum):
    """How a run ended; OPEN while it goes on."""

    OPEN = 0
    CONVERGED = 1
    INDEFINITE = 2
    SINGULAR = 3
    STAGNATED = 4
    BUDGET = 5
    NONFINITE = 6
    PRECONDITIONER = 7


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Problem:
    """What stays the same: the right-hand side in its unit, the preconditioner, and limits."""

    b: PyTree  # in units of unit_b
    inverse: LinearOperator | None  # the preconditioner P, near A⁻¹
    unit_b: jax.Array
    unit_p: jax.Array
    target: jax.Array  # of |r|, in unit_b
    limit: jax.Array  # products
    noise: jax.Array  # rounding of one product, in units of |A|
    began: jax.Array  # |x0|, in unit_b: b is a residual, which has lost noise |A| |x0|
    only_cg: bool = dataclasses.field(metadata={"static": True})

    def precondition(self, r: PyTree) -> PyTree:
        """P r in its unit."""
        return r if self.inverse is None else trees.scale(1 / self.unit_p, self.inverse.mv(r))


def sides_of(problem: Problem) -> Any:
    """Which parts of a problem are there for every right-hand side: zeros and None in place of arrays."""
    shared = None if problem.inverse is None else jax.tree.map(lambda _: None, problem.inverse)
    each: Any = 0
    return Problem(each, shared, each, each, each, each, each, each, only_cg=problem.only_cg)


SHORT_VECTORS = ("v", "before", "d1", "d2", "u")
"""The fields of `Short` that are vectors; the others are numbers."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Short:
    """The vectors and numbers of MINRES beyond those of CG."""

    v: PyTree  # the Lanczos vector whose P-multiple is multiplied
    before: PyTree
    d1: PyTree  # directions of the last two updates
    d2: PyTree
    u: PyTree  # what A times the next direction has of the last vectors
    beta: jax.Array
    phi: jax.Array  # uᵀ P r: all of |r| where the run began from r
    cs: jax.Array
    sn: jax.Array
    dbar: jax.Array
    eps: jax.Array
    trigger: jax.Array  # |A r| / |r| below which r may be in the null space
    ranged: jax.Array  # the run began from A r


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """All that a run carries from product to product."""

    mode: jax.Array
    verdict: jax.Array
    method: jax.Array  # CG or MINRES, whichever a check goes on with
    x: PyTree
    r: PyTree  # the recurrence's residual, or the true one after a check
    go: PyTree  # what is multiplied next
    short: Short | None  # None where only CG is asked for
    unit_a: jax.Array
    norm_a: jax.Array  # largest |A v| / |v| so far
    scale: jax.Array  # of the preconditioned operator: largest row sum of T
    rz: jax.Array  # rᵀ P r
    size: jax.Array  # pᵀ P⁻¹ p
    step: jax.Array  # 1 / (step length) of CG before, with its factor: the last row of T
    couple: jax.Array
    norm_r: jax.Array  # of the true residual, at the last check
    best: jax.Array  # smallest |r| of MINRES that counted as progress
    idle: jax.Array  # steps since
    steps: jax.Array  # of this cycle
    resume: jax.Array  # after the check, go on with the same recurrence
    stale: jax.Array  # cycles in a row that took little off the true residual
    products: jax.Array


Step = tuple[PyTree, Callable[[PyTree], State]]
"""The one vector that a step gives to the preconditioner, and the state after what comes of it: so that all
modes can share one application."""


def to_check(state: State, when: jax.Array, verdict: Verdict = Verdict.OPEN) -> State:
    """The true residual next, where `when` and where the run has not ended; then the end with `verdict`."""
    when = when & (state.mode != Mode.DONE)
    said = state.verdict if verdict is Verdict.OPEN else jnp.int32(verdict)
    return dataclasses.replace(
        state,
        mode=jnp.where(when, jnp.int32(Mode.CHECK), state.mode),
        verdict=jnp.where(when, said, state.verdict),
        go=choose(when, state.x, state.go),
    )


def to_null(state: State, when: jax.Array, *, resume: bool) -> State:
    """Is the residual in the null space? If not, go on with the recurrence, or anew from the residual."""
    when = when & (state.mode != Mode.DONE)
    state = merge(state, when, idle=jnp.zeros_like(state.idle), resume=jnp.full_like(state.resume, resume))
    return dataclasses.replace(
        merge(state, when, mode=jnp.int32(Mode.NULL)), go=choose(when, state.r, state.go)
    )


def refuse_inverse(state: State, square: jax.Array, r: PyTree) -> State:
    """The end where rᵀ P r is negative: P is not positive definite."""
    bad = square < 0
    return merge(state, bad, mode=jnp.int32(Mode.DONE), verdict=jnp.int32(Verdict.PRECONDITIONER))


def zeros_beside(v: PyTree) -> PyTree:
    """Zeros that lie on a mesh as v does. Nothing says so of constants: each device would have them whole."""
    return jax.tree.map(lambda x: x - x, v)


def norm_of(v: PyTree) -> jax.Array:
    """|v|."""
    return jnp.sqrt(trees.vdot(v, v))


def merge(state: State, when: jax.Array, **fields: Any) -> State:
    """The state with other fields where `when`."""
    new = {name: jnp.where(when, value, getattr(state, name)) for name, value in fields.items()}
    return dataclasses.replace(state, **new)


def choose(when: jax.Array, a: Any, b: Any) -> Any:
    """All leaves of `a` where `when`, else of `b`."""
    return jax.tree.map(lambda x, y: jnp.where(when, x, y), a, b)


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
    flat: tuple[PyTree, PyTree],
) -> Solution:
    """The solution with its rounding, bound and status; `flat` are b and x as the run had them, packed.

    Where there is no solution, |b - A x| and its rounding are those of the x at which the run ended, which
    bound the distance of b from the range; x itself is NaN.
    """
    x, (flat_b, flat_x) = found["x"], flat
    known = (verdicts != Verdict.SINGULAR) & (verdicts != Verdict.NONFINITE)
    norms = np.asarray(sizes(flat_x), np.float64)
    residual, norm_a = (np.asarray(found[name], np.float64) for name in ("residual", "norm_a"))
    moved = rounding_of(op, b, x, residual, norm_a, norms)
    error = np.full(len(norms), np.inf)
    x = x if known.all() else _unless(known, x)
    basis = UNBOUNDED
    if bound is not None:
        error = np.where(known, (residual + moved) / bound[0], np.inf)
        basis = bound[1]
    lost = noise_of(op) * norms * np.asarray(sizes(flat_b), np.float64)
    value = np.where(known, _dots(flat_b, flat_x), np.nan)
    form = quadratic_form(value, norms, residual + moved, lost, bound and bound[0])
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


@programs.jit
def _unless(known: Any, x: PyTree) -> PyTree:
    """The vectors of a stack that are known, NaN in place of others: added, so that derivatives pass."""
    none = jnp.where(known, 0.0, jnp.nan)
    return jax.tree.map(lambda leaf: leaf + none.reshape(-1, *[1] * (leaf.ndim - 1)).astype(leaf.dtype), x)


def quadratic_form(value: Any, norms: Any, residual: Any, lost: Any, bound: float | None) -> Interval:
    """bᵀA⁻¹b = bᵀx + xᵀr + rᵀA⁻¹r for r = b - Ax, of which the last two are bounded by norms.

    `value` is bᵀx, of which `lost` is rounding, and `bound` one on |λ|, without which no end is known. That
    holds for every symmetric A: CG may have met no negative curvature of one that is not definite.
    """
    slack = lost + (math.inf if bound is None else norms * residual + residual**2 / bound)
    return Interval(value - slack, value, value + slack)


def traced_solution(
    op: LinearOperator, b: PyTree, x: PyTree, found: dict[str, Any], method: str, bound: float | None
) -> Solution:
    """The same inside jit, vmap and grad, without looking at values. Only x and bᵀx have derivatives."""
    verdicts = found["verdict"]
    still, b_still = lax.stop_gradient((x, b))
    known = (verdicts != Verdict.SINGULAR) & (verdicts != Verdict.NONFINITE)
    x = _unless(known, x)
    count = jax.tree.leaves(still)[0].shape[0]
    residual = found["residual"]
    seen = jnp.maximum(found["norm_a"], seen_norm_traced(op))
    moved = noise_of(op) * (seen * sizes(still) + residual)
    error = jnp.full(count, jnp.inf)
    if bound is not None:
        error = jnp.where(known, (residual + moved) / bound, jnp.inf)
    norms = sizes(still)
    lost = noise_of(op) * norms * sizes(b_still)
    form = quadratic_form(jax.vmap(trees.vdot)(b, x), norms, residual + moved, lost, bound)
    return Solution(
        x=x,
        residual_norm=residual,
        rounding=moved,
        error_bound=error,
        quadratic_form=form,
        converged=verdicts == Verdict.CONVERGED,
        num_matvecs=0,
        preconditioner_matvecs=0,
        method=method,
        bound="the given lower bound" if bound is not None else UNBOUNDED,
        status=Status.TRACED,
    )


@programs.jit
def sizes(x: PyTree) -> jax.Array:
    """|x| of each of several vectors."""
    return jax.vmap(trees.norm)(x)


def _dots(a: PyTree, b: PyTree) -> np.ndarray:
    """aᵀb of each pair, on the host: in the type of the vectors it may be too small or too large."""
    found, *units = (np.asarray(x, np.float64) for x in _dots_in_units(a, b))
    return found * units[0] * units[1]


@programs.jit
def _dots_in_units(a: PyTree, b: PyTree) -> tuple[jax.Array, jax.Array, jax.Array]:
    def one(a: PyTree, b: PyTree) -> tuple[jax.Array, jax.Array, jax.Array]:
        unit_a, unit_b = (trees.power_of_two(trees.largest(x)) for x in (a, b))
        return trees.vdot(trees.scale(1 / unit_a, a), trees.scale(1 / unit_b, b)), unit_a, unit_b

    return jax.vmap(one)(a, b)


@programs.jit
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
