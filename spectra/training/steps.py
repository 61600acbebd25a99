"""One update under the eyes of the curvature, and how large updates may be before they oscillate and grow."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import trees
from spectra.base.errors import NonFiniteError, SpectraError, Status, StructureError
from spectra.base.meshes import automatic
from spectra.base.trees import PyTree
from spectra.estimators.landscape import losses_at
from spectra.operators.data import DataOperator
from spectra.results import Eigenpairs, GradientOverlap, StableStep, StepQuality


@automatic
def step_quality(op: DataOperator, update: PyTree, *, measure: bool = True) -> StepQuality:
    """Compare the change in loss that slope and curvature predict for an update with the actual change.

    With the update d the prediction is g·d + ½ dᵀHd. With the operator of one task and the update of another,
    `sharpness` = dᵀHd / |g·d| is the relative sharpness, and a positive slope means that the tasks conflict.

    Args:
        op: operator on data that has a loss.
        update: what is added to the parameters: a pytree like them, or flat.
        measure: evaluate the loss at θ + d.

    Returns:
        `StepQuality`: `.predicted`, `.measured`, `.ratio`, `.sharpness`, `.largest_step`.

    Raises:
        StructureError: `op` has no loss, or the update is not like its parameters.
        SpectraError: the update is zero.
        NonFiniteError: the loss is NaN or infinite at the parameters.

    Cost: one gradient, one product, and two evaluations of the loss.

    References:
        Kalra et al., arXiv:2601.16979.

    Examples:
        >>> import jax.numpy as jnp, spectra
        >>> op = spectra.HessianOperator(lambda w, _: jnp.sum(w**2), jnp.ones(2), None)
        >>> found = spectra.step_quality(op, -0.5 * op.gradient())
        >>> found.predicted, found.measured, found.largest_step
        (-2.0, -2.0, 2.0)
    """
    _require_loss(op)
    along = op.as_vector(update, "update")
    length = trees.length(along)
    if not 0 < length < math.inf:
        raise SpectraError(f"the update has length {length}: pass one that is finite and not zero.")
    loss = float(op.loss())
    if not math.isfinite(loss):
        raise NonFiniteError(op.explain_non_finite())
    slope, curvature = jax.device_get(_two(along, op.gradient(), op @ along))
    moved = math.nan
    if measure:
        stack = jax.tree.map(lambda x: x[None], along)
        moved = float(losses_at(op, stack, np.ones((1, 1)))[0]) - loss
    return StepQuality(float(slope), float(curvature), length, loss, moved)


@automatic
def gradient_overlap(op: DataOperator, pairs: Eigenpairs) -> GradientOverlap:
    """Compute the share of |g|² that lies in the span of eigenvectors.

    (v_j·g)² / |g|² for each of the orthonormal vectors v_j. Training with large steps moves most of the
    gradient into the span of the leading ones.

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
    _require_loss(op)
    trees.check_structure(jax.tree.map(lambda x: x[0], pairs.vectors), op.structure, "an eigenvector")
    gradient = op.gradient()
    length = trees.length(gradient)
    if not 0 < length < math.inf:
        raise SpectraError(f"the gradient has length {length}: it has no direction.")
    along = jax.device_get(_shares(pairs.vectors, gradient))
    return GradientOverlap(np.asarray(along, float) ** 2, length)


def _require_loss(op: Any) -> None:
    if not isinstance(op, DataOperator):
        raise StructureError(f"a {type(op).__name__} has no loss: pass an operator on data.")


@jax.jit
def _two(along: PyTree, gradient: PyTree, image: PyTree) -> tuple[jax.Array, jax.Array]:
    return trees.vdot(gradient, along), trees.vdot(image, along)


@jax.jit
def _shares(vectors: PyTree, gradient: PyTree) -> jax.Array:
    """v·g / |g| of a stack of vectors."""
    unit = trees.scale(1 / trees.norm(gradient), gradient)
    return jax.vmap(lambda v: trees.vdot(jax.tree.map(jnp.asarray, v), unit))(vectors)


