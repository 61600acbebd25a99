"""The Fisher information matrix of a model: exact in the targets, sampled, or empirical."""

# pyright: reportPrivateUsage=false
# Operators have parts that only this package uses.

from collections.abc import Callable, Iterator
from typing import Any, Literal, Self, Unpack

import jax
import jax.numpy as jnp

from spectra.base import programs, trees
from spectra.base.calls import automatic
from spectra.base.errors import SpectraError
from spectra.base.trees import PyTree
from spectra.operators import likelihood
from spectra.operators.accumulate import map_microbatches
from spectra.operators.arguments import DataOptions
from spectra.operators.batches import batch_size, shared_leaves, weigh
from spectra.operators.data import shows_options
from spectra.operators.fisher_checks import look_at_loss, require_examples_first, softmax_error
from spectra.operators.ggn import ModelFn, ModelOperator, OutputLossFn, split
from spectra.operators.pytree import operator
from spectra.operators.stochastic import QUICK

KINDS = ("type2", "mc", "empirical")


@operator(leaves=("params", "data", "key", "linear", "captured"))
class FisherOperator(ModelOperator):
    """The Fisher information Σ_t w_t E[∇log p(y|f_t) ∇log p(y|f_t)ᵀ] of a model's predictions.

    The loss is read as the weighted mean Σ_t w_t ℓ_t of negative log-likelihoods ℓ_t over *terms*: the
    entries of integer targets (examples, or tokens), else the examples. For a softmax cross-entropy the w_t
    are read from its curvature: class weights, masks, ignored labels and sums over tokens count as they do in
    the loss. Terms of other losses count alike. The kinds differ in y:

    * "type2": the exact expectation over y ~ p(·|f_t), by E[∇ℓ ∇ℓᵀ] = E[∇²ℓ]. If ∇²ℓ does not depend on y
      (softmax cross-entropy, squared error, binary cross-entropy with logits, every natural exponential
      family), this is the Gauss-Newton matrix, and products are computed as for that matrix.
    * "mc": one y_t drawn from p(·|f_t) for each term, unbiased for "type2". The operator
      on one batch holds them in its `data`.
    * "empirical": the y_t of the data. Not a Fisher matrix in the strict sense, and far from one when the
      model fits (Kunstner, Balles and Hennig, arXiv:1905.12558).

    Args:
        model_fn: pure function (params, inputs) -> outputs, one array for "mc". Static.
        loss_fn: pure function (outputs, targets) -> scalar, the mean over the batch. Static.
        params: pytree of parameters.
        data: one batch, a pair (inputs, targets), or a re-iterable of such pairs. Targets may contain masks
            or weights next to the labels; where data are cut, `weight_fn` then gives what a batch weighs.
            For losses other than a softmax cross-entropy it gives the number of terms, which sets the scale
            of the empirical matrix, quadratic in the terms: pass it if the loss is a mean over more than the
            examples (such as the numbers of a regression target), or over some of them. Weights of examples
            are no numbers of terms: `GradientCovarianceOperator` has them. If the loss has an attribute
            `weight`, it is used where targets are classes.
        kind: "type2", "mc" or "empirical".
        key: JAX random key of the samples, for "mc". The sample of an example depends only on the key, the
            position of the batch in the stream and that of the example in the batch.
        sample_fn: function (key, outputs, targets) -> targets of one example, for "mc" with a likelihood
            other than softmax, Gaussian and Bernoulli, which are recognised from the targets.
        **options: see `DataOperator`.

    Raises:
        StructureError: "type2" for a loss whose curvature depends on the targets, which is seen for targets
            that are one array, or labels beside others, and for a loss that has a gradient and no curvature;
            "mc" for targets or a loss of no known likelihood; "mc" and "empirical" for outputs that are not
            those of examples.
        DataError: "mc" and "empirical" for a loss that is no mean over its terms, and weights of examples in
            the place of their number.
        SpectraError: as `GGNOperator` otherwise.

    Cost: a product is one J v and one Jᵀ u; gradients of single terms exist in output space only. "mc"
    evaluates the model once when the operator is created; on streams, it does so once more in every product.

    References:
        Amari, doi:10.1162/089976698300017746; Martens, arXiv:1412.1193, sections 5, 9, 11.

    Examples:
        >>> import jax, jax.numpy as jnp, spectra
        >>> def model_fn(params, x):
        ...     return x @ params
        >>> def loss_fn(logits, labels):
        ...     return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1))
        >>> data = (jnp.eye(3), jnp.array([0, 1, 0]))
        >>> op = spectra.FisherOperator(model_fn, loss_fn, jnp.zeros((3, 2)), data, kind="type2")
        >>> op @ jnp.array([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
        Array([[ 0.08333334, -0.08333334],
               [ 0.        ,  0.        ],
               [ 0.        ,  0.        ]], dtype=float32)
    """

    model_fn: ModelFn
    loss_fn: OutputLossFn
    kind: str
    sample_fn: Callable[[jax.Array, PyTree, PyTree], PyTree] | None
    count_fn: Callable[[PyTree], Any] | None  # weight_fn as given: not what the loss brings
    labels: int | None  # which leaf of the targets is drawn; None as far as nothing but shapes is known
    softmax: bool | None  # whether classes have a softmax cross-entropy; None decides where it is computed
    key: jax.Array | None

    @shows_options
    @automatic
    def __init__(
        self,
        model_fn: ModelFn,
        loss_fn: OutputLossFn,
        params: PyTree,
        data: Any,
        *,
        kind: Literal["type2", "mc", "empirical"] = "type2",
        key: jax.Array | None = None,
        sample_fn: Callable[[jax.Array, PyTree, PyTree], PyTree] | None = None,
        **options: Unpack[DataOptions],
    ):
        if kind not in KINDS:
            raise SpectraError(f"kind={kind!r}: use one of {KINDS}.")
        if kind == "mc" and key is None:
            raise SpectraError("kind='mc' draws targets and needs key=, a JAX random key.")
        if kind != "mc" and key is not None:
            raise SpectraError(f"kind={kind!r} draws nothing: leave key= out, or use kind='mc'.")
        functions: dict[str, Any] = {"model_fn": model_fn, "loss_fn": loss_fn, "sample_fn": sample_fn}
        functions["count_fn"] = options.get("weight_fn")
        own: dict[str, Any] = {"kind": kind, "key": None, "labels": None, "softmax": None}
        self._open(params, data, **own, **functions, **options)
        self._set(**look_at_loss(self.first_piece(), options.get("check_data", True)))
        if kind == "mc":
            self._set(key=key)
            if self.stream is None:
                self._set(data=_with_samples_once(self), key=None)

    @property
    def semidefinite(self) -> bool:
        """True for outer products; for "type2", as the curvature of the loss."""
        return self.kind != "type2"

    def _pieces(self) -> Iterator[tuple[float, Self]]:
        key = self.key
        for index, (weight, piece) in enumerate(super()._pieces()):
            if key is not None:
                piece = piece._with(key=jax.random.fold_in(key, index))
                piece = piece._with(data=_with_samples(piece), key=None)
            yield weight, piece

    def _piece_product(self, variables: PyTree, piece: PyTree, v: PyTree) -> PyTree:
        if self.kind == "type2":
            return self._gauss_newton_product(variables, piece, v)
        inputs, targets = split(piece)
        outputs, push, pull = self._jacobian(variables, inputs)
        axis = self._class_axis(outputs, targets)
        if axis is None:
            require_examples_first(self, outputs, piece)
        scores, pushed = self._scores(outputs, targets, piece), push(v)
        terms = 1 if axis is None else outputs.ndim - 1
        first, along = (likelihood.terms_first(x, axis) for x in (scores, pushed))
        along = _inner(first, along, terms)
        scaled = jax.tree.map(lambda s: s * along.reshape(along.shape + (1,) * (s.ndim - terms)), first)
        return pull(trees.cast_like(likelihood.classes_back(scaled, axis), pushed))

    def _class_axis(self, outputs: PyTree, targets: PyTree) -> int | None:
        """The axis of the outputs that counts classes; None where examples are the terms."""
        if self.labels is None:
            return likelihood.class_axis(outputs, targets)
        return likelihood.class_leaves(outputs, targets).get(self.labels)

    def _scores(self, outputs: PyTree, targets: PyTree, piece: PyTree) -> PyTree:
        """√w_t ∇ℓ_t for each term: the gradient of the loss, w_t ∇ℓ_t, over √w_t."""
        gradient = jax.grad(self._output_loss)(outputs, targets)
        axis = self._class_axis(outputs, targets)
        if axis is not None and self.softmax is not False:
            if self.softmax:
                weights = self._softmax_weights(outputs, targets, axis)
                labels = jax.tree.leaves(targets)[self._label_leaf(outputs, targets)]
                gradient = likelihood.sum_to_zero(gradient, weights, labels, axis)
            return gradient * self._inverse_roots(outputs, targets, piece, axis)
        weight = self._num_terms(outputs, targets, piece)
        if self.kind == "mc" and self.sample_fn is None and axis is None:
            index = self._label_leaf(outputs, targets)
            second, mixed = likelihood.regression_curvature(self._output_loss, outputs, targets, index)
            bernoulli = jnp.where(mixed > 0, gradient / jnp.sqrt(jnp.where(mixed > 0, mixed, 1)), 0)
            return jnp.where(second > 0, jnp.sqrt(weight) * gradient, bernoulli)
        return jax.tree.map(lambda g: jnp.sqrt(weight).astype(g.dtype) * g, gradient)

    def _inverse_roots(self, outputs: jax.Array, targets: PyTree, piece: PyTree, axis: int) -> jax.Array:
        """1 / √w_t, zero for terms that do not count; of a loss that is no softmax, √ of their number."""
        weights = self._softmax_weights(outputs, targets, axis)
        roots = jnp.where(weights > 0, 1 / jnp.sqrt(jnp.where(weights > 0, weights, 1)), 0)
        if self.softmax:
            return roots
        fits = softmax_error(self, outputs, targets, axis) <= self.precision**0.5
        return jnp.where(fits, roots, jnp.sqrt(self._num_terms(outputs, targets, piece)).astype(roots.dtype))

    def _softmax_weights(self, outputs: jax.Array, targets: PyTree, axis: int) -> jax.Array:
        """The weight of each term, in the form of the outputs with one entry along the axis of classes."""
        return likelihood.softmax_weights(lambda z, u: self._curvature(z, targets, u), outputs, axis)

    def _num_terms(self, outputs: PyTree, targets: PyTree, piece: PyTree) -> jax.Array:
        axis = self._class_axis(outputs, targets)
        count = self.count_fn if axis is None else self.weight_fn  # a mean over numbers is one over examples
        if count is not None:
            return jnp.asarray(weigh(count, piece), float)
        first = jax.tree.leaves(outputs)[0]
        return jnp.asarray(len(first) if axis is None else first.size // first.shape[axis], float)

    def _label_leaf(self, outputs: PyTree, targets: PyTree) -> int:
        """The leaf of the targets that a likelihood speaks of."""
        likelihood.require_known(outputs, targets)
        numbers = likelihood.number_leaf(outputs, targets)
        found = [self.labels, *likelihood.class_leaves(outputs, targets), numbers]
        return next(index for index in found if index is not None)

    def _redraw(self, keys: jax.Array, outputs: PyTree, targets: PyTree, piece: PyTree) -> PyTree:
        """The targets with labels drawn at the outputs, one key an example."""
        if self.sample_fn is not None:
            return jax.vmap(self.sample_fn)(keys, outputs, targets)
        index = self._label_leaf(outputs, targets)
        axis = likelihood.class_leaves(outputs, targets).get(index)
        if axis is None:
            weight = self._num_terms(outputs, targets, piece)
        else:
            weight = self._softmax_weights(outputs, targets, axis)
        return likelihood.sample(self._output_loss, keys, outputs, targets, index, weight)

    def _draw(self, piece: PyTree, keys: jax.Array) -> PyTree:
        inputs, targets = split(piece)
        return self._redraw(keys, self.model_fn(self._merge(self._variables()), inputs), targets, piece)


def _inner(a: PyTree, b: PyTree, terms: int) -> jax.Array:
    """Σ a b over all axes but the first `terms`, over all leaves."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum((jnp.sum(x * y, axis=tuple(range(terms, x.ndim))) for x, y in pairs), jnp.zeros(()))


def _sampled_batch(op: FisherOperator) -> tuple[PyTree, PyTree]:
    """The batch with its targets drawn anew, each example with a key of its own."""
    assert op.key is not None
    keys = jax.vmap(jax.random.fold_in, (None, 0))(op.key, jnp.arange(batch_size(op.data, op.shared)))
    with jax.default_matmul_precision(op.matmul_precision):
        drawn = map_microbatches(op._draw, op.data, keys, op.microbatch, op.shared)
    inputs, targets = split(op.data)
    leaves, treedef = jax.tree.flatten(targets)
    alike = shared_leaves(op.data, op.shared)[-len(leaves) :]  # every piece has these, class weights say
    new = zip(leaves, jax.tree.leaves(drawn), alike, strict=True)
    return inputs, treedef.unflatten([old if whole else label for old, label, whole in new])


_with_samples = programs.jit(_sampled_batch)
_with_samples_once = programs.jit(_sampled_batch, options=QUICK)  # a generator compiles for seconds otherwise
