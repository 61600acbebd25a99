"""An operator on the orthogonal complement of vectors that are known already."""

from collections.abc import Callable
from typing import Any

import jax

from spectra import _stacks, _tree
from spectra.operators.arithmetic import Wrapped
from spectra.operators.base import LinearOperator, operator

PyTree = Any


def project(vectors: PyTree, v: PyTree) -> PyTree:
    """(I - X Xᵀ) v for orthonormal rows X, stacked as leaves (r, *leaf.shape)."""
    coefficients = jax.vmap(lambda x: _tree.vdot(x, v))(vectors)
    return _stacks.subtract(v, _stacks.combine(coefficients, vectors))


@operator(leaves=("base", "vectors"))
class DeflatedOperator(Wrapped):
    """(I - X Xᵀ) H (I - X Xᵀ): H where it is not known, zero on the span of the vectors X."""

    base: LinearOperator
    vectors: PyTree

    def _apply(self, multiply: Callable[[PyTree], PyTree], v: PyTree) -> PyTree:
        known = jax.tree.leaves(self.vectors)[0].ndim
        stacked = jax.tree.leaves(v)[0].ndim == known
        clear = jax.vmap(project, in_axes=(None, 0)) if stacked else project
        return clear(self.vectors, multiply(clear(self.vectors, v)))

    def _with_base(self, base: LinearOperator) -> "DeflatedOperator":
        return DeflatedOperator(base, self.vectors)

    def _principal(self, indices: tuple[int, ...]) -> LinearOperator:
        from spectra.operators.blocks import BlockOperator

        return BlockOperator(self, indices)