HALVINGS = 40
"""Of the error in the answer to an alternating gradient: 1e-12, below the rounding of float32."""
NORMAL = 2.0**10
"""In units of the smallest normal number: what stands for zero in an optimizer's state."""


@automatic
def stable_step(
    op: DataOperator,
    optimizer: Any,
    optimizer_state: PyTree,
    *,
    key: jax.Array,
    learning_rate: float = 1.0,
    tol: float = 1e-2,
    max_matvecs: int = 60,
) -> StableStep:
    """Find the multiple of an optimizer's updates at which training becomes unstable.

    It is one over the largest eigenvalue of -R H / 2, where R is the response of the optimizer's own update
    map to an alternating gradient: 2 / (η λ) for gradient descent, (2 + 2 β) / (η λ) with momentum, and the
    corresponding limit for any other optax transformation (Adam, Adafactor, Muon, chains of them).

    Args:
        op: `HessianOperator` at the parameters, over data whose gradient the optimizer sees.
        optimizer: an optax `GradientTransformation`, including its learning rate; its update is linearised.
        optimizer_state: its state, for the parameters that `op` differentiates.
        key: JAX random key of the start vector.
        learning_rate: the current rate; `learning_rate` of the result is the stable multiple of it.
        tol: relative residual at which the iteration ends.
        max_matvecs: maximum number of products, and of vectors kept.

    Returns:
        `StableStep`. Status NOT_CONVERGED: the products ran out; the interval is then that of the residual.
        The multiple is infinite if there is no positive curvature along the updates.

    Raises:
        StructureError: `op` has no loss, or the optimizer no `update`.
        SpectraError: max_matvecs or tol out of range.
        NonFiniteError: an update is NaN or infinite.

    Cost: about 20 products, each with 40 linearised updates of the optimizer; as many vectors.

    Fails to account for noise: the limit is for the loss of `op`, and updates from small batches become
    unstable earlier. Clipping, and schedules within a state, are taken as they act in this step.

    References:
        Cohen et al., arXiv:2103.00065 and arXiv:2207.14484.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, spectra
        >>> w, scales = jnp.ones(3), jnp.array([1.0, 2.0, 4.0])
        >>> op = spectra.HessianOperator(lambda w, _: 0.5 * jnp.sum(scales * w**2), w, None)
        >>> optimizer = optax.sgd(0.1, momentum=0.9)
        >>> found = spectra.stable_step(op, optimizer, optimizer.init(w), key=jax.random.key(0))
        >>> round(float(found), 3), round((2 + 2 * 0.9) / 4 / 0.1, 3)
        (9.5, 9.5)
    """
    if not isinstance(op, DataOperator):
        raise StructureError(f"a {type(op).__name__} has no loss: pass an operator on data.")
    if not callable(getattr(optimizer, "update", None)):
        raise StructureError(f"optimizer is a {type(optimizer).__name__} without an update function.")
    if max_matvecs < 1 or not 0 < tol < 1:
        raise SpectraError(f"max_matvecs={max_matvecs}, tol={tol}: use one product or more, and 0 < tol < 1.")
    prepared, point, gradient = op.prepare(), op._variables(), op.gradient()
    start = trees.sphere_sample(key, op.structure)

    def image(v):
        return _answer(optimizer.update, optimizer_state, (gradient, point), (prepared @ v, v))

    value, residual, count = _largest(image, start, min(max_matvecs, op.size), tol)
    converged = residual <= tol * abs(value) or count == op.size
    multiple = 1 / value if value > 0 else math.inf
    return StableStep(
        multiple=multiple,
        lower=1 / (value + residual) if value + residual > 0 else math.inf,
        upper=1 / (value - residual) if value > residual else math.inf,
        learning_rate=learning_rate * multiple,
        num_matvecs=count,
        status=Status.CONVERGED if converged else Status.NOT_CONVERGED,
    )


