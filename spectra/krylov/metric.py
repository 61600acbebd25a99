"""Eigenpairs of H v = λ M v, and what the rounding of both matrices does to them.

With X the eigenvectors of the computed pencil, Xᵀ M X = I, what H and M are off by, E and F, changes its
eigenvalues to first order by those of Xᵀ (E - λ F) X, of which `_moved` makes a bound. Where float64 is fast
the columns (E - λ F) x are measured, by products in it; entries of matrices, which may have been rounded
before they were given, are drawn. Elsewhere (E - λ F) x is that of operators that are moved.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import arrays, stacks
from spectra.base.errors import SpectraError, StructureError
from spectra.krylov import wanted
from spectra.krylov.dense import as_tree, chosen_pairs, matrix_error
from spectra.krylov.matrices import LARGEST, Matrix, matrix_of
from spectra.krylov.product_rounding import DRAWN, KEY, RARE, SAMPLES, limit, multiply
from spectra.operators.base import LinearOperator
from spectra.operators.doubled import DoubledOperator, flat, in_double
from spectra.operators.preconditioned import PreconditionedOperator
from spectra.results import Eigenpairs

ROOM = 10
"""What lies beside the wanted eigenvalues is taken to move by so many times as much as they do, at most."""


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
    # An entry of M^(-1/2) is rounded twice, to 1.5 units, and D has it on both sides (Ostrowski).
    rounding = 1.5 * float(jnp.finfo(scaled.dtype).eps) * float(np.abs(pairs.values).max())
    return dataclasses.replace(pairs, vectors=vectors, noise_floor=pairs.noise_floor + rounding)


@dataclasses.dataclass(frozen=True)
class _Side:
    """One of the two matrices, as computed, and the factors of its columns in (E - λ F) x."""

    op: LinearOperator
    matrix: np.ndarray
    factors: np.ndarray
    exact: DoubledOperator | None

    @property
    def is_stated(self) -> bool:
        """Whether its rounding is neither known in float64 nor seen in moved operators."""
        return self.exact is None and self.op.moved(jax.random.key(0)) is None

    def bound(self) -> float:
        """On what rounding did to a matrix that cannot be measured, or to products with it in float64."""
        values = np.linalg.eigvalsh(self.matrix)
        if self.is_stated:
            return matrix_error(self.op, Matrix(self.matrix, None), values)
        return len(values) * float(np.finfo(float).eps) * float(np.abs(values).max())


def _dense(op: LinearOperator, metric: LinearOperator, k: int, which: str, tol: float) -> Eigenpairs:
    """By LAPACK in float64 on the host, from n products with either."""
    import scipy.linalg

    n = op.size
    if metric.size != n:
        raise StructureError(f"the metric has order {metric.size}, the operator {n}.")
    if n > LARGEST:
        raise SpectraError(
            f"a metric of order {n} would be factorised as a dense matrix, up to order {LARGEST}: give its "
            "diagonal as a pytree like the parameters, or use op.block(...) of both."
        )
    matrix, known = np.asarray(op.as_matrix(), np.float64), matrix_of(metric)
    weight = known.entries
    spectrum = np.linalg.eigvalsh(weight)
    noise = matrix_error(metric, known, spectrum)
    if spectrum[0] <= noise:
        raise SpectraError(
            f"the metric is not positive definite to its rounding: its smallest eigenvalue is "
            f"{spectrum[0]:.2e} with errors up to {noise:.1e}. Shift it: metric.shift(delta)."
        )
    values, vectors = scipy.linalg.eigh(matrix, weight)

    def residuals(values: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        return arrays.norms(all_vectors.T @ (matrix @ vectors - (weight @ vectors) * values), axis=0)

    all_vectors, chosen = vectors, np.sort(wanted.order(values, which)[:k])
    some, x = values[chosen], vectors[:, chosen]
    sides = [
        _Side(op, matrix, np.ones(k), in_double(op)),
        _Side(metric, weight, -some, in_double(metric)),
    ]
    stated = sum(side.bound() * np.abs(side.factors) for side in sides)
    floor = float(np.max(stated * np.linalg.norm(x, axis=0))) / float(np.sqrt(spectrum[0]))
    floor += _measured(sides, values, vectors, chosen) + _sampled(sides, vectors, chosen)
    # Both are lengths in the computed metric, which the true one may fall short of by its error.
    share = noise / float(spectrum[0])
    floor = (floor + share * float(residuals(some, x).max())) / (1 - share)
    return chosen_pairs(op, k, which, tol, values, vectors, residuals, floor)


def _moved(coupling: np.ndarray, values: np.ndarray, chosen: np.ndarray) -> float:
    """A bound on what the chosen eigenvalues move by, given the columns Xᵀ (E - λ F) x of theirs.

    Those of the pencil on the chosen vectors move by the norm of the chosen rows. They are off those of the
    whole by the norm of all other rows, or its square over the gap (Mathias, doi:10.1137/S0895479896310536).
    """
    others = np.setdiff1d(np.arange(len(values)), chosen)
    inner, outer = coupling[chosen], float(np.linalg.norm(coupling[others], 2)) if len(others) else 0.0
    gap = float(np.abs(values[others, None] - values[chosen]).min(initial=np.inf)) - ROOM * outer
    inside = float(np.linalg.norm((inner + inner.T) / 2, 2))
    return inside + (min(outer, outer**2 / gap) if gap > 0 else outer)


def _measured(sides: list[_Side], values: np.ndarray, vectors: np.ndarray, chosen: np.ndarray) -> float:
    """What rounding has done to the chosen eigenvalues, as products in float64 say; and where matrices may
    have been rounded before, what that stays below but once in a thousand."""
    known = [(side, side.exact) for side in sides if side.exact is not None]
    if not known:
        return 0.0
    stack = as_tree(known[0][0].op, vectors[:, chosen])
    columns = np.stack([flat(v) for v in stacks.split(stack)], axis=1)

    def images(side: _Side, exact: DoubledOperator) -> np.ndarray:
        return np.stack([exact.unrounded(v) for v in columns.T], axis=1) * side.factors

    products = [images(*pair) for pair in known]
    pairs = list(zip(known, products, strict=True))
    here = sum(side.matrix @ columns * side.factors - image for (side, _), image in pairs)
    given = [pair for pair in pairs if pair[0][1].is_given]
    before = [
        sum(images(side, exact.before_rounding(salt)) - image for (side, exact), image in given)
        for salt in range(DRAWN)
        if given
    ]
    drawn = [_moved(vectors.T @ change, values, chosen) for change in before]
    return _moved(vectors.T @ here, values, chosen) + limit(drawn, RARE)


def _sampled(sides: list[_Side], vectors: np.ndarray, chosen: np.ndarray) -> float:
    """What |L⁻¹ (E - λ F) x| stays below at 95 % by moved operators, where nothing is known in float64.

    By the residual theorem no λ is further than that from an eigenvalue. One sum of the vectors stands for
    all, as in `with_measured_floor`. An entry that was made of others, as by a shift, has been rounded
    once more.
    """
    total, rng = np.zeros((SAMPLES, len(vectors))), np.random.default_rng(KEY)
    for side in sides:
        if side.exact is not None or side.is_stated:
            continue
        op, column = side.op, vectors[:, chosen] @ side.factors
        vector = jax.tree.map(lambda x: x[0], as_tree(op, column[:, None]))
        image, unit = multiply(op.prepare(), vector), float(jnp.finfo(op.dtype).eps)
        for i in range(SAMPLES):
            other = op.moved(jax.random.fold_in(jax.random.key(KEY), i))
            assert other is not None
            change = jax.tree.map(jnp.subtract, multiply(other.prepare(), vector), image)
            entries = (unit * rng.choice([-1, 1], side.matrix.shape) * side.matrix) @ column
            total[i] += flat(change) + entries
    return limit(np.linalg.norm(total @ vectors, axis=1))  # M⁻¹ = X Xᵀ
