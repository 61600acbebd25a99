"""The loss itself along directions: what curvature at a point says about the landscape around it."""

from collections.abc import Sequence
from typing import Any, cast

# pyright: reportPrivateUsage=false
# Operators have parts that only this package uses.
import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import programs, stacks, trees
from spectra.base.calls import automatic
from spectra.base.errors import NonFiniteError, SpectraError, StructureError
from spectra.base.trees import PyTree
from spectra.operators.accumulate import weighted_sum
from spectra.operators.data import DataOperator
from spectra.results import Eigenpairs, LossSlice

PARALLEL = 1e-3
"""Sine of the angle between two directions below which they span no plane in single precision."""


@automatic
def loss_slice(
    op: DataOperator,
    pairs: Eigenpairs | None = None,
    *,
    directions: Any = None,
    extent: float | None = None,
    num_points: int = 25,
) -> LossSlice:
    """Evaluate the loss along eigenvectors, the gradient or directions of your own.

    L(θ + x v₁ + y v₂) for x and y in [-extent, extent]. With `pairs`, v₁ and v₂ are the unit vectors of the
    pairs with the largest |λ|. With `directions`, they are these at unit length, the second made orthogonal
    to the first, with the curvature vᵀHv along each and the quadratic model of their plane; a single
    direction gives a curve.

    Args:
        op: operator on data that has a loss: a Hessian, Gauss-Newton or Fisher matrix, or a block of one.
        pairs: at least two eigenpairs of it, from `eigsh`.
        directions: in place of `pairs`, a list of one or two of: "gradient", of the loss at the parameters;
            a pytree like the parameters, or a flat array, such as the difference to other parameters;
            `Eigenpairs`, for the vector of the largest |λ|.
        extent: the largest distance, in the norm of the parameters; default sqrt(2 |L| / |λ|), at which the
            largest curvature alone would double the loss; with `directions`, |L| / |slope| if that is less;
            and a tenth of the parameters' norm if the loss is zero.
        num_points: points per side, odd so that the parameters themselves are one of them.

    Returns:
        `LossSlice`; `plot_landscape` draws it.

    Raises:
        StructureError: `op` has no loss, or the vectors are not those of its parameters.
        SpectraError: fewer than two pairs; a direction that is zero, parallel to the other, or unknown;
            extent or num_points out of range.
        NonFiniteError: the loss, or a direction, is NaN or infinite at the parameters themselves.

    Cost: num_points² evaluations of the loss over all data, num_points along one direction; one gradient;
    with `directions` a product for each.

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
        >>> line = spectra.loss_slice(op, directions=["gradient"], num_points=5)
        >>> line.names, line.eigenvalues.round(3)  # gᵀHg / gᵀg
        (('the gradient',), array([5.401]))
    """
    if not isinstance(op, DataOperator):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise StructureError(
            f"a {type(op).__name__} has no loss; pass the operator on data that it was made of."
        )
    trees.require_values("loss_slice", (op, pairs, directions))
    if (pairs is None) == (directions is None):
        raise SpectraError("pass eigenpairs, or directions=[...] with one or two directions.")
    if num_points < 3 or num_points % 2 == 0:
        raise SpectraError(f"num_points={num_points}: use an odd number of at least 3.")
    if extent is not None and not 0 < extent < np.inf:
        raise SpectraError(f"extent={extent}: use a positive distance.")
    center = float(op.loss())
    if not np.isfinite(center):
        raise NonFiniteError(op.explain_non_finite())
    gradient, cosine = op.gradient(), 0.0
    if pairs is not None:
        names, plane, curvature = ("v1", "v2"), *_of_pairs(op, pairs)
    else:
        names, plane, cosine = _of_directions(op, directions, gradient)
        images = stacks.stacked([op @ v for v in stacks.split(plane)])
        curvature = np.asarray(stacks.inner(plane, images), float)
        curvature = (curvature + curvature.T) / 2
    slope = np.array([float(trees.vdot(gradient, v)) for v in stacks.split(plane)])
    values = np.diagonal(curvature).copy()
    steep = slope if pairs is None else 0 * slope
    side = _extent(op, center, values, steep) if extent is None else float(extent)
    line = side * np.linspace(-1.0, 1.0, num_points)
    axes = [line, line.copy() if len(values) == 2 else np.zeros(1)]
    points = np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, 2)[:, : len(values)]
    quadratic = center + points @ slope + np.sum((points @ curvature) * points, axis=1) / 2
    shape = (len(axes[1]), num_points)
    return LossSlice(
        x=axes[0],
        y=axes[1],
        loss=np.asarray(losses_at(op, plane, points), float).reshape(shape),
        quadratic=quadratic.reshape(shape),
        slope=slope,
        eigenvalues=values,
        center=center,
        num_evaluations=len(points),
        names=names,
        cross=float(curvature[0, -1]) if len(values) == 2 else 0.0,
        cosine=cosine,
    )


