"""What a Fisher matrix takes for granted of a loss, seen on few examples.

That is the likelihood that the kind needs, and the weights of its terms: those of a softmax cross-entropy are
read from its curvature, others have to be equal, so that the loss is a mean.
"""

# pyright: reportPrivateUsage=false
# Operators have parts that only this package uses.

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import draws, trees
from spectra.base.errors import DataError, StructureError
from spectra.base.trees import PyTree
from spectra.operators import likelihood
from spectra.operators.batches import batch_size, rows
from spectra.operators.ggn import split
from spectra.operators.term_means import once, outputs_of, require_mean_of_outputs

CHECKED_EXAMPLES = 64
"""Examples on which the loss is compared with the likelihood it is taken for."""
FITS = 0.9
"""Share of terms whose label the gradient has to point away from, to be taken for the labels."""


def look_at_loss(op: Any, check_mean: bool) -> dict[str, Any]:
    """The fields `labels` and `softmax` of a Fisher operator on one batch, found on a few of its examples.

    Raises:
        StructureError: the kind does not fit the loss, as far as concrete data show it.
        DataError: as `require_mean_of_outputs`, if that is asked for and weights cannot be read.
    """
    drawn = op.kind == "mc" and op.sample_fn is None
    outputs, targets = op._outputs_shape(), split(op.data)[1]
    if drawn:
        likelihood.require_known(outputs, targets)
    classes, numbers = likelihood.class_leaves(outputs, targets), likelihood.number_leaf(outputs, targets)
    candidates = [*classes] if numbers is None else [*classes, numbers]
    op = op._with(labels=candidates[0] if candidates else None)
    arrays = (op.params, op.data)
    concrete = all(isinstance(x, (jax.Array, np.ndarray)) for x in jax.tree.leaves(arrays))
    if not concrete or trees.is_traced(arrays):
        if op.kind != "type2" and len(candidates) > 1 and (drawn or numbers is not None):
            raise StructureError(
                f"kind={op.kind!r}: several leaves of the targets have the shape of labels, "
                f"{jax.tree.map(lambda x: f'{x.dtype}{list(x.shape)}', targets)}, and only values tell which "
                "ones are: make the operator outside of jit."
            )
        return {"labels": op.labels, "softmax": None}
    few = op._with(data=rows(op.data, 0, CHECKED_EXAMPLES, op.shared), microbatch=None)
    if len(candidates) > 1:
        shares = jax.device_get(_label_fits(few, tuple(classes.items())))
        best = int(np.argmax(shares))
        known = list(classes)[best] if shares[best] >= FITS or numbers is None else numbers
        few = few._with(labels=known)
    axis = classes.get(-1 if few.labels is None else few.labels)
    if op.kind == "type2":
        _require_alike_curvature(few)
        return {"labels": few.labels, "softmax": None}
    if axis is not None:
        _check_layout(few, outputs, axis)
    unlike = float(_softmax_error_of(few, axis)) if axis is not None else np.inf
    softmax = unlike <= op.precision**0.5
    if drawn and not softmax and np.isfinite(unlike):  # what is not finite is reported when it is used
        raise _refusal(op.kind, "classes", unlike)
    few = few._with(softmax=softmax)
    if check_mean and not softmax:
        require_mean_of_outputs(op._with(labels=few.labels, softmax=softmax))
    if drawn and not (error := float(_likelihood_error(few))) <= op.precision**0.5:
        raise _refusal(op.kind, "targets" if axis is None else "classes", error)
    return {"labels": few.labels, "softmax": softmax}


def require_examples_first(op: Any, outputs: PyTree, piece: PyTree) -> None:
    """Raise where the outputs' leaves are not those of single examples, whose scores are wanted."""
    found = {x.shape[:1] for x in jax.tree.leaves(outputs)}
    try:
        sizes = {(batch_size(piece, op.shared),)}
    except DataError:  # a batch that is not cut may have leaves of any shape
        sizes = found - {()}
    own_logits = hasattr(op.loss_fn, "gauss_newton")
    if not own_logits and len(found) == 1 and found <= sizes:
        return
    advice = "return outputs of every example along the first axis of each leaf"
    if own_logits:
        advice = "return logits, and take a loss of logits"
    raise StructureError(
        f"kind={op.kind!r} takes the gradient of every example in the model's outputs, whose shapes are "
        f"{[list(x.shape) for x in jax.tree.leaves(outputs)]}: {advice}, or use kind='type2' or GGNOperator."
    )


def _require_alike_curvature(op: Any) -> None:
    if op.sample_fn is not None or hasattr(op.loss_fn, "gauss_newton"):
        return
    error, is_flat = jax.device_get(_curvature_seen(op))
    if is_flat:
        raise StructureError(
            "kind='type2' does not fit this loss: it has a gradient in the model's outputs and no curvature, "
            "so E[∇ℓ ∇ℓᵀ] is not E[∇²ℓ]. If the model returns log-probabilities, let it return logits, and "
            "take log_softmax in loss_fn; for an absolute error or a hinge use kind='mc' with sample_fn=, or "
            "kind='empirical'."
        )
    if error > op.precision**0.5:
        raise _refusal("type2", "targets", error)


