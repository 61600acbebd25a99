"""The Fisher information matrix of a model: exact in the targets, sampled, or empirical.

It takes for granted that a loss is the mean over terms with a gradient for each; that is tried.
"""

# pyright: reportPrivateUsage=false
# Operators have parts that only this package uses.

from collections.abc import Callable, Iterator
from typing import Any, Literal, Self, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import programs, trees
from spectra.base.calls import automatic
from spectra.base.errors import DataError, SpectraError, StructureError
from spectra.base.trees import PyTree, is_traced
from spectra.operators import likelihood
from spectra.operators.accumulate import map_microbatches
from spectra.operators.arguments import DataOptions
from spectra.operators.batches import batch_size, rows, shared_leaves, weigh
from spectra.operators.data import shows_options
from spectra.operators.ggn import ModelFn, ModelOperator, OutputLossFn, split
from spectra.operators.jaxprs import drawn_shapes, largest_epsilon, rounding_of_sums
from spectra.operators.means import FAR, MARGIN, kind_of, known_means, remember, waves
from spectra.operators.pytree import operator
from spectra.operators.redraws import joined
from spectra.operators.redraws import rows as examples

OUTPUTS = 64
"""Examples whose outputs are looked at."""


def require_mean_of_outputs(op: Any) -> None:
    """Raise if the loss on the outputs of some examples is not the mean of that on two halves of them.

    For matrices that are sums over terms of the loss, each with a gradient of its own in output space.

    Raises:
        DataError: the loss is not a mean over examples.

    Cost: the outputs of some examples once, and a few evaluations of the loss on them.
    """
    if not trees.has_values((op.params, op.data)) or trees.is_traced((op.params, op.data)):
        return
    half = min(batch_size(op.data, op.shared), OUTPUTS) // 2
    if half == 0:
        return
    few = op._with(data=examples(op, op.data, 0, 2 * half))
    outputs = _outputs(few)
    floating = all(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(outputs))
    if not floating or any(x.shape[:1] != (2 * half,) for x in jax.tree.leaves(outputs)):
        return
    kind = kind_of(few, few.data)
    if kind in known_means:
        return
    try:
        jaxpr = _values_of_outputs.trace(few, outputs).jaxpr
    except Exception:  # it takes no batches of this size
        return
    if drawn_shapes(jaxpr):
        return
    unit = max(largest_epsilon(jaxpr), op.precision)
    treedef, leaves = jax.tree.structure(outputs), jax.tree.leaves(outputs)
    for amount in (0.0, FAR):
        values = jax.device_get(_values_of_outputs(few, treedef.unflatten(waves(leaves, amount))))
        whole, turned, first, second = map(float, np.asarray(values[0], float))
        weights = np.asarray(values[1], float)
        mean = float(np.array([first, second]) @ weights / weights.sum()) if weights.all() else whole
        size = max(map(abs, (whole, first, second)))
        if not np.isfinite(size):
            return
        rounding = size * (unit / 2 + rounding_of_sums(jaxpr))
        by_order = abs(whole - turned)  # a mean changes by its rounding alone
        if by_order > MARGIN**2 * rounding or abs(whole - mean) > MARGIN * (rounding + by_order):
            raise DataError(
                f"kind={op.kind!r} needs a loss that is the mean over its terms: on the outputs of "
                f"{2 * half} examples it is {whole:.6g}, the mean of its values on two halves {mean:.6g}. "
                "If it is a sum, divide it by the number of examples; if its terms count otherwise (tokens, "
                "masks), give their number by weight_fn=; a loss that sets examples against each other has "
                "no such matrix: use GGNOperator on one batch."
            )
    remember(kind)


@programs.jit
def _outputs(op: Any) -> PyTree:
    with jax.default_matmul_precision(op.matmul_precision):
        return op.model_fn(op._merge(op._variables()), split(op.data)[0])


@programs.jit
def _values_of_outputs(op: Any, outputs: PyTree) -> tuple[list[jax.Array], list[jax.Array]]:
    """The loss of the outputs, of their halves in the other order, and of each half, with its weight."""
    half = batch_size(op.data, op.shared) // 2
    first, second = (examples(op, op.data, a, a + half) for a in (0, half))
    here, there = (jax.tree.map(lambda x, a=a: x[a : a + half], outputs) for a in (0, half))
    swapped = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), there, here)
    pairs = [(outputs, op.data), (swapped, joined(op, second, first)), (here, first), (there, second)]
    values = [op._output_loss(f, split(piece)[1]) for f, piece in pairs]
    return values, [op._num_terms(f, split(piece)[1], piece) for f, piece in pairs[2:]]


