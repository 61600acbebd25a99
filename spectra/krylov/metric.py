"""Eigenpairs in the metric of another matrix: H v = λ M v."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectra._errors import SpectraError, StructureError
from spectra.krylov.dense import LARGEST, chosen_pairs
from spectra.operators.base import LinearOperator
from spectra.operators.preconditioned import PreconditionedOperator
from spectra.results import Eigenpairs


def generalized_eigenpairs(
    op: LinearOperator,
    metric: Any,
    k: int,
    which: str,
    tol: float,
    max_matvecs: int | None,
    solve: Callable[[LinearOperator], Eigenpairs],
) -> Eigenpairs:
    """k pairs of H v = λ M v, with M given as an operator or by its diagonal.

    A diagonal M makes M^(-1/2) H M^(-1/2) an operator like any other, which `solve` is given; an operator is
    factorised as a dense matrix.
    """
    if isinstance(metric, LinearOperator):
        if max_matvecs is not None and max_matvecs < op.size:
            raise SpectraError(
                f"max_matvecs={max_matvecs}: a metric that is an operator takes {op.size} products."
            )
        return _dense(op, metric, k, which, tol)
    scaled = PreconditionedOperator(op, metric)
    pairs = solve(scaled)
    vectors = jax.tree.map(jnp.multiply, scaled.scale, pairs.vectors)
    return dataclasses.replace(pairs, vectors=vectors)


def _dense(op: LinearOperator, metric: LinearOperator, k: int, which: str, tol: float) -> Eigenpairs:
    """By LAPACK in float64 on the host, from n products with either.

    With M = L Lᵀ the eigenvalues are those of L⁻¹ H L⁻ᵀ: an error E of H changes them by |E| |M⁻¹| at
    most, one of M by |λ| |E| |M⁻¹|.
    """
    import scipy.linalg

    n = op.size
    if metric.size != n:
        raise StructureError(f"the metric has order {metric.size}, the operator {n}.")
    if n > LARGEST:
        raise SpectraError(
            f"a metric of order {n} would be factorised as a dense matrix, up to order {LARGEST}: give its "
            "diagonal as a pytree like the parameters, or use op.block(...) of both."
        )
    matrix, weight = (np.asarray(x.as_matrix(), np.float64) for x in (op, metric))
    smallest = float(np.linalg.eigvalsh(weight)[0])
    noise = np.sqrt(n) * metric.precision * float(np.linalg.norm(weight, 2))
    if smallest <= noise:
        raise SpectraError(
            f"the metric is not positive definite to its rounding: its smallest eigenvalue is {smallest:.2e} "
            f"with errors up to {noise:.1e}. Shift it: metric.shift(delta)."
        )
    values, vectors = scipy.linalg.eigh(matrix, weight)
    factor, scale = np.linalg.cholesky(weight), float(np.max(np.abs(values)))
    error = np.sqrt(n) * max(op.precision, np.finfo(float).eps * np.sqrt(n)) * np.linalg.norm(matrix, 2)

    def residuals(values, vectors):
        rest = matrix @ vectors - (weight @ vectors) * values
        return np.linalg.norm(scipy.linalg.solve_triangular(factor, rest, lower=True), axis=0)

    floor = float(error + scale * noise) / smallest
    return chosen_pairs(op, k, which, tol, values, vectors, residuals, floor)
