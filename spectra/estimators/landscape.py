"""The loss itself along eigenvectors: what curvature at a point says about the landscape around it."""

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import trees
from spectra.base.errors import NonFiniteError, SpectraError, StructureError
from spectra.base.meshes import automatic
from spectra.base.trees import PyTree
from spectra.operators.accumulate import weighted_sum
from spectra.operators.data import DataOperator
from spectra.results import Eigenpairs, LossSlice


@automatic
def loss_slice(
    op: DataOperator, pairs: Eigenpairs, *, extent: float | None = None, num_points: int = 25
) -> LossSlice:
    """Evaluate the loss on a square in the plane of the two leading eigenvectors.

    L(θ + x v₁ + y v₂) for x and y in [-extent, extent], with v₁ and v₂ the unit vectors of the pairs with
    the largest |λ|.

    Args:
        op: operator on data that has a loss: a Hessian, Gauss-Newton or Fisher matrix, or a block of one.
        pairs: at least two eigenpairs of it, from `eigsh`.
        extent: half the side of the square, in the norm of the parameters; default sqrt(2 |L| / |λ₁|), at
            which λ₁ alone would double the loss, or a tenth of the parameters' norm where the loss is zero.
        num_points: points per side, odd so that the parameters themselves are one of them.

    Returns:
        `LossSlice`; `plot_landscape` draws it.

    Raises:
        StructureError: `op` has no loss, or the vectors are not those of its parameters.
        SpectraError: fewer than two pairs, extent or num_points out of range.
        NonFiniteError: the loss is NaN or infinite at the parameters themselves.

    Cost: num_points² evaluations of the loss over all data, one gradient, no product.

    References:
        Li, Xu, Taylor, Studer and Goldstein, arXiv:1712.09913.

    Examples:
        >>> import jax, jax.numpy as jnp, spectra
        >>> def loss_fn(w, x):
        ...     return jnp.mean((x @ w) ** 2)
        >>> op = spectra.HessianOperator(loss_fn, jnp.ones(3), jnp.diag(jnp.array([1.0, 2.0, 3.0])))
        >>> pairs = spectra.eigsh(op, 2, key=jax.random.key(0))
        >>> plane = spectra.loss_slice(op, pairs, num_points=5)
        >>> plane.loss.shape
        (5, 5)
    """
    if not isinstance(op, DataOperator):
        raise StructureError(
            f"a {type(op).__name__} has no loss; pass the operator on data that it was made of."
        )
    if len(pairs.values) < 2:
        raise SpectraError("a plane needs two eigenvectors: call eigsh with k=2 or more.")
    if num_points < 3 or num_points % 2 == 0:
        raise SpectraError(f"num_points={num_points}: use an odd number of at least 3.")
    if extent is not None and not 0 < extent < np.inf:
        raise SpectraError(f"extent={extent}: use a positive distance.")
    order = np.argsort(-np.abs(np.asarray(pairs.values)), kind="stable")[:2]
    values = np.asarray(pairs.values, float)[order]
    plane = jax.tree.map(lambda x: jnp.asarray(x)[order], pairs.vectors)
    trees.check_structure(jax.tree.map(lambda x: x[0], plane), op.structure, "an eigenvector")
    center = float(op.loss())
    if not np.isfinite(center):
        raise NonFiniteError(op.explain_non_finite())
    side = _extent(op, center, values) if extent is None else float(extent)
    line = side * np.linspace(-1.0, 1.0, num_points)
    points = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)
    gradient = op.gradient()
    slope = np.array([float(trees.vdot(gradient, jax.tree.map(lambda x, i=i: x[i], plane))) for i in (0, 1)])
    quadratic = center + points @ slope + points**2 @ values / 2
    shape = (num_points, num_points)
    return LossSlice(
        x=line,
        y=line.copy(),
        loss=np.asarray(losses_at(op, plane, points), float).reshape(shape),
        quadratic=quadratic.reshape(shape),
        slope=slope,
        eigenvalues=values,
        center=center,
        num_evaluations=len(points),
    )


def _extent(op: DataOperator, center: float, values: np.ndarray) -> float:
    if center and values[0]:
        return float(np.sqrt(2 * abs(center / values[0])))
    size = trees.length(trees.cast_like(op.like, op.structure))
    return 0.1 * size if size else 1.0


def losses_at(op: DataOperator, plane: PyTree, points: np.ndarray) -> jax.Array:
    """The mean loss over all data at θ + Σ_j x_j v_j for each point x (p, k), with k stacked vectors v."""
    where = jnp.asarray(points, op.dtype)
    if op.stream is None:
        return _on_batch(op, plane, where)
    return weighted_sum(lambda piece: _on_batch(piece, plane, where), op._pieces())


@jax.jit
def _on_batch(op: DataOperator, plane: PyTree, points: jax.Array) -> jax.Array:
    """One point after another: the memory is that of one evaluation."""

    def one(point):
        def move(x, v):
            return x + jnp.tensordot(point.astype(v.dtype), v, 1, precision="highest")

        params = op._merge(jax.tree.map(move, op._variables(), plane))
        return op._mean(lambda piece: op._value(params, piece))

    return jax.lax.map(one, points)