KINDS = ("type2", "mc", "empirical")
CHECKED_EXAMPLES = 64
"""Examples on which the loss is compared with the likelihood it is taken for."""


@operator(leaves=("params", "data", "key", "linear"))
class FisherOperator(ModelOperator):
    """The Fisher information Σ_t w_t E[∇log p(y|f_t) ∇log p(y|f_t)ᵀ] of a model's predictions.

    The loss is read as the weighted mean Σ_t w_t ℓ_t of negative log-likelihoods ℓ_t over *terms*: the
    entries of integer targets (examples, or tokens), else the examples. The kinds differ in y:

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
            or weights next to the labels; `weight_fn` then gives the number of terms of a batch. If the loss
            is a mean over more than the examples (such as the numbers of a regression target), `weight_fn`
            also sets the scale of the empirical matrix, which is quadratic in the terms. If the loss has an
            attribute `weight`, it is used where targets are classes.
        kind: "type2", "mc" or "empirical".
        key: JAX random key of the samples, for "mc". The sample of an example depends only on the key, the
            position of the batch in the stream and that of the example in the batch.
        sample_fn: function (key, outputs, targets) -> targets of one example, for "mc" with a likelihood
            other than softmax, Gaussian and Bernoulli, which are recognised from the targets.
        **options: see `DataOperator`.

    Raises:
        StructureError: "type2" for a loss whose curvature depends on the targets; "mc" for targets or a
            loss of no known likelihood.
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
        if (kind == "mc") != (key is not None):
            raise SpectraError("kind='mc' draws targets and needs key=; the other kinds draw nothing.")
        functions: dict[str, Any] = {"model_fn": model_fn, "loss_fn": loss_fn, "sample_fn": sample_fn}
        functions["count_fn"] = options.get("weight_fn")
        self._open(params, data, kind=kind, key=None, **functions, **options)
        piece = self.first_piece()
        _check_likelihood(piece)
        if kind != "type2" and options.get("check_data", True):
            require_mean_of_outputs(piece)
        if kind == "mc":
            self._set(key=key)
            if self.stream is None:
                self._set(data=_with_samples(self), key=None)

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
        scores = self._scores(outputs, targets, piece)
        axis = likelihood.class_axis(outputs, targets)
        terms = 1 if axis is None else outputs.ndim - 1
        scores, pushed = (likelihood.terms_first(x, axis) for x in (scores, push(v)))
        along = _inner(scores, pushed, terms)
        scaled = jax.tree.map(lambda s: s * along.reshape(along.shape + (1,) * (s.ndim - terms)), scores)
        return pull(likelihood.classes_back(scaled, axis))

    def _scores(self, outputs: PyTree, targets: PyTree, piece: PyTree) -> PyTree:
        """√w_t ∇ℓ_t for each term: the gradient of the mean loss, w_t ∇ℓ_t, over √w_t."""
        gradient = jax.grad(self._output_loss)(outputs, targets)
        weight = self._num_terms(outputs, targets, piece)
        if self.kind == "mc" and self.sample_fn is None:
            index, classes = likelihood.label_index(outputs, targets)
            if not classes:
                loss = self._output_loss
                second, mixed = likelihood.regression_curvature(loss, outputs, targets, index)
                bernoulli = jnp.where(mixed > 0, gradient / jnp.sqrt(jnp.where(mixed > 0, mixed, 1)), 0)
                return jnp.where(second > 0, jnp.sqrt(weight) * gradient, bernoulli)
        return jax.tree.map(lambda g: jnp.sqrt(weight).astype(g.dtype) * g, gradient)

    def _num_terms(self, outputs: PyTree, targets: PyTree, piece: PyTree) -> jax.Array:
        axis = likelihood.class_axis(outputs, targets)
        count = self.count_fn if axis is None else self.weight_fn  # a mean over numbers is one over examples
        if count is not None:
            return jnp.asarray(weigh(count, piece), float)
        first = jax.tree.leaves(outputs)[0]
        return jnp.asarray(len(first) if axis is None else first.size // first.shape[axis], float)

    def _draw(self, piece: PyTree, keys: jax.Array) -> PyTree:
        inputs, targets = split(piece)
        outputs = self.model_fn(self._merge(self._variables()), inputs)
        if self.sample_fn is not None:
            return jax.vmap(self.sample_fn)(keys, outputs, targets)
        weight = self._num_terms(outputs, targets, piece)
        return likelihood.sample(self._output_loss, keys, outputs, targets, weight)


def _inner(a: PyTree, b: PyTree, terms: int) -> jax.Array:
    """Σ a b over all axes but the first `terms`, over all leaves."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum((jnp.sum(x * y, axis=tuple(range(terms, x.ndim))) for x, y in pairs), jnp.zeros(()))


