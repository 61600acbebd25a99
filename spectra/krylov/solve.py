"""Linear systems: conjugate gradients where the operator is definite, MINRES where it turns out not to be."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spectra.base import trees
from spectra.base.errors import NonFiniteError, SpectraError, Status
from spectra.base.meshes import automatic
from spectra.base.trees import PyTree
from spectra.krylov import dense, wanted
from spectra.krylov import dense as dense_solve
from spectra.krylov.layout import stacked
from spectra.krylov.linear_state import Mode, Problem, State, Verdict, noise_of
from spectra.krylov.linear_step import absorb, start
from spectra.krylov.preconditioners import as_preconditioner
from spectra.operators.arithmetic import outside_loops
from spectra.operators.base import LinearOperator, require_operator
from spectra.results import Interval, Solution

METHODS = ("auto", "cg", "minres", "dense")
CHUNK = 256
"""Products of one compiled call: how often Ctrl-C is heard."""
DEFAULT_LIMIT = 10_000
_STATUS = {
    Verdict.CONVERGED: Status.CONVERGED,
    Verdict.STAGNATED: Status.STAGNATED,
    Verdict.BUDGET: Status.BUDGET_EXHAUSTED,
    Verdict.INDEFINITE: Status.INDEFINITE,
    Verdict.SINGULAR: Status.SINGULAR,
}
"""From the best to the worst."""


@automatic
def solve(
    op: LinearOperator,
    b: PyTree,
    *,
    shift: Any = 0.0,
    method: str = "auto",
    preconditioner: Any = None,
    tol: float = 1e-5,
    max_matvecs: int | None = None,
    lower_bound: float | None = None,
    x0: PyTree | None = None,
    key: jax.Array | None = None,
) -> Solution:
    """Solve (H + shift I) x = b, with the true residual of x and a bound on its error.

    Conjugate gradients run until they meet a direction whose curvature is not positive, to rounding; MINRES,
    which does not need definiteness, continues from there. When the recurrence reports a small residual, the
    true one is computed from x; if that is not small, the iteration restarts from it. So `residual_norm`
    belongs to the x returned, and an x that misses the tolerance is never called converged.

    **How wrong x is.** With A = H + shift I, |x - A⁻¹b| <= (|b - Ax| + rounding) / min |λ(A)|. The smallest
    |λ| is known if `lower_bound` states it, if the operator is positive semi-definite by construction
    (`GradientCovarianceOperator`, sampled and empirical `FisherOperator`) and shift > 0, or if the matrix was
    formed. Otherwise `error_bound` is infinite: Krylov steps see only the eigenvectors that b has components
    on, and an eigenvalue near zero without such a component shows in no residual. `condition_number(op, key=,
    shift=)` bounds it: pass its `smallest_interval.lower`. `rounding` is that of the product, from its stated
    precision; for a loss it is measured, by products at parameters that are moved by one rounding each. If A
    is definite with a known bound, `quadratic_form` brackets bᵀA⁻¹b: 2 bᵀx - xᵀAx plus 0 to |r|² / min λ.

    **Several right-hand sides**, as columns of an (n, k) array or with a leading axis, are solved side by
    side, each by its own iteration; their products form one batch.

    **Derivatives.** Inside jit, vmap and grad the same iteration runs. jax.grad differentiates x by the
    implicit function theorem, dx = A⁻¹ (db - dA x), at the cost of one more solve: with respect to b, the
    shift, and the operator's parameters and data.

    **Small operators.** If n products were not enough, and n is at most 2000, n more give the dense matrix,
    as for `eigsh`; `method` is "dense" then. These count towards `max_matvecs`.

    Args:
        op: symmetric operator of order n.
        b: right-hand side, a pytree like the parameters or a flat array (n,), or several of them.
        shift: added to every eigenvalue of H: the damping.
        method: "cg", which ends with status INDEFINITE where curvature is not positive; "minres"; "dense"; or
            "auto", CG followed by MINRES if needed.
        preconditioner: "nystrom", a randomised sketch that doubles until the remainder of H is near 10
            shifts, shared by all right-hand sides; `Eigenpairs` of H, which are deflated; a `KFACOperator` or
            `EKFACOperator` that approximates H, inverted with the shift as its damping; or a positive
            definite approximate inverse of A: an operator, anything with `mv`, or a function of a vector.
        tol: largest accepted |b - Ax| / |b|.
        max_matvecs: maximum number of products per right-hand side; default 10,000 or, where a dense matrix
            may follow, 2 n.
        lower_bound: lower bound on the |eigenvalues| of H + shift I, if known.
        x0: starting point, in the same form as b; default zero.
        key: JAX random key, for "nystrom".

    Returns:
        `Solution`. `status` is CONVERGED; STAGNATED, if the precision of products prevents reaching the
        tolerance; SINGULAR, if b lies outside the range, to rounding: x is NaN then, and `residual_norm` is
        the distance of b from the range; BUDGET_EXHAUSTED; or INDEFINITE. For several right-hand sides it is
        the worst, and `converged` distinguishes them. Inside jit it is TRACED: use `converged` there.

    Raises:
        SpectraError: an argument out of range; a preconditioner that is not positive definite.
        StructureError: b does not match the operator.
        NonFiniteError: b or a product is NaN or infinite.

    Cost: one product per step. Memory: ten vectors, four with method="cg", plus those of a preconditioner.

    Fails if A is singular but b lies in its range: x is one of many solutions, and `error_bound` is infinite.

    References:
        Hestenes and Stiefel, doi:10.6028/jres.049.044; Paige and Saunders, doi:10.1137/0712047;
        Frangella, Tropp and Udell, arXiv:2110.02820.

    Examples:
        >>> import jax.numpy as jnp, spectra
        >>> op = spectra.MatrixOperator(jnp.array([[2.0, 1.0], [1.0, -3.0]]))
        >>> solution = spectra.solve(op, jnp.array([3.0, -2.0]))
        >>> solution.x, solution.status.code
        (Array([1., 1.], dtype=float32), 'converged')
    """
    require_operator(op)
    _check_arguments(method, tol, max_matvecs, lower_bound, shift)
    traced = trees.is_traced((op, b, shift, x0, preconditioner, key))
    if traced and op.on_host:
        raise SpectraError(
            "an operator that streams its data cannot be solved with inside jit, vmap or grad."
        )
    b, several, back = stacked(op, b, "b")
    if not traced and not trees.all_finite(b):
        raise NonFiniteError("b is NaN or infinite somewhere.")
    if x0 is not None:
        x0, many, _ = stacked(op, x0, "x0")
        count = jax.tree.leaves(b)[0].shape[0]
        if many != several or jax.tree.leaves(x0)[0].shape[0] != count:
            raise SpectraError("x0 is another number of vectors than b.")
    shifted = op if isinstance(shift, (int, float)) and shift == 0 else op.shift(shift)
    inverse, built = as_preconditioner(preconditioner, op, shift, key, traced)
    if not traced:
        bound = _known_bound(op, shift, lower_bound)
        found = _concrete(shifted, b, x0, inverse, method, tol, max_matvecs, bound)
    else:
        found = _traced(shifted, b, x0, inverse, method, tol, max_matvecs, lower_bound)
    return _in_form(found, several, back, built)


def _check_arguments(method, tol, max_matvecs, lower_bound, shift) -> None:
    if method not in METHODS:
        raise SpectraError(f"method={method!r}: use one of {METHODS}.")
    if not 0 <= tol < 1:
        raise SpectraError(f"tol={tol} is a residual in units of |b|: use a number in [0, 1).")
    if max_matvecs is not None and max_matvecs < 2:
        raise SpectraError(f"max_matvecs={max_matvecs}: a step and the residual take two products.")
    if lower_bound is not None and not (lower_bound > 0 and math.isfinite(lower_bound)):
        raise SpectraError(f"lower_bound={lower_bound}: no |eigenvalue| is below it, a positive number.")
    if not trees.is_traced(shift) and not np.isfinite(shift):
        raise SpectraError(f"shift={shift}: use a finite number.")


def _known_bound(op: LinearOperator, shift: Any, given: float | None) -> tuple[float, str] | None:
    """A bound on the smallest |eigenvalue| and where it is from."""
    if given is not None:
        return float(given), "the given lower bound"
    if op.semidefinite and float(shift) > 0:
        return float(shift), "a positive semi-definite operator and its shift"
    return None


# The iteration.


def _prepared(op, b, inverse, method, tol, limit, reference) -> tuple[Problem, State]:
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


_start = jax.jit(_prepared, static_argnames=("method",))


def _loop(op: LinearOperator, problem: Problem, state: State, stop) -> State:
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


_chunk = jax.jit(_loop, donate_argnames=("state",))


@jax.jit
def _absorb(problem: Problem, state: State, products: PyTree) -> State:
    axes = _axes(problem.inverse, "cg" if problem.only_cg else "auto")
    return jax.vmap(absorb, in_axes=(axes, 0, 0))(problem, state, products)


def _drive(op: LinearOperator, problem: Problem, state: State) -> State:
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
def _outcome(problem: Problem, state: State, x0: PyTree | None) -> dict[str, Any]:
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


# Outside of jit.


def _concrete(op, b, x0, inverse, method, tol, max_matvecs, bound) -> Solution:
    may_be_dense = method == "auto" and inverse is None and dense.allowed(op, max_matvecs)
    if method == "dense":
        return dense_solve.solution(op, b, tol, 0)
    n = op.size
    if may_be_dense:
        limit = max(n, 2) if max_matvecs is None else min(n, max_matvecs - n)
        if limit < 2:
            return dense_solve.solution(op, b, tol, 0)
    else:
        limit = DEFAULT_LIMIT if max_matvecs is None else max_matvecs
    run = outside_loops(op.prepare())
    rest, extra = b, 0
    if x0 is not None:
        rest, extra = jax.tree.map(jnp.subtract, b, _multiply(run, x0)), 1
    problem, state = _start(run, rest, inverse, method, tol, limit, b)
    state = _drive(run, problem, state)
    found = _outcome(problem, state, x0)
    verdicts = np.asarray(found["verdict"])
    spent = int(np.sum(found["products"])) + extra * len(verdicts)
    if (verdicts == Verdict.NONFINITE).any():
        raise NonFiniteError(
            f"one of the first {spent} products is NaN or infinite. {op.explain_non_finite()}"
        )
    if (verdicts == Verdict.PRECONDITIONER).any():
        raise SpectraError("the preconditioner is not positive definite: rᵀPr < 0 for a residual r.")
    if may_be_dense and (verdicts == Verdict.BUDGET).any():
        return dense_solve.solution(op, b, tol, spent)
    if x0 is not None:
        images = _multiply(run, found["x"])
        found["residual"] = jnp.where(verdicts == Verdict.SINGULAR, found["residual"], _distances(b, images))
        spent += len(verdicts)
    return _judged(op, b, found, spent, bound, verdicts)


def _judged(op, b, found, spent: int, bound, verdicts) -> Solution:
    """The solution with its rounding, bound and status."""
    x, noise = found["x"], noise_of(op)
    sizes = np.asarray(_sizes(x), np.float64)
    residual = np.asarray(found["residual"], np.float64)
    # Of the product, and of the difference and its norm.
    moved = noise * (np.asarray(found["norm_a"], np.float64) * sizes + residual)
    if op.moved(jax.random.key(wanted.KEY)) is not None:
        here = op.prepare()
        for i in np.flatnonzero(np.isfinite(sizes) & (sizes > 0)):
            vector = jax.tree.map(lambda leaf, i=i: leaf[i], x)
            moved[i] = max(moved[i], wanted.change_of_product(op, vector, wanted.multiply(here, vector)))
    error = np.full(len(sizes), np.inf)
    form = Interval(*[np.full(len(sizes), np.nan)] * 3)
    known = np.isfinite(sizes)
    basis = "nothing bounds the spectrum away from zero"
    if bound is not None:
        error = np.where(known, (residual + moved) / bound[0], np.inf)
        basis = bound[1]
        if np.all(np.asarray(found["method"]) == Mode.CG):
            form = _quadratic_form(b, x, residual + moved, residual, bound[0], op)
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


def _quadratic_form(b, x, residual, computed, bound: float, op) -> Interval:
    """bᵀA⁻¹b = bᵀx + xᵀr + rᵀA⁻¹r for r = b - Ax, of which the last two are bounded by norms."""
    value = np.asarray(_dots(b, x), np.float64)
    sizes = np.asarray(_sizes(x), np.float64)
    summed = noise_of(op) * sizes * np.asarray(_sizes(b), np.float64)
    slack = sizes * residual + summed
    return Interval(value - slack, value, value + slack + residual**2 / bound)


@jax.jit
def _sizes(x: PyTree) -> jax.Array:
    return jax.vmap(trees.norm)(x)


@jax.jit
def _dots(a: PyTree, b: PyTree) -> jax.Array:
    return jax.vmap(trees.vdot)(a, b)


@jax.jit
def _distances(a: PyTree, b: PyTree) -> jax.Array:
    return jax.vmap(trees.norm)(jax.tree.map(jnp.subtract, a, b))


def _multiply(op: LinearOperator, stack: PyTree) -> PyTree:
    return op.mv_batch(stack)


# Inside jit, vmap or grad.


def _traced(op, b, x0, inverse, method, tol, max_matvecs, bound) -> Solution:
    """The same without looking at values; differentiated implicitly, never through the iteration."""
    if method == "dense":
        raise SpectraError("method='dense' factorises on the host: call it outside jit, vmap and grad.")
    limit = DEFAULT_LIMIT if max_matvecs is None else max_matvecs
    fixed, inverse, x0 = lax.stop_gradient((op, inverse, x0))

    def iterate(_, b):
        rest = b if x0 is None else jax.tree.map(jnp.subtract, b, jax.vmap(fixed.mv)(x0))
        problem, state = _prepared(fixed, rest, inverse, method, tol, limit, b)
        found = _outcome(problem, _loop(fixed, problem, state, limit), x0)
        return found.pop("x"), found

    x, found = lax.custom_linear_solve(jax.vmap(op.mv), b, iterate, symmetric=True, has_aux=True)
    found = lax.stop_gradient(found)
    count = jax.tree.leaves(b)[0].shape[0]
    still = lax.stop_gradient((x, b))
    residual = found["residual"]
    if x0 is not None:
        residual = _distances(still[1], jax.vmap(fixed.mv)(still[0]))
    moved = noise_of(op) * (found["norm_a"] * _sizes(still[0]) + residual)
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
        bound="the given lower bound" if bound is not None else "nothing bounds the spectrum away from zero",
        status=Status.TRACED,
    )


def _in_form(found: Solution, several: bool, back, built: int) -> Solution:
    """The solution in the form of the right-hand side; numbers where there is one."""

    def number(x):
        if several:
            return x
        return x[0].item() if isinstance(x, np.ndarray) else x[0]

    names = ("residual_norm", "rounding", "error_bound", "converged")
    numbers = {name: number(getattr(found, name)) for name in names}
    form = Interval(*map(number, found.quadratic_form))
    return dataclasses.replace(
        found, x=back(found.x), quadratic_form=form, preconditioner_matvecs=built, **numbers
    )