@partial(jax.jit, static_argnames="update")
def _answer(update, state: PyTree, point: tuple[PyTree, PyTree], change: tuple[PyTree, PyTree]) -> PyTree:
    """-1/2 times the updates that answer alternating changes of (gradient, parameters)."""
    leaves, treedef = jax.tree.flatten(state)
    moves = [i for i, x in enumerate(leaves) if jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)]

    def step(point, floats):
        own = list(leaves)
        for i, x in zip(moves, floats, strict=True):
            own[i] = x
        updates, new = update(point[0], treedef.unflatten(own), point[1])
        new = jax.tree.leaves(new)
        return updates, [jnp.asarray(new[i], floats[j].dtype) for j, i in enumerate(moves)]

    floats = [_off_zero(jnp.asarray(leaves[i])) for i in moves]
    tangents = jax.linearize(step, point, floats)[1]

    def settle(_, s):
        new = tangents(change, s)[1]
        return [(a - b) / 2 for a, b in zip(s, new, strict=True)]

    settled = jax.lax.fori_loop(0, HALVINGS, settle, [jnp.zeros_like(x) for x in floats])
    # The state before the step is the negative of the one after it.
    answer = tangents(change, settled)[0]
    return jax.tree.map(lambda x, v: (-x / 2).astype(v.dtype), answer, change[1])


def _off_zero(x: jax.Array) -> jax.Array:
    """A state without zeros: the root of a second moment that is zero, as under pixels that are always black
    or embeddings not met yet, has no slope, and 0 · inf is NaN. What takes its place is the smallest number
    whose products with decay rates are still normal; no eps of an optimizer is that small.
    """
    return jnp.where(x == 0, NORMAL * jnp.finfo(x.dtype).tiny, x)


def _largest(image, start: PyTree, most: int, tol: float) -> tuple[float, float, int]:
    """The eigenvalue of largest real part of a map that need not be symmetric, by Arnoldi iteration; its
    residual, and the products."""
    basis = jax.tree.map(lambda x: jnp.zeros((most + 1, *x.shape), x.dtype).at[0].set(x), start)
    vector, columns, value, residual = start, [], 0.0, math.inf
    for count in range(1, most + 1):
        basis, vector, *found = _next(basis, image(vector), count)
        along, length = jax.device_get(found)
        columns.append((along, float(length)))
        if not np.isfinite(length):
            raise NonFiniteError("an update of the optimizer is NaN or infinite.")
        h = np.zeros((count, count))
        for j, (column, below) in enumerate(columns):
            h[: j + 1, j] = column[: j + 1]
            if j + 1 < count:
                h[j + 1, j] = below
        values, vectors = np.linalg.eig(h)
        top = int(np.argmax(np.real(values)))
        value = float(np.real(values[top]))
        residual = float(length) * abs(vectors[-1, top]) / float(np.linalg.norm(vectors[:, top]))
        scale = float(np.abs(values).max())
        small = float(length) <= 10 * float(jnp.finfo(trees.scalar_dtype(start)).eps) * scale
        if small or (count > 2 and residual <= tol * abs(value)):
            break
    return value, residual, count


@jax.jit
def _next(basis: PyTree, image: PyTree, count) -> tuple[PyTree, PyTree, jax.Array, jax.Array]:
    """The basis with one vector more, that vector, the coefficients of the image in it, and what is left."""

    def coefficients(x):
        return jax.vmap(lambda vector: trees.vdot(vector, x))(basis)  # zero for rows that are not filled yet

    def without(x, along):
        def one(leaf, rows):
            return leaf - jnp.tensordot(along.astype(rows.dtype), rows, 1, precision="highest")

        return jax.tree.map(one, x, basis)

    first = coefficients(image)
    image = without(image, first)
    second = coefficients(image)
    image = without(image, second)
    length = trees.norm(image)
    vector = trees.scale(1 / jnp.where(length > 0, length, 1), image)
    return jax.tree.map(lambda rows, x: rows.at[count].set(x), basis, vector), vector, first + second, length
