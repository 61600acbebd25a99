"""Diagonal entries one by one: n products with unit vectors, in chunks of bounded memory, and one that tells
whether they are the columns of a symmetric matrix."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spectra import _tree
from spectra.estimators import blocks, symmetry
from spectra.estimators.run import Run
from spectra.operators.base import LinearOperator

PyTree = Any


def columns(run: Run) -> tuple[jax.Array, jax.Array, Any]:
    """e_iᵀ H e_i and |H e_i| for all i, in the order of `ravel`, two arrays (n,), and what
    `Run.check_columns` says of them: the same z is multiplied by H, and by the n columns from the left."""
    op, n = run.op, run.op.size
    vector = symmetry.normal_vector(op, jax.random.key(0))
    z, image = (jax.tree.map(lambda x: x[0], stack) for stack in (vector, blocks.products(op, vector, 1)))
    if not op.on_host and run.journal is None:
        entries, norms, across = _columns(op, z, run.batch)
    else:

        def step(state, start, stop):
            indices = np.arange(start, stop)
            return state, _entries(op.mv_batch(_units(op, indices)), indices, z)

        parts = run.fold(step, None, 0, n, out=(0, 0, 0))[1]
        entries, norms, across = (jnp.concatenate(x) for x in zip(*parts, strict=True))
    return entries, norms, run.check_columns(across, _tree.ravel(image))


def _unit(op: LinearOperator, i) -> PyTree:
    return _tree.unravel(jnp.zeros(op.size, op.dtype).at[i].set(1), op.structure)


_units = jax.jit(lambda op, indices: jax.vmap(lambda i: _unit(op, i))(indices))


@jax.jit
def _entries(products: PyTree, indices, z: PyTree):
    def one(product, i):
        return _tree.ravel(product)[i], _tree.norm(product), _tree.vdot(z, product)

    return jax.vmap(one)(products, indices)


@partial(jax.jit, static_argnames="batch")
def _columns(op: LinearOperator, z: PyTree, batch: int):
    def one(i):
        product = op.mv(_unit(op, i))
        return _tree.ravel(product)[i], _tree.norm(product), _tree.vdot(z, product)

    return lax.map(one, jnp.arange(op.size), batch_size=batch)
