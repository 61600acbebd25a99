"""What rounding leaves unknown of |b - A x|, the residual on which the bound of a solution's error rests."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import programs, stacks
from spectra.base.trees import PyTree
from spectra.krylov.product_rounding import (
    DRAWN,
    RARE,
    change_of_product,
    is_measured,
    limit,
    multiply,
    seen_norm,
)
from spectra.operators.arithmetic import ShiftedOperator
from spectra.operators.base import LinearOperator
from spectra.operators.doubled import DoubledOperator, flat, in_double, rounded_once
from spectra.quadrature.rules import breakdown_noise

PRODUCTS = 6
"""Draws of a matrix or a function, each a product: from `DRAWN` of them the limit is 0.6 of theirs."""


def noise_of(op: LinearOperator) -> float:
    """What one product is off by, in units of |A|."""
    return breakdown_noise(op.size, op.precision)


def rounding_of(
    op: LinearOperator, b: PyTree, x: PyTree, stated: np.ndarray, norm_a: np.ndarray, norms: np.ndarray
) -> np.ndarray:
    """What the residuals of stacks x and b, which are `stated`, may be off by; NaN where x is.

    Where no residual is known in float64, products are right to `noise_of` |A|, or to what moved operators
    say. |A| is at least `norm_a`; `norms` are |x|.
    """
    known = known_rounding(op, b, x, stated, norm_a * norms)
    if known is not None:
        return known
    measured = is_measured(op)
    seen = np.maximum(norm_a, 0.0 if measured else seen_norm(op))
    # Of the product, and of the difference and its norm.
    moved = noise_of(op) * (seen * norms + stated)
    if measured:
        here = op.prepare()
        for i in np.flatnonzero(np.isfinite(norms) & (norms > 0)).tolist():
            vector = stacks.row(x, i)
            moved[i] = max(moved[i], change_of_product(op, vector, multiply(here, vector)))
    return moved


def known_rounding(
    op: LinearOperator, b: PyTree, x: PyTree, stated: np.ndarray, images: np.ndarray
) -> np.ndarray | None:
    """The same by products in float64, which round a little of `images`, |A| |x|; None without them.

    The constants of a loss stay as its type rounds them, or the one that it computes in: each by half of eps.
    """
    exact = in_double(op)
    if exact is None or not all(leaf.is_fully_addressable for leaf in jax.tree.leaves(x)):
        return None
    eps = float(jnp.finfo(op.dtype).eps)
    left = noise_of(op) * float(np.finfo(float).eps) / eps * (images + stated)
    left = left + (0.0 if exact.is_given else max(eps, op.precision) / 2) * images
    sides = np.flatnonzero(np.isfinite(left)).tolist()
    found = np.full(len(stated), np.nan)
    found[sides] = [_known(exact, stacks.row(b, i), stacks.row(x, i), stated[i]) for i in sides]
    return found + left


def _known(exact: DoubledOperator, b: PyTree, x: PyTree, stated: float) -> float:
    """What a residual differs by from that in float64; and from those with what b, the shift, and the numbers
    of a matrix may have been rounded from."""
    image, op = exact.unrounded(x), exact.base
    residual, drawn = float(np.linalg.norm(flat(b) - image)), list[float]()
    for salt in range(PRODUCTS if exact.is_given else DRAWN):
        if exact.is_given:
            image = exact.before_rounding(salt).unrounded(x)
        drawn.append(float(np.linalg.norm(_before(b, salt) - image)) - residual)
    found = abs(residual - stated) + limit(drawn, RARE)
    if isinstance(op, ShiftedOperator):
        found += abs(float(op.delta) - float(jnp.asarray(op.delta, op.dtype))) * float(
            np.linalg.norm(flat(x))
        )
    return found


def _before(b: PyTree, salt: int) -> np.ndarray:
    with jax.enable_x64(True):
        return flat(_drawn(b, jnp.uint32(salt)))


@programs.jit
def _drawn(b: PyTree, salt: jax.Array) -> PyTree:
    return jax.tree.map(partial(rounded_once, salt=salt), b)
