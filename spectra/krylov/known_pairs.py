"""Whether eigenpairs that a user passes are those of an operator, and fit to be deflated."""

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import stacks, trees
from spectra.base.errors import SpectraError
from spectra.krylov.product_rounding import multiply
from spectra.operators.base import LinearOperator
from spectra.results import Eigenpairs

ORTHONORMAL = 1e-3
"""Entry of XᵀX - 1 of vectors X that are deflated, at most."""
CLEAR = 64
"""Roundings of a product that are no sign of another operator."""


def check(op: LinearOperator, pairs: Eigenpairs) -> None:
    """Raise unless the vectors are like the parameters of the operator, and orthonormal."""
    if pairs.size != op.size:
        raise SpectraError(f"deflate has vectors of order {pairs.size}, the operator has {op.size}.")
    trees.check_structure(jax.tree.map(lambda x: x[0], pairs.vectors), op.structure, "a vector of deflate")
    gram = np.asarray(jnp.sum(stacks.gram(pairs.vectors, pairs.vectors), axis=0), np.float64)
    off = float(np.abs(gram - np.eye(len(gram))).max(initial=0.0))
    if not off <= ORTHONORMAL:  # NaN, too
        raise SpectraError(
            f"the vectors to deflate are not orthonormal: XᵀX - 1 has an entry of {off:.1e}. Pass the "
            "result of eigsh as it is."
        )


def require_own(op: LinearOperator, pairs: Eigenpairs) -> None:
    """Raise where the pairs are not those of this operator; of one product, with their sum at random signs.

    Of pairs with residuals r_j, H Σ ± x_j - Σ ± θ_j x_j is Σ |r_j| at most. Pairs of another operator, as of
    parameters before the last steps of training, are atoms in the wrong place, and what they leave of the
    outliers is counted once more.
    """
    values, residuals = (np.asarray(x, np.float64) for x in (pairs.values, pairs.residuals))
    if not len(values):
        return
    signs = np.random.default_rng(len(values)).choice([-1.0, 1.0], len(values))
    total, expected = (stacks.combine(jnp.asarray(c), pairs.vectors) for c in (signs, signs * values))
    off = trees.length(stacks.subtract(multiply(op, total), expected))
    rounding = CLEAR * op.precision * len(values) ** 0.5 * float(np.abs(values).max())
    rounding += len(values) * pairs.noise_floor
    if off > 2 * (float(np.sum(residuals)) + rounding):
        raise SpectraError(
            f"the pairs to deflate are not those of this operator: H x - λ x of their sum is {off:.1e}, and "
            f"their residuals add up to {np.sum(residuals):.1e}. Pass pairs from eigsh of the same operator."
        )
