"""Operators whose functions close over traced values, as ones that hold these among their leaves.

`lax.stop_gradient` of an operator, and rules of differentiation of one's own, reach what is a leaf. A value
of a caller's `grad` that a loss closes over is none.
"""

from collections.abc import Callable
from typing import Any, cast

import jax

from spectra.base import trees
from spectra.base.trees import PyTree
from spectra.operators.base import LinearOperator
from spectra.operators.pytree import operator


@operator(leaves=("example", "constants"))
class HoistedOperator(LinearOperator):
    """The products of another operator, by a function of a vector and of all traced values in it."""

    function: Callable[..., PyTree]
    example: PyTree
    constants: tuple[Any, ...]
    unit: float
    dtype_name: str

    def __init__(self, op: LinearOperator, function: Callable[..., PyTree], constants: tuple[Any, ...]):
        given = (function, jax.lax.stop_gradient(op.like), constants, op.precision, op.computes_in)
        names = ("function", "example", "constants", "unit", "dtype_name")
        for name, value in zip(names, given, strict=True):
            object.__setattr__(self, name, value)

    @property
    def like(self) -> PyTree:
        """The example of a vector."""
        return self.example

    @property
    def precision(self) -> float:
        """That of the other operator."""
        return self.unit

    @property
    def computes_in(self) -> str:
        """As the other operator."""
        return self.dtype_name

    def mv(self, v: PyTree) -> PyTree:
        """The product, in the working dtypes."""
        return trees.cast_like(self.function(v, *self.constants), v)


def hoisted(op: LinearOperator) -> LinearOperator:
    """The operator itself, unless its functions close over traced values."""
    if op.on_host:
        return op
    still = jax.lax.stop_gradient(op)  # of which only what the functions close over is as it was
    own = {id(leaf) for leaf in jax.tree.leaves(still)}
    if all(id(one) in own for one in _converted(still)[1]):
        return op
    return HoistedOperator(op, *_converted(op))


def _converted(op: LinearOperator) -> tuple[Callable[..., PyTree], tuple[Any, ...]]:
    function, constants = cast("Any", jax).closure_convert(op.mv, op.structure)
    return function, tuple(constants)
