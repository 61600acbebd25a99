"""PyTorch's losses in JAX, with its reductions.

`mean` divides by what PyTorch divides by: the weights of the targets that count for class indices,
the number of samples for class probabilities, the number of elements for `mse_loss` and
`bce_with_logits`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from spectra.bridge.errors import BridgeError


def _reduce(total: jax.Array, divisor: Any, reduction: str) -> jax.Array:
    if reduction == "none":
        return total
    if reduction not in ("mean", "sum"):
        raise BridgeError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    return jnp.sum(total) if reduction == "sum" else jnp.sum(total) / divisor


def cross_entropy(
    logits: jax.Array,
    targets: jax.Array,
    *,
    weight: Any = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    class_axis: int = 1,
) -> jax.Array:
    """Compute PyTorch's cross entropy, -Σ_c w_c q_c log softmax(logits)_c.

    q is the one-hot target mixed with ε/C: q = (1 - ε)·target + ε/C, ε the label smoothing.

    Args:
        logits: shape (N, C, ...) or (C,), floating.
        targets: class indices of shape (N, ...), or probabilities of the shape of `logits`.
        weight: one number a class, shape (C,).
        ignore_index: targets of this value count neither in the sum nor in the divisor.
        label_smoothing: ε in [0, 1].
        reduction: "mean", "sum" or "none".
        class_axis: the axis of C. PyTorch's is 1; -1 suits language models' (N, T, C).

    Returns:
        A scalar, or the shape of the class indices for "none". NaN if every target is ignored.
    """
    axis = 0 if logits.ndim == 1 else class_axis
    log_probs = jnp.moveaxis(jax.nn.log_softmax(logits, axis), axis, -1)
    if not 0 <= label_smoothing <= 1:
        raise BridgeError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
    if not jnp.issubdtype(targets.dtype, jnp.floating):
        return _from_indices(log_probs, targets, weight, ignore_index, label_smoothing, reduction)
    if targets.shape != logits.shape:
        raise BridgeError(
            "targets must be class indices, which are integers, or class probabilities of the shape of the "
            f"logits, {logits.shape}; got {_described(targets)}"
        )
    q = jnp.moveaxis(targets, axis, -1) * (1 - label_smoothing) + label_smoothing / log_probs.shape[-1]
    total = -jnp.sum(_class_weights(weight, log_probs) * q * log_probs, -1)
    return _reduce(total, max(total.size, 1), reduction)


def nll_loss(
    log_probs: jax.Array,
    targets: jax.Array,
    *,
    weight: Any = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    class_axis: int = 1,
) -> jax.Array:
    """Compute PyTorch's negative log likelihood, -w_y·log_probs_y; see `cross_entropy`."""
    log_probs = jnp.moveaxis(log_probs, 0 if log_probs.ndim == 1 else class_axis, -1)
    return _from_indices(log_probs, targets, weight, ignore_index, 0.0, reduction)


def _from_indices(log_probs, targets, weight, ignore_index, smoothing, reduction):
    """Cross entropy of class indices, the classes on the last axis."""
    classes = log_probs.shape[-1]
    if not jnp.issubdtype(targets.dtype, jnp.integer) or targets.shape != log_probs.shape[:-1]:
        one_hot = ": one-hot rows are probabilities, and these are floats" if targets.ndim > 1 else ""
        raise BridgeError(
            f"targets must be class indices, which are integers, of shape {log_probs.shape[:-1]}; got "
            f"{_described(targets)}{one_hot if targets.shape == log_probs.shape else ''}"
        )
    w = _class_weights(weight, log_probs)
    keep, valid = targets != ignore_index, (targets >= 0) & (targets < classes)
    safe = jnp.where(valid, targets, 0)
    total = -jnp.take_along_axis(log_probs, safe[..., None], -1)[..., 0] * w[safe]
    if smoothing:
        total = (1 - smoothing) * total - smoothing / classes * jnp.sum(w * log_probs, -1)
    # A target outside of the classes, which PyTorch refuses, gives NaN: the operators report it.
    total = jnp.where(keep, jnp.where(valid, total, jnp.nan), 0)
    return _reduce(total, jnp.sum(jnp.where(keep, w[safe], 0)), reduction)


