"""What rounding does to eigenvalues, measured: products at parameters that are moved by one rounding each.

The matrix that float32 products belong to is symmetric and linear; where a loss is steep it is only another
one, by many times eps |H|, which neither asymmetry nor residuals show. By Weyl's theorem an eigenvalue moves
by |(H' - H) v| at most, to first order, and H' is the operator at parameters multiplied by 1 ± eps with
random signs (see `spectra.estimators.rounding` for what that is worth).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectra import _tree
from spectra.operators.base import LinearOperator, product
from spectra.results import Eigenpairs

PyTree = Any
SAMPLES = 4
"""Moved operators: as many degrees of freedom has what they say."""
KEY = 7


def multiply(op: LinearOperator, v: PyTree) -> PyTree:
    """One product outside of any loop."""
    return op.mv(v) if op.on_host else product(op, v)


def change_of_product(op: LinearOperator, v: PyTree, image: PyTree) -> float:
    """What |(H' - H) v| of one more moved operator H' stays below at 95 %, given the image H v.

    That is Student's t with the root mean square of `SAMPLES` of them. `op` is not prepared, and has `moved`.
    """
    from scipy.special import stdtrit

    changes = []
    for i in range(SAMPLES):
        other = op.moved(jax.random.fold_in(jax.random.key(KEY), i))
        assert other is not None
        changes.append(float(_distance(multiply(other.prepare(), v), image)))
    return float(stdtrit(SAMPLES, 0.975) * np.sqrt(np.mean(np.square(changes))))


@jax.jit
def _distance(a: PyTree, b: PyTree) -> jax.Array:
    return _tree.norm(jax.tree.map(jnp.subtract, a, b))


def with_measured_floor(op: LinearOperator, pairs: Eigenpairs) -> Eigenpairs:
    """The pairs with a noise floor that holds what rounding does to their eigenvalues.

    One vector stands for all: with u = Σ v_i / sqrt(k) the square of sqrt(k) |(H' - H) u| is
    Σ |(H' - H) v_i|², on average over the signs of the v_i. Five products, four of them at other parameters;
    none where an operator does not say what it depends on, as a matrix does not.
    """
    if op.moved(jax.random.key(KEY)) is None:
        return pairs
    k = len(pairs.values)
    vector = _mean(pairs.vectors)
    image = multiply(op.prepare(), vector)
    change = float(np.sqrt(k)) * change_of_product(op, vector, image)
    return dataclasses.replace(pairs, noise_floor=max(pairs.noise_floor, change))


@jax.jit
def _mean(vectors: PyTree) -> PyTree:
    return jax.tree.map(lambda x: (x.sum(axis=0) / x.shape[0] ** 0.5).astype(x.dtype), vectors)
