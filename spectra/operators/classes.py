"""The parts of a Gauss-Newton matrix of a softmax: class means, what lies across them, and what lies within.

With probabilities p_i of example i, diag(p_i) - p_i p_iᵀ = Σ_c' p_ic' (e_c' - p_i)(e_c' - p_i)ᵀ, so that the
matrix is Σ w g gᵀ over examples and all classes c', with g_ic' = J_iᵀ(e_c' - p_i), the gradient as if c' were
the label, up to sign, and w_ic' = p_ic' / N.
"""

# pyright: reportPrivateUsage=false
# Operators have parts that only this package uses.

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spectra.base import arrays, host, programs, trees
from spectra.base.calls import automatic
from spectra.base.errors import DataError, MemoryLimitError, StructureError
from spectra.base.trees import PyTree
from spectra.operators.accumulate import weighted_sum
from spectra.operators.base import LinearOperator
from spectra.operators.ggn import GGNOperator, ModelFn, ModelOperator, OutputLossFn, split
from spectra.operators.pytree import operator
from spectra.results import format_bytes

AGREE = 1e-3
"""Relative difference allowed between the curvature of the loss and that of softmax cross-entropy."""


@operator(leaves=("params", "data", "linear", "captured"))
class _Terms(ModelOperator):
    """Σ w g gᵀ over the terms of the example's own class, or over those of all others."""

    model_fn: ModelFn
    loss_fn: OutputLossFn
    own: bool

    def _piece_product(self, variables: PyTree, piece: PyTree, v: PyTree) -> PyTree:
        inputs, targets = split(piece)
        outputs, push, pull = self._jacobian(variables, inputs)
        p, labels = jax.nn.softmax(outputs), labels_of(targets, outputs)
        u = push(v)
        toward = jax.nn.one_hot(labels, p.shape[-1], dtype=p.dtype) - p
        weight = jnp.take_along_axis(p, labels[..., None], -1) / labels.size
        own = weight * toward * jnp.sum(toward * u, axis=-1, keepdims=True)
        if self.own:
            return pull(own)
        whole = p * (u - jnp.sum(p * u, axis=-1, keepdims=True)) / labels.size
        return pull(whole - own)


