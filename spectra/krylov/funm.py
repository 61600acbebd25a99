"""Functions of an operator applied to vectors, by Lanczos, with a bound on the error.

Inside jit, vmap and grad f(H) v comes from a block Krylov space, with the derivatives of f(H) v itself. With
w the cotangent of f(H) v, that of v is f(H) w, and that of H, by its eigenpairs (λ_i, u_i), is

    Σ_ij f[λ_i, λ_j] (u_i · w) (u_j · v) u_iᵀ dH u_j,    f[λ, μ] = (f(λ) - f(μ)) / (λ - μ)

(Daleckii and Krein). Ritz pairs of the space that v and w share stand for the eigenpairs, as those of the
space of v do for the value. The derivative of the iteration would be another: a vector that is zero, that
depends on the others or whose space is exhausted leaves no trace in it of where it could move to.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spectra.base import arrays, stacks, trees
from spectra.base.calls import automatic
from spectra.base.errors import NonFiniteError, SpectraError, Status
from spectra.base.files import tree_digest
from spectra.base.reverse import refused_as, reverse_only
from spectra.base.trees import PyTree
from spectra.krylov.band import BandState, append, empty
from spectra.krylov.band_block import run_block
from spectra.krylov.floors import relative_change
from spectra.krylov.function_bounds import Range, given_intervals, named_function
from spectra.krylov.function_run import FunctionRun, split, width_of
from spectra.krylov.layout import Layout
from spectra.krylov.recurrence import check_steps
from spectra.krylov.rows import stack
from spectra.krylov.same_function import digest
from spectra.krylov.vectors import as_stack
from spectra.operators.base import LinearOperator, require_operator
from spectra.operators.hoisted import hoisted
from spectra.operators.jaxprs import outside_loops
from spectra.results import FunctionProduct
from spectra.runs.checkpoint import Checkpoint
from spectra.runs.watch import watched

_product = partial(jnp.matmul, precision="highest")
GAUSS = ((0.5 - 0.15**0.5, 5 / 18), (0.5, 8 / 18), (0.5 + 0.15**0.5, 5 / 18))
"""Points and weights on (0, 1) of the rule that is exact for polynomials of degree 5."""


FORWARD = (
    "f(H) v has derivatives in reverse mode only: use jax.grad, jax.vjp or jax.jacrev, not jax.jvp, "
    "jax.jacfwd or jax.hessian."
)


def traced_values(op: LinearOperator, f: Callable[[Any], Any], vectors: PyTree, steps: int) -> PyTree:
    """f(H) v of each of some vectors, in blocks, without looking at values."""
    op, count, dtype = hoisted(op), stacks.length(vectors), op.dtype
    width = width_of(count, steps)
    # What f is made of may be differentiated, too; a function of a single number takes arrays of any shape.
    plain, constants = cast("Any", jax).closure_convert(f, jnp.zeros((), dtype))

    def function(x: jax.Array, *constants: Any) -> jax.Array:
        def one(x: jax.Array) -> jax.Array:
            return plain(x, *constants)

        return jax.vmap(one)(x.ravel()).reshape(x.shape).astype(x.dtype)

    @jax.custom_vjp
    def block(op: LinearOperator, constants: Any, vectors: PyTree) -> PyTree:
        return _values(op, lambda x: function(x, *constants), vectors, steps)

    def forward(op: LinearOperator, constants: Any, vectors: PyTree) -> tuple[PyTree, Any]:
        return block(op, constants, vectors), (op, constants, vectors)

    def backward(known: Any, cotangent: PyTree) -> Any:
        op, constants, vectors = known
        return _pullback(function, steps, op, constants, vectors, cotangent)

    block.defvjp(forward, backward)
    op, constants, vectors = reverse_only((op, constants, vectors), FORWARD)
    with refused_as(FORWARD):
        if width == 1:
            alone = jax.vmap(lambda v: block(op, constants, jax.tree.map(lambda x: x[None], v)))(vectors)
            return jax.tree.map(lambda x: x[:, 0], alone)
        parts = [stacks.rows(vectors, i, min(i + width, count)) for i in range(0, count, width)]
        return stacks.concatenate([block(op, constants, part) for part in parts])


def _values(op: LinearOperator, f: Callable[[Any], Any], vectors: PyTree, steps: int) -> PyTree:
    basis, theta, turn, sizes, along = _space(op, vectors, steps)
    return jax.vmap(trees.scale)(sizes, stacks.combine(_product(turn, _times(f(theta), along)).T, basis))


def _times(values: jax.Array, coefficients: jax.Array) -> jax.Array:
    """f counts for nothing where there are no coefficients: it need not be finite there."""
    return jnp.where(coefficients != 0, values[:, None] * coefficients, 0)


def _pullback(
    f: Callable[..., jax.Array],
    steps: int,
    op: LinearOperator,
    constants: Any,
    vectors: PyTree,
    cotangents: PyTree,
) -> tuple[Any, Any, PyTree]:
    """The cotangents of the operator, of what f is made of and of the vectors."""
    count = stacks.length(vectors)
    basis, theta, turn, sizes, along = _space(op, stacks.concatenate([vectors, cotangents]), steps)
    v, w, both = along[:, :count], along[:, count:], sizes[:count] * sizes[count:]

    def values(constants: Any) -> jax.Array:
        return f(theta, *constants)

    here, pull = jax.vjp(values, constants)
    of_vectors = stacks.combine(_product(turn, _times(here, w)).T, basis)
    of_values = jnp.sum(both * w * v, axis=1)
    (of_constants,) = pull(jnp.where(of_values != 0, of_values, 0))
    pairs = _product(w * both, v.T)
    pairs = jnp.where(pairs != 0, _quotients(lambda x: f(x, *constants), theta) * pairs, 0)
    moved = stacks.combine(_product(_product(turn, pairs), turn.T), basis)

    def form(op: LinearOperator) -> jax.Array:
        """Σ_i q_i · H moved_i, of which no more than one product is held."""

        def add(total: jax.Array, pair: tuple[PyTree, PyTree]) -> tuple[jax.Array, None]:
            return total + trees.vdot(pair[0], op.mv(pair[1])), None

        return lax.scan(jax.checkpoint(add), jnp.zeros((), theta.dtype), (basis, moved))[0]

    (of_op,) = jax.vjp(form, op)[1](jnp.ones((), theta.dtype))
    return of_op, of_constants, jax.vmap(trees.scale)(sizes[count:], of_vectors)


def _quotients(f: Callable[[Any], Any], theta: jax.Array) -> jax.Array:
    """f[θ_i, θ_j]; where they are closer than eps^(1/4), for which differences of f would lose the digits of
    eps^(1/4), the mean of f' between them by Gauss, whose error is of the sixth power of the distance."""
    left, right = theta[:, None], theta[None, :]
    gap = right - left
    near = jnp.abs(gap) <= jnp.finfo(theta.dtype).eps ** 0.25 * jnp.maximum(jnp.abs(left), jnp.abs(right))

    def slope(x: jax.Array) -> jax.Array:
        return jax.jvp(f, (x,), (jnp.ones_like(x),))[1]

    mean = sum(weight * slope(left + at * gap) for at, weight in GAUSS)
    at = f(theta)
    return jnp.where(near, mean, (at[None, :] - at[:, None]) / jnp.where(near, 1, gap))


