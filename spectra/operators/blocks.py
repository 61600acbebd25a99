"""Principal submatrices of operators that know nothing about single parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from spectra import _tree
from spectra.operators.arithmetic import Wrapped
from spectra.operators.base import LinearOperator, operator

PyTree = Any


@operator(leaves=("base",))
class BlockOperator(Wrapped):
    """P H Pᵀ for the projection P on some leaves: products of the whole with zeros elsewhere.

    Operators on data have blocks of their own, which differentiate the chosen leaves only.
    """

    base: LinearOperator
    selected: tuple[int, ...]

    @property
    def like(self) -> PyTree:
        """The chosen leaves of a vector; None in the place of all others."""
        return _tree.keep_leaves(self.base.like, self.selected)

    def _apply(self, multiply: Callable[[PyTree], PyTree], v: PyTree) -> PyTree:
        """The chosen leaves of the product with the vector that is zero elsewhere."""
        structure = self.base.structure
        leaf = jax.tree.leaves(v)[0]
        stack = leaf.shape[: leaf.ndim - jax.tree.leaves(structure)[self.selected[0]].ndim]
        zero = jax.tree.map(lambda s: jnp.zeros((*stack, *s.shape), s.dtype), structure)
        product = multiply(_tree.replace_leaves(zero, self.selected, v))
        return _tree.keep_leaves(product, self.selected)

    def _with_base(self, base: LinearOperator) -> "BlockOperator":
        return BlockOperator(base, self.selected)

    def _principal(self, indices: tuple[int, ...]) -> "BlockOperator":
        return BlockOperator(self.base, tuple(self.selected[i] for i in indices))


@operator(leaves=("base", "index"))
class LayerOperator(Wrapped):
    """The block of one of several layers whose parameters are stacked along the leading axis of their leaves.

    Which one is a leaf, so that all layers share the compiled code. A product costs one with all of them.
    """

    base: LinearOperator
    index: Any

    @property
    def like(self) -> PyTree:
        """The shapes of one layer's parameters."""
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape[1:], s.dtype), self.base.structure)

    def _apply(self, multiply: Callable[[PyTree], PyTree], v: PyTree) -> PyTree:
        def place(x, s):
            stack = x.shape[: x.ndim - len(s.shape) + 1]
            rows = jnp.zeros((*stack, *s.shape), s.dtype)
            return rows.at[(*[slice(None)] * len(stack), self.index)].set(x.astype(s.dtype))

        product = multiply(jax.tree.map(place, v, self.base.structure))
        axes = jax.tree.map(lambda x, s: x.ndim - len(s.shape), product, self.base.structure)
        return jax.tree.map(lambda x, axis: jnp.take(x, self.index, axis=axis), product, axes)

    def _stacks(self) -> dict[int, str]:
        return {}

    def _with_base(self, base: LinearOperator) -> "LayerOperator":
        return LayerOperator(base, self.index)
