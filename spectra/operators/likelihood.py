"""Targets drawn from the distribution that a loss and the model's outputs define.

A loss L = Σ_t w_t ℓ_t is a weighted mean over terms t, with ℓ_t = -log p(y_t | f_t) up to a constant:

* integer targets of shape (...), outputs (..., C): each target is a term and p is softmax(f_t). Weights w_t
  are read from the loss, zeros included: masks, ignored labels, class weights.
* targets of the shape of the outputs, loss quadratic in them: each example is a term, p is Gaussian with
  mean f and the variance that the loss's own curvature in y gives.
* targets of the shape of the outputs, loss linear in them: each number is a term, p is Bernoulli with
  probability sigmoid(f) (binary cross-entropy with logits).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from spectra.base import trees
from spectra.base.errors import StructureError
from spectra.base.trees import PyTree

Curvature = Callable[[jax.Array, jax.Array], jax.Array]
"""(outputs, u) -> (∇²ℓ) u at the outputs."""


def class_leaves(outputs: PyTree, targets: PyTree) -> dict[int, int]:
    """The leaves of `targets` that may hold classes, with the axis of the outputs that counts these.

    That is the last, or the second as in PyTorch's layout. Booleans are labels of two classes where there are
    no integers, and no numbers like the outputs that they could be the mask of.
    """
    if not hasattr(outputs, "shape") or outputs.ndim == 0:
        return {}
    axes = {outputs.shape[:1] + outputs.shape[2:]: 1} if outputs.ndim > 2 else {}
    axes[outputs.shape[:-1]] = outputs.ndim - 1
    leaves = list(enumerate(jax.tree.leaves(targets)))

    def found(kind: Any) -> dict[int, int]:
        return {i: axes[x.shape] for i, x in leaves if x.shape in axes and jnp.issubdtype(x.dtype, kind)}

    masks = {} if number_leaf(outputs, targets) is not None else found(jnp.bool_)
    return found(jnp.integer) or {i: axis for i, axis in masks.items() if outputs.shape[axis] == 2}


def number_leaf(outputs: PyTree, targets: PyTree) -> int | None:
    """The first leaf of `targets` with a floating number for each of the outputs."""
    shape = getattr(outputs, "shape", None)
    leaves = enumerate(jax.tree.leaves(targets))
    return next((i for i, x in leaves if x.shape == shape and jnp.issubdtype(x.dtype, jnp.floating)), None)


def require_known(outputs: PyTree, targets: PyTree) -> None:
    """Raise unless the shapes of the targets say how they are distributed."""
    if class_leaves(outputs, targets) or number_leaf(outputs, targets) is not None:
        return
    shapes = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", (outputs, targets))
    raise StructureError(
        "the distribution of the targets cannot be recognised: outputs and targets are "
        f"{shapes[0]} and {shapes[1]}. Known are integer classes of shape outputs.shape[:-1] and floats "
        "of the outputs' shape; for others pass sample_fn(key, outputs, targets) -> targets."
    )


def class_axis(outputs: PyTree, targets: PyTree) -> int | None:
    """The axis of the outputs that counts classes, as far as shapes tell; None for other targets."""
    axes = class_leaves(outputs, targets).values()
    return max(axes, default=None)


def matching_labels(gradient: jax.Array, labels: jax.Array, axis: int) -> jax.Array:
    """The share of terms whose label a gradient in the outputs points away from, among those that count.

    That of a softmax cross-entropy is negative for the label alone.
    """
    counts = jnp.any(gradient != 0, axis)
    right = (jnp.argmin(gradient, axis) == labels) & counts
    return jnp.sum(right) / jnp.maximum(jnp.sum(counts), 1)


def softmax_weights(curvature: Curvature, outputs: jax.Array, axis: int) -> jax.Array:
    """The weight of each term in a sum of softmax cross-entropies, read from its curvature.

    It is read where two classes have half of the probability each, which is w/4 for one of them: any number
    of classes, and predictions however sure, leave it far from the rounding.
    """
    x = at_least_float32(outputs)
    place = jnp.arange(x.shape[axis]).reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    even, unit = (jnp.broadcast_to(y, x.shape).astype(x.dtype) for y in (-60 * (place > 1), place == 0))
    return jnp.maximum(4 * jnp.sum(unit * curvature(even, unit), axis, keepdims=True), 0)


def softmax_error(
    curvature: Curvature,
    gradient: Callable[[jax.Array], jax.Array],
    outputs: jax.Array,
    axis: int,
    precision: float,
) -> jax.Array:
    """How far the curvature of a loss is from w (diag p - p pᵀ) for each term, as a share of the largest.

    At the outputs, and at normal ones: predictions that are sure leave little to compare, or the rounding of
    p (u - p · u) alone, by the eps of the type or the `precision` of the loss. That counts nowhere.
    """
    x = at_least_float32(outputs)
    weights = softmax_weights(curvature, x, axis)
    keys = jax.random.split(jax.random.key(0))
    u, other = (jax.random.normal(key, x.shape, x.dtype) for key in keys)
    eps, most = float(jnp.finfo(x.dtype).eps), jnp.max(weights)
    lost = 8 * max(eps, precision) * most * jnp.max(jnp.abs(u))

    def error(logits: jax.Array, rounding: jax.Array | float) -> jax.Array:
        p, own = jax.nn.softmax(logits, axis), curvature(logits, u)
        difference = jnp.max(jnp.abs(own - weights * p * (u - jnp.sum(p * u, axis, keepdims=True))))
        difference = jnp.maximum(difference - rounding, 0)
        return jnp.where(difference > 0, difference / jnp.maximum(jnp.max(jnp.abs(own)), 8 * eps * most), 0)

    uncurved = jnp.any((weights == 0) & (gradient(x) != 0))  # such a term has a gradient all the same
    return jnp.where(uncurved, jnp.inf, jnp.maximum(error(x, lost), error(other, 0.0)))


def sum_to_zero(gradient: jax.Array, weights: jax.Array, labels: jax.Array, axis: int) -> jax.Array:
    """The gradient of a softmax cross-entropy, with the label's entry from those of the other classes.

    w (p_y - 1) of a prediction that is sure has no digits left, and is zero from p_y = 1 - eps on; minus the
    sum of the others, w p_j, has them all. Where these sums are further from zero than the rounding of p_y,
    as with an L1 penalty on the outputs, the gradient stays as it is.
    """
    own = jax.nn.one_hot(labels.astype(int), gradient.shape[axis], axis=axis) > 0
    total, others = (jnp.sum(x, axis, keepdims=True) for x in (gradient, jnp.where(own, 0, gradient)))
    size = weights + jnp.sum(jnp.abs(gradient), axis, keepdims=True)
    fits = jnp.abs(total) <= 4 * jnp.finfo(gradient.dtype).eps * size
    return jnp.where(own & fits, -others, gradient)


def at_least_float32(x: jax.Array) -> jax.Array:
    """Outputs in which weights of single terms, 1 / N, and small probabilities do not vanish."""
    return x.astype(trees.working_dtype(x.dtype))


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
    loss: Callable[..., Any], keys: jax.Array, outputs: jax.Array, targets: PyTree, index: int, weight: Any
) -> PyTree:
    """Targets drawn at the outputs, with one key an example: the same however the data are cut.

    `index` is the leaf of the labels. `weight` is 1 / w_t, the number of terms that the loss is a mean over,
    for regression, and for classes the weight of each term: labels of terms that do not count stay as they
    are, since they may say so. Numbers are drawn in float32 at least: of 2⁸, rare ones would be too many.
    """
    axis = class_leaves(outputs, targets).get(index)
    working = at_least_float32(outputs)
    if axis is not None:
        own = jax.tree.leaves(targets)[index]
        drawn = jax.vmap(jax.random.categorical)(keys, terms_first(working, axis))
        return replace_labels(targets, index, jnp.where(jnp.squeeze(weight > 0, axis), drawn, own))
    curvature, mixed = regression_curvature(loss, working, targets, index)
    precision = jnp.where(curvature > 0, weight * curvature, 1)
    noise = jax.vmap(lambda k, f: jax.random.normal(k, f.shape, f.dtype))(keys, working)
    uniform = jax.vmap(lambda k, f: jax.random.uniform(k, f.shape, f.dtype))(keys, working)
    coin = (uniform < jax.nn.sigmoid(working)).astype(working.dtype)
    own = jax.tree.leaves(targets)[index].astype(working.dtype)
    other = jnp.where(mixed > 0, coin, own)
    return replace_labels(
        targets, index, jnp.where(curvature > 0, working + noise / jnp.sqrt(precision), other)
    )


def regression_error(
    curvature: Curvature,
    loss: Callable[..., Any],
    outputs: jax.Array,
    targets: PyTree,
    drawn: PyTree,
    index: int,
) -> jax.Array:
    """How far a loss is from the normal or the Bernoulli law that it is taken for, as a share of its size.

    Scores of a law have mean zero, and the variance that the loss's curvature is; `curvature` is that at the
    targets `drawn`.
    """
    f = at_least_float32(outputs)
    y = jax.tree.leaves(targets)[index].astype(f.dtype)
    second, mixed = regression_curvature(loss, f, targets, index)
    normal, coin, p = second > 0, (second <= 0) & (mixed > 0), jax.nn.sigmoid(f)
    means = jnp.where(normal, f, jnp.where(coin, p, y))
    of_coin = jnp.where(coin, mixed * p * (1 - p), 0)
    variance = jnp.where(normal, mixed**2 / jnp.where(normal, second, 1), of_coin)

    def slope(y: PyTree) -> jax.Array:
        return jnp.abs(jax.grad(loss)(f, y))

    u = jax.random.normal(jax.random.key(0), f.shape, f.dtype)
    own = curvature(f, u)
    scale = jnp.max(jnp.where(coin, mixed, 0))
    sizes = jnp.maximum(jnp.max(slope(drawn)), scale), jnp.maximum(jnp.max(jnp.abs(own)), scale / 64)
    errors = jnp.max(slope(replace_labels(targets, index, means))), jnp.max(jnp.abs(own - variance * u))
    shares = [jnp.where(e == 0, 0, e / jnp.where(s == 0, 1, s)) for e, s in zip(errors, sizes, strict=True)]
    return jnp.maximum(*shares)


def other_targets(gradient: PyTree, outputs: PyTree, targets: PyTree, index: int | None) -> PyTree | None:
    """Targets of other examples and other classes, of the same kind; None where no leaf is known.

    What has no gradient stays, and goes nowhere else: it may say that a term does not count. A single leaf is
    known whatever its form, as of a model that returns a mean and a variance; one of several may be a weight.
    """
    leaves, classes = jax.tree.leaves(targets), class_leaves(outputs, targets)
    if index is None:
        alike = [i for i, x in enumerate(leaves) if x.shape == getattr(outputs, "shape", None)]
        index = alike[0] if len(alike) == 1 else None
    if index is None:
        examples = {x.shape[:1] for x in (*jax.tree.leaves(outputs), *leaves)}
        return _of_other_examples(gradient, targets) if len(leaves) == len(examples) == 1 else None
    y, axis = leaves[index], classes.get(index)
    if axis is not None:
        counts = jnp.any(gradient != 0, axis)
        return replace_labels(targets, index, jnp.where(counts, (y.astype(int) + 1) % outputs.shape[axis], y))
    rows = y.reshape(-1, y.shape[-1]) if y.ndim > 1 else y.reshape(-1, 1)  # one-hot ones stay such
    counts = gradient.reshape(rows.shape) != 0
    alike = jnp.all(counts == jnp.roll(counts, 1, 0), 1, keepdims=True)
    moved = jnp.where(alike, jnp.roll(rows, 1, 0), rows)
    return replace_labels(targets, index, moved.reshape(y.shape))


def _of_other_examples(gradient: PyTree, targets: PyTree) -> PyTree | None:
    """The single leaf of the targets with its rows moved by one, where both examples count."""
    y = jax.tree.leaves(targets)[0]
    if y.ndim == 0:
        return None
    rows = [jnp.any(g.reshape(len(y), -1) != 0, 1) for g in jax.tree.leaves(gradient)]
    counts = jnp.any(jnp.stack(rows), 0)
    both = (counts & jnp.roll(counts, 1)).reshape(-1, *[1] * (y.ndim - 1))
    return replace_labels(targets, 0, jnp.where(both, jnp.roll(y, 1, 0), y))
