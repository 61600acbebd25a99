"""The second moment and the covariance of the gradients of single examples."""

from collections.abc import Callable
from typing import Any, ClassVar, Unpack

import jax
import jax.numpy as jnp

from spectra.base import trees
from spectra.base.calls import automatic
from spectra.base.trees import PyTree
from spectra.operators import differentiate
from spectra.operators.arguments import DataOptions
from spectra.operators.batches import batch_size, owned_leaves, replace_owned, weigh
from spectra.operators.data import DataOperator, shows_options
from spectra.operators.pytree import operator


@operator(leaves=("params", "data", "mean", "linear", "captured"))
class GradientCovarianceOperator(DataOperator):
    """The second moment Σ w_i g_i g_iᵀ / Σ w_i of the gradients g_i of single examples.

    With `centered`, the gradient of the mean loss is subtracted: C - ḡ ḡᵀ is the noise covariance of
    stochastic gradients with batch size one. Both matrices are positive semi-definite. If the loss is a
    negative log-likelihood, the second moment is the empirical Fisher matrix.

    Args:
        loss_fn: pure function (params, batch) -> scalar, the mean over the batch. It is evaluated on
            batches of one example, so it is not defined for a model that mixes examples (batch statistics).
        params: pytree of parameters.
        data: one batch or a re-iterable of batches.
        centered: subtract ḡ ḡᵀ; costs one gradient when the operator is created.
        **options: see `DataOperator`; `weight_fn` of a batch of one example gives w_i, by default 1.

    Raises:
        SpectraError: as `HessianOperator`.

    Cost: a product is one J v and one Jᵀ u of the vector of losses, about as much as a Hessian product;
    gradients of single examples are never stored.

    References:
        Kunstner, Balles and Hennig, arXiv:1905.12558; Jastrzębski et al., arXiv:2002.09572.

    Examples:
        >>> import jax.numpy as jnp, spectra
        >>> def loss_fn(w, x):
        ...     return jnp.mean(x @ w)  # g_i = x_i
        >>> op = spectra.GradientCovarianceOperator(loss_fn, jnp.ones(2), jnp.array([[1.0, 0.0], [3.0, 2.0]]))
        >>> op.as_matrix()
        Array([[5., 3.],
               [3., 2.]], dtype=float32)
    """

    loss_fn: Callable[[PyTree, PyTree], jax.Array]
    mean: PyTree  # ḡ if centered, else None
    takes_single_examples: ClassVar[bool] = True

    @shows_options
    @automatic
    def __init__(
        self,
        loss_fn: Callable[[PyTree, PyTree], jax.Array],
        params: PyTree,
        data: Any,
        *,
        centered: bool = False,
        **options: Unpack[DataOptions],
    ):
        self._open(params, data, loss_fn=loss_fn, mean=None, **options)
        if centered:
            self._set(mean=self.gradient())

    @property
    def centered(self) -> bool:
        """Whether the mean gradient is subtracted."""
        return self.mean is not None

    @property
    def semidefinite(self) -> bool:
        """True: a mean of outer products, less that of their mean."""
        return True

    def _principal(self, indices: tuple[int, ...]) -> "GradientCovarianceOperator":
        block = super()._principal(indices)
        return block if self.mean is None else block._with(mean=trees.keep_leaves(self.mean, indices))

    def _on(self, **data: Any) -> "GradientCovarianceOperator":
        other = self._with(**data, mean=None)
        return other._with(mean=other.gradient()) if self.centered else other

    def _value(self, params: PyTree, piece: PyTree) -> jax.Array:
        return differentiate.check_scalar(self.loss_fn(params, piece), "loss_fn")

    def _piece_product(self, variables: PyTree, piece: PyTree, v: PyTree) -> PyTree:
        weights, owned, one = self._examples(piece)

        def losses(x: PyTree) -> jax.Array:
            return jax.vmap(lambda weight, example: one(x, weight, example))(weights, owned)

        _, push, pull = differentiate.jacobian(self.mode, losses, variables, self.differences)
        along = push(v)
        shares = (weights / jnp.sum(weights)).astype(along.dtype)
        if self.mean is None:
            return pull(shares * along)
        # Σ p (g - ḡ) (g - ḡ)ᵀ v: with C v - ḡ ḡᵀ v, all of the noise below eps |ḡ|² would be lost, and
        # a ḡ that is off by its rounding would count with |ḡ| in place of with its own length.
        along = shares * (along - trees.vdot(self.mean, v).astype(along.dtype))
        return trees.axpy(-jnp.sum(along), self.mean, pull(along))

    def _examples(self, piece: PyTree) -> tuple[jax.Array, list[jax.Array], Callable[..., jax.Array]]:
        """Weights and leaves of the examples, and the loss of one: (variables, weight, example) -> scalar."""
        weights = self._weights(piece)
        # An example of weight zero (padding) may have no finite loss: another one stands in for it.
        owned = owned_leaves(piece, self.shared)
        stand_in = [x[jnp.argmax(weights > 0)] for x in owned]

        def one(variables: PyTree, weight: Any, example: PyTree) -> jax.Array:
            kept = [jnp.where(weight > 0, e, s) for e, s in zip(example, stand_in, strict=True)]
            return self._value(self._merge(variables), self._alone(piece, kept))

        return weights, owned, one

    def _weights(self, piece: PyTree) -> jax.Array:
        count = batch_size(piece, self.shared)
        if self.weight_fn is None:
            return jnp.ones(count)
        weight_fn, owned = self.weight_fn, owned_leaves(piece, self.shared)

        def one(example: list[jax.Array]) -> jax.Array:
            return jnp.asarray(weigh(weight_fn, self._alone(piece, example)), float)

        return jax.vmap(one)(owned)

    def _alone(self, piece: PyTree, example: list[jax.Array]) -> PyTree:
        """The batch of one example."""
        return replace_owned(piece, self.shared, [x[None] for x in example])
