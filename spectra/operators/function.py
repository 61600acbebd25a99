"""Operators from what people already have: a matrix, or a function that multiplies."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from spectra import _tree
from spectra._errors import NotSymmetricError, StructureError
from spectra._mesh import automatic, on_automatic_axes
from spectra.operators.base import LinearOperator, operator

PyTree = Any


@operator(leaves=("matrix",))
class MatrixOperator(LinearOperator):
    """A dense symmetric matrix as an operator on flat vectors.

    Args:
        matrix: (n, n), real; integers and half precision become float32.

    Raises:
        StructureError: not a square real matrix.
        NotSymmetricError: max |A - Aᵀ| exceeds sqrt(eps) max |A|.

    Cost: n² operations a product, in full precision.

    Examples:
        >>> import jax.numpy as jnp, spectra
        >>> spectra.MatrixOperator(jnp.array([[2.0, 1.0], [1.0, 2.0]])) @ jnp.array([1.0, 0.0])
        Array([2., 1.], dtype=float32)
    """

    matrix: jax.Array

    @automatic
    def __init__(self, matrix):
        matrix = jnp.asarray(matrix)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
            raise StructureError(f"a MatrixOperator needs a square matrix, got shape {matrix.shape}.")
        if jnp.iscomplexobj(matrix):
            raise StructureError(f"a MatrixOperator needs a real matrix, got dtype {matrix.dtype}.")
        matrix = on_automatic_axes(matrix).astype(_tree.working_dtype(matrix.dtype))
        if not _tree.is_traced(matrix):
            difference, largest = map(float, _asymmetry(matrix))
            if difference > float(jnp.finfo(matrix.dtype).eps) ** 0.5 * largest:
                raise NotSymmetricError(
                    f"the matrix is not symmetric: |A - Aᵀ| reaches {difference:.2e}. Pass "
                    "(A + A.T) / 2 if the difference is rounding, or AᵀA for singular values."
                )
        object.__setattr__(self, "matrix", matrix)

    @property
    def known_linear(self) -> bool:
        """True: it is a matrix."""
        return True

    @property
    def cancels(self) -> bool:
        """Columns are right to the unit roundoff, each relative to itself."""
        return False

    @property
    def like(self) -> jax.Array:
        """One row of the matrix."""
        return self.matrix[0]

    def mv(self, v: jax.Array) -> jax.Array:
        """A v."""
        return jnp.matmul(self.matrix, v, precision=lax.Precision.HIGHEST)


@jax.jit
def _asymmetry(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """max |A - Aᵀ| and max |A|."""
    return jnp.max(jnp.abs(matrix - matrix.T)), jnp.max(jnp.abs(matrix))


@operator(leaves=("example",))
class FunctionOperator(LinearOperator):
    """A symmetric operator given by its product with a vector.

    Args:
        mv: function from a vector to a vector of the same structure; traceable by JAX and linear. It is
            static: keep one function object, a new lambda each time compiles anew. Arrays that it
            closes over become constants of the compiled program.
        like: pytree of arrays or `jax.ShapeDtypeStruct`, the structure of a vector.

    Raises:
        StructureError: `mv` returns another structure or other shapes than `like`.

    Examples:
        >>> import jax, jax.numpy as jnp, spectra
        >>> def negative_laplacian(v):
        ...     padded = jnp.pad(v, 1)
        ...     return 2 * v - padded[:-2] - padded[2:]
        >>> op = spectra.FunctionOperator(negative_laplacian, jnp.zeros(50))
        >>> report = spectra.lanczos(op, jnp.ones(50), 10)
    """

    function: Callable[[PyTree], PyTree]
    example: PyTree

    @automatic
    def __init__(self, mv: Callable[[PyTree], PyTree], like: PyTree):
        if not callable(mv):
            raise StructureError(f"mv is a {type(mv).__name__}; pass a function of a vector.")
        object.__setattr__(self, "function", mv)
        object.__setattr__(self, "example", on_automatic_axes(like))
        structure = self.structure
        _tree.check_structure(jax.eval_shape(mv, structure), structure, "the result of mv")

    @property
    def like(self) -> PyTree:
        """The example of a vector."""
        return self.example

    def mv(self, v: PyTree) -> PyTree:
        """The user's product, in the working dtypes."""
        return _tree.cast_like(self.function(v), v)
