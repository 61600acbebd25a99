"""Blocks of random probes, their products in batches, and an orthonormal basis of them.

A block is a stack of vectors, whose algebra is that of `spectra._stacks`. Squares of float32 underflow below
1e-19 and overflow beyond 1e19, so that products are kept in a unit, see `in_unit`, and estimates multiplied
by it at the end. Probe i depends on the key and i alone, whatever the batch it is in.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from spectra import _tree
from spectra._stacks import combine, concatenate, gram, inner, length, row_dots, rows, subtract
from spectra.operators.base import LinearOperator

PyTree = Any
PROBES = ("rademacher", "normal")
JITTER = 4.0
"""Noise added before a stack is orthonormalised, in roundings of its longest vector: what a product may
be off by anyway, and what fills the basis where the vectors are dependent."""
PASSES = 4
"""A pass brings singular values from s to s / sqrt(eps): two reach those of size eps, the third makes
them orthonormal, the fourth to the last bit."""


@partial(jax.jit, static_argnames="kind")
def draw(op: LinearOperator, key: jax.Array, indices: jax.Array, kind: str) -> PyTree:
    """The probes with the given numbers, entries ±1 ("rademacher") or N(0, 1) ("normal")."""
    return _draw(key, indices, op.structure, kind)


def draw_with_noise(op: LinearOperator, key: jax.Array, indices: jax.Array, kind: str, noise: jax.Array):
    """Probes, and as many normal vectors from the key `noise`: (probes, vectors).

    Together where both are normal: compiling the generator takes longer than all else in a sketch.
    """
    others = jnp.arange(len(indices))
    if kind != "normal":
        return draw(op, key, indices, kind), draw(op, noise, others, "normal")
    keys, numbers = jnp.stack([key, noise]), jnp.stack([indices, others])
    both = jax.vmap(lambda key, indices: _draw(key, indices, op.structure, kind))(keys, numbers)
    return tuple(jax.tree.map(lambda x, i=i: x[i], both) for i in (0, 1))


def _draw(key: jax.Array, indices: jax.Array, structure: PyTree, kind: str) -> PyTree:
    distribution = getattr(jax.random, kind)
    return jax.vmap(lambda i: _tree.sample(jax.random.fold_in(key, i), structure, distribution))(indices)


@jax.jit
def in_unit(stack: PyTree, unit: jax.Array) -> tuple[PyTree, jax.Array]:
    """Products in a unit in which their squares are numbers, and that unit: a power of two, which is exact.

    `unit` is the one of the products before, or 0: then it is set by the largest entry, if there is any.
    """

    def first(stack):
        size = _tree.largest(stack)
        return jnp.where(size > 0, _tree.power_of_two(size), 0)

    unit = lax.cond(unit > 0, lambda _: unit, first, stack)
    return _tree.scale(1 / jnp.where(unit > 0, unit, 1), stack), unit


@partial(jax.jit, static_argnames="batch")
def _products(op: LinearOperator, stack: PyTree, batch: int) -> PyTree:
    # `lax.map` puts the results of batches together by a reshape, which leaves without numbers refuse.
    plain = batch == 1 or any(x.size == 0 for x in jax.tree.leaves(stack))
    return lax.map(op.mv, stack, batch_size=None if plain else batch)


def products(op: LinearOperator, stack: PyTree, batch: int) -> PyTree:
    """H v for each vector of a stack, `batch` at a time; a stream reads its data once a batch."""
    if not op.on_host:
        return _products(op, stack, batch)
    starts = range(0, length(stack), batch)
    return concatenate([op.mv_batch(rows(stack, s, s + batch)) for s in starts])


@jax.custom_jvp
def orthonormalize(stack: PyTree, against: PyTree | None, noise: PyTree) -> PyTree:
    """k orthonormal vectors, orthogonal to `against`, whose span holds the stack to rounding.

    Dependent vectors are no exception: `noise`, k normal vectors scaled to their rounding error, takes the
    place of what is missing, so the result always has k orthonormal rows (as Householder's QR would
    give, but from inner products alone). Each pass divides by the eigenvalues of the scaled Gram
    matrix, clipped at eps: never by a small pivot.

    Its derivative is that of the span: a rotation of the rows within it, which no estimate depends on, is
    left out. With S = R B + G A for rows A of `against`, dB = R⁺ (dS - G dA)(1 - AᵀA - BᵀB) - B dAᵀ A.

    References:
        Stathopoulos and Wu, doi:10.1137/S1064827500370883.
    """
    return _orthonormalize(stack, against, noise)


@jax.jit
def _orthonormalize(stack: PyTree, against: PyTree | None, noise: PyTree) -> PyTree:
    k = length(stack)
    dtype = _tree.scalar_dtype(stack)
    eps = jnp.finfo(dtype).eps
    structure = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stack)
    longest = jnp.sqrt(jnp.max(jnp.sum(row_dots(stack, stack), axis=0)))
    size = JITTER * eps * longest / _tree.tree_size(structure) ** 0.5
    stack = _tree.axpy(jnp.where(longest > 0, size, 1), noise, stack)
    for _ in range(PASSES):
        if against is not None:
            stack = subtract(stack, combine(jnp.sum(gram(stack, against), axis=0), against))
        products = jnp.sum(gram(stack, stack), axis=0)
        size = jnp.diagonal(products)
        unit = 1 / jnp.sqrt(jnp.where(size > 0, size, 1))
        values, vectors = jnp.linalg.eigh(unit[:, None] * products * unit)
        values = jnp.maximum(values, k * eps * jnp.maximum(values[-1], eps))
        stack = combine((vectors / jnp.sqrt(values)).T * unit, stack)
    return stack


@orthonormalize.defjvp
def _span_derivative(primals, tangents):
    (stack, against, noise), (moved, against_moved, _) = primals, tangents
    basis = orthonormalize(stack, against, noise)
    if against is not None:
        moved = subtract(moved, combine(inner(stack, against), against_moved))
        moved = subtract(moved, combine(inner(moved, against), against))
    moved = subtract(moved, combine(inner(moved, basis), basis))
    # What the basis was filled with where the stack is dependent does not move with it.
    factor = jnp.linalg.pinv(
        inner(stack, basis), rtol=length(stack) * jnp.finfo(_tree.scalar_dtype(stack)).eps
    )
    moved = combine(factor, moved)
    if against is not None:
        moved = subtract(moved, combine(inner(basis, against_moved), against))
    return basis, moved
