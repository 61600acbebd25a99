"""What can be said of an operator whose products are all zero: not that its eigenvalues are."""

import jax.numpy as jnp

from spectra.krylov import wanted
from spectra.operators.base import LinearOperator


def vanished(op: LinearOperator) -> float:
    """A noise floor where all products are zero, in the units of an eigenvalue.

    A saturated loss has second derivatives below what its type resolves: 1 - p of a probability that rounds
    to one, or an exponential that underflows. What rounding changes is then no share of |H|, but the whole of
    it: |H' - H|, as measured, and no less than the smallest number of the type. Products in float64 do not
    say it, since they may vanish as well. 0 for an operator without parameters, such as a matrix of zeros,
    which has nothing to round.
    """
    if not wanted.is_measured(op, moved=True):
        return 0.0
    return max(wanted.change_of_matrix(op, moved=True), float(jnp.finfo(op.dtype).tiny))