def _space(op: LinearOperator, vectors: PyTree, steps: int) -> tuple[PyTree, Any, Any, Any, Any]:
    """Of the block Krylov space: its basis, the Ritz values θ and vectors S, the norms of the vectors, and
    the coefficients of the vectors, of norm one, on the Ritz vectors."""
    op, layout, width = op.prepare(), Layout.leafwise(op.structure), stacks.length(vectors)
    q, sizes, z = split(vectors)
    state = empty(layout, min((steps + 1) * width, op.size))

    def add(state: BandState, one: tuple[PyTree, jax.Array]) -> tuple[BandState, jax.Array]:
        row, there = one
        added = lax.cond(there, partial(_appended, layout, row), lambda state: state, state)
        return added, state.filled

    state, starts = lax.scan(add, state, (q, arrays.diagonal(z) != 0))  # starts: the row of each vector
    processed, state = run_block(op, layout, state, steps, width)
    rows = jnp.arange(len(state.coefficients))
    there = rows < processed
    g = jnp.where(there & there[:, None], state.coefficients, 0)
    # Rows that are not there count for nothing. They get values within the spectrum, where f has one too, and
    # different ones: eigenvectors of the same value have no derivative.
    own = arrays.diagonal(g)
    low, high = (jnp.where(processed > 0, x, 0) for x in (_least(own, there), -_least(-own, there)))
    fill = low + (rows + 0.5) * ((high - low) / len(rows))
    theta, turn = arrays.eigh((g + g.T) / 2 + jnp.diag(jnp.where(there, 0, fill)))
    first = (rows[:, None] == starts).astype(z.dtype)
    along = _product(turn.T, _product(first, z))
    return stack(state.basis, layout, 0, len(rows)), theta, turn, sizes, along


