"""What shifts inside of an operator add to its products: where they cancel, rounding is of their size.

Errors are vectors in random directions, followed through what is made of the products: a submatrix keeps its
share of one, a diagonal raises it where it is large.
"""

# pyright: reportPrivateUsage=false
# Operators have parts that only this package uses.

import jax
import jax.numpy as jnp

from spectra.base import draws, trees
from spectra.base.trees import PyTree
from spectra.operators.arithmetic import DiagonallyScaledOperator, ScaledOperator, ShiftedOperator, Wrapped
from spectra.operators.base import LinearOperator

KEY = 11
"""Of the directions of errors."""


def of_shifts(op: LinearOperator, v: PyTree) -> PyTree | None:
    """What shifts inside of an operator are of its product with v, in a random direction; None without any.

    Where they cancel, rounding is of their size. No product is computed.
    """
    if not isinstance(op, Wrapped):
        return None
    inputs: list[PyTree] = []

    def base(w: PyTree) -> PyTree:
        inputs.append(w)
        return w

    op._apply(base, v)
    inner = of_shifts(op.base, inputs[0])
    if not isinstance(op, ShiftedOperator):
        return None if inner is None else op._apply(lambda _: inner, v)
    return of_shift(op, v) if inner is None else together(inner, of_shift(op, v))


def largest_shift(op: LinearOperator) -> jax.Array:
    """A bound on the norm of what `of_shifts` says."""
    if not isinstance(op, Wrapped):
        return jnp.zeros((), op.dtype)
    inner = largest_shift(op.base)
    if isinstance(op, ShiftedOperator):
        return inner + jnp.abs(jnp.asarray(op.delta, op.dtype))
    if isinstance(op, ScaledOperator):
        return inner * jnp.abs(jnp.asarray(op.factor, op.dtype))
    return inner * trees.largest(op.scale) ** 2 if isinstance(op, DiagonallyScaledOperator) else inner


def of_shift(op: ShiftedOperator, v: PyTree) -> PyTree:
    """What the shift of an operator is of its product with v, in a random direction."""
    return in_random_direction(op, jnp.abs(op.delta) * trees.norm(v), v)


def in_random_direction(op: LinearOperator, size: jax.Array, like: PyTree) -> PyTree:
    """A vector of this length, in the types of another."""
    vector = draws.unit_vector(jax.random.key(KEY), op)
    return jax.tree.map(lambda x, y: (size * x).astype(y.dtype), vector, like)


def together(a: PyTree, b: PyTree) -> PyTree:
    """A vector as long as both one after the other, in the direction of the longer one."""
    one, other = trees.norm(a), trees.norm(b)
    most = jnp.where(one + other > 0, jnp.maximum(one, other), 1)
    return jax.tree.map(
        lambda x, y: ((one + other) / most * jnp.where(one < other, y, x)).astype(x.dtype), a, b
    )