def _class_weights(weight: Any, log_probs: jax.Array) -> jax.Array:
    if weight is None:
        return jnp.ones(log_probs.shape[-1:], log_probs.dtype)
    weight = jnp.asarray(weight, log_probs.dtype)
    if weight.shape != log_probs.shape[-1:]:
        raise BridgeError(f"class weights of shape {weight.shape}, {log_probs.shape[-1]} classes")
    return weight


def mse_loss(outputs: jax.Array, targets: jax.Array, *, reduction: str = "mean") -> jax.Array:
    """Compute the squared error, averaged over all elements. Shapes must be equal: broadcasting
    (batch,) against (batch, 1), which PyTorch only warns about, is refused."""
    return _reduce(_difference("mse_loss", outputs, targets) ** 2, max(outputs.size, 1), reduction)


def l1_loss(outputs: jax.Array, targets: jax.Array, *, reduction: str = "mean") -> jax.Array:
    """Compute the absolute error, averaged over all elements; its derivative at zero is zero."""
    return _reduce(jnp.abs(_difference("l1_loss", outputs, targets)), max(outputs.size, 1), reduction)


def smooth_l1_loss(
    outputs: jax.Array, targets: jax.Array, *, beta: float = 1.0, reduction: str = "mean"
) -> jax.Array:
    """Compute d²/2β where |d| < β and |d| - β/2 elsewhere, d = outputs - targets."""
    d = _difference("smooth_l1_loss", outputs, targets)
    size = jnp.abs(d)
    total = size if beta == 0 else jnp.where(size < beta, d * d / (2 * beta), size - beta / 2)
    return _reduce(total, max(outputs.size, 1), reduction)


def huber_loss(
    outputs: jax.Array, targets: jax.Array, *, delta: float = 1.0, reduction: str = "mean"
) -> jax.Array:
    """Compute d²/2 where |d| < δ and δ·(|d| - δ/2) elsewhere, d = outputs - targets."""
    d = _difference("huber_loss", outputs, targets)
    size = jnp.abs(d)
    total = jnp.where(size < delta, d * d / 2, delta * (size - delta / 2))
    return _reduce(total, max(outputs.size, 1), reduction)


def _difference(name: str, outputs: jax.Array, targets: jax.Array) -> jax.Array:
    _require_same_shape(name, outputs, targets)
    return outputs - targets


def _require_same_shape(name: str, outputs: jax.Array, targets: jax.Array) -> None:
    if outputs.shape != targets.shape:
        raise BridgeError(
            f"{name} needs targets of the shape of the outputs, {outputs.shape}; got {_described(targets)}"
        )


def _described(x: jax.Array) -> str:
    """The type and shape of an array: `float32[40, 3]`."""
    return f"{x.dtype}{list(x.shape)}"


def bce_with_logits(
    logits: jax.Array,
    targets: jax.Array,
    *,
    weight: Any = None,
    pos_weight: Any = None,
    reduction: str = "mean",
) -> jax.Array:
    """Compute -w·(p·y·log σ(x) + (1 - y)·log σ(-x)), averaged over all elements.

    Args:
        logits: any shape.
        targets: the same shape, in [0, 1].
        weight: w, broadcast against the shape.
        pos_weight: p, broadcast against the shape.
        reduction: "mean", "sum" or "none".
    """
    _require_same_shape("bce_with_logits", logits, targets)
    y = targets.astype(logits.dtype)
    positive = y if pos_weight is None else y * jnp.asarray(pos_weight, logits.dtype)
    total = -(positive * jax.nn.log_sigmoid(logits) + (1 - y) * jax.nn.log_sigmoid(-logits))
    total = total if weight is None else total * jnp.asarray(weight, logits.dtype)
    return _reduce(total, max(total.size, 1), reduction)
