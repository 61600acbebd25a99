"""Linear systems of operators that are small enough for a dense matrix."""

import jax
import jax.numpy as jnp
import numpy as np

from spectra import _tree
from spectra._blas import one_thread
from spectra._status import Status
from spectra.operators.base import LinearOperator
from spectra.results import Interval, Solution

PyTree = object
CLEAR = 0.1
"""Null vectors are known where rounding turns them by less than this."""


def matrix_error(op: LinearOperator, values: np.ndarray) -> float:
    """A bound on the spectral norm of what rounding did to the matrix and to its eigenvalues.

    The Frobenius norm bounds it. Columns are right to `precision` of themselves, or of |H|: measured on
    float32 Hessians of networks, the spectral norm was up to 1.8 precision sqrt(n) |H|. The float64
    eigensolver is backward stable, with n eps |H| as in `numpy.linalg.matrix_rank`.
    """
    n, norm = len(values), float(np.abs(values).max())
    if op.cancels:
        columns = 4 * op.precision * np.sqrt(n) * norm
    else:
        columns = op.precision * norm * float(np.linalg.norm(values / norm)) if norm else 0.0
    return columns + n * float(np.finfo(float).eps) * norm


def solution(op: LinearOperator, b: PyTree, tol: float, spent: int) -> Solution:
    """Solutions from the eigenpairs of the dense matrix in float64, for n products; x is rounded once.

    Eigenvalues within the error of the matrix count as zero. By Weyl's theorem no |λ| of the operator is
    below the smallest of the matrix less that error, on which the error bound rests.
    """
    matrix = np.asarray(op.as_matrix(), np.float64)
    n = len(matrix)
    with one_thread():
        values, vectors = np.linalg.eigh(matrix)
    error = matrix_error(op, values)
    rows = np.asarray(jax.vmap(_tree.ravel)(b), np.float64)
    zero = np.abs(values) <= error
    coefficients = rows @ vectors
    # What rounding of the vectors lets a b of the range have along the null ones.
    scale = float(np.abs(values).max()) or 1.0
    gap = float(np.min(np.abs(values[~zero]), initial=scale))
    turned = 4 * error / gap
    slack = max(tol, turned) if turned < CLEAR else tol
    sizes = np.linalg.norm(rows, axis=1)
    outside = np.linalg.norm(coefficients[:, zero], axis=1)
    singular = outside > slack * sizes
    inverse = np.where(zero, 0, 1 / np.where(zero, 1, values))
    x = _as_stack(op, (coefficients * inverse) @ vectors.T)
    kept = np.asarray(jax.vmap(_tree.ravel)(x), np.float64)  # as it was rounded
    residual = np.linalg.norm(rows - kept @ matrix, axis=1)
    rounding = error * np.linalg.norm(kept, axis=1)
    least = float(np.abs(values).min()) - error
    bounded = np.full(len(rows), np.inf) if least <= 0 else (residual + rounding) / least
    form = Interval(*[np.full(len(rows), np.nan)] * 3)
    if values[0] > error:
        value, slack = np.sum(rows * kept, axis=1), np.linalg.norm(kept, axis=1) * (residual + rounding)
        form = Interval(value - slack, value, value + slack + (residual + rounding) ** 2 / least)
    residual = np.where(singular, outside, residual)
    converged = ~singular & (residual <= tol * sizes)
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
        bound="the eigenvalues of the matrix" if least > 0 else "nothing bounds the spectrum away from zero",
        status=status,
    )


def _as_stack(op: LinearOperator, rows: np.ndarray) -> PyTree:
    return jax.vmap(lambda row: _tree.unravel(row, op.structure))(jnp.asarray(rows, op.dtype))


def _like(flags: np.ndarray, leaf: jax.Array) -> np.ndarray:
    return flags.reshape(-1, *[1] * (leaf.ndim - 1))
