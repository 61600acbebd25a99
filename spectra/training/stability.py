"""How large updates may be before they oscillate and grow: the linearised update map of an optimizer."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import draws, programs, trees
from spectra.base.calls import automatic
from spectra.base.errors import NonFiniteError, SpectraError, Status, StructureError
from spectra.base.trees import PyTree
from spectra.operators.data import DataOperator
from spectra.quadrature.christoffel import chance
from spectra.results import StableStep
from spectra.training.steps import require_loss
from spectra.training.updates import Answers, Seen

OUTSIDE = 0.01
"""Share of start vectors for which an eigenvalue lies beyond what is stated."""


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
    corresponding limit for any other optax transformation (Adam, Adafactor, Muon, chains of them). For a pair
    of complex eigenvalues λ, which Muon may have, |λ|² / Re λ replaces λ.

    Args:
        op: `HessianOperator` at the parameters, over data whose gradient the optimizer sees.
        optimizer: an optax `GradientTransformation`, including its learning rate; its update is linearised.
        optimizer_state: its state, for the parameters that `op` differentiates.
        key: JAX random key of the start vector.
        learning_rate: the current rate; `learning_rate` of the result is the stable multiple of it.
        tol: relative width, of the residual and of what `lower` leaves, at which the iteration ends.
        max_matvecs: maximum number of products, and of vectors kept.

    Returns:
        `StableStep`. Where the update map is symmetric, as for gradient descent and momentum, the multiple is
        below `upper` always, and above `lower` with 99 %; elsewhere both are those of the residual of its
        eigenvalue. Status NOT_CONVERGED: the products ran out before they were within `tol`.
        The multiple is infinite if there is no positive curvature along the updates.

    Raises:
        StructureError: `op` has no loss; or the optimizer has no `update`, or its `update` needs more than
            gradient, state, parameters and the loss as `value`.
        SpectraError: learning_rate, max_matvecs or tol out of range.
        NonFiniteError: an update is NaN or infinite.

    Cost: 5 to 25 products, each with 40 linearised updates of the optimizer; as many vectors.

    If updates come only every few calls (`optax.MultiSteps`), the limit is that of the next whole cycle.

    Fails to account for noise: the limit is for the loss of `op`, and updates from small batches become
    unstable earlier. Clipping, and schedules within a state, are taken as they act in this step. The limit is
    that of oscillations from step to step; averages of averages (`optax.ema` after momentum) may grow in
    slower oscillations before it is reached.

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
    if not 0 < learning_rate < math.inf:
        raise SpectraError(f"learning_rate={learning_rate}: the current rate is a positive number.")
    if max_matvecs < 1 or not 0 < tol < 1:
        raise SpectraError(f"max_matvecs={max_matvecs}, tol={tol}: use one product or more, and 0 < tol < 1.")
    trees.require_values("stable_step", (op.params, op.data, optimizer_state, key))
    prepared, gradient = op.prepare(), op.gradient()
    start = draws.unit_vector(key, op)

    def image(v: PyTree) -> PyTree:
        return answers(Seen(prepared @ v, v, trees.vdot(gradient, v)))

    answers = Answers(optimizer.update, optimizer_state, Seen(gradient, op._variables(), op.loss()))
    found = _largest(image, start, min(max_matvecs, op.size), tol, 4 * op.precision)
    value, least, most, count = found
    converged = max(most - value, value - least) <= tol * abs(value) or count == op.size
    multiple = 1 / value if value > 0 else math.inf
    return StableStep(
        multiple=multiple,
        lower=1 / most if most > 0 else math.inf,
        upper=1 / least if least > 0 else math.inf,
        learning_rate=learning_rate * multiple,
        num_matvecs=count,
        status=Status.CONVERGED if converged else Status.NOT_CONVERGED,
    )


def _largest(
    image: Callable[[PyTree], PyTree], start: PyTree, most: int, tol: float, rounding: float
) -> tuple[float, float, float, int]:
    """The eigenvalue of largest real part of a map that need not be symmetric, by Arnoldi iteration; what it
    is at least and at most, and the products. Rounding is relative to the largest in modulus.

    Of a symmetric map no Ritz value is above the largest eigenvalue, and the start vector, which is drawn
    from the sphere, excludes those that are far beyond at 99 %. Of another map it is an estimate: a ball of
    the residual about the value.
    """
    basis = jax.tree.map(lambda x: jnp.zeros((most + 1, *x.shape), x.dtype).at[0].set(x), start)
    vector, columns, size = start, [], sum(x.size for x in jax.tree.leaves(start))
    value, low, high = 0.0, -math.inf, math.inf
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
        reach = max(residual, rounding * scale)
        low, high = value - reach, value + reach
        if float(length) <= 10 * float(jnp.finfo(trees.scalar_dtype(start)).eps) * scale:
            break
        close = count > 2 and residual <= tol * abs(value)
        moved = rounding * scale + float(np.abs(h - h.T).max())
        if (close or count == most) and count < size and moved <= math.sqrt(rounding) * scale:
            low, high = value - moved, _limit(h, float(length), size, moved)
        if close and high - value <= tol * abs(value):
            break
    return value, low, high, count


def _limit(h: np.ndarray, length: float, size: int, moved: float) -> float:
    """What the largest eigenvalue of a symmetric map is above for a share `OUTSIDE` of start vectors at most;
    from the Hessenberg matrix of Lanczos steps and the length of what is left."""
    alpha, beta = np.diagonal(h), np.append(np.diagonal(h, -1), length)
    largest = float(np.linalg.eigvalsh((h + h.T) / 2)[-1])
    low, high = 0.0, float(np.abs(h).max()) + length
    while chance(largest + high, alpha, beta, size, moved) > OUTSIDE:
        low, high = high, 2 * high
    while high - low > moved:
        middle = (low + high) / 2
        below = chance(largest + middle, alpha, beta, size, moved) > OUTSIDE
        low, high = (middle, high) if below else (low, middle)
    return largest + high


def _edge(value: complex) -> float:
    """One over the multiple m at which 1 - 2 m value has modulus one.

    Maps like Muon's turn as they alternate: a pair of eigenvalues beside the real axis. Far from it nothing
    alternates, and the answer to what does is not the one that counts.
    """
    if abs(value.imag) < value.real:
        return abs(value) ** 2 / value.real
    return value.real


@programs.jit
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