def _least(x: jax.Array, there: jax.Array) -> jax.Array:
    return jnp.min(jnp.where(there, x, jnp.inf))


def _appended(layout: Layout, row: PyTree, state: BandState) -> BandState:
    return append(layout, state, row)[0]


STEPS = 128
"""Lanczos steps at most where num_steps is not given."""
TRACED_STEPS = 64


@automatic
def funm(
    op: LinearOperator,
    f: str | Callable[[np.ndarray], Any],
    v: PyTree,
    *,
    num_steps: int | None = None,
    tol: float = 1e-5,
    bounds: Any = None,
    key: jax.Array | None = None,
    progress: bool = False,
    checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
) -> FunctionProduct:
    """Compute f(H) v by Lanczos, with a bound on the error.

    The value is |v| Q f(T) e_1 after m steps from v, exact for polynomials of degree m - 1. The error is |v|
    β g(H) q with a known function g (`spectra.krylov.function_bounds`), so it is at most |v| β max |g| over
    the spectrum; steps are taken until that is below tol |value|.

    **Several vectors** share one Krylov space (block Lanczos), with their products computed side by side:
    each value uses the directions of all vectors and has its own bound. A block takes as many vectors as fit
    in half of the free memory with at most 1024 rows of the basis (8 vectors for the default num_steps, 64
    for num_steps=16); further vectors go into further blocks. A block ends when all of its values have
    reached the tolerance.

    **What the bound rests on.** It needs a set that contains the spectrum. With both ends in `bounds` it is
    certain, up to the variation of g between some 2,000 samples. Ends that are not given are found by 40
    Lanczos steps from a random vector, and hold with probability 1 - 1e-6 each (Kuczynski and Wozniakowski);
    an operator that is positive semi-definite by construction needs none below zero. The lower end matters
    where f has a pole or a branch point there: 1/x, log and 1/sqrt are bounded only if the spectrum is known
    to stay away from zero, so pass `bounds=(shift, None)` for a damped operator. For "sign" and "abs" pass
    two intervals, on both sides of zero: between them f needs no approximation. The effect of rounding in the
    products is added, as measured where an operator has parameters.

    **Derivatives.** Inside jit, vmap and grad num_steps are taken without a bound. jax.grad differentiates
    f(H) v, not the iteration: with respect to v, the operator's parameters and data, and what f is made of,
    also where a vector is zero, depends on others or spans an exhausted space. It takes num_steps products
    for each vector and its cotangent, and differentiates as many. There is no forward mode.

    Args:
        op: symmetric operator of order n.
        f: "exp", "log", "sqrt", "inv_sqrt", "inv", "sign", "abs", or a vectorised function of real
            numbers, of NumPy or JAX, as for `trace_of`; inside jit, of JAX.
        v: a vector, a pytree like the parameters or a flat array (n,); or several, as the columns of an (n,
            k) array or with a leading axis.
        num_steps: maximum number of Lanczos steps, each a product for each vector; default 128, or n.
        tol: accepted error relative to |f(H) v|; 0 takes all steps.
        bounds: (a, b) that contain the spectrum, None for an unknown end; or several such intervals.
        key: JAX random key for the ends of the spectrum; default jax.random.key(0).
        progress: show the number of products, and the error of the current vector.
        checkpoint: a folder, or a `Checkpoint`, to save the run in: finished values, and the basis of the
            current one. The same call resumes from there, with bit-identical results on the same devices.
            The first save comes after the products for the ends of the spectrum.

    Returns:
        `FunctionProduct` with value and error_bound. `status` is CONVERGED, INVARIANT where the Krylov space
        is exhausted and the value exact to rounding, which the bound holds, BUDGET_EXHAUSTED, or TRACED
        inside jit, where the bound is infinite.

    Raises:
        SpectraError: f is not finite at a Ritz value, as for the root of an operator with a negative
            eigenvalue, which the message names; a Ritz value lies outside `bounds`.
        NonFiniteError: a product is NaN or infinite.
        CheckpointError: the folder holds the checkpoint of another run.
        PreemptedError: the process was asked to end (SIGTERM or Ctrl-C), and the run is saved.

    Cost: one product per step for each vector, and 40 for the ends of the spectrum; one more, which is not
        counted, where parts of a sum may cancel, and seven or eight where rounding is measured. Memory:
        num_steps vectors for each vector of a block.

    References:
        Saad, doi:10.1137/0729014; Chen, Greenbaum, Musco and Musco, arXiv:2106.09806; of blocks Frommer, Lund
        and Szyld, Electronic Transactions on Numerical Analysis 47 (2017) 100-126.

    Examples:
        >>> import jax.numpy as jnp, spectra
        >>> op = spectra.MatrixOperator(jnp.diag(jnp.array([1.0, 4.0, 9.0])))
        >>> result = spectra.funm(op, "sqrt", jnp.ones(3))
        >>> [round(float(x), 4) for x in result.value]
        [1.0, 2.0, 3.0]
    """
    require_operator(op)
    named, name = named_function(f)
    if not 0 <= tol < 1:
        raise SpectraError(f"tol={tol} is relative to |f(H) v|: use a number in [0, 1).")
    traced = trees.is_traced((op, v, bounds, key))
    most = TRACED_STEPS if traced else STEPS
    steps = min(most, op.size) if num_steps is None else num_steps
    check_steps(steps, op.size)
    rows, several, back = as_stack(op, v, "v")
    if traced:
        if checkpoint is not None:
            raise SpectraError("checkpoint= needs values, which do not exist inside jit or vmap.")
        value = traced_values(op, named.jax, rows, steps)
        return FunctionProduct(back(value), np.inf, 0, steps, name, "nothing inside jit", Status.TRACED)
    if not trees.all_finite(rows):
        raise NonFiniteError("v is NaN or infinite somewhere.")
    intervals = given_intervals(bounds)

    def arguments() -> dict[str, Any]:
        own = {"num_steps": steps, "tol": float(tol), "bounds": [list(pair) for pair in intervals]}
        return own | {"f": [name, digest(named.real)], "v": tree_digest(rows)}

    with watched("funm", progress, checkpoint, None, arguments) as watch, watch.saver(op, key) as saver:
        measured = relative_change(op)
        run = FunctionRun(outside_loops(op.prepare()), named, name, steps, tol, watch.bar, saver, measured)
        run.restore()
        if run.known is None:
            run.known = Range.of(run.op, intervals, key, run.before, measured)
            watch.bar.update(run.known.products)
        run.values(rows, run.known)
    found, errors = run.found, np.array([one.error for one in run.found])
    worst = [Status.BUDGET_EXHAUSTED, Status.CONVERGED, Status.INVARIANT]
    return FunctionProduct(
        value=back(stacks.stacked([one.value for one in found])),
        error_bound=errors if several else float(errors[0]),
        num_matvecs=run.known.products + run.products,
        num_steps=run.longest,
        function=name,
        bound=run.known.reason,
        status=min((one.status for one in found), key=worst.index),
    )
