"""The loss of a model: one of PyTorch's losses joined to its outputs and to the targets in a batch."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from spectra.bridge import _losses
from spectra.bridge._errors import BridgeError
from spectra.bridge._model import TorchModel, as_jax
from spectra.data import to_numpy

LOSSES: dict[str, Callable[..., jax.Array]] = {
    "cross_entropy": _losses.cross_entropy,
    "nll_loss": _losses.nll_loss,
    "mse_loss": _losses.mse_loss,
    "bce_with_logits": _losses.bce_with_logits,
    "binary_cross_entropy_with_logits": _losses.bce_with_logits,
}


@dataclass(frozen=True, eq=False)
class Loss:
    """A scalar loss of a model: `loss(params, batch)`, and `weight(batch)`, what it divides by.

    Made by `make_loss`; compared by identity, so one object compiles once.
    """

    model: TorchModel
    name: str
    output: str | int | None = None
    targets: str = "labels"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, params: Mapping[str, jax.Array], batch: Any) -> jax.Array:
        """Return the loss of a batch, a scalar."""
        inputs, targets = self._split(batch)
        return self.of_outputs(self.outputs(params, inputs), targets)

    def outputs(self, params: Mapping[str, jax.Array], inputs: Any) -> jax.Array:
        """Return the array that the loss takes: the `model_fn` of a Gauss-Newton or Fisher operator."""
        if isinstance(inputs, Mapping):
            result = self.model.apply(params, **inputs)
        else:
            result = self.model.apply(params, *(inputs if isinstance(inputs, (tuple, list)) else (inputs,)))
        return _pick(result, self.output)

    def of_outputs(self, outputs: jax.Array, targets: Any) -> jax.Array:
        """Return the loss of outputs: the `loss_fn` of a Gauss-Newton or Fisher operator."""
        return LOSSES[self.name](outputs, as_jax(targets), **self.options)

    def weight(self, batch: Any) -> jax.Array:
        """Return the divisor of the mean: weighting by it averages batches exactly.

        Raises:
            BridgeError: the reduction is "sum", which no weighted mean over batches gives.
        """
        if self.options.get("reduction", "mean") != "mean":
            raise BridgeError("batches are averaged, so a sum over them has no weight: use reduction='mean'")
        targets = as_jax(self._split(batch)[1])
        indices = self.name in ("cross_entropy", "nll_loss")
        if not indices or not jnp.issubdtype(targets.dtype, jnp.integer):
            classes = self._num_classes(targets) if indices else 1
            return jnp.asarray(targets.size // classes, float)
        keep = targets != self.options.get("ignore_index", -100)
        weights = self.options.get("weight")
        if weights is None:
            return jnp.sum(keep).astype(float)
        picked = jnp.asarray(weights, float)[jnp.where(keep, targets, 0)]
        return jnp.sum(jnp.where(keep, picked, 0))

    def _num_classes(self, targets: jax.Array) -> int:
        return targets.shape[0 if targets.ndim == 1 else self.options.get("class_axis", 1)]

    def _split(self, batch: Any) -> tuple[Any, Any]:
        if isinstance(batch, Mapping):
            if self.targets not in batch:
                raise BridgeError(f"the batch has no {self.targets!r}, only {sorted(batch)}")
            return {k: v for k, v in batch.items() if k != self.targets}, batch[self.targets]
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise BridgeError("a batch must be (inputs, targets) or a mapping that holds the targets")
        return batch[0], batch[1]


def _pick(outputs: Any, key: str | int | None) -> jax.Array:
    if key is None and isinstance(outputs, Mapping) and "logits" in outputs:
        key = "logits"
    if key is not None:
        try:
            outputs = outputs[key]
        except (KeyError, IndexError, TypeError):
            raise BridgeError(f"the model's output has no entry {key!r}") from None
    if not isinstance(outputs, jax.Array):
        kind = sorted(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
        raise BridgeError(f"the model returns {kind}: choose the array for the loss with output=")
    return outputs


def make_loss(
    model: TorchModel,
    name: str,
    *,
    output: str | int | None = None,
    targets: str = "labels",
    **options: Any,
) -> Loss:
    """Join a model with a loss of PyTorch's, as `loss(params, batch)` for the operators.

    Args:
        model: from `from_torch` or `load`.
        name: "cross_entropy", "nll_loss", "mse_loss" or "bce_with_logits".
        output: the entry of the model's output that the loss takes; by default the output itself,
            or its "logits".
        targets: the key of the targets, where a batch is one mapping. Other batches are pairs
            (inputs, targets), inputs being an array, a tuple or a mapping.
        **options: of the loss: `weight`, `ignore_index`, `label_smoothing`, `pos_weight`,
            `class_axis`, `reduction` ("mean" or "sum").
            Tensors are accepted.

    Returns:
        The loss. `loss.weight` gives each batch's share in an average, for `weight_fn=`;
        `loss.outputs` and `loss.of_outputs` are its two halves, for operators that know the model.

    Raises:
        BridgeError: an unknown name or option, or `reduction="none"`, which gives no scalar.

    Examples:
        >>> import jax.numpy as jnp
        >>> import spectra
        >>> import torch
        >>> model = spectra.from_torch(torch.nn.Linear(3, 2), (torch.zeros(4, 3),))
        >>> loss = spectra.bridge.make_loss(model, "cross_entropy", label_smoothing=0.1)
        >>> loss(model.params, (jnp.ones((5, 3)), jnp.zeros(5, int))).shape
        ()
    """
    if name not in LOSSES:
        raise BridgeError(f"unknown loss {name!r}: choose from {', '.join(LOSSES)}")
    known = list(inspect.signature(LOSSES[name]).parameters)[2:]
    if unknown := sorted(set(options) - set(known)):
        raise BridgeError(f"{name} has no options {unknown}, but {known}")
    if options.get("reduction", "mean") not in ("mean", "sum"):
        raise BridgeError("a loss for curvature is a scalar: reduction must be 'mean' or 'sum'")
    options = {k: to_numpy(v) if hasattr(v, "__array__") else v for k, v in options.items()}
    return Loss(model, name, output, targets, options)
