"""How large the updates of any optimizer may be before they oscillate with growing size.

Near the parameters θ the gradient is H δ. Where training turns unstable because steps are too long, δ changes
its sign in every step: δ, -δ, δ, ... To a gradient that alternates, the optimizer answers with updates R H δ
that alternate as well, R being linear. The mode neither grows nor decays when the update takes δ to -δ:

    m R H δ = -2 δ,

so that the largest eigenvalue μ of -R H / 2 gives the multiple m = 1 / μ of its updates at the edge. For
gradient descent R = -η, and η m = 2 / λ; for momentum β, R = -η / (1 + β), and η m = (2 + 2 β) / λ; for
Adam R = -η (1 - b1) / (1 + b1) P⁻¹.

R comes from the optimizer's own update. With s its state, linearised, s' = A s + B g, and the answer to an
alternating gradient is the s with -s = A s + B g. A forgets, with eigenvalues in [0, 1], so that s ← (s - A s
- B g) / 2 halves the error with each step.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectra import _tree
from spectra._errors import NonFiniteError, SpectraError, StructureError
from spectra._mesh import automatic
from spectra._status import Status
from spectra.operators.data_operator import DataOperator
from spectra.results import StableStep

PyTree = Any
HALVINGS = 40
"""Of the error in the answer to an alternating gradient: 1e-12, below the rounding of float32."""


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
    """Find the multiple of an optimizer's updates at which training turns unstable.

    It is one over the largest eigenvalue of -R H / 2, R being the answer of the optimizer's own update map to
    a gradient that alternates: 2 / (η λ) for gradient descent, (2 + 2 β) / (η λ) with momentum, and what
    follows for any other transformation of optax (Adam, Adafactor, Muon, chains of them).

    Args:
        op: `HessianOperator` at the parameters, over data whose gradient the optimizer sees.
        optimizer: optax's `GradientTransformation`, its learning rate included; its update is linearised.
        optimizer_state: its state, for the parameters of `op` that vary.
        key: JAX random key of the start vector.
        learning_rate: what `learning_rate` of the result is a multiple of.
        tol: relative residual at which the iteration ends.
        max_matvecs: products allowed, and vectors kept.

    Returns:
        `StableStep`. Status NOT_CONVERGED: the products ended first; the interval is that of the residual.
        The multiple is infinite where no curvature is positive along the updates.

    Raises:
        StructureError: `op` has no loss, or the optimizer no `update`.
        SpectraError: max_matvecs or tol out of range.
        NonFiniteError: an update is NaN or infinite.

    Cost: about 20 products, each with 40 updates of the optimizer, linearised; as many vectors.

    Fails for noise: the edge is that of the loss of `op`; updates from small batches are unstable earlier.
    Clipping, and schedules within a state, are taken as they act in this step.

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
    start = _tree.sphere_sample(key, op.structure)

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

    # Where every gradient so far was zero, as behind an input that always is, the root of Adam's second
    # moment has an infinite slope, and times zero that is NaN. At the least number it is finite.
    floats = [jnp.asarray(leaves[i]) for i in moves]
    floats = [jnp.where(x == 0, 4 * jnp.finfo(x.dtype).tiny, x) for x in floats]
    tangents = jax.linearize(step, point, floats)[1]

    def settle(_, s):
        new = tangents(change, s)[1]
        return [(a - b) / 2 for a, b in zip(s, new, strict=True)]

    settled = jax.lax.fori_loop(0, HALVINGS, settle, [jnp.zeros_like(x) for x in floats])
    # The state before the step is the negative of the one after it.
    answer = tangents(change, settled)[0]
    return jax.tree.map(lambda x, v: (-x / 2).astype(v.dtype), answer, change[1])


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
        small = float(length) <= 10 * float(jnp.finfo(_tree.scalar_dtype(start)).eps) * scale
        if small or (count > 2 and residual <= tol * abs(value)):
            break
    return value, residual, count


@jax.jit
def _next(basis: PyTree, image: PyTree, count) -> tuple[PyTree, PyTree, jax.Array, jax.Array]:
    """The basis with one vector more, that vector, the coefficients of the image in it, and what is left."""

    def coefficients(x):
        return jax.vmap(lambda vector: _tree.vdot(vector, x))(basis)  # zero for rows that are not filled yet

    def without(x, along):
        def one(leaf, rows):
            return leaf - jnp.tensordot(along.astype(rows.dtype), rows, 1, precision="highest")

        return jax.tree.map(one, x, basis)

    first = coefficients(image)
    image = without(image, first)
    second = coefficients(image)
    image = without(image, second)
    length = _tree.norm(image)
    vector = _tree.scale(1 / jnp.where(length > 0, length, 1), image)
    return jax.tree.map(lambda rows, x: rows.at[count].set(x), basis, vector), vector, first + second, length
