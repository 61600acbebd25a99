"""Eigenpairs of operators that are small enough for a dense matrix."""

import jax
import jax.numpy as jnp
import numpy as np

from spectra import _memory, _tree
from spectra._status import Status
from spectra.krylov import wanted
from spectra.operators.base import LinearOperator
from spectra.results import Eigenpairs

PyTree = object
LARGEST = 2000
"""Up to this order n products and LAPACK, some seconds, are what an iteration may give way to."""


def allowed(op: LinearOperator, max_matvecs: int | None) -> bool:
    """Whether the n products of a dense matrix are, and the matrix fits."""
    n, free = op.size, _memory.available_bytes(op.device)
    if n > LARGEST or (max_matvecs is not None and max_matvecs < n):
        return False
    return free is None or 3 * n * n * jnp.dtype(op.dtype).itemsize <= free // 2


def dense_eigenpairs(
    op: LinearOperator, k: int, which: str, tol: float, deflate: Eigenpairs | None = None
) -> Eigenpairs:
    """k eigenpairs by LAPACK in float64 on the host, from n products."""
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

    def residuals(values, vectors):
        return np.linalg.norm(matrix @ vectors - vectors * values, axis=0)

    return chosen_pairs(op, k, which, tol, values, vectors, residuals, floor)


def chosen_pairs(op: LinearOperator, k, which, tol, values, vectors, residuals, floor: float) -> Eigenpairs:
    """The k that are wanted of all pairs; `residuals(values, vectors)` are theirs."""
    scale = float(np.max(np.abs(values)))
    chosen = np.sort(wanted.order(values, which)[:k])
    values, vectors = values[chosen], vectors[:, chosen]
    errors = residuals(values, vectors)
    null = bool(np.any(np.abs(values) <= floor))
    return Eigenpairs(
        values=values,
        vectors=as_tree(op, vectors),
        residuals=errors,
        converged=errors <= max(tol * scale, floor),
        which=which,
        size=op.size,
        num_matvecs=op.size,
        num_restarts=0,
        missed=0.0,
        noise_floor=floor,
        status=Status.SINGULAR if which == "SM" and null else Status.CONVERGED,
    )


def as_tree(op: LinearOperator, columns: np.ndarray):
    """Columns (n, k) as one pytree with leaves (k, *leaf.shape), in the working dtypes."""
    structure = op.structure
    return jax.vmap(lambda row: _tree.unravel(row, structure))(jnp.asarray(columns.T, op.dtype))