@programs.jit
def _with_samples(op: FisherOperator) -> tuple[PyTree, PyTree]:
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


def _check_likelihood(op: FisherOperator) -> None:
    """Raise where the kind does not fit the loss, as far as a few examples of concrete data show it."""
    if op.sample_fn is not None:
        return
    if op.kind == "mc":
        shapes = jax.eval_shape(lambda op: op.model_fn(op._merge(op._variables()), split(op.data)[0]), op)
        likelihood.label_index(shapes, split(op.data)[1])
    arrays = (op.params, op.data)
    if not all(isinstance(x, (jax.Array, np.ndarray)) for x in jax.tree.leaves(arrays)) or is_traced(arrays):
        return
    few = op._with(data=rows(op.data, 0, CHECKED_EXAMPLES, op.shared))
    if op.kind == "empirical":
        _check_layout(few)
        return
    error = float(_likelihood_error(few))
    if error > op.precision**0.5:
        what = {
            "type2": "its curvature depends on the targets; use GGNOperator for the curvature at the data's "
            "own targets, or kind='mc' with sample_fn=",
            "mc": "for integer targets it is not the mean softmax cross-entropy of its terms (class weights? "
            "label smoothing? another loss?); pass sample_fn=, weight_fn= if weights or masks are at work, "
            "or use GGNOperator",
        }[op.kind]
        raise StructureError(f"kind='{op.kind}' does not fit this loss: {what} (relative error {error:.1e}).")


def _check_layout(op: FisherOperator) -> None:
    inputs, targets = split(op.data)
    outputs = jax.eval_shape(lambda op: op.model_fn(op._merge(op._variables()), split(op.data)[0]), op)
    axis = likelihood.class_axis(outputs, targets)
    if axis not in (None, 1) and outputs.ndim > 2 and outputs.shape[1] == outputs.shape[-1]:
        outputs = op.model_fn(op._merge(op._variables()), inputs)
        likelihood.require_classes_last(jax.grad(op._output_loss)(outputs, targets))


@programs.jit
def _likelihood_error(op: FisherOperator) -> jax.Array:
    inputs, targets = split(op.data)
    outputs = op.model_fn(op._merge(op._variables()), inputs)
    if not likelihood.is_known(outputs, targets):
        return jnp.zeros(())
    keys = jax.random.split(jax.random.key(0), batch_size(op.data, op.shared))
    # "type2" compares curvatures at targets of any spread, also of a sum, which has no number of terms
    weight = jnp.ones(()) if op.kind == "type2" else op._num_terms(outputs, targets, op.data)
    drawn = likelihood.sample(op._output_loss, keys, outputs, targets, weight)
    if op.kind == "type2":
        u = jax.random.normal(keys[0], outputs.shape, outputs.dtype)
        own, other = (op._curvature(outputs, y, u) for y in (targets, drawn))
        error = jnp.max(jnp.abs(own - other)) / jnp.max(jnp.abs(own))
    elif likelihood.is_classification(outputs, targets):
        index, _ = likelihood.label_index(outputs, targets)
        labels = jax.tree.leaves(drawn)[index]
        expected = jax.nn.softmax(outputs) - jax.nn.one_hot(labels, outputs.shape[-1], dtype=outputs.dtype)
        gradient = weight * jax.grad(op._output_loss)(outputs, drawn)
        masked = jnp.all(gradient == 0, axis=-1, keepdims=True)
        error = jnp.max(jnp.where(masked, 0, jnp.abs(gradient - expected)))
    else:
        return jnp.zeros(())
    return jnp.where(jnp.isfinite(error), error, 0)  # a non-finite loss is reported when it is used
