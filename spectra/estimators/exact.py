"""Diagonal entries one by one: n products with unit vectors, in chunks of bounded memory."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spectra import _tree
from spectra.estimators.run import Run
from spectra.operators.base import LinearOperator

PyTree = Any


def columns(run: Run) -> tuple[jax.Array, jax.Array]:
    """e_iᵀ H e_i and |H e_i| for all i, in the order of `ravel`; two arrays (n,)."""
    op, n = run.op, run.op.size
    if not op.on_host:
        return _columns(op, run.batch)
    parts = []
    for start in range(0, n, run.batch):
        indices = np.arange(start, min(start + run.batch, n))
        parts.append(_entries(op.mv_batch(_units(op, indices)), indices))
    return tuple(jnp.concatenate(x) for x in zip(*parts, strict=True))  # pyright: ignore[reportReturnType]


def _unit(op: LinearOperator, i) -> PyTree:
    return _tree.unravel(jnp.zeros(op.size, op.dtype).at[i].set(1), op.structure)


_units = jax.jit(lambda op, indices: jax.vmap(lambda i: _unit(op, i))(indices))


@jax.jit
def _entries(products: PyTree, indices):
    def one(product, i):
        return _tree.ravel(product)[i], _tree.norm(product)

    return jax.vmap(one)(products, indices)


@partial(jax.jit, static_argnames="batch")
def _columns(op: LinearOperator, batch: int):
    def one(i):
        product = op.mv(_unit(op, i))
        return _tree.ravel(product)[i], _tree.norm(product)

    return lax.map(one, jnp.arange(op.size), batch_size=batch)
