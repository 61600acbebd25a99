"""A few numbers of each basis vector: enough to tell whether vectors of two runs are parallel."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spectra import _tree
from spectra.krylov import basis as _basis
from spectra.krylov.basis import Basis
from spectra.krylov.layout import Layout

SIZE = 8
"""Random vectors: a right angle between two unit vectors looks like one below 0.05 once in 10^7 times."""
_NUMBER = 2**31 - 1  # of their key; no probe reaches it


def sketch(layout: Layout, basis: Basis, key: jax.Array, *, batched: bool = False) -> jax.Array:
    """Products of all rows with the same SIZE random vectors for every probe, shape (rows, SIZE).

    One vector after another, so that no memory beside one of them is needed. Entries are uniform on
    (-1, 1): signs would see two coordinates as two lines only.
    """
    key = jax.random.fold_in(key, _NUMBER)
    count = len(basis) * basis[0][0].shape[2 if batched else 1]

    def products(vector, basis):
        return _basis.dots(basis, vector, count)[0]

    def one(number):
        v = _tree.sample(jax.random.fold_in(key, number), layout.structure, _uniform)
        vector = layout.place(layout.pack(v))
        return (jax.vmap(products, in_axes=(None, 0)) if batched else products)(vector, basis)

    return jnp.moveaxis(lax.map(one, jnp.arange(SIZE)), 0, -1)


def _uniform(key, shape, dtype):
    return jax.random.uniform(key, shape, dtype, -1, 1)


_compiled = partial(jax.jit, static_argnames=("layout", "batched"))(sketch)


def sketches(layout: Layout, basis: Basis, key: jax.Array, *, batched: bool) -> list[np.ndarray]:
    """The sketch of each probe in flight, in float64 on the host."""
    found = np.asarray(jax.device_get(_compiled(layout.anonymous(), basis, key, batched=batched)), np.float64)
    return list(found) if batched else [found]
