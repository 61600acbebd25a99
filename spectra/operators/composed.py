"""Operators made of others: blocks, complements of known vectors, products, submatrices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import stacks, trees
from spectra.base.errors import StructureError
from spectra.base.trees import PyTree
from spectra.operators.arithmetic import OfTerms, Wrapped
from spectra.operators.base import LinearOperator
from spectra.operators.pytree import operator
from spectra.results.base import provides


@operator(leaves=("base",))
class BlockOperator(Wrapped):
    """P H Pᵀ for the projection P on some leaves: products of the whole with zeros elsewhere.

    Operators on data have blocks of their own, which differentiate the chosen leaves only.
    """

    base: LinearOperator
    selected: tuple[int, ...]

    @property
    def like(self) -> PyTree:
        """The chosen leaves of a vector; None in place of all others."""
        return trees.keep_leaves(self.base.like, self.selected)

    def _apply(self, multiply: Callable[[PyTree], PyTree], v: PyTree) -> PyTree:
        """The chosen leaves of the product with the vector that is zero elsewhere."""
        structure = self.base.structure
        leaf = jax.tree.leaves(v)[0]
        stack = leaf.shape[: leaf.ndim - jax.tree.leaves(structure)[self.selected[0]].ndim]
        zero = jax.tree.map(lambda s: jnp.zeros((*stack, *s.shape), s.dtype), structure)
        product = multiply(trees.replace_leaves(zero, self.selected, v))
        return trees.keep_leaves(product, self.selected)

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
        def place(x: jax.Array, s: jax.ShapeDtypeStruct) -> jax.Array:
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


def along(vectors: PyTree, v: PyTree) -> jax.Array:
    """X v, shape (r,), for rows X stacked as leaves (r, *leaf.shape)."""
    return jax.vmap(lambda x: trees.vdot(x, v))(vectors)


def project(vectors: PyTree, v: PyTree) -> PyTree:
    """(I - X Xᵀ) v for orthonormal rows X, stacked as leaves (r, *leaf.shape)."""
    return stacks.subtract(v, stacks.combine(along(vectors, v), vectors))


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
        return BlockOperator(self, indices)


@operator(leaves=("terms",))
class ProductOperator(OfTerms):
    """A B …, written `a @ b`: a matrix of this package where it is symmetric.

    A B A is; A B is where the two commute. What is not symmetric is refused where a result rests on it, as a
    function that is not symmetric is.
    """

    terms: tuple[LinearOperator, ...]

    def __init__(self, terms: tuple[LinearOperator, ...]):
        flat = [t for term in terms for t in (term.terms if isinstance(term, ProductOperator) else (term,))]
        for term in flat[1:]:
            trees.check_structure(term.structure, flat[0].structure, "the second operator of a product")
        object.__setattr__(self, "terms", tuple(flat))

    def mv(self, v: PyTree) -> PyTree:
        """The factors' products one after the other, from the right."""
        for term in reversed(self.terms):
            v = term.mv(v)
        return v

    def mv_batch(self, vectors: PyTree) -> PyTree:
        """The same with a stack of vectors."""
        for term in reversed(self.terms):
            vectors = term.mv_batch(vectors)
        return vectors

    @property
    def semidefinite(self) -> bool:
        """Not known: where A and B are, A B need not be."""
        return False

    @property
    def precision(self) -> float:
        """The errors of the factors add up."""
        return sum(term.precision for term in self.terms)

    def _remade(self, parts: tuple[LinearOperator, ...]) -> "ProductOperator":
        return ProductOperator(parts)

    def _principal(self, indices: tuple[int, ...]) -> LinearOperator:
        return BlockOperator(self, indices)


@operator(leaves=("base", "rows"))
class SubmatrixOperator(Wrapped):
    """The principal submatrix of some entries, on flat vectors; written `op.submatrix(indices)`.

    A product costs one with the whole. `op.block(...)` of whole leaves costs less.
    """

    base: LinearOperator
    rows: jax.Array

    @classmethod
    def of(cls, base: LinearOperator, indices: Any) -> "SubmatrixOperator":
        """The submatrix of the rows and columns `indices`, checked."""
        rows = np.asarray(indices)
        rows = np.flatnonzero(rows) if rows.dtype == bool and rows.shape == (base.size,) else rows
        if rows.ndim != 1 or not rows.size or not np.issubdtype(rows.dtype, np.integer):
            raise StructureError(
                f"submatrix takes numbers of rows, or a mask of shape ({base.size},), got an array of shape "
                f"{rows.shape} and dtype {rows.dtype}."
            )
        if rows.min() < 0 or rows.max() >= base.size or len(np.unique(rows)) < len(rows):
            raise StructureError(
                f"the rows of a submatrix are different numbers from 0 to {base.size - 1}, in the order of "
                f"the flat vector; got {len(rows)} from {rows.min()} to {rows.max()}, "
                f"{len(rows) - len(np.unique(rows))} of them repeated."
            )
        return cls(base, jnp.asarray(rows))

    @property
    def like(self) -> jax.ShapeDtypeStruct:
        """A flat vector of the chosen entries."""
        return jax.ShapeDtypeStruct(self.rows.shape, self.base.dtype)

    def _apply(self, multiply: Callable[[PyTree], PyTree], v: jax.Array) -> jax.Array:
        def place(row: jax.Array) -> PyTree:
            flat = jnp.zeros(self.base.size, row.dtype).at[self.rows].set(row)
            return trees.unravel(flat, self.base.structure)

        def take(tree: PyTree) -> jax.Array:
            return trees.ravel(tree)[self.rows].astype(v.dtype)

        if v.ndim == 1:
            return take(multiply(place(v)))
        return jax.vmap(take)(multiply(jax.vmap(place)(v)))

    def _stacks(self) -> dict[int, str]:
        return {}

    def _with_base(self, base: LinearOperator) -> "SubmatrixOperator":
        return SubmatrixOperator(base, self.rows)

    def _principal(self, indices: tuple[int, ...]) -> "SubmatrixOperator":
        del indices  # one leaf: the whole of it
        return self


# `LinearOperator` stands below these classes, and makes them by name.
provides("block")(BlockOperator)
provides("layer")(LayerOperator)
provides("product")(ProductOperator)
provides("submatrix")(SubmatrixOperator.of)


BESIDE_PAIRS = 2**31 - 3
"""Of keys beside eigenpairs; no probe and no start vector reaches it."""


def beside_pairs(key: jax.Array, count: int, use: int) -> jax.Array:
    """A key for vectors outside of eigenpairs that may have been found with the same key.

    Where an eigenvalue repeats, its eigenvectors are what a random start has of its space: the same start has
    nothing left there beside them.

    Args:
        key: what a user passed.
        count: of the pairs: a chain of calls takes out more each time.
        use: of the random numbers; 0 for start vectors, 1 for probes.
    """
    for number in (BESIDE_PAIRS, use, count):
        key = jax.random.fold_in(key, number)
    return key
