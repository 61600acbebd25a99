"""Targets drawn from the distribution that a loss and the model's outputs define.

A loss L = Σ_t w_t ℓ_t is a weighted mean over terms t, with ℓ_t = -log p(y_t | f_t) up to a constant:

* integer targets of shape (...), outputs (..., C): each target is a term and p is softmax(f_t).
* targets of the shape of the outputs, loss quadratic in them: each example is a term, p is Gaussian with
  mean f and the variance that the loss's own curvature in y gives.
* targets of the shape of the outputs, loss linear in them: each number is a term, p is Bernoulli with
  probability sigmoid(f) (binary cross-entropy with logits).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from spectra.base.errors import StructureError
from spectra.base.trees import PyTree


def label_index(outputs: PyTree, targets: PyTree) -> tuple[int, bool]:
    """Which leaf of `targets` holds the labels, and whether they are classes."""
    if hasattr(outputs, "shape"):
        leaves = jax.tree.leaves(targets)
        for index, leaf in enumerate(leaves):
            if jnp.issubdtype(leaf.dtype, jnp.integer) and leaf.shape == outputs.shape[:-1]:
                return index, True
        for index, leaf in enumerate(leaves):
            if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.shape == outputs.shape:
                return index, False
    shapes = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", (outputs, targets))
    raise StructureError(
        "the distribution of the targets cannot be recognised: outputs and targets are "
        f"{shapes[0]} and {shapes[1]}. Known are integer classes of shape outputs.shape[:-1] and floats "
        "of the outputs' shape; for others pass sample_fn(key, outputs, targets) -> targets."
    )


def is_known(outputs: PyTree, targets: PyTree) -> bool:
    """Whether `label_index` recognises the targets."""
    try:
        label_index(outputs, targets)
    except StructureError:
        return False
    return True


def is_classification(outputs: PyTree, targets: PyTree) -> bool:
    """Whether the terms of the loss are the entries of integer targets."""
    return is_known(outputs, targets) and label_index(outputs, targets)[1]


def class_axis(outputs: PyTree, targets: PyTree) -> int | None:
    """The axis of the outputs that counts classes: the last, or the second as in PyTorch's layout."""
    if not hasattr(outputs, "shape") or outputs.ndim == 0:
        return None
    shapes = [x.shape for x in jax.tree.leaves(targets) if jnp.issubdtype(x.dtype, jnp.integer)]
    if outputs.shape[:-1] in shapes:
        return outputs.ndim - 1
    return 1 if outputs.ndim > 2 and outputs.shape[:1] + outputs.shape[2:] in shapes else None


def terms_first(tree: PyTree, axis: int | None) -> PyTree:
    """Arrays in the shape of the outputs, with the axis of the classes, if there is one, as the last."""
    return tree if axis is None else jax.tree.map(lambda x: jnp.moveaxis(x, axis, -1), tree)


def classes_back(tree: PyTree, axis: int | None) -> PyTree:
    """The inverse of `terms_first`."""
    return tree if axis is None else jax.tree.map(lambda x: jnp.moveaxis(x, -1, axis), tree)


def require_classes_last(gradient: jax.Array) -> None:
    """Raise if the last axis was taken for that of the classes, and the gradient says that the second is.

    The scores of a softmax sum to zero over the classes. Shapes alone do not tell where there are as many
    classes as tokens.
    """
    size, last, second = (float(jnp.max(jnp.abs(x))) for x in (gradient, gradient.sum(-1), gradient.sum(1)))
    if second <= 1e-3 * size < last:
        raise StructureError(
            f"outputs of shape {list(gradient.shape)} have their classes along axis 1, as in PyTorch, and as "
            "many of them as the last axis has entries, so the shapes are ambiguous: move the classes to "
            "the last axis, jnp.moveaxis(outputs, 1, -1), in the model and in the loss."
        )


def replace_labels(targets: PyTree, index: int, labels: jax.Array) -> PyTree:
    """`targets` with other labels; masks and weights beside them stay."""
    leaves, treedef = jax.tree.flatten(targets)
    leaves[index] = labels.astype(leaves[index].dtype)
    return treedef.unflatten(leaves)


def regression_curvature(
    loss: Callable[..., Any], outputs: jax.Array, targets: PyTree, index: int
) -> tuple[Any, ...]:
    """Diagonals of ∂²L/∂y² and of -∂²L/∂f∂y for a loss that couples no two numbers."""
    labels = jax.tree.leaves(targets)[index].astype(outputs.dtype)

    def value(f: jax.Array, y: jax.Array) -> jax.Array:
        return loss(f, replace_labels(targets, index, y))

    ones = jnp.ones_like(labels)
    second = jax.jvp(lambda y: jax.grad(value, 1)(outputs, y), (labels,), (ones,))[1]
    mixed = jax.jvp(lambda y: jax.grad(value, 0)(outputs, y), (labels,), (ones,))[1]
    return second, -mixed


def sample(
    loss: Callable[..., Any], keys: jax.Array, outputs: jax.Array, targets: PyTree, weight: Any
) -> PyTree:
    """Targets drawn at the outputs, with one key an example: the same however the data are cut.

    `weight` is 1 / w_t, the number of terms that the loss is a mean over.
    """
    index, classes = label_index(outputs, targets)
    if classes:
        return replace_labels(targets, index, jax.vmap(jax.random.categorical)(keys, outputs))
    curvature, _ = regression_curvature(loss, outputs, targets, index)
    precision = jnp.where(curvature > 0, weight * curvature, 1)
    noise = jax.vmap(lambda k, f: jax.random.normal(k, f.shape, f.dtype))(keys, outputs)
    uniform = jax.vmap(lambda k, f: jax.random.uniform(k, f.shape, f.dtype))(keys, outputs)
    coin = (uniform < jax.nn.sigmoid(outputs)).astype(outputs.dtype)
    labels = jnp.where(curvature > 0, outputs + noise / jnp.sqrt(precision), coin)
    return replace_labels(targets, index, labels)