@operator(leaves=("rows",))
class OuterOperator(LinearOperator):
    """Σ r rᵀ over the rows r of a stack of vectors."""

    rows: PyTree  # leaves (k, *leaf.shape)

    @property
    def like(self) -> PyTree:
        """The shapes of one row."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), self.rows)

    def mv(self, v: PyTree) -> PyTree:
        """One inner product with each row, and their combination."""
        along = jax.vmap(lambda row: trees.vdot(row, v))(self.rows)
        return jax.tree.map(
            lambda x: jnp.tensordot(along.astype(x.dtype), x, 1, precision=lax.Precision.HIGHEST), self.rows
        )


class ClassMeans(NamedTuple):
    """Means of the gradients over the examples of a class."""

    weights: np.ndarray  # (C, C): w_cc' = Σ p_ic' / N over the examples i of class c
    means: PyTree  # leaves (C, C, *leaf.shape): Σ p_ic' g_ic' / (N w_cc'), 0 where there is no weight


def labels_of(targets: PyTree, outputs: jax.Array) -> jax.Array:
    """Labels as integers, of one-hot targets too."""
    targets = jnp.asarray(targets)
    if jnp.issubdtype(targets.dtype, jnp.integer) and targets.shape == outputs.shape[:-1]:
        return targets
    if targets.shape == outputs.shape:
        return jnp.argmax(targets, axis=-1)
    raise StructureError(
        f"targets of shape {targets.shape} and dtype {targets.dtype} for outputs of shape {outputs.shape}: a "
        "split by classes needs integer labels, or one-hot rows."
    )


@automatic
def class_operators(op: GGNOperator) -> dict[str, LinearOperator]:
    """Make the four operators whose sum is the Gauss-Newton matrix of a softmax cross-entropy.

    With g_ic' = J_iᵀ(e_c' - p_i) and weights p_ic' / N, means g_cc' over the examples of class c, their
    weights w_cc', and g_c the mean of g_cc' over c' ≠ c with weight w_c:

        class_means  Σ_c w_c g_c g_cᵀ
        cross        Σ_c Σ_{c' ≠ c} w_cc' (g_cc' - g_c)(g_cc' - g_c)ᵀ
        within       Σ_i Σ_{c' ≠ y_i} (p_ic' / N) (g_ic' - g_{y_i c'})(...)ᵀ
        same         Σ_i (p_iy / N) g_iy g_iyᵀ, y the example's own class

    Args:
        op: `GGNOperator` of `loss_fn(logits, labels)`, the mean softmax cross-entropy; labels are integers or
            one-hot rows, of shape `logits.shape[:-1]` or `logits.shape`.

    Returns:
        {"class_means", "cross", "within", "same"}: operators of the same structure.

    Raises:
        StructureError: `op` is not a `GGNOperator`, its outputs are not one array, or its targets are not
            labels.
        DataError: the curvature of the loss is not that of a mean softmax cross-entropy, or labels are not
            those of its classes.
        MemoryLimitError: the C² mean gradients do not fit in half of the free memory.

    Cost: C² gradients over all data, for C classes, and C² vectors of memory; a product with `within` is one
    of `op` and C (C - 1) inner products.

    References:
        Papyan, arXiv:1901.08244.

    Examples:
        See `class_split`.
    """
    return parts_of(op, class_means(op))


def parts_of(op: GGNOperator, means: ClassMeans) -> dict[str, Any]:
    """The operators, from the means."""
    classes = len(means.weights)
    away = ~np.eye(classes, dtype=bool)
    weights = np.where(away, means.weights, 0)
    total = weights.sum(axis=1)
    shares = weights / np.where(total > 0, total, 1)[:, None]

    def center(x: jax.Array) -> jax.Array:
        return arrays.einsum("ij,ij...->i...", jnp.asarray(shares, x.dtype), x)

    centers = jax.tree.map(center, means.means)
    i, j = np.nonzero(away)

    def weighted(x: jax.Array, w: np.ndarray) -> jax.Array:
        return jnp.asarray(np.sqrt(w), x.dtype).reshape(-1, *[1] * (x.ndim - 1)) * x

    rows = jax.tree.map(lambda x: weighted(x[i, j], weights[i, j]), means.means)
    across = jax.tree.map(lambda x, c: weighted(x[i, j] - c[i], weights[i, j]), means.means, centers)
    base = vars(op._with())
    others, own = (_make(base | {"own": own}) for own in (False, True))
    within = others - OuterOperator(rows)
    if _are_single(op, means):  # each term is its own mean: what is left of the difference is rounding
        within = OuterOperator(jax.tree.map(lambda x: jnp.zeros((1, *x.shape[1:]), x.dtype), rows))
    return {
        "class_means": OuterOperator(jax.tree.map(lambda x: weighted(x, total), centers)),
        "cross": OuterOperator(across),
        "within": within,
        "same": own,
    }


def _are_single(op: GGNOperator, means: ClassMeans) -> bool:
    """Whether no class has more than one label."""
    shares = means.weights.sum(axis=1)
    present = int(np.sum(shares > 0))
    if not np.allclose(shares[shares > 0], 1 / present):
        return False
    pieces = [op] if op.stream is None else (piece for _, piece in op._pieces())
    labels = 0
    for piece in pieces:
        targets = jnp.asarray(split(piece.data)[1])
        labels += targets.size if jnp.issubdtype(targets.dtype, jnp.integer) else targets.size // len(shares)
        if labels > present:
            return False
    return labels == present


def _make(fields: dict[str, Any]) -> _Terms:
    op = object.__new__(_Terms)
    op._set(**fields)
    return op


def require_split(op: Any) -> None:
    """Raise a StructureError for what can't be split by classes."""
    if not isinstance(op, GGNOperator):
        raise StructureError(f"op is a {type(op).__name__}: pass the GGNOperator of a softmax cross-entropy.")


