"""A loss, its parameters and its data under one name: what the command line analyses."""

import dataclasses
from collections.abc import Callable
from typing import Any

from spectra.operators.hessian import HessianOperator


@dataclasses.dataclass(frozen=True)
class Problem:
    """What `problem()` in a file for `spectra run` returns.

    Args:
        loss_fn: pure function (params, batch) -> scalar.
        params: pytree of parameters.
        data: one batch or a re-iterable of batches.
        name: title of the report.
        options: keyword arguments for the operator, for example {"microbatch": 256}.

    Examples:
        >>> import jax.numpy as jnp, spectra
        >>> problem = spectra.Problem(lambda w, x: jnp.mean((x @ w) ** 2), jnp.ones(3), jnp.eye(3))
        >>> problem.operator().size
        3
    """

    loss_fn: Callable[[Any, Any], Any]
    params: Any
    data: Any
    name: str = "problem"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def operator(self) -> HessianOperator:
        """The Hessian of the problem's loss."""
        return HessianOperator(self.loss_fn, self.params, self.data, **self.options)