def _refusal(kind: str, terms: str, error: float) -> StructureError:
    what = {
        (
            "type2",
            "targets",
        ): "its curvature depends on the targets; use GGNOperator for the curvature at the "
        "data's own targets, or kind='mc' with sample_fn=",
        ("mc", "classes"): "for integer targets it is not the sum of softmax cross-entropies with weights "
        "that do not depend on the label (class weights? label smoothing? another loss?); pass sample_fn=, "
        "or use GGNOperator",
        ("mc", "targets"): "as a function of targets like the outputs it is neither a squared error around "
        "the outputs, entry by entry, nor a binary cross-entropy of logits; pass sample_fn=, for one-hot "
        "targets lambda key, outputs, targets: jax.nn.one_hot(jax.random.categorical(key, outputs), "
        "outputs.shape[-1]), or use GGNOperator",
    }[kind, terms]
    return StructureError(f"kind='{kind}' does not fit this loss: {what} (relative error {error:.1e}).")


def _check_layout(op: Any, outputs: jax.Array, axis: int) -> None:
    if axis != 1 and outputs.ndim > 2 and outputs.shape[1] == outputs.shape[-1]:
        likelihood.require_classes_last(_gradient(op))


def _finite(error: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(error), error, 0)  # a non-finite loss is reported when it is used


@once
def _gradient(op: Any) -> PyTree:
    return jax.grad(op._output_loss)(outputs_of(op), split(op.data)[1])


@partial(once, static_argnames="classes")
def _label_fits(op: Any, classes: tuple[tuple[int, int], ...]) -> list[jax.Array]:
    """For each leaf that may hold labels, the share of terms that point away from it."""
    gradient, leaves = _gradient(op), jax.tree.leaves(split(op.data)[1])
    return [likelihood.matching_labels(gradient, leaves[i], axis) for i, axis in classes]


def softmax_error(op: Any, outputs: jax.Array, targets: PyTree, axis: int) -> jax.Array:
    """How far the loss is from a sum of softmax cross-entropies; infinite where it cannot be told."""
    error = likelihood.softmax_error(
        lambda z, u: op._curvature(z, targets, u),
        lambda z: jax.grad(op._output_loss)(z, targets),
        outputs,
        axis,
        op.precision,
    )
    return jnp.where(jnp.isfinite(error), error, jnp.inf)


@partial(once, static_argnames="axis")
def _softmax_error_of(op: Any, axis: int) -> jax.Array:
    return softmax_error(op, outputs_of(op), split(op.data)[1], axis)


@once
def _curvature_seen(op: Any) -> tuple[jax.Array, jax.Array]:
    """How much other targets change the curvature, as a share of it; and whether there is a gradient alone.

    That is looked for at normal outputs, too: the curvature of predictions that are sure may underflow.
    """
    outputs, targets = outputs_of(op), split(op.data)[1]
    gradient = jax.grad(op._output_loss)(outputs, targets)
    u, elsewhere = (
        draws.sample(key, outputs, jax.random.normal) for key in jax.random.split(jax.random.key(0))
    )
    own = op._curvature(outputs, targets, u)
    size = trees.largest(own)
    size_elsewhere = trees.largest(op._curvature(elsewhere, targets, u))
    is_flat = (size == 0) & (size_elsewhere == 0) & (trees.largest(gradient) > 0)
    other = likelihood.other_targets(gradient, outputs, targets, op.labels)
    if other is None:
        return jnp.zeros(()), is_flat
    there = op._curvature(outputs, other, u)
    change = trees.largest(jax.tree.map(jnp.subtract, own, there))
    return _finite(change / jnp.maximum(size, trees.largest(there))), is_flat


@once
def _likelihood_error(op: Any) -> jax.Array:
    """How far the loss at drawn targets is from the law that they are drawn from."""
    outputs: Any = outputs_of(op)
    targets = split(op.data)[1]
    keys = jax.random.split(jax.random.key(0), batch_size(op.data, op.shared))
    drawn = op._redraw(keys, outputs, targets, op.data)
    axis: int | None = op._class_axis(outputs, targets)
    slope = jax.grad(op._output_loss)(outputs, targets)
    if axis is None:
        error = likelihood.regression_error(
            lambda z, u: op._curvature(z, drawn, u), op._output_loss, outputs, targets, drawn, op.labels
        )
        # No law has targets at which a loss is NaN that is a number at those of the data.
        return jnp.where(jnp.isnan(error) & trees.finite(slope), jnp.inf, _finite(error))
    z: jax.Array = likelihood.at_least_float32(outputs)
    weights = op._softmax_weights(outputs, targets, axis)
    labels = jax.tree.leaves(drawn)[op.labels]
    hot = jax.nn.one_hot(labels, z.shape[axis], axis=axis, dtype=z.dtype)
    gradient = jax.grad(op._output_loss)(z, drawn) / jnp.where(weights > 0, weights, 1)
    expected = jnp.where(weights > 0, jax.nn.softmax(z, axis) - hot, 0)
    return _finite(jnp.max(jnp.abs(gradient - expected)))
