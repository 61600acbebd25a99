"""Derivatives of eigenpairs in what the operator is made of, not of the iteration that found them.

With H v_i = λ_i M v_i and v_iᵀ M v_j = δ_ij, dλ_i = v_iᵀ (dH - λ_i dM) v_i. That needs no other pair, and of
eigenvalues that coincide the sum over all of them is right, whatever basis the vectors are of their space.
Without a metric, dv_i = (λ_i I - H)⁺ dH v_i: along the vectors known by their eigenvalues, across them by a
linear system. It grows like one over the distance to the nearest other eigenvalue; for equal ones there is
none (Magnus, doi:10.1017/S0266466600011671). Forward mode would solve such systems for vectors that nothing
depends on, and fail for those of equal eigenvalues: there values have derivatives, and vectors NaN.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spectra.base import stacks, trees
from spectra.base.errors import SpectraError, Status
from spectra.base.reverse import unknown_forward
from spectra.base.trees import PyTree
from spectra.krylov.solve import solve
from spectra.operators.base import LinearOperator
from spectra.operators.composed import DeflatedOperator, project
from spectra.results import Eigenpairs

SEPARATED = 10.0
"""A vector counts as separated where its eigenvalue is this many errors away from every other one."""


def differentiable(op: LinearOperator, metric: Any, pairs: Eigenpairs) -> Eigenpairs:
    """The pairs, found at the values of `op` and `metric`, as functions of what these are traced in."""
    if op.on_host:
        raise SpectraError("an operator that streams its data cannot be differentiated: pass one batch.")
    images = _once(stacks.mapped(op.mv, pairs.vectors))
    own = images
    if metric is not None:
        weights = jnp.asarray(pairs.values, op.dtype)
        moved = _once(jax.vmap(lambda v: _weighted(metric, v))(pairs.vectors))
        own = jax.tree.map(
            lambda x, y: x - weights.reshape(-1, *[1] * (y.ndim - 1)).astype(y.dtype) * y, images, moved
        )
    forms = jax.vmap(trees.vdot)(pairs.vectors, own)
    values = jnp.asarray(pairs.values, op.dtype) + (forms - lax.stop_gradient(forms))
    fixed = lax.stop_gradient(op)
    pullback = partial(_vectors_pullback, fixed, metric is not None, pairs)
    return dataclasses.replace(pairs, values=values, vectors=unknown_forward(images, pairs.vectors, pullback))


@jax.custom_jvp
def _once(images: PyTree) -> PyTree:
    """The same, of which nothing but a first derivative is asked: the vectors were found on the host, and
    what they change by would be missing in a second one."""
    return images


@_once.defjvp
def _once_forward(primals: tuple[PyTree], tangents: tuple[PyTree]) -> tuple[PyTree, PyTree]:  # pyright: ignore[reportUnusedFunction]
    if trees.is_traced(primals):
        raise SpectraError(
            "eigenpairs have no second derivatives here, nor derivatives inside of jit and vmap: call "
            "jax.grad once. For a second derivative of an eigenvalue take differences of its gradient."
        )
    return primals[0], tangents[0]


def _weighted(metric: Any, v: PyTree) -> PyTree:
    return metric.mv(v) if isinstance(metric, LinearOperator) else jax.tree.map(jnp.multiply, metric, v)


def _vectors_pullback(op: LinearOperator, weighted: bool, pairs: Eigenpairs, cotangent: PyTree) -> PyTree:
    """(λ_i I - H)⁺ c_i for the cotangent c_i of each vector; those that nothing depends on cost nothing."""
    if trees.is_traced(cotangent):
        raise SpectraError(
            "the derivative of eigenvectors is computed on the host: call jax.grad outside of jit and vmap, "
            "and once, not twice."
        )
    size = np.asarray(jax.vmap(trees.norm)(cotangent))
    used = np.flatnonzero(size)
    if weighted and len(used):
        raise SpectraError(
            "eigenvectors in a metric have no derivative here: use the values alone, or the operator of "
            "M^(-1/2) H M^(-1/2), PreconditionedOperator(op, metric)."
        )
    run, zero = op.prepare(), jax.tree.map(lambda c: jnp.zeros_like(c[0]), cotangent)
    rows = [zero] * len(size)
    for i in used:
        rows[i] = _resolvent(run, pairs, int(i), jax.tree.map(lambda c, i=i: c[i], cotangent))
    return jax.tree.map(lambda *x: jnp.stack(x), *rows)


def _resolvent(op: LinearOperator, pairs: Eigenpairs, i: int, c: PyTree) -> PyTree:
    """(λ_i I - H)⁺ c."""
    values = np.asarray(pairs.values, np.float64)
    gaps = np.abs(values - values[i])
    gaps[i] = np.inf
    error = float(np.max(pairs.residuals)) + pairs.noise_floor
    if gaps.min() <= SEPARATED * error:
        raise SpectraError(
            f"eigenvector {i} is not separated: its eigenvalue {values[i]:.6g} is {gaps.min():.1e} from the "
            f"next, with errors up to {error:.1e}, and any vector of their common space is as good. Use the "
            "values, or what depends on the space alone, such as the sum of their projectors."
        )
    known = jax.vmap(lambda v: trees.vdot(v, c))(pairs.vectors)
    inverse = np.zeros(len(values))
    inverse[gaps < np.inf] = 1 / (values[i] - values)[gaps < np.inf]
    along = known * jnp.asarray(inverse, known.dtype)
    inside = jax.tree.map(
        lambda v: jnp.tensordot(along.astype(v.dtype), v, 1, precision="highest"), pairs.vectors
    )
    rest = project(pairs.vectors, project(pairs.vectors, c))
    size, whole = float(trees.norm(rest)), float(trees.norm(c))
    eps = float(jnp.finfo(op.dtype).eps)
    if len(values) == op.size or size <= eps * op.size**0.5 * whole:
        return inside
    # On the span of the vectors the operator is -λ_i, and the right-hand side has nothing there.
    outside = DeflatedOperator(op, pairs.vectors)
    found = solve(outside, rest, shift=-float(values[i]), tol=10 * eps ** (2 / 3))
    if found.status is not Status.CONVERGED:
        raise SpectraError(
            f"eigenvector {i} has no derivative within rounding: the system for it ended with "
            f"'{found.status.code}' and a residual of {found.residual_norm / size:.1e}. Its eigenvalue may "
            "have a neighbour that is not among the pairs: ask for more of them."
        )
    return jax.tree.map(jnp.subtract, inside, project(pairs.vectors, found.x))
