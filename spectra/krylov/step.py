"""The step that all Lanczos runs share: what a product leaves beside the rows, and the vector it leads to.

With q the vector that was multiplied, p the one before it, and rows v_j,

    w = H q - β p;  α = qᵀw;  w -= α q;  w ⟂ v_0 .. v_i;  v_{i+1} = w / |w|

Subtracting the large coefficients first leaves others of rounding size, so that one Gram-Schmidt pass over
the rows is as good as two over the raw product. A step computes in a unit near |H|, a power of two, which the
subtraction brings in without a pass of its own: squares neither under- nor overflow.

Two kinds of runs keep books of it. `recurrence` has the coefficients of T alone, and beside rows that may be
stored in less precision or not at all one vector at hand in full; it runs under `vmap`. `band` has the
coefficients of a product on all rows, from any of them, which restarts and several start vectors need.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spectra.base import trees
from spectra.krylov import panels as _panels
from spectra.krylov.basis import Basis
from spectra.krylov.layout import Panels
from spectra.krylov.orthogonalize import orthogonalize
from spectra.quadrature.copies import breakdown_factor


class Remainder(NamedTuple):
    """What is left of a product, in the unit of the step."""

    vector: Panels
    norm: jax.Array
    alpha: jax.Array  # qᵀHq before the passes over the rows
    first: Any  # coefficients on the rows that the first pass found, (rows,); None without rows
    total: Any  # of all passes
    repeated: Any  # whether there was a second pass


def remainder(
    w: Panels,
    q: Panels,
    previous: Panels,
    beta: jax.Array,
    unit: jax.Array,
    rows: Basis,
    filled: jax.Array | int,
) -> Remainder:
    """The product w = H q without its parts along q, `previous` (with coefficient β) and the rows."""
    w, alpha = _panels.three_terms(w, q, previous, beta, unit)
    if not rows:
        return Remainder(w, jnp.sqrt(_panels.vdot(w, w)), alpha, None, None, None)
    w, norm, first, total, repeated = orthogonalize(rows, w, filled)
    return Remainder(w, norm, alpha, first, total, repeated)


def following(
    rest: Remainder, scale: jax.Array, size: int, going: bool | jax.Array
) -> tuple[Panels, jax.Array]:
    """The next vector, and whether there is one: zero where rounding alone can have left the remainder.

    Args:
        rest: of the product.
        scale: |H| in the unit of the step.
        size: numbers of a vector.
        going: whether the run has come this far.
    """
    eps = jnp.finfo(scale.dtype).eps
    alive = going & (rest.norm > breakdown_factor(size) * eps * scale)
    inverse = jnp.where(alive, 1 / jnp.where(alive, rest.norm, 1), 0)
    return [jnp.where(alive, x, 0) for x in trees.scale(inverse, rest.vector)], alive
