"""The dense matrix of any operator, column by column, refused where the map has no symmetric matrix; products
with a matrix."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from spectra import _tree
from spectra._errors import NotSymmetricError, StructureError
from spectra.operators.base import LinearOperator, product

PyTree = Any
IN_FLIGHT = 64
"""Columns in one vmapped product: bounds the batched activations."""


def symmetric_matrix(op: LinearOperator) -> jax.Array:
    """(A + Aᵀ) / 2 of the n columns A, which have to be symmetric and to be those of a linear map.

    What may differ is the square root of the precision of products, as in a Lanczos run. One product more
    than there are columns tells an affine map, whose columns may be symmetric, from a linear one.
    """
    op = op.prepare()
    matrix = jnp.stack([_column(op, i) for i in range(op.size)]).T if op.on_host else _columns(op)
    if not isinstance(matrix, Tracer):
        _require_symmetric(op, matrix)
    return _symmetrise(matrix)


def times_matrix(op: LinearOperator, matrix: jax.Array) -> jax.Array:
    """A V for a matrix (n, k) whose columns are flat vectors."""
    if not jnp.issubdtype(matrix.dtype, jnp.floating):
        raise StructureError(f"the matrix has dtype {matrix.dtype}, expected {op.dtype}.")
    leaves, treedef = jax.tree.flatten(op.structure)
    kinds = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    parts = []
    for start in range(0, matrix.shape[1], IN_FLIGHT):
        vectors = treedef.unflatten(_as_vectors(matrix[:, start : start + IN_FLIGHT], kinds))
        parts.append(_as_columns(op.mv_batch(vectors)))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


@partial(jax.jit, static_argnames="kinds")
def _as_vectors(matrix: jax.Array, kinds: tuple) -> list[jax.Array]:
    """The columns of a matrix as a stack of vectors."""
    like = [jax.ShapeDtypeStruct(*kind) for kind in kinds]
    return jax.vmap(lambda column: _tree.unravel(column, like), in_axes=1)(matrix)


@jax.jit
def _as_columns(vectors: PyTree) -> jax.Array:
    """A stack of vectors as the columns of a matrix."""
    return jax.vmap(_tree.ravel, out_axes=1)(vectors)


def _require_symmetric(op: LinearOperator, matrix: jax.Array) -> None:
    start = _tree.sphere_sample(jax.random.key(0), op.structure)
    image = op.mv(start) if op.on_host else product(op, start)
    largest, asymmetry, size, defect = map(float, jax.device_get(_defects(matrix, start, image)))
    if not np.isfinite([largest, size, defect]).all():
        return  # the caller says so
    limit = float(np.sqrt(op.precision))
    above = f"above {limit:.1e}, the square root of the precision of its products."
    if asymmetry > limit * largest:
        raise NotSymmetricError(
            f"the operator is not symmetric: |A - Aᵀ| of its columns A reaches {asymmetry / largest:.1e} "
            f"max |A|, {above} {op.explain_asymmetry()} If half the sum with its transpose is "
            "meant, pass that."
        )
    if defect > limit * size:
        error = defect / size if size else np.inf
        raise NotSymmetricError(
            f"the operator is not linear: H v is {error:.1e} |H v| away from the sum of v_i H e_i, {above} "
            f"A constant that is added is not linear. {op.explain_asymmetry()}"
        )


@jax.jit
def _defects(matrix, start, image):
    """max |A|, max |A - Aᵀ|, a size for products and the error of one, over the numbers of a vector."""
    start, image = _tree.ravel(start), _tree.ravel(image)
    with jax.default_matmul_precision("highest"):
        expected = matrix @ start
    scale = jnp.max(jnp.abs(matrix))
    unit = jnp.where(scale > 0, scale, jnp.maximum(jnp.max(jnp.abs(image)), jnp.finfo(image.dtype).tiny))
    size = jnp.linalg.norm(matrix / unit) * jnp.linalg.norm(start) / len(start) ** 0.5 * unit
    return scale, jnp.max(jnp.abs(matrix - matrix.T)), size, jnp.linalg.norm((image - expected) / unit) * unit


def _column(op: LinearOperator, i) -> jax.Array:
    unit = jnp.zeros(op.size, op.dtype).at[i].set(1)
    return _tree.ravel(op.mv(_tree.unravel(unit, op.structure)))


@jax.jit
def _columns(op):
    rows = jax.lax.map(lambda i: _column(op, i), jnp.arange(op.size), batch_size=min(IN_FLIGHT, op.size))
    return rows.T


@jax.jit
def _symmetrise(matrix):
    return (matrix + matrix.T) / 2
