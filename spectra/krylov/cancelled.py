"""The relative error of products where parts of an operator cancel: each is right to its own precision."""

# pyright: reportPrivateUsage=false
# Operators have parts that only this package uses.

import jax
import jax.numpy as jnp

from spectra.base import draws, trees
from spectra.base.trees import PyTree
from spectra.krylov.product_rounding import multiply
from spectra.krylov.shifts import in_random_direction, of_shift, together
from spectra.operators.arithmetic import ScaledOperator, ShiftedOperator, SumOperator, Wrapped
from spectra.operators.base import LinearOperator
from spectra.operators.composed import (
    BlockOperator,
    DeflatedOperator,
    LayerOperator,
    ProductOperator,
    SubmatrixOperator,
)
from spectra.results.base import provides

_KEEP_ENTRIES = (ScaledOperator, ShiftedOperator, BlockOperator, LayerOperator, SubmatrixOperator)


def relative_precision(op: LinearOperator) -> float:
    """The relative error of a product: what the operator states, or more where parts of it cancel.

    It is known from one product of a random vector with each part. 1 where nothing is left.
    """
    if not _may_cancel(op):
        return op.precision
    image, error = _product(op, draws.unit_vector(jax.random.key(0), op))
    size = trees.length(image)
    return max(op.precision, min(op.precision * trees.length(error) / size, 1.0) if size else 1.0)


def size_before(op: LinearOperator) -> float:
    """What products with a unit vector are rounded relative to, if not to |H|: the parts, where they cancel.

    It is known as in `relative_precision`, and 0 where nothing can cancel.
    """
    if not _may_cancel(op):
        return 0.0
    return trees.length(_product(op, draws.unit_vector(jax.random.key(0), op))[1])


@provides("asymmetry_limit")
def asymmetry_limit(op: LinearOperator, found: float, least: float = 0.0) -> float:
    """How far from symmetric, or linear, products may be in units of |H|: the square root of their precision.

    Where parts cancel that takes a product with each of them, which are made only if the precision that the
    operator states, and `least`, do not explain what was `found`.
    """
    limit = max(op.precision**0.5, least)
    return max(limit, relative_precision(op) ** 0.5) if found > limit else limit


def rounds_columns(op: LinearOperator) -> bool:
    """Whether a column H e_i is rounded as a product with any vector is.

    That of a matrix is not: it is exact, and a shift that it meets rounds what is left. What terms of a sum
    lose is measured, since they are moved.
    """
    while isinstance(op, _KEEP_ENTRIES):
        op = op.base
    return not isinstance(op, SumOperator) and op.cancels


def _may_cancel(op: LinearOperator) -> bool:
    own = isinstance(op, SumOperator | ShiftedOperator | DeflatedOperator)
    return own or any(_may_cancel(part) for part in op.made_of if isinstance(op, Wrapped | ProductOperator))


def _product(op: LinearOperator, v: PyTree) -> tuple[PyTree, PyTree]:
    """A product and its error, in units of the operator's precision."""
    if isinstance(op, SumOperator):
        parts = [_product(term, v) for term in op.terms]
        image, error = parts[0]
        error = trees.scale(op.terms[0].precision / op.precision, error)
        for term, (other, more) in zip(op.terms[1:], parts[1:], strict=True):
            image = jax.tree.map(jnp.add, image, other)
            error = together(error, trees.scale(term.precision / op.precision, more))
        return image, error
    if isinstance(op, ProductOperator):
        error = trees.scale(0.0, v)
        for term in reversed(op.terms):
            led = multiply(term, error)
            v, error = _product(term, v)
            error = together(led, trees.scale(term.precision / op.precision, error))
        return v, error
    if isinstance(op, ShiftedOperator):
        image, error = _product(op.base, v)
        return trees.axpy(op.delta, v, image), together(error, of_shift(op, v))
    if isinstance(op, Wrapped):
        found: list[PyTree] = []

        def base(w: PyTree) -> PyTree:
            image, error = _product(op.base, w)
            found.append(error)
            return image

        image = op._apply(base, v)
        return image, op._apply(lambda _: found[0], v)
    image = multiply(op.prepare(), v)
    return image, in_random_direction(op, trees.norm(image), image)
