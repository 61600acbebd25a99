"""A loss, its parameters and its data under one name: what the command line analyses."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from spectra.base import OPERATORS
from spectra.base.errors import SpectraError
from spectra.distributed import shard_data, shard_params
from spectra.operators.base import LinearOperator
from spectra.operators.covariance import GradientCovarianceOperator
from spectra.operators.fisher import FisherOperator
from spectra.operators.ggn import ComposedLoss, GGNOperator
from spectra.operators.hessian import HessianOperator


@dataclasses.dataclass(frozen=True)
class Problem:
    """The return value of `problem()` in a file for `spectra run`.

    Args:
        loss_fn: pure function (params, batch) -> scalar; or, with `model_fn`, (outputs, targets) -> scalar.
        params: pytree of parameters.
        data: one batch or a re-iterable of batches; with `model_fn`, batches are (inputs, targets).
        name: title of the report.
        options: keyword arguments for the operator, for example {"microbatch": 256}.
        model_fn: pure function (params, inputs) -> outputs, which Gauss-Newton and Fisher matrices need.
        partition: how parameters are split over a mesh: a function (path, leaf) -> PartitionSpec or a pytree
            of specs; see `spectra.distributed.shard_params`.
        local_data: whether each process holds only its own part of every batch.

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
    model_fn: Callable[[Any, Any], Any] | None = None
    partition: Any = None
    local_data: bool = False

    def on(self, mesh: Mesh) -> "Problem":
        """The problem with its parameters and data on a mesh; arrays that are there already stay."""
        params = shard_params(self.params, mesh, self.partition)
        shared = self.options.get("shared")
        data = shard_data(self.data, mesh, local=self.local_data, shared=shared)
        return dataclasses.replace(self, params=params, data=data)

    def operator(self, kind: str = "hessian", *, key: jax.Array | None = None) -> LinearOperator:
        """A curvature matrix of the problem: one of "hessian", "ggn", "fisher", "mc-fisher" (which draws
        targets with `key`), "empirical-fisher" and "covariance" (of the gradients of single examples).

        Raises:
            SpectraError: unknown kind, or a kind that needs a `model_fn` when there is none.
        """
        if kind not in OPERATORS:
            raise SpectraError(f"operator '{kind}' is not known; use one of {', '.join(OPERATORS)}.")
        if kind in ("hessian", "covariance"):
            cls = HessianOperator if kind == "hessian" else GradientCovarianceOperator
            loss_fn = self.loss_fn if self.model_fn is None else ComposedLoss(self.model_fn, self.loss_fn)
            return cls(loss_fn, self.params, self.data, **self.options)
        if self.model_fn is None:
            raise SpectraError(
                f"operator '{kind}' needs to know the model apart from the loss: give the Problem "
                "model_fn(params, inputs) -> outputs, and loss_fn(outputs, targets) -> scalar."
            )
        arguments = (self.model_fn, self.loss_fn, self.params, self.data)
        if kind == "ggn":
            return GGNOperator(*arguments, **self.options)
        if kind == "mc-fisher":
            return FisherOperator(*arguments, kind="mc", key=key, **self.options)
        return FisherOperator(*arguments, kind="type2" if kind == "fisher" else "empirical", **self.options)
