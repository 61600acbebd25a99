"""The rounding of products in which terms cancel, relative to what is left of them."""

import jax
import jax.numpy as jnp

from spectra.base import draws, trees
from spectra.base.trees import PyTree
from spectra.krylov.wanted import multiply
from spectra.operators.arithmetic import ScaledOperator, ShiftedOperator, SumOperator
from spectra.operators.base import LinearOperator

Rounded = tuple[PyTree, float]  # a product, and the length of its error


def relative_precision(op: LinearOperator) -> float:
    """The relative error of a product: what the operator states, or more where a sum or a shift cancels.

    Each term is right to its own precision, so that the error of their sum is known from one product of a
    random vector with each. 1 where nothing is left.
    """
    if not isinstance(op, SumOperator | ScaledOperator | ShiftedOperator):
        return op.precision
    image, error = _product(op, draws.unit_vector(jax.random.key(0), op))
    size = trees.length(image)
    return max(op.precision, min(error / size, 1.0) if size else 1.0)


def _product(op: LinearOperator, v: PyTree) -> Rounded:
    if isinstance(op, SumOperator):
        parts = [_product(term, v) for term in op.terms]
        image = parts[0][0]
        for other, _ in parts[1:]:
            image = jax.tree.map(jnp.add, image, other)
        return image, sum(error for _, error in parts)
    if isinstance(op, ScaledOperator):
        image, error = _product(op.base, v)
        return trees.scale(op.factor, image), abs(float(op.factor)) * error
    if isinstance(op, ShiftedOperator):
        image, error = _product(op.base, v)
        return trees.axpy(op.delta, v, image), error + op.precision * abs(float(op.delta)) * trees.length(v)
    image = multiply(op.prepare(), v)
    return image, op.precision * trees.length(image)
