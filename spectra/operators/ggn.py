"""The generalised Gauss-Newton matrix: the loss's curvature seen through the linearised model."""

import dataclasses
from collections.abc import Callable
from typing import Any, Unpack, cast

import jax

from spectra.base.calls import automatic
from spectra.base.errors import DataError, StructureError
from spectra.base.trees import PyTree
from spectra.operators import differentiate
from spectra.operators.arguments import DataOptions
from spectra.operators.batches import describe
from spectra.operators.data import DataOperator, shows_options
from spectra.operators.jaxprs import uses
from spectra.operators.pytree import operator

ModelFn = Callable[[PyTree, PyTree], PyTree]
OutputLossFn = Callable[[PyTree, PyTree], jax.Array]


def split(piece: PyTree) -> tuple[PyTree, PyTree]:
    """(inputs, targets) of a batch for operators that know the model."""
    items = cast("list[Any]", piece) if isinstance(piece, (tuple, list)) else []
    if len(items) == 2:
        return items[0], items[1]
    other = cast("Any", piece)
    found = describe(other) if hasattr(other, "dtype") else f"a {type(other).__name__}"
    raise DataError(
        f"a batch is {found}, not a pair (inputs, targets): the operator calls "
        "model_fn(params, inputs) and loss_fn(outputs, targets)."
    )


@dataclasses.dataclass(frozen=True)
class ComposedLoss:
    """loss_fn(model_fn(params, inputs), targets): equal for equal functions, so compiled code is shared."""

    model_fn: Callable[[Any, Any], Any]
    loss_fn: Callable[[Any, Any], Any]

    def __call__(self, params: Any, batch: Any) -> Any:
        """The loss of a batch (inputs, targets)."""
        inputs, targets = split(batch)
        return self.loss_fn(self.model_fn(params, inputs), targets)


class ModelOperator(DataOperator):
    """An operator that knows the model apart from the loss on its outputs."""

    model_fn: ModelFn
    loss_fn: OutputLossFn

    def _value(self, params: PyTree, piece: PyTree) -> jax.Array:
        inputs, targets = split(piece)
        return self._output_loss(self.model_fn(params, inputs), targets)

    def _output_loss(self, outputs: PyTree, targets: PyTree) -> jax.Array:
        return differentiate.check_scalar(self.loss_fn(outputs, targets), "loss_fn")

    def _outputs_shape(self) -> PyTree:
        """The structure of the model's outputs."""
        return jax.eval_shape(lambda op: op.model_fn(op._merge(op._variables()), split(op.data)[0]), self)

    def _jacobian(
        self, variables: PyTree, inputs: PyTree
    ) -> tuple[PyTree, Callable[[PyTree], PyTree], Callable[[PyTree], PyTree]]:
        """Outputs, v -> J v and u -> Jᵀ u of the model at the variables."""
        return differentiate.jacobian(
            self.mode, lambda x: self.model_fn(self._merge(x), inputs), variables, self.differences
        )

    def _curvature(self, outputs: PyTree, targets: PyTree, u: PyTree) -> PyTree:
        """(∇²ℓ) u in output space."""
        gradient = jax.grad(self._output_loss)
        return differentiate.derivative(self.mode, lambda f: gradient(f, targets), outputs, u)

    def _gauss_newton_product(self, variables: PyTree, piece: PyTree, v: PyTree) -> PyTree:
        """Jᵀ (∇²ℓ) J v."""
        inputs, targets = split(piece)
        outputs, push, pull = self._jacobian(variables, inputs)
        curvature = getattr(self.loss_fn, "gauss_newton", self._curvature)  # that of logits within the loss
        return pull(curvature(outputs, targets, push(v)))


@operator(leaves=("params", "data", "linear", "captured"))
class GGNOperator(ModelOperator):
    """The generalised Gauss-Newton matrix Jᵀ (∇²ℓ) J of a loss ℓ on the outputs of a model.

    With outputs f = model_fn(θ, x), J = ∂f/∂θ, and ∇²ℓ the Hessian of `loss_fn` with respect to the outputs,
    by automatic differentiation. Any loss works, and the matrix is positive semi-definite if the loss is
    convex in the outputs. The residual term H - GGN = Σ (∂ℓ/∂f_k) ∇²f_k is
    `HessianOperator(...) - GGNOperator(...)`.

    Args:
        model_fn: pure function (params, inputs) -> outputs, any pytree of floating arrays. Static.
        loss_fn: pure function (outputs, targets) -> scalar, the mean over the batch. Static.
        params: pytree of parameters.
        data: one batch, a pair (inputs, targets), or a re-iterable of such pairs.
        **options: see `DataOperator`.

    Raises:
        SpectraError: as `HessianOperator`.
        DataError: a batch is not a pair.
        StructureError: the loss is linear in the outputs, or piecewise linear, so that the matrix is zero at
            all parameters.

    Cost: a product is one J v and one Jᵀ u, about 3 evaluations of the model beyond the shared one, in the
    memory of a gradient plus a few arrays of the size of the outputs: neither a Jacobian nor a matrix in
    output space is formed. `microbatch` bounds the outputs in memory.

    References:
        Schraudolph, doi:10.1162/08997660260028683; Martens, arXiv:1412.1193.

    Examples:
        >>> import jax.numpy as jnp, spectra
        >>> def model_fn(params, x):
        ...     return jnp.tanh(x @ params)
        >>> def loss_fn(outputs, targets):
        ...     return 0.5 * jnp.mean((outputs - targets) ** 2)
        >>> x = jnp.array([[1.0, 0.0], [0.0, 3.0]])
        >>> op = spectra.GGNOperator(model_fn, loss_fn, jnp.zeros(2), (x, jnp.ones(2)))
        >>> op @ jnp.ones(2)
        Array([0.5, 4.5], dtype=float32)
    """

    model_fn: ModelFn
    loss_fn: OutputLossFn

    @shows_options
    @automatic
    def __init__(
        self,
        model_fn: ModelFn,
        loss_fn: OutputLossFn,
        params: PyTree,
        data: Any,
        **options: Unpack[DataOptions],
    ):
        self._open(params, data, model_fn=model_fn, loss_fn=loss_fn, **options)
        self._require_curvature()

    def _require_curvature(self) -> None:
        """Raise where ∇²ℓ is zero by the form of the loss, whatever the numbers: so is Jᵀ (∇²ℓ) J then."""
        if hasattr(self.loss_fn, "gauss_newton"):
            return
        piece = self.first_piece()
        outputs, targets = piece._outputs_shape(), split(piece.data)[1]
        if not uses(piece._curvature, outputs, targets, outputs):
            raise StructureError(
                "the Gauss-Newton matrix of this loss is zero at all parameters: loss_fn is linear in the "
                "model's outputs, or piecewise linear, and has no curvature there. If the model returns "
                "log-probabilities, let it return logits, and take log_softmax in loss_fn; for an absolute "
                "error or a hinge use HessianOperator, or FisherOperator with kind='empirical'."
            )

    def _piece_product(self, variables: PyTree, piece: PyTree, v: PyTree) -> PyTree:
        return self._gauss_newton_product(variables, piece, v)
