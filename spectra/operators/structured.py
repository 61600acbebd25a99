"""Operators with a form that multiplies cheaply: diagonal and low-rank matrices on any tree of parameters."""

from typing import Any

import jax
import jax.numpy as jnp

from spectra.base import trees
from spectra.base.errors import StructureError
from spectra.base.meshes import automatic, on_automatic_axes
from spectra.base.trees import PyTree
from spectra.operators.base import LinearOperator
from spectra.operators.pytree import operator


@operator(leaves=("entries",))
class DiagonalOperator(LinearOperator):
    """diag(d): a preconditioner, a metric, the precision of a prior.

    Args:
        entries: d, a pytree like the parameters.

    Cost: n operations per product.

    Examples:
        >>> import jax.numpy as jnp, spectra
        >>> op = spectra.DiagonalOperator({"w": jnp.array([1.0, 2.0]), "b": jnp.array(3.0)})
        >>> op @ jnp.ones(3)  # leaves in tree order: b, w
        Array([3., 1., 2.], dtype=float32)
    """

    entries: PyTree

    @automatic
    def __init__(self, entries: PyTree):
        entries = jax.tree.map(jnp.asarray, on_automatic_axes(entries))
        object.__setattr__(self, "entries", trees.cast_like(entries, trees.vector_structure(entries)))

    @property
    def like(self) -> PyTree:
        """The diagonal."""
        return self.entries

    @property
    def known_linear(self) -> bool:
        """True: it is a matrix."""
        return True

    @property
    def cancels(self) -> bool:
        """Every entry is right to the unit roundoff of itself."""
        return False

    def mv(self, v: PyTree) -> PyTree:
        """d ⊙ v."""
        return jax.tree.map(jnp.multiply, self.entries, v)

    def _principal(self, indices: tuple[int, ...]) -> "DiagonalOperator":
        return DiagonalOperator(trees.keep_leaves(self.entries, indices))


@operator(leaves=("vectors", "values"))
class LowRankOperator(LinearOperator):
    """Σ_i λ_i v_i v_iᵀ: a matrix from a few eigenpairs, gradients or rows of a Jacobian.

    Args:
        vectors: r vectors stacked, leaves (r, *leaf.shape), or a matrix (r, n); they need not be orthonormal.
        values: (r,) λ_i; default all one.

    Raises:
        StructureError: leaves with different leading axes, or a different number of values.

    Cost: 4 r n operations per product; r n numbers.

    Examples:
        >>> import jax, jax.numpy as jnp, spectra
        >>> matrix = spectra.MatrixOperator(jnp.diag(jnp.arange(1.0, 31.0)))
        >>> pairs = spectra.eigsh(matrix, 2, which="LA", key=jax.random.key(0))
        >>> rest = matrix - spectra.LowRankOperator(pairs.vectors, pairs.values)
        >>> round(float(spectra.eigsh(rest, 1, which="LA", key=jax.random.key(0)).values[0]), 3)
        28.0
    """

    vectors: PyTree
    values: jax.Array

    @automatic
    def __init__(self, vectors: PyTree, values: Any = None):
        vectors = jax.tree.map(jnp.asarray, on_automatic_axes(vectors))
        leading = {x.shape[:1] for x in jax.tree.leaves(vectors)}
        if len(leading) != 1 or () in leading:
            raise StructureError(
                f"the vectors of a low-rank operator share one leading axis, got {sorted(leading)}: stack "
                "them, leaves (r, *leaf.shape)."
            )
        vectors = trees.cast_like(vectors, trees.vector_structure(vectors))
        ((count,),) = leading
        values = jnp.ones(count) if values is None else jnp.asarray(values)
        if values.shape != (count,):
            raise StructureError(f"{count} vectors have values of shape {values.shape}: use ({count},).")
        object.__setattr__(self, "vectors", vectors)
        object.__setattr__(self, "values", values.astype(trees.scalar_dtype(vectors)))

    @property
    def like(self) -> PyTree:
        """The shape of one of the vectors."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), self.vectors)

    @property
    def known_linear(self) -> bool:
        """True: it is a matrix."""
        return True

    def mv(self, v: PyTree) -> PyTree:
        """V diag(λ) Vᵀ v."""
        weights = self.values * jax.vmap(lambda x: trees.vdot(x, v))(self.vectors)

        def one(x: jax.Array) -> jax.Array:
            return jnp.tensordot(weights.astype(x.dtype), x, 1, precision="highest")

        return jax.tree.map(one, self.vectors)

    def _principal(self, indices: tuple[int, ...]) -> "LowRankOperator":
        return LowRankOperator(trees.keep_leaves(self.vectors, indices), self.values)
