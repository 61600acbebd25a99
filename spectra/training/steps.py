"""One update under the eyes of the curvature."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import programs, trees
from spectra.base.calls import automatic
from spectra.base.errors import NonFiniteError, SpectraError, StructureError
from spectra.base.trees import PyTree
from spectra.estimators.loss_errors import measured_change, stated_rounding
from spectra.operators.data import DataOperator
from spectra.results import Eigenpairs, GradientOverlap, StepQuality


@automatic
def step_quality(op: DataOperator, update: PyTree, *, measure: bool = True) -> StepQuality:
    """Compare the change in loss that slope and curvature predict for an update with the actual change.

    With the update d the prediction is g·d + ½ dᵀHd. With the operator of one task and the update of another,
    `sharpness` = dᵀHd / |g·d| is the relative sharpness, and a positive slope means that the tasks conflict.

    Args:
        op: operator on data that has a loss.
        update: the change that is added to the parameters: a pytree like them, or a flat array.
        measure: evaluate the loss at θ + d.

    Returns:
        `StepQuality`: `.predicted`, `.measured`, `.ratio`, `.sharpness`, `.largest_step`.

    Raises:
        StructureError: `op` has no loss, or the update is not like its parameters.
        SpectraError: the update is zero.
        NonFiniteError: the loss is NaN or infinite at the parameters.

    Cost: one gradient, one product, and two evaluations of the loss, once more in float64, or
    four times more in stochastic arithmetic, to measure their rounding.

    References:
        Kalra et al., arXiv:2601.16979.

    Examples:
        >>> import jax.numpy as jnp, spectra
        >>> op = spectra.HessianOperator(lambda w, _: jnp.sum(w**2), jnp.ones(2), None)
        >>> found = spectra.step_quality(op, -0.5 * op.gradient())
        >>> found.predicted, found.measured, found.largest_step
        (-2.0, -2.0, 2.0)
    """
    require_loss(op)
    trees.require_values("step_quality", (op.params, op.data, update))
    along = op.as_vector(update, "update")
    length = trees.length(along)
    if not 0 < length < math.inf:
        raise SpectraError(f"the update has length {length}: pass one that is finite and not zero.")
    loss = float(op.loss())
    if not math.isfinite(loss):
        raise NonFiniteError(op.explain_non_finite())
    size, unit = _unit(along)
    slope, curvature = (float(x) for x in jax.device_get(_two(unit, op.gradient(), op @ unit)))
    moved, rounding = math.nan, stated_rounding(op, loss)
    if measure:
        moved, rounding = measured_change(op, [along], loss)
    return StepQuality(
        slope=float(size) * slope,
        curvature=float(size) ** 2 * curvature,
        length=length,
        loss=loss,
        measured=moved,
        rounding=rounding,
    )


@automatic
def gradient_overlap(op: DataOperator, pairs: Eigenpairs) -> GradientOverlap:
    """Compute the share of |g|² that lies in the span of eigenvectors.

    The share is (v_j·g)² / |g|² for each of the orthonormal vectors v_j. Training with large steps moves most
    of the gradient into the span of the leading eigenvectors.

    Args:
        op: operator on data that has a loss; the gradient is over all of its data.
        pairs: eigenpairs of it, from `eigsh`.

    Returns:
        `GradientOverlap`; `float()` is the share in the span of all.

    Raises:
        StructureError: `op` has no loss, or the vectors are not like its parameters.
        SpectraError: the gradient is zero.

    Cost: one gradient.

    References:
        Gur-Ari, Roberts and Dyer, arXiv:1812.04754.

    Examples:
        >>> import jax, jax.numpy as jnp, spectra
        >>> op = spectra.HessianOperator(lambda w, _: w[0] ** 2 + w[1] ** 2 / 4, jnp.array([1.0, 2.0]), None)
        >>> pairs = spectra.eigsh(op, 1, which="LA", key=jax.random.key(0))
        >>> round(float(spectra.gradient_overlap(op, pairs)), 4)  # g = (2, 1)
        0.8
    """
    require_loss(op)
    if not isinstance(pairs, Eigenpairs):
        raise StructureError(f"pairs is a {type(pairs).__name__}: pass the Eigenpairs that eigsh returns.")
    trees.require_values("gradient_overlap", (op.params, op.data, pairs.vectors))
    trees.check_structure(jax.tree.map(lambda x: x[0], pairs.vectors), op.structure, "an eigenvector")
    gradient = op.gradient()
    length = trees.length(gradient)
    if not 0 < length < math.inf:
        raise SpectraError(f"the gradient has length {length}: it has no direction.")
    along = jax.device_get(_shares(pairs.vectors, gradient))
    return GradientOverlap(np.asarray(along, float) ** 2, length)


def require_loss(op: Any) -> None:
    """Raise a StructureError unless this is an operator on data, which has a loss."""
    if not isinstance(op, DataOperator):
        raise StructureError(f"a {type(op).__name__} has no loss: pass an operator on data.")


@programs.jit
def _unit(update: PyTree) -> tuple[jax.Array, PyTree]:
    """The size of the update, and the update in units of it: dᵀHd of a small one would underflow."""
    size = trees.power_of_two(trees.largest(update))
    return size, trees.scale(1 / size, update)


@programs.jit
def _two(along: PyTree, gradient: PyTree, image: PyTree) -> tuple[jax.Array, jax.Array]:
    return trees.vdot(gradient, along), trees.vdot(image, along)


@programs.jit
def _shares(vectors: PyTree, gradient: PyTree) -> jax.Array:
    """v·g / |g| of a stack of vectors."""
    unit = trees.scale(1 / trees.norm(gradient), gradient)
    return jax.vmap(lambda v: trees.vdot(jax.tree.map(jnp.asarray, v), unit))(vectors)
