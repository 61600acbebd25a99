"""Chebyshev polynomials of an operator: T_{j+1}(A) v = 2 A T_j(A) v - T_{j-1}(A) v, from T_1(A) v = A v."""

from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def following(image: PyTree, before: PyTree, first: Any) -> PyTree:
    """T_{j+1} v from the image A T_j v and T_{j-1} v; where `first` the image alone."""
    twice = jnp.where(first, 1, 2)
    return jax.tree.map(lambda x, y: twice.astype(x.dtype) * x - jnp.where(first, 0, y), image, before)