def _of_pairs(op: DataOperator, pairs: Eigenpairs) -> tuple[PyTree, np.ndarray]:
    """The two leading eigenvectors, stacked, and the diagonal matrix of their eigenvalues."""
    if not isinstance(pairs, Eigenpairs):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise SpectraError(f"pairs is of type {type(pairs).__name__}: pass the result of eigsh.")
    if len(pairs.values) < 2:
        raise SpectraError("a plane needs two eigenvectors: call eigsh with k=2 or more.")
    order = np.argsort(-np.abs(np.asarray(pairs.values)), kind="stable")[:2]
    plane = jax.tree.map(lambda x: jnp.asarray(x)[order], pairs.vectors)
    trees.check_structure(stacks.row(plane, 0), op.structure, "an eigenvector")
    return plane, np.diag(np.asarray(pairs.values, float)[order])


def _of_directions(
    op: DataOperator, directions: Any, gradient: PyTree
) -> tuple[tuple[str, ...], PyTree, float]:
    """Names, the directions at unit length and orthogonal to each other, and the cosine of their angle."""
    if isinstance(directions, (str, Eigenpairs)):
        directions = [directions]
    several = list(cast("Sequence[Any]", directions)) if isinstance(directions, Sequence) else []
    if len(several) not in (1, 2):
        raise SpectraError(
            'directions is a list of one or two: "gradient", pytrees like the parameters, Eigenpairs.'
        )
    named = [_direction(op, d, i, gradient) for i, d in enumerate(several)]
    names, vectors = zip(*named, strict=True)
    if len(vectors) == 1:
        return names, stacks.stacked(list(vectors)), 0.0
    first, second = vectors
    cosine = float(trees.vdot(first, second))
    rest = trees.axpy(-cosine, first, second)
    if trees.length(rest) < PARALLEL:
        raise SpectraError(
            f"{names[0]} and {names[1]} are parallel (cosine {cosine:.6f}) and span no plane: pass one."
        )
    rest = trees.scale(1 / trees.norm(rest), rest)
    rest = trees.axpy(-trees.vdot(first, rest), first, rest)  # twice: to rounding
    return names, stacks.stacked([first, trees.scale(1 / trees.norm(rest), rest)]), cosine


def _direction(op: DataOperator, direction: Any, i: int, gradient: PyTree) -> tuple[str, PyTree]:
    """Name and unit vector of one direction."""
    name = f"direction {i + 1}"
    if isinstance(direction, str):
        if direction != "gradient":
            raise SpectraError(f'{name} is {direction!r}: "gradient" is the only one with a name.')
        name, vector = "the gradient", gradient
    elif isinstance(direction, Eigenpairs):
        leading = int(np.argmax(np.abs(np.asarray(direction.values))))
        name = f"eigenvector {i + 1}"
        vector = op.as_vector(jax.tree.map(lambda x: jnp.asarray(x)[leading], direction.vectors), name)
    else:
        vector = op.as_vector(direction, name)
    if not trees.all_finite(vector):
        raise NonFiniteError(f"{name} is NaN or infinite.")
    size = trees.length(vector)
    if not size > 0:
        hint = ": the parameters are a stationary point" if isinstance(direction, str) else ""
        raise SpectraError(f"{name} is zero{hint}, and has no direction.")
    return name, trees.scale(1 / trees.norm(vector), vector)


def _extent(op: DataOperator, center: float, values: np.ndarray, slope: np.ndarray) -> float:
    """Where curvature alone, or a slope alone, would double the loss."""
    largest, steep = float(np.abs(values).max()), float(np.abs(slope).max())
    reach = [np.sqrt(2 * abs(center) / largest)] if largest else []
    reach += [abs(center) / steep] if steep else []
    if center and reach:
        return float(min(reach))
    size = trees.length(trees.cast_like(op.like, op.structure))
    return 0.1 * size if size else 1.0


def losses_at(op: DataOperator, plane: PyTree, points: np.ndarray) -> jax.Array:
    """The mean loss over all data at θ + Σ_j x_j v_j for each point x (p, k), with k stacked vectors v."""
    where = jnp.asarray(points, op.dtype)
    if op.stream is None:
        return on_batch(op, plane, where)
    return weighted_sum(lambda piece: on_batch(piece, plane, where), op._pieces())


@programs.jit
def on_batch(op: DataOperator, plane: PyTree, points: jax.Array) -> jax.Array:
    """One point after another: the memory is that of one evaluation."""

    def one(point: jax.Array) -> jax.Array:
        def move(x: jax.Array, v: jax.Array) -> jax.Array:
            return x + jnp.tensordot(point.astype(v.dtype), v, 1, precision="highest")

        params = op._merge(jax.tree.map(move, op._variables(), plane))
        return op._mean(lambda piece: op._value(params, piece))

    return jax.lax.map(one, points)
