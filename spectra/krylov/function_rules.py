"""f(H) v inside jit, vmap and grad: from a block Krylov space, with the derivatives of f(H) v itself.

With w the cotangent of f(H) v, that of v is f(H) w, and that of H, by its eigenpairs (λ_i, u_i), is

    Σ_ij f[λ_i, λ_j] (u_i · w) (u_j · v) u_iᵀ dH u_j,    f[λ, μ] = (f(λ) - f(μ)) / (λ - μ)

(Daleckii and Krein). Ritz pairs of the space that v and w share stand for the eigenpairs, as those of the
space of v do for the value. The derivative of the iteration would be another: a vector that is zero, that
depends on the others or whose space is exhausted leaves no trace in it of where it could move to.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax

from spectra.base import arrays, stacks, trees
from spectra.base.trees import PyTree
from spectra.krylov.band import BandState, append, empty
from spectra.krylov.band_block import run_block
from spectra.krylov.function_run import split, width_of
from spectra.krylov.layout import Layout
from spectra.krylov.rows import stack
from spectra.operators.base import LinearOperator

_product = partial(jnp.matmul, precision="highest")
GAUSS = ((0.5 - 0.15**0.5, 5 / 18), (0.5, 8 / 18), (0.5 + 0.15**0.5, 5 / 18))
"""Points and weights on (0, 1) of the rule that is exact for polynomials of degree 5."""


def traced_values(op: LinearOperator, f: Callable[[Any], Any], vectors: PyTree, steps: int) -> PyTree:
    """f(H) v of each of some vectors, in blocks, without looking at values."""
    count, dtype = stacks.length(vectors), op.dtype
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
