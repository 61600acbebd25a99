"""Control flow whose branches are graphs."""

import jax
from jax import lax

from spectra.bridge._registry import register


@register("spectra.cond")
def cond(pred, true_fn, false_fn, operands=()):
    """One of two branches; the other is not evaluated and has no derivative."""
    if isinstance(pred, bool):
        return tuple((true_fn if pred else false_fn)(*operands))
    arrays = [x for x in operands if isinstance(x, jax.Array)]

    def with_sizes(branch):
        def run(*values):
            rest = iter(values)
            return tuple(branch(*(next(rest) if isinstance(x, jax.Array) else x for x in operands)))

        return run

    return lax.cond(pred.reshape(()), with_sizes(true_fn), with_sizes(false_fn), *arrays)
