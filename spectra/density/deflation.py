"""Quadratures of operators with eigenvalues that are known: some, as atoms beside Lanczos, or all."""

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np

from spectra.base import programs, trees
from spectra.base.errors import SpectraError, Status
from spectra.base.trees import PyTree
from spectra.krylov import dense, known_pairs, step
from spectra.krylov.dense import matrix_error
from spectra.krylov.layout import Layout, Panels
from spectra.krylov.matrices import Matrix, matrix_of
from spectra.krylov.recurrence import LanczosState
from spectra.operators.base import LinearOperator, require_operator
from spectra.operators.composed import project
from spectra.results import Eigenpairs, Quadrature

CONVERGED = 1e-6
"""Residual of a Ritz pair that is an eigenpair, in units of |H|; eight roundings where that is more."""


def check(op: LinearOperator, pairs: Any) -> Eigenpairs:
    """The eigenpairs, which `known_pairs` finds fit for deflation and which leave something; else raises."""
    if not isinstance(pairs, Eigenpairs):
        raise SpectraError(
            f"deflate is of type {type(pairs).__name__}: pass the result of eigsh, or a number of steps."
        )
    known_pairs.check(op, pairs)
    if not np.all(pairs.converged):
        raise SpectraError(
            f"{int(np.sum(~pairs.converged))} of the eigenpairs to deflate have not converged: their values "
            "are not eigenvalues. Raise max_matvecs in eigsh, or ask for fewer pairs."
        )
    if len(pairs.values) >= op.size:
        raise SpectraError("deflate holds all eigenpairs: nothing is left to estimate.")
    return pairs


def project_start(layout: Layout, vectors: PyTree, state: LanczosState, batched: bool) -> LanczosState:
    """The state of a fresh Lanczos run with its start vector made orthogonal to `vectors`."""
    return dataclasses.replace(state, current=_project_panels(layout, vectors, state.current, batched))


@partial(programs.jit, static_argnames=("layout", "batched"))
def _project_panels(layout: Layout, vectors: PyTree, current: Panels, batched: bool) -> Panels:
    def one(current: Panels) -> Panels:
        v = layout.unpack(current)
        for _ in range(2):
            v = project(vectors, v)
        panels = layout.pack(v)
        return trees.scale(1 / step.norm(panels), panels)

    return (jax.vmap(one) if batched else one)(current)


def with_atoms(bulk: Quadrature, pairs: Eigenpairs) -> Quadrature:
    """The quadrature of the whole operator from that of the complement, of order n - r."""
    atoms = np.asarray(pairs.values, np.float64)
    return joined(bulk, atoms, pairs.residuals, pairs.size, _coupling(bulk, atoms, pairs.residuals))


def with_space(bulk: Quadrature, atoms: np.ndarray, residuals: np.ndarray, n: int) -> Quadrature:
    """The same where all Ritz values of a Krylov space are taken out, see `spectra.quadrature.links`.

    Those that have converged are eigenpairs, and couple as those do. An invariant space of the complement is
    none of the whole while others couple.
    """
    scale = max(map(abs, (*bulk.range, *atoms)))
    known = residuals <= max(CONVERGED, 8 * bulk.precision) * scale
    coupling = _coupling(bulk, atoms[known], residuals[known]) if known.any() else 0.0
    links = np.where(known, 0.0, residuals)
    open_ = float(np.linalg.norm(links))  # what a product of the rest has in the space
    found = dataclasses.replace(bulk, residuals=np.hypot(bulk.residuals, open_))
    found = joined(found, atoms, residuals, n, coupling)
    invariant = bulk.status is Status.INVARIANT and open_ > 0
    return dataclasses.replace(
        found, bulk=bulk, links=links, status=Status.COMPLETE if invariant else bulk.status
    )


