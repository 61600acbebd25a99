"""Classical Gram-Schmidt against a segmented basis, with a second pass only where it is needed.

One pass computes c = Q w and w' = w - Q^T c; it leaves a component along the basis of relative size
(loss of orthogonality of Q) * |c| / |w'|. When |c| is small beside |w'| that is below rounding, and a
second pass would read the whole basis for nothing. Daniel, Gragg, Kaufman and Stewart
(doi:10.2307/2005398) repeat the pass when |w'| < |w| / sqrt(2), which is |c| > |w'|. Here the test is
|c| > `REPEAT` |w'| with a smaller constant: the orthogonality of the basis must not decay by a factor
in every step of a long run.
"""

import jax
import jax.numpy as jnp
from jax import lax

from spectra.krylov import basis as _basis
from spectra.krylov.basis import Basis, Panels

REPEAT = 0.1


def gram_schmidt_pass(basis: Basis, vector: Panels, filled) -> tuple[Panels, jax.Array, jax.Array]:
    """One classical pass over the first `filled` rows: w' = w - QᵀQw, |w'| and Qw. Two reads of the rows.

    |w'|² = |w|² - |Qw|², both from one reduction; it loses no digits where the pass removes little, and
    where it removes much a second pass follows.
    """
    coefficients, square = _basis.dots(basis, vector, filled)
    rest = jnp.maximum(square - _square(coefficients), 0)
    return _basis.subtract(basis, coefficients, vector, filled), _root(rest), coefficients


def orthogonalize(
    basis: Basis, vector: Panels, filled
) -> tuple[Panels, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Make `vector` orthogonal to the first `filled` rows of `basis` to working precision.

    `vector` is in a unit in which its square is a number, see `basis.unit_of_step`.

    Returns the new vector, its norm, the coefficients of the first pass, the sum of the coefficients
    of all passes, and whether a second one ran. Costs one pass, or two where the first removed a
    relevant part.
    """
    vector, norm, first = gram_schmidt_pass(basis, vector, filled)

    def again(vector):
        vector, _, second = gram_schmidt_pass(basis, vector, filled)
        # At a breakdown nothing but rounding is left, and no difference of squares tells how much.
        return vector, jnp.sqrt(_basis.vdot(vector, vector)), first + second

    def enough(vector):
        return vector, norm, first

    repeat = _square(first) > (REPEAT * norm) ** 2
    vector, norm, total = lax.cond(repeat, again, enough, vector)
    return vector, norm, first, total, repeat


def _square(coefficients: jax.Array) -> jax.Array:
    return jnp.vdot(coefficients, coefficients, precision=lax.Precision.HIGHEST)


def _root(x: jax.Array) -> jax.Array:
    """sqrt, with the derivative 0 at 0: where a space ends, the norm of what is left says nothing."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)
