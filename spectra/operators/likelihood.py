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

from spectra._errors import StructureError

PyTree = Any


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
        "which distribution the targets have cannot be seen: outputs and targets are "
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


def term_axes(outputs: PyTree, targets: PyTree) -> int:
    """How many leading axes of the outputs count the terms of the loss."""
    return outputs.ndim - 1 if is_classification(outputs, targets) else 1


def replace_labels(targets: PyTree, index: int, labels: jax.Array) -> PyTree:
    """`targets` with other labels; masks and weights beside them stay."""
    leaves, treedef = jax.tree.flatten(targets)
    leaves[index] = labels.astype(leaves[index].dtype)
    return treedef.unflatten(leaves)


def regression_curvature(loss: Callable, outputs: jax.Array, targets: PyTree, index: int) -> tuple:
    """Diagonals of ∂²L/∂y² and of -∂²L/∂f∂y for a loss that couples no two numbers."""
    labels = jax.tree.leaves(targets)[index].astype(outputs.dtype)

    def value(f, y):
        return loss(f, replace_labels(targets, index, y))

    ones = jnp.ones_like(labels)
    second = jax.jvp(lambda y: jax.grad(value, 1)(outputs, y), (labels,), (ones,))[1]
    mixed = jax.jvp(lambda y: jax.grad(value, 0)(outputs, y), (labels,), (ones,))[1]
    return second, -mixed


def sample(loss: Callable, keys: jax.Array, outputs: jax.Array, targets: PyTree, weight) -> PyTree:
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
