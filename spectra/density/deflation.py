"""Quadratures of an operator of which some eigenpairs are known: atoms, and Lanczos for the rest.

With r eigenpairs (λ_i, x_i) the spectral measure is (1/n) Σ δ(λ_i) + ((n - r)/n) ν, where ν belongs to H on
the complement of the x_i. A probe that is uniform on the sphere of R^n is uniform on the sphere of the
complement once it is projected and normalised: for ν all holds that holds for an operator of order n - r,
the law of a probe's shares among it. The atoms have no sampling variance.

Eigenpairs with residual matrix R couple the two parts: H differs from the deflated operator plus the atoms
by a matrix of norm |R|, so that no eigenvalue moves by more than |R|, nor by more than |R|² / gap where a
gap separates the atoms from the rest (Mathias, doi:10.1137/S0895479896298518).
"""

import dataclasses
from functools import partial

import jax
import numpy as np

from spectra import _tree
from spectra._errors import SpectraError
from spectra.krylov import basis as _basis
from spectra.krylov.layout import Layout, Panels
from spectra.krylov.recurrence import LanczosState
from spectra.operators.base import LinearOperator
from spectra.operators.deflated import project
from spectra.results import Eigenpairs, Quadrature


def check(op: LinearOperator, pairs: Eigenpairs) -> None:
    """Raise unless the eigenpairs belong to an operator like this one and are fit for deflation."""
    if not isinstance(pairs, Eigenpairs):
        raise SpectraError(f"deflate is a {type(pairs).__name__}; pass the result of eigsh.")
    if pairs.size != op.size:
        raise SpectraError(f"deflate has vectors of order {pairs.size}, the operator has {op.size}.")
    _tree.check_structure(jax.tree.map(lambda x: x[0], pairs.vectors), op.structure, "a vector of deflate")
    if not np.all(pairs.converged):
        raise SpectraError(
            f"{int(np.sum(~pairs.converged))} of the eigenpairs to deflate have not converged: their values "
            "are not eigenvalues. Raise max_matvecs in eigsh, or ask for fewer pairs."
        )
    if len(pairs.values) >= op.size:
        raise SpectraError("deflate holds all eigenpairs: nothing is left to estimate.")


def project_start(layout: Layout, vectors, state: LanczosState, batched: bool) -> LanczosState:
    """The state of a fresh Lanczos run with its start vector made orthogonal to `vectors`."""
    return dataclasses.replace(state, current=_project_panels(layout, vectors, state.current, batched))


@partial(jax.jit, static_argnames=("layout", "batched"))
def _project_panels(layout: Layout, vectors, current: Panels, batched: bool) -> Panels:
    def one(current):
        v = layout.unpack(current)
        for _ in range(2):
            v = project(vectors, v)
        panels = layout.pack(v)
        return _tree.scale(1 / _basis.norm(panels), panels)

    return (jax.vmap(one) if batched else one)(current)


def with_atoms(bulk: Quadrature, pairs: Eigenpairs) -> Quadrature:
    """The quadrature of the whole operator from that of the complement, of order n - r."""
    atoms = np.asarray(pairs.values, np.float64)
    return joined(bulk, atoms, pairs.residuals, pairs.size, _coupling(bulk, pairs))


def joined(bulk: Quadrature, atoms: np.ndarray, own, n: int, coupling: float) -> Quadrature:
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


def _coupling(bulk: Quadrature, pairs: Eigenpairs) -> float:
    """How far residuals of the known pairs can move an eigenvalue."""
    size = float(np.linalg.norm(pairs.residuals))
    live = np.arange(bulk.num_steps) < np.asarray(bulk.lengths)[:, None]
    gap = np.abs(np.asarray(bulk.nodes)[live][:, None] - np.asarray(pairs.values)).min() - size
    return min(size, size**2 / gap) if gap > 0 else size