def class_means(op: GGNOperator) -> ClassMeans:
    """Means of the gradients as if each class were the label, by true class."""
    require_split(op)
    trees.require_values("class_operators", (op.params, op.data))
    classes = _check(op)
    needed, free = 3 * classes**2 * trees.tree_bytes(op.structure), host.available_bytes()
    if free is not None and needed > free // 2:
        raise MemoryLimitError(
            f"the mean gradients of {classes}² pairs of classes need {format_bytes(needed)}, more than half "
            f"of the {format_bytes(free)} that are free: take op.block(...), a layer."
        )
    if op.stream is None:
        outside, weights, sums = _moments(op, classes)
    else:
        outside, weights, sums = weighted_sum(lambda piece: _moments(piece, classes), op._pieces())
    if float(outside) > 0:
        raise DataError(
            f"{100 * float(outside):.3g} % of the labels are not between 0 and {classes - 1}: a split by "
            "classes needs one for each example."
        )
    weights = np.asarray(weights, float)
    inverse = np.divide(1, weights, where=weights > 0, out=np.zeros_like(weights))

    def divide(x: jax.Array) -> jax.Array:
        return x * jnp.asarray(inverse, x.dtype).reshape(classes, classes, *[1] * (x.ndim - 2))

    return ClassMeans(weights, jax.tree.map(divide, sums))


@partial(programs.jit, static_argnames="classes")
def _moments(op: GGNOperator, classes: int) -> tuple[jax.Array, jax.Array, PyTree]:
    """The share of labels of no class, and Σ p_ic' / N and Σ p_ic' g_ic' / N over each class c."""
    variables = op._variables()

    def of_piece(piece: PyTree) -> Any:
        inputs, targets = split(piece)
        outputs, _, pull = op._jacobian(variables, inputs)
        p, labels = jax.nn.softmax(outputs), labels_of(targets, outputs)

        def pair(c: jax.Array, other: jax.Array) -> Any:
            share = jnp.where(labels == c, p[..., other], 0) / labels.size
            toward = jax.nn.one_hot(other, classes, dtype=p.dtype) - p
            return jnp.sum(share), pull(share[..., None] * toward)

        others = jnp.arange(classes)
        outside = jnp.mean((labels < 0) | (labels >= classes), dtype=p.dtype)
        return outside, *lax.map(lambda c: jax.vmap(pair, (None, 0))(c, others), others)

    return op._mean(of_piece)


def _check(op: GGNOperator) -> int:
    """The number of classes of a loss that is the mean softmax cross-entropy."""
    piece = op.first_piece()
    outputs, here, wanted = jax.device_get(_curvatures(piece))
    size = max(np.abs(wanted).max(), np.abs(here).max())
    rounding = (
        8 * piece.loss_precision * outputs / wanted.size
    )  # of p - p², at most: saturated p have no more
    if not np.allclose(here, wanted, rtol=0, atol=AGREE * size + rounding):
        raise DataError(
            "the curvature of loss_fn in the outputs is not (diag(p) - p pᵀ) / N: the split by classes is "
            "that of the mean softmax cross-entropy over all labels, without class weights or ignored labels."
        )
    return int(outputs)


@programs.jit
def _curvatures(op: GGNOperator) -> tuple[int, PyTree, jax.Array]:
    """Classes, and the curvature of the loss and that of a softmax along one direction."""
    inputs, targets = split(op.data)
    outputs = op.model_fn(op._merge(op._variables()), inputs)
    if not isinstance(outputs, jax.Array) or outputs.ndim < 2:
        raise StructureError("the outputs of the model are not one array of logits (..., classes).")
    labels_of(targets, outputs)
    u = jnp.cos(jnp.arange(outputs.size, dtype=outputs.dtype)).reshape(outputs.shape)
    p = jax.nn.softmax(outputs)
    count = outputs.size // outputs.shape[-1]
    wanted = p * (u - jnp.sum(p * u, -1, keepdims=True)) / count
    return outputs.shape[-1], op._curvature(outputs, targets, u), wanted