def joined(bulk: Quadrature, atoms: np.ndarray, own: np.ndarray, n: int, coupling: float) -> Quadrature:
    """Columns for eigenvalues that are known, with the residuals `own`, beside those of the complement."""
    known = np.broadcast_to(atoms, (bulk.num_probes, len(atoms)))
    # Behind a row's length its last node repeats with weight zero: it goes to the end again.
    live = np.arange(bulk.num_steps) < np.asarray(bulk.lengths)[:, None]
    columns = [
        np.concatenate([np.where(live, bulk.nodes, np.inf), known], axis=1),
        np.concatenate([bulk.weights * (bulk.size / n), np.full(known.shape, 1 / n)], axis=1),
        np.concatenate([bulk.residuals, np.broadcast_to(own, known.shape)], axis=1),
    ]
    order = np.argsort(columns[0], axis=1, kind="stable")
    nodes, weights, residuals = (np.take_along_axis(column, order, axis=1) for column in columns)
    lengths = np.asarray(bulk.lengths) + len(atoms)
    last = np.take_along_axis(nodes, lengths[:, None] - 1, axis=1)
    nodes = np.where(np.isfinite(nodes), nodes, last)
    # Asymmetry is in units of the norm, which is now that of the whole operator.
    size = np.abs(nodes).max()
    asymmetry = bulk.asymmetry * (np.abs(bulk.nodes).max() / size if size > 0 else 1.0)
    return dataclasses.replace(
        bulk,
        nodes=nodes,
        weights=weights,
        residuals=residuals,
        lengths=lengths,
        asymmetry=asymmetry,
        size=n,
        bulk=bulk,
        atoms=atoms,
        coupling=coupling,
        coefficients=None,
        sketches=None,  # those of the complement are in `bulk`
    )


def _coupling(bulk: Quadrature, values: np.ndarray, residuals: Any) -> float:
    """How far residuals of the known pairs can move an eigenvalue."""
    size = float(np.linalg.norm(residuals))
    live = np.arange(bulk.num_steps) < np.asarray(bulk.lengths)[:, None]
    gap = np.abs(np.asarray(bulk.nodes)[live][:, None] - values).min() - size
    return min(size, size**2 / gap) if gap > 0 else size


def pays(op: LinearOperator, num_steps: int, num_probes: int, tol: float | None) -> bool:
    """Whether n products, which give the matrix, are no more than a run of Lanczos would take.

    A tolerance can end a run early: then one probe has to reach n. The matrix must fit into memory, and its
    eigenvalues be a matter of seconds.
    """
    products = num_steps * (num_probes if tol is None else 1)
    return dense.allowed(op, products)


def eigenvalues(op: LinearOperator, matrix: Matrix | None = None) -> Quadrature:
    """All eigenvalues from the dense matrix, by LAPACK in float64 on the host: atoms of weight 1/n.

    The noise floor is a bound on what rounding did to the matrix, see `matrix_error`.
    """
    require_operator(op)
    matrix = matrix or matrix_of(op)
    values, n = np.linalg.eigvalsh(matrix.entries), op.size
    scale, error = float(np.abs(values).max()), matrix_error(op, matrix, values)
    return Quadrature(
        nodes=values[None],
        weights=np.full((1, n), 1 / n),
        residuals=np.zeros((1, n)),
        lengths=np.array([n]),
        asymmetry=np.array([error / scale if scale else 0.0]),
        size=n,
        num_matvecs=n,
        precision=op.precision,
        status=Status.EXACT,
        atoms=values,
        rounding=0.0 if scale else error,
    )


def choose(
    op: LinearOperator, exact: bool | None, num_steps: int, num_probes: int, tol: float | None, plain: bool
) -> bool:
    """Whether `spectrum` takes the dense matrix; `plain` runs have asked for nothing of Lanczos' own."""
    if exact not in (None, True, False):
        raise SpectraError(f"exact={exact!r}: use True, False, or None for the cheaper of the two.")
    if exact is not None:
        return exact
    checked = num_steps >= 1 and num_probes >= 1 and num_steps <= op.size
    return plain and checked and pays(op, num_steps, num_probes, tol)
