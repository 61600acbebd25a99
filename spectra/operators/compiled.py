"""The compiled functions of operators on data, and the linear map that the products of one run share.

Jitted once for all operators: the cache is keyed by the operator's static part and the shapes of its leaves,
so the next checkpoint of a model neither traces nor compiles.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from spectra.operators.arithmetic import Derived
from spectra.operators.base import LinearOperator, operator

if TYPE_CHECKING:
    from spectra.operators.data_operator import DataOperator

PyTree = Any


def _mean_loss(op: "DataOperator") -> jax.Array:
    params = op._merge(op._variables())
    return op._mean(lambda piece: op._value(params, piece))


loss = jax.jit(_mean_loss)


@jax.jit
def gradient(op: "DataOperator") -> PyTree:
    """The gradient of the mean loss, in the working dtypes."""
    variables = op._variables()
    return op._mean(lambda piece: op._grad(variables, piece))


@jax.jit
def linearize(op: "DataOperator") -> tuple[jax.Array, Callable[[PyTree], PyTree]]:
    """The loss, and v -> A v with all values that do not depend on v saved: pytrees that jit returns."""
    zero = jax.tree.map(jnp.zeros_like, op._variables())
    if op.mode == "reverse-over-reverse":  # the product itself may refuse forward mode
        pullback = jax.vjp(op.mv, zero)[1]  # A is symmetric: Aᵀ u is A u
        return _mean_loss(op), jax.tree_util.Partial(_first, pullback)
    return _mean_loss(op), jax.linearize(op.mv, zero)[1]


def _first(pullback, u: PyTree) -> PyTree:
    return pullback(u)[0]


def saved_bytes(op: "DataOperator") -> int:
    """Bytes of the values that the linear map saves and that are not the operator's own leaves."""
    jaxpr = linearize.trace(op).jaxpr.jaxpr
    own = {id(var) for var in jaxpr.invars}
    saved = {id(var): var.aval for var in jaxpr.outvars[1:] if id(var) not in own}
    return sum(aval.size * aval.dtype.itemsize for aval in saved.values())  # pyright: ignore


@operator(leaves=("linear", "base"))
class LinearizedOperator(Derived):
    """An operator with the values saved that its products share; made by `prepare`, for one run."""

    linear: Any
    base: LinearOperator

    def mv(self, v: PyTree) -> PyTree:
        """One application of the saved linear map."""
        return self.linear(v)
