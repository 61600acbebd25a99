"""Operators that are small enough for a dense matrix: eigenpairs and linear systems."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import arrays, host, programs, stacks, trees
from spectra.base.errors import Status
from spectra.base.host import one_thread
from spectra.krylov import wanted
from spectra.krylov.cancelled import rounds_columns
from spectra.krylov.linear_rounding import known_rounding
from spectra.krylov.linear_state import quadratic_form
from spectra.krylov.matrices import LARGEST, Matrix, matrix_of
from spectra.krylov.product_rounding import change_of_matrix, error_of_matrix, mixtures, vanished
from spectra.krylov.shifts import largest_shift
from spectra.operators.base import LinearOperator
from spectra.results import Eigenpairs, Solution

PyTree = object


def allowed(op: LinearOperator, max_matvecs: int | None) -> bool:
    """Whether the n products of a dense matrix are, and the matrix fits."""
    n, free = op.size, host.available_bytes(op.device)
    if n > LARGEST or (max_matvecs is not None and max_matvecs < n):
        return False
    return free is None or 3 * n * n * jnp.dtype(op.dtype).itemsize <= free // 2


Residuals = Callable[[np.ndarray, np.ndarray], np.ndarray]  # of values and vectors


def dense_eigenpairs(
    op: LinearOperator, k: int, which: str, tol: float, deflate: Eigenpairs | None = None
) -> tuple[Eigenpairs, list[PyTree]]:
    """k eigenpairs by LAPACK in float64 on the host, from n products, and the images of their mixtures."""
    matrix = np.asarray(op.as_matrix(), np.float64)
    n = len(matrix)
    if deflate is None:
        values, vectors = np.linalg.eigh(matrix)
    else:
        rest = np.linalg.qr(deflate.matrix(), mode="complete")[0][:, len(deflate.values) :]
        values, small = np.linalg.eigh(rest.T @ matrix @ rest)
        vectors = rest @ small
    # The matrix carries the rounding of n products of relative error `precision`.
    floor = max(op.precision, np.sqrt(n) * np.finfo(float).eps) * np.sqrt(n) * float(np.abs(values).max())

    def residuals(values: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        return arrays.norms(matrix @ vectors - vectors * values, axis=0)

    pairs = chosen_pairs(op, k, which, tol, values, vectors, residuals, floor)
    images = mixtures(k) @ pairs.matrix().T.astype(np.float64) @ matrix
    return pairs, stacks.split(as_tree(op, images.T))


def chosen_pairs(
    op: LinearOperator,
    k: int,
    which: str,
    tol: float,
    values: np.ndarray,
    vectors: np.ndarray,
    residuals: Residuals,
    floor: float,
) -> Eigenpairs:
    """The k that are wanted of all pairs; `residuals(values, vectors)` are theirs."""
    scale = float(np.max(np.abs(values)))
    chosen = np.sort(wanted.order(values, which)[:k])
    values, vectors = values[chosen], vectors[:, chosen]
    errors = residuals(values, vectors)
    converged = errors <= max(tol * scale, floor)  # unless pairs that are deflated are rough
    null = bool(np.any(np.abs(values) <= floor))
    done = Status.CONVERGED if converged.all() else Status.NOT_CONVERGED
    return Eigenpairs(
        values=values,
        vectors=as_tree(op, vectors),
        residuals=errors,
        converged=converged,
        which=which,
        size=op.size,
        num_matvecs=op.size,
        num_restarts=0,
        missed=0.0,
        noise_floor=floor,
        status=Status.SINGULAR if which == "SM" and null else done,
    )


def as_tree(op: LinearOperator, columns: np.ndarray) -> PyTree:
    """Columns (n, k) as one pytree with leaves (k, *leaf.shape), in the working dtypes."""
    structure = op.structure
    return jax.vmap(lambda row: trees.unravel(row, structure))(jnp.asarray(columns.T, op.dtype))


def matrix_error(op: LinearOperator, matrix: Matrix, values: np.ndarray) -> float:
    """A bound on the spectral norm of what rounding did to the matrix of `op` and to its eigenvalues.

    It is measured where products are known in float64; constants of the program are still rounded. Elsewhere
    the Frobenius norm bounds it. Columns are right to `precision` of themselves, or of |H|: measured on
    float32 Hessians of networks, the spectral norm was up to 1.8 precision sqrt(n) |H|, with |H| before it is
    shifted. Where products subtract larger numbers it is more, as measured by eight of them. The float64
    eigensolver is backward stable, with n eps |H| as in `numpy.linalg.matrix_rank`.
    """
    n, norm = len(values), float(np.abs(values).max())
    if not norm:
        return vanished(op)
    solver = n * float(np.finfo(float).eps) * norm
    if matrix.unrounded is not None:
        return (
            error_of_matrix(op, matrix.entries, matrix.unrounded)
            + float(jnp.finfo(op.dtype).eps) / 2 * norm
            + solver
        )
    if rounds_columns(op):
        columns = 4 * op.precision * np.sqrt(n) * (norm + float(largest_shift(op)))
    elif op.cancels:
        columns = 4 * op.precision * np.sqrt(n) * norm
    else:
        columns = op.precision * norm * float(np.linalg.norm(values / norm)) if norm else 0.0
    return max(columns, change_of_matrix(op)) + solver


def solution(
    op: LinearOperator, b: PyTree, tol: float, spent: int, known: tuple[float, str] | None = None
) -> Solution:
    """Solutions from the eigenpairs of the dense matrix in float64, for n products; x is rounded once.

    Eigenvalues within the error of the matrix count as zero. By Weyl's theorem no |λ| of the operator is
    below the smallest of the matrix less that error, on which the error bound rests.
    """
    found = matrix_of(op)
    matrix, n = found.entries, op.size
    with one_thread():
        values, vectors = np.linalg.eigh(matrix)
    error = matrix_error(op, found, values)
    rows = np.asarray(_as_rows(b), np.float64)
    zero = np.abs(values) <= error
    coefficients = rows @ vectors
    # What rounding of the vectors lets a b of the range have along the null ones: all of it, where they are
    # no better known than others.
    scale = float(np.abs(values).max()) or 1.0
    gap = float(np.min(np.abs(values[~zero]), initial=scale))
    slack = max(tol, 4 * error / gap)
    sizes = arrays.norms(rows, axis=1)
    outside = arrays.norms(coefficients[:, zero], axis=1)
    singular = outside > slack * sizes
    inverse = np.where(zero, 0, 1 / np.where(zero, 1, values))
    x = _as_stack(op, (coefficients * inverse) @ vectors.T)
    kept = np.asarray(_as_rows(x), np.float64)  # as it was rounded
    residual = arrays.norms(rows - kept @ matrix, axis=1)
    sizes_x = arrays.norms(kept, axis=1)
    rounding = known_rounding(op, b, x, residual, scale * sizes_x)
    rounding = error * sizes_x if rounding is None else rounding
    least, source = float(np.abs(values).min()) - error, "the eigenvalues of the matrix"
    if known is not None and known[0] > least:  # rounding of the matrix says less than what is known
        least, source = known
    bounded = np.full(len(rows), np.inf) if least <= 0 else (residual + rounding) / least
    value = np.where(singular, np.nan, np.sum(rows * kept, axis=1))
    form = quadratic_form(value, sizes_x, residual + rounding, 0.0, least if least > 0 else None)
    converged: np.ndarray = ~singular & (residual <= tol * sizes)
    x = jax.tree.map(lambda leaf: jnp.where(_like(singular, leaf), jnp.nan, leaf), x)
    status = Status.CONVERGED if converged.all() else Status.SINGULAR if singular.any() else Status.STAGNATED
    return Solution(
        x=x,
        residual_norm=residual,
        rounding=rounding,
        error_bound=np.where(singular, np.inf, bounded),
        quadratic_form=form,
        converged=converged,
        num_matvecs=spent + n,
        preconditioner_matvecs=0,
        method="dense",
        bound=source if least > 0 else "nothing bounds the spectrum away from zero",
        status=status,
    )


_as_rows = programs.jit(jax.vmap(trees.ravel))


def _as_stack(op: LinearOperator, rows: np.ndarray) -> PyTree:
    return jax.vmap(lambda row: trees.unravel(row, op.structure))(jnp.asarray(rows, op.dtype))


def _like(flags: np.ndarray, leaf: jax.Array) -> np.ndarray:
    return flags.reshape(-1, *[1] * (leaf.ndim - 1))
