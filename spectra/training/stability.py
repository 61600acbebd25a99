"""How large updates may be before they oscillate and grow: the linearised update map of an optimizer."""

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
from spectra.operators.data import DataOperator
from spectra.results import StableStep
from spectra.training.steps import require_loss

HALVINGS = 40
"""Of the error in the answer to an alternating gradient: 1e-12, below the rounding of float32."""
NORMAL = 2.0**10
"""In units of the smallest normal number of float32, or of a lower precision: what stands for zero."""


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
    Of a pair of eigenvalues λ beside the real axis, as Muon's may be, |λ|² / Re λ takes the place of λ.

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
    require_loss(op)
    if not callable(getattr(optimizer, "update", None)):
        raise StructureError(f"optimizer is a {type(optimizer).__name__} without an update function.")
    if max_matvecs < 1 or not 0 < tol < 1:
        raise SpectraError(f"max_matvecs={max_matvecs}, tol={tol}: use one product or more, and 0 < tol < 1.")
    prepared, point, gradient = op.prepare(), op._variables(), op.gradient()
    start = trees.sphere_sample(key, op.structure)

    answers = _Answers(optimizer.update, optimizer_state, gradient, point)
    value, residual, count = _largest(
        lambda v: answers((prepared @ v, v)), start, min(max_matvecs, op.size), tol
    )
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


class _Answers:
    """Updates that answer alternating changes, in the optimizer's precision while that is enough.

    Adafactor has 1e-30 in place of the moments of what has seen no gradient, whose power -3/2, in the slope,
    is beyond float32; and it divides by the root mean square of a whole leaf, which has no slope at zero. In
    float64, with tiny numbers in place of zeros in gradients and parameters too, both are finite.
    """

    def __init__(self, update: Any, state: PyTree, gradient: PyTree, point: PyTree):
        self.update, self.state, self.point, self.wide = update, state, (gradient, point), False

    def __call__(self, change: tuple[PyTree, PyTree]) -> PyTree:
        if not self.wide:
            answer = _answer(self.update, self.state, self.point, change)
            if trees.all_finite(answer):
                return answer
            self.wide = True
        with jax.enable_x64(True):
            point = jax.tree.map(_off_zero, self.point)
            found = _answer(self.update, *_wide((self.state, point, change)))
        return jax.tree.map(lambda x, v: jnp.asarray(np.asarray(x), v.dtype), found, change[1])


def _wide(tree: PyTree) -> PyTree:
    """Floats in float64."""

    def one(x):
        floating = jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)
        return jnp.asarray(np.asarray(x, np.float64)) if floating else x

    return jax.tree.map(one, tree)


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
    least = max(jnp.finfo(x.dtype).tiny, jnp.finfo(jnp.float32).tiny)
    return jnp.where(x == 0, NORMAL * least, x)


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
        value = _edge(complex(values[top]))
        residual = float(length) * abs(vectors[-1, top]) / float(np.linalg.norm(vectors[:, top]))
        scale = float(np.abs(values).max())
        small = float(length) <= 10 * float(jnp.finfo(trees.scalar_dtype(start)).eps) * scale
        if small or (count > 2 and residual <= tol * abs(value)):
            break
    return value, residual, count


def _edge(value: complex) -> float:
    """One over the multiple m at which 1 - 2 m value has modulus one.

    Maps like Muon's turn as they alternate: a pair of eigenvalues beside the real axis. Far from it nothing
    alternates, and the answer to what does is not the one that counts.
    """
    if abs(value.imag) < value.real:
        return abs(value) ** 2 / value.real
    return value.real


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
