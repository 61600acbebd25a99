"""The quadrature of an operator that is small enough for all of its eigenvalues."""

import numpy as np

from spectra._errors import SpectraError
from spectra._status import Status
from spectra.krylov import dense
from spectra.krylov.dense_solve import matrix_error
from spectra.operators.base import LinearOperator, require_operator
from spectra.results import Quadrature


def pays(op: LinearOperator, num_steps: int, num_probes: int, tol: float | None) -> bool:
    """Whether n products, which give the matrix, are no more than a run of Lanczos would take.

    A tolerance can end a run early: then one probe has to reach n. The matrix must fit into memory, and its
    eigenvalues be a matter of seconds.
    """
    products = num_steps * (num_probes if tol is None else 1)
    return dense.allowed(op, products)


def eigenvalues(op: LinearOperator) -> Quadrature:
    """All eigenvalues from the dense matrix, by LAPACK in float64 on the host: atoms of weight 1/n.

    The noise floor is a bound on what rounding did to the matrix, see `matrix_error`.
    """
    require_operator(op)
    matrix = np.asarray(op.as_matrix(), np.float64)
    values, n = np.linalg.eigvalsh(matrix), len(matrix)
    scale = float(np.abs(values).max())
    return Quadrature(
        nodes=values[None],
        weights=np.full((1, n), 1 / n),
        residuals=np.zeros((1, n)),
        lengths=np.array([n]),
        asymmetry=np.array([matrix_error(op, values) / scale if scale else 0.0]),
        size=n,
        num_matvecs=n,
        precision=op.precision,
        status=Status.EXACT,
        atoms=values,
    )


def choose(op, exact: bool | None, num_steps: int, num_probes: int, tol: float | None, plain: bool) -> bool:
    """Whether `spectrum` takes the dense matrix; `plain` runs have asked for nothing of Lanczos' own."""
    if exact not in (None, True, False):
        raise SpectraError(f"exact={exact!r}: use True, False, or None for what costs less.")
    if exact is not None:
        return exact
    checked = num_steps >= 1 and num_probes >= 1 and num_steps <= op.size
    return plain and checked and pays(op, num_steps, num_probes, tol)
