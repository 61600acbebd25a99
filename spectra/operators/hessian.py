"""The Hessian of a loss as an operator."""

from collections.abc import Callable
from typing import Any, Unpack

import jax

from spectra.operators import products
from spectra.operators.base import operator
from spectra.operators.checks import DataOptions, check_scalar
from spectra.operators.data_operator import DataOperator, shows_options

PyTree = Any


@operator(leaves=("params", "data"))
class HessianOperator(DataOperator):
    """The Hessian ∇²L(θ) of a loss, multiplied without being formed.

    (H v)_i = Σ_j ∂²L/∂θ_i∂θ_j v_j, with L the mean of `loss_fn` over the data.

    Args:
        loss_fn: pure function (params, batch) -> scalar, the mean over the examples of the batch. It is
            static: keep one function object.
        params: pytree of real floating arrays (dicts, Flax linen or nnx state, Equinox, ...).
        data: one batch (a tuple, dict or other pytree of arrays; those of a batch that is cut share a
            leading axis), or a re-iterable of batches (list, DataLoader, generator function), which is
            then read anew for every product; None for a loss that ignores its second argument.
        **options: see `DataOperator`: wrt, mode, microbatch, linearize, matmul_precision, weight_fn,
            shared, num_batches, subsample_key, check_data.

    Raises:
        StructureError: a parameter leaf is not a real floating array, the loss is not a scalar, or cannot
            be called with the parameters and a batch.
        DataError: the data are empty, inconsistent, or change between passes; they are cut, and the loss
            is no mean over examples.
        DifferentiationError: the loss has no gradient; carries JAX's reason.

    Cost: see `spectra.operators.products`; streams cost one pass over the data a product.

    References:
        Pearlmutter, Fast exact multiplication by the Hessian, doi:10.1162/neco.1994.6.1.147.

    Examples:
        >>> import jax.numpy as jnp, spectra
        >>> def loss_fn(params, batch):
        ...     inputs, targets = batch
        ...     return 0.5 * jnp.mean((inputs @ params["w"] - targets) ** 2)
        >>> x = jnp.array([[1.0, 0.0], [0.0, 3.0]])
        >>> op = spectra.HessianOperator(loss_fn, {"w": jnp.zeros(2)}, (x, jnp.ones(2)))
        >>> op @ {"w": jnp.ones(2)}
        {'w': Array([0.5, 4.5], dtype=float32)}
    """

    loss_fn: Callable[[PyTree, PyTree], jax.Array]

    @shows_options
    def __init__(
        self,
        loss_fn: Callable[[PyTree, PyTree], jax.Array],
        params: PyTree,
        data: Any,
        **options: Unpack[DataOptions],
    ):
        self._open(params, data, loss_fn=loss_fn, **options)

    def _value(self, params: PyTree, piece: PyTree) -> jax.Array:
        return check_scalar(self.loss_fn(params, piece), "loss_fn")

    def _piece_product(self, variables: PyTree, piece: PyTree, v: PyTree) -> PyTree:
        return products.derivative(self.mode, lambda x: self._grad(x, piece), variables, v)

    def _matrix(self) -> jax.Array:
        from spectra.operators.dense import hessian_matrix

        self._require_finite(self.loss())
        return hessian_matrix(self)
