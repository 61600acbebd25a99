"""Linear systems: conjugate gradients where the operator is definite, MINRES where it turns out not to be."""

import math
import os
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spectra.base import programs, stacks, trees
from spectra.base.calls import automatic
from spectra.base.errors import NonFiniteError, SpectraError
from spectra.base.files import tree_digest
from spectra.base.trees import PyTree
from spectra.krylov import dense
from spectra.krylov.linear_run import begin, begin_from, drive, from_start, outcome, prepared, whole_run
from spectra.krylov.linear_state import Verdict, distances, in_form, judged, sizes, traced_solution
from spectra.krylov.packed import layout_of, pack, packed, unpack
from spectra.krylov.preconditioners import as_preconditioner, identity
from spectra.krylov.vectors import as_stack
from spectra.operators.base import LinearOperator, is_real_scalar, require_operator
from spectra.operators.jaxprs import outside_loops
from spectra.results import Solution
from spectra.runs.checkpoint import Checkpoint
from spectra.runs.watch import Journal, watched

METHODS = ("auto", "cg", "minres", "dense")
DEFAULT_LIMIT = 10_000


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
    progress: bool = False,
    checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
) -> Solution:
    """Solve (H + shift I) x = b, with the true residual of x and a bound on its error.

    Conjugate gradients run until they meet a direction whose curvature is not positive, to rounding; MINRES,
    which does not need definiteness, continues from there. When the recurrence reports a small residual, the
    true one is computed from x; if that is not small, the iteration restarts from it. So `residual_norm`
    belongs to the x returned, and an x that misses the tolerance is never called converged.

    **How wrong x is.** With A = H + shift I, |x - A⁻¹b| <= (|b - Ax| + rounding) / min |λ(A)|. The smallest
    |λ| is known if `lower_bound` states it, if the operator is positive semi-definite by construction
    (`GradientCovarianceOperator`, sampled and empirical `FisherOperator`) and shift > 0, or if the matrix was
    formed. Otherwise `error_bound` is infinite: Krylov steps see only the eigenvectors along which b has a
    component, so no residual reveals other eigenvalues near zero. `condition_number(op, key=, shift=)` bounds
    the smallest |λ|: pass its `smallest_interval.lower`. `rounding` is what `residual_norm` may be off by:
    where float64 is fast, as on a CPU or an H100, measured by a product in it, with what b and the entries of
    a matrix may have been rounded by before; elsewhere from the stated precision of a product, or for a loss
    by products that are rounded at random. If a bound is known, `quadratic_form` brackets bᵀA⁻¹b: bᵀx ±
    (|x| |r| + |r|² / min |λ|); its ends are infinite otherwise.

    **Rounding** makes textbook CG find the largest eigenvalues again and again. So the directions of the
    first steps are kept, and later ones made conjugate to them. At a damping of 1e-3 λ₁ that takes about half
    the products in float32 (docs/solving.md). Inside jit it is not done for a single right-hand side.

    **Several right-hand sides**, as columns of an (n, k) array or with a leading axis, are solved in blocks
    of up to 64, their products in one batch. Conjugate gradients use the directions of the whole block for
    each of them (block CG), which takes fewer products than as many separate calls; docs/solving.md has
    figures. If a block meets curvature that is not positive, or makes no more progress, each right-hand side
    continues by itself.

    **Derivatives.** Inside jit, vmap and grad the same methods run. jax.grad differentiates x by the
    implicit function theorem, dx = A⁻¹ (db - dA x), at the cost of one more solve: with respect to b, the
    shift, and the operator's parameters and data. x has derivatives, those of A⁻¹b however far off it is, and
    so has bᵀx, the estimate of `quadratic_form`; for all other fields they are zero.

    **Small operators.** If n products were not enough, and n is at most 2000, n more give the dense matrix,
    as for `eigsh`; `method` of the result is then "dense". These products count towards `max_matvecs`.

    Args:
        op: symmetric operator of order n.
        b: right-hand side, a pytree like the parameters or a flat array (n,), or several of them.
        shift: added to every eigenvalue of H: the damping.
        method: "cg", which ends with status INDEFINITE where curvature is not positive; "minres"; "dense"; or
            "auto", CG followed by MINRES if needed.
        preconditioner: "nystrom", a randomised sketch, shared by all right-hand sides, that doubles as long
            as this should save products in all; `Eigenpairs` of H, which are deflated; a `KFACOperator` or
            `EKFACOperator` that approximates H, inverted with the shift as its damping, or with more where it
            is wrong; or a positive definite approximate inverse of A: an operator, anything with `mv`, or a
            function of a vector. Not for method="dense".
        tol: largest accepted |b - Ax| / |b|.
        max_matvecs: maximum number of products per right-hand side; default 10,000 or, where a dense matrix
            may follow, 2 n. At least n for method="dense".
        lower_bound: lower bound on the |eigenvalues| of H + shift I, if known.
        x0: starting point, in the same form as b; costs two more products for each right-hand side; default
            zero, which is also taken where x0 is farther off, and rounding of A x0 would miss the tolerance.
            Not for method="dense".
        key: JAX random key, for "nystrom".
        progress: show the number of products and the residual.
        checkpoint: a folder, or a `Checkpoint`, to save the run in. The same call resumes from there, with
            bit-identical results on the same devices; a larger `max_matvecs` continues a run that had used
            up its own. Nothing is saved where a dense matrix is formed.

    Returns:
        `Solution`. `status` is CONVERGED; STAGNATED, if the precision of products, also of that with x0,
        prevents reaching the tolerance; SINGULAR, if b lies outside the range, up to rounding, in which case
        x is NaN, and b is no farther from the range than `residual_norm` with its `rounding`, those of the
        x where the run ended; BUDGET_EXHAUSTED; or INDEFINITE. For several right-hand sides it is the worst
        of their statuses, and `converged` distinguishes them. Inside jit it is TRACED: use `converged` there.

    Raises:
        SpectraError: an argument out of range; a preconditioner that is not positive definite; a lower bound
            above an |eigenvalue|, where the solution shows it.
        StructureError: b does not match the operator.
        NonFiniteError: b or a product is NaN or infinite.
        CheckpointError: the folder holds the checkpoint of another run.
        PreemptedError: the process was asked to end (SIGTERM or Ctrl-C), and the run is saved.

    Cost: one product per step, and those that measure rounding, which are not counted: one in float64, where
        that is fast, for each right-hand side, and six more for matrices and functions; elsewhere five for
        each right-hand side for a loss, three for other operators. Memory: ten vectors, those of a
        preconditioner, and those that are kept: 64 for one right-hand side, 128 for up to 32 together, 4 for
        each of more; fewer where that is more than a quarter of the free memory.

    Fails if A is singular but b lies in its range: x is one of many solutions, and `error_bound` is infinite.

    References:
        Hestenes and Stiefel, doi:10.6028/jres.049.044; O'Leary, doi:10.1016/0024-3795(80)90247-5; Paige and
        Saunders, doi:10.1137/0712047;
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
    if traced and checkpoint is not None:
        raise SpectraError("checkpoint= needs values, which do not exist inside jit, vmap or grad.")
    if method == "dense":
        _check_dense(op, preconditioner, x0, max_matvecs)
    b, several, back = as_stack(op, b, "b")
    if not traced and not trees.all_finite(b):
        raise NonFiniteError("b is NaN or infinite somewhere.")
    if not traced and method != "dense":
        _check_flushed(b, op)
    if x0 is not None:
        x0, many, _ = as_stack(op, x0, "x0")
        count = jax.tree.leaves(b)[0].shape[0]
        if many != several or jax.tree.leaves(x0)[0].shape[0] != count:
            raise SpectraError("x0 and b have different numbers of vectors.")
    shifted = op if isinstance(shift, (int, float)) and shift == 0 else op.shift(shift)

    def arguments() -> dict[str, Any]:
        plain = {"method": method, "tol": float(tol), "shift": float(shift)}
        vectors = {"b": tree_digest(b), "x0": None if x0 is None else tree_digest(x0)}
        return plain | vectors | {"preconditioner": identity(preconditioner, op.structure)}

    with (
        watched("solve", progress and not traced, checkpoint, None, arguments) as watch,
        watch.journal(shifted, key) as journal,
    ):
        inverse, built = as_preconditioner(
            preconditioner, op, shift, key, traced, sides=stacks.length(b), tol=tol, journal=journal
        )
        if not traced:
            bound = _known_bound(op, shift, lower_bound)
            found = _concrete(shifted, b, x0, inverse, method, tol, max_matvecs, bound, journal)
            _check_bound(lower_bound, b, found)
        else:
            found = _traced(shifted, b, x0, inverse, method, tol, max_matvecs, lower_bound)
    return in_form(found, several, back, built)


def _check_arguments(
    method: str, tol: float, max_matvecs: int | None, lower_bound: float | None, shift: Any
) -> None:
    if method not in METHODS:
        raise SpectraError(f"method={method!r}: use one of {METHODS}.")
    if not 0 <= tol < 1:
        raise SpectraError(f"tol={tol} is a residual in units of |b|: use a number in [0, 1).")
    if max_matvecs is not None and max_matvecs < 2:
        raise SpectraError(
            f"max_matvecs={max_matvecs}: at least two are needed, for a step and for the residual."
        )
    if lower_bound is not None and not (lower_bound > 0 and math.isfinite(lower_bound)):
        raise SpectraError(f"lower_bound={lower_bound}: no |eigenvalue| is below it, a positive number.")
    if not is_real_scalar(shift) or not (trees.is_traced(shift) or np.isfinite(shift)):
        raise SpectraError(f"shift={shift!r}: use a finite real number.")


def _check_flushed(b: PyTree, op: LinearOperator) -> None:
    """Raise where a part of b that counts is below the normal numbers: devices take that for zero."""
    least = float(jnp.finfo(op.dtype).tiny)
    for i in np.flatnonzero(np.asarray(_largest(b)) <= least / op.precision):  # above, rounding hides it
        entries = np.concatenate([np.asarray(x)[i].ravel().astype(np.float64) for x in jax.tree.leaves(b)])
        unit = np.abs(entries).max(initial=0) or 1.0
        lost = np.linalg.norm(entries[np.abs(entries) < least] / unit)
        share = lost / (np.linalg.norm(entries / unit) or 1.0)
        if share > op.precision:
            which = f"right-hand side {i}" if len(_largest(b)) > 1 else "b"
            raise SpectraError(
                f"{share:.1%} of {which} is below {least:.1e}, the smallest normal number of {op.dtype}, "
                "and would be taken for zero. Multiply b by a power of two, and divide x by it."
            )


_largest = programs.jit(jax.vmap(trees.largest))


def _check_dense(op: LinearOperator, preconditioner: Any, x0: PyTree | None, max_matvecs: int | None) -> None:
    """What has no meaning where the matrix is factorised."""
    for name, value in {"preconditioner": preconditioner, "x0": x0}.items():
        if value is not None:
            raise SpectraError(
                f"method='dense' factorises the matrix: {name}= is for 'cg', 'minres' and 'auto'."
            )
    if max_matvecs is not None and max_matvecs < op.size:
        raise SpectraError(
            f"max_matvecs={max_matvecs}: method='dense' forms the matrix by {op.size} products. Allow "
            "as many, or use another method."
        )


def _known_bound(op: LinearOperator, shift: Any, given: float | None) -> tuple[float, str] | None:
    """A bound on the smallest |eigenvalue| and where it is from."""
    if given is not None:
        return float(given), "the given lower bound"
    if op.semidefinite and float(shift) > 0:
        return float(shift), "a positive semi-definite operator and its shift"
    return None


def _check_bound(given: float | None, b: PyTree, found: Solution) -> None:
    """Raise where a solution belies the bound given: |Ax| is at least min |λ| |x|, at most |b| + |b - Ax|."""
    if given is None:
        return
    norms = np.asarray(sizes(found.x), np.float64)
    images = np.asarray(sizes(b), np.float64) + found.residual_norm + found.rounding
    belied = np.flatnonzero(given * norms > images * (1 + _SLACK))
    if len(belied):
        least = float(images[belied[0]] / norms[belied[0]])
        raise SpectraError(
            f"lower_bound={given}: |A x| is at most {least:.3g} |x| for the x found here, so an |eigenvalue| "
            "of A = H + shift I is below. Pass a bound on the smallest of them, or leave it out."
        )


_SLACK = 1e-3  # above what rounding takes from the norms of vectors in half precision, sums in float32


# Outside of jit.


def _concrete(
    op: LinearOperator,
    b: PyTree,
    x0: PyTree | None,
    inverse: LinearOperator | None,
    method: str,
    tol: float,
    max_matvecs: int | None,
    bound: tuple[float, str] | None,
    journal: Journal | None,
) -> Solution:
    may_be_dense = method == "auto" and inverse is None and dense.allowed(op, max_matvecs)
    if method == "dense":
        return dense.solution(op, b, tol, 0, bound)
    n = op.size
    if may_be_dense:
        limit = max(n, 2) if max_matvecs is None else min(n, max_matvecs - n)
        if limit < 2:
            return dense.solution(op, b, tol, 0, bound)
    else:
        limit = DEFAULT_LIMIT if max_matvecs is None else max_matvecs
    base = outside_loops(op.prepare())
    layout = layout_of(base, journal)
    run, inverse = packed(layout, base), packed(layout, inverse)
    whole, x0 = pack(layout, b), pack(layout, x0)
    rest, extra = whole, 0
    if x0 is not None:
        (rest, x0), extra = begin_from(run, whole, x0, run.mv_batch(x0), tol), 1
    problem, state = begin(run, rest, inverse, method, tol, limit, whole, x0)
    state = drive(run, problem, state, method, journal)
    found = outcome(problem, state, x0)
    flat = whole, found["x"]
    found["x"] = unpack(layout, flat[1])
    verdicts = np.asarray(found["verdict"])
    spent = int(np.sum(found["products"])) + extra * len(verdicts)
    if (verdicts == Verdict.NONFINITE).any():
        raise NonFiniteError(
            f"one of the first {spent} products is NaN or infinite. {op.explain_non_finite()}"
            + " So may be the preconditioner's, which are multiplied next." * (inverse is not None)
        )
    if (verdicts == Verdict.PRECONDITIONER).any():
        raise SpectraError("the preconditioner is not positive definite: rᵀPr < 0 for a residual r.")
    if may_be_dense and (verdicts == Verdict.BUDGET).any():
        return dense.solution(op, b, tol, spent, bound)
    if x0 is not None:
        found["residual"] = distances(b, base.mv_batch(found["x"]))
        verdicts = np.asarray(_of_the_sum(verdicts, found["residual"], b, tol))
        spent += len(verdicts)
    return judged(op, b, found, spent, bound, verdicts, flat)


def _of_the_sum(verdicts: Any, residual: Any, b: PyTree, tol: float) -> jax.Array:
    """The verdicts on x0 + dx, whose rounding the iteration for dx does not see."""
    missed = (verdicts == Verdict.CONVERGED) & ~(residual <= tol * sizes(b))
    return jnp.where(missed, Verdict.STAGNATED, verdicts)


# Inside jit, vmap or grad.


def _traced(
    op: LinearOperator,
    b: PyTree,
    x0: PyTree | None,
    inverse: LinearOperator | None,
    method: str,
    tol: float,
    max_matvecs: int | None,
    bound: float | None,
) -> Solution:
    """The same without looking at values; differentiated implicitly, never through the iteration."""
    if method == "dense":
        raise SpectraError("method='dense' factorises on the host: call it outside jit, vmap and grad.")
    limit = DEFAULT_LIMIT if max_matvecs is None else max_matvecs
    fixed, inverse, x0 = lax.stop_gradient((op, inverse, x0))

    def iterate(_: Any, b: PyTree) -> tuple[PyTree, dict[str, Any]]:
        rest, begun = (b, None) if x0 is None else from_start(fixed, b, x0, stacks.mapped(fixed.mv, x0), tol)
        problem, state = prepared(fixed, rest, inverse, method, tol, limit, b, begun)
        found = outcome(problem, whole_run(fixed, problem, state, method, limit), begun)
        return found.pop("x"), found

    x, found = lax.custom_linear_solve(
        partial(stacks.mapped, op.mv), b, iterate, symmetric=True, has_aux=True
    )
    found = lax.stop_gradient(found)
    x_still, b_still = lax.stop_gradient((x, b))
    if x0 is not None:
        found["residual"] = distances(b_still, stacks.mapped(fixed.mv, x_still))
        found["verdict"] = _of_the_sum(found["verdict"], found["residual"], b_still, tol)
    return traced_solution(fixed, b, x, found, method, bound)
