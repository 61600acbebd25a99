"""The loss of a model: one of PyTorch's losses joined to its outputs and to the targets in a batch."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import jax
import jax.numpy as jnp

from spectra.bridge import losses
from spectra.bridge.errors import BridgeError
from spectra.bridge.model import TorchModel, as_jax
from spectra.operators.batches import batch_size, to_numpy

LOSSES: dict[str, Callable[..., jax.Array]] = {
    "cross_entropy": losses.cross_entropy,
    "nll_loss": losses.nll_loss,
    "mse_loss": losses.mse_loss,
    "l1_loss": losses.l1_loss,
    "smooth_l1_loss": losses.smooth_l1_loss,
    "huber_loss": losses.huber_loss,
    "bce_with_logits": losses.bce_with_logits,
    "binary_cross_entropy_with_logits": losses.bce_with_logits,
}
# PyTorch's loss modules, by the function that each calls.
MODULES = {
    "CrossEntropyLoss": "cross_entropy",
    "NLLLoss": "nll_loss",
    "NLLLoss2d": "nll_loss",
    "MSELoss": "mse_loss",
    "L1Loss": "l1_loss",
    "SmoothL1Loss": "smooth_l1_loss",
    "HuberLoss": "huber_loss",
    "BCEWithLogitsLoss": "bce_with_logits",
}


@dataclass(frozen=True, eq=False)
class Loss:
    """A scalar loss of a model: `loss(params, batch)`, and `weight(batch)`, what it divides by.

    Made by `make_loss`; compared by identity, so one object compiles once. The name is None where the
    model's own output is the loss.
    """

    model: TorchModel
    name: str | None
    output: str | int | None = None
    targets: str = "labels"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, params: Mapping[str, jax.Array], batch: Any) -> jax.Array:
        """Return the loss of a batch, a scalar."""
        inputs, targets = self._split(batch)
        return self.of_outputs(self.outputs(params, inputs), targets)

    def outputs(self, params: Mapping[str, jax.Array], inputs: Any) -> jax.Array:
        """Return the array that the loss takes: the `model_fn` of a Gauss-Newton or Fisher operator."""
        args, kwargs = self._arguments(inputs)
        taken = len(self.model.graph.input_tree["items"][0]["items"])
        if self.name is None and len(args) > max(taken, 1):
            raise BridgeError(
                f"a loss without a name is the model's own output, and the model takes {taken} of the "
                f"{len(args)} arrays in the batch: name a loss, as in make_loss(model, 'cross_entropy')"
            )
        default = "loss" if self.name is None else "logits"
        return _pick(self.model.apply(params, *args, **kwargs), self.output, default)

    def of_outputs(self, outputs: jax.Array, targets: Any) -> jax.Array:
        """Return the loss of outputs: the `loss_fn` of a Gauss-Newton or Fisher operator."""
        if self.name is None:
            if outputs.size != 1:
                raise BridgeError(
                    f"the model's output has shape {outputs.shape}, and a loss is one number: choose the "
                    "loss among several outputs with output=, or name one of PyTorch's losses"
                )
            return outputs.reshape(())
        return LOSSES[self.name](outputs, as_jax(targets), **self.options)

    def weight(self, batch: Any) -> jax.Array:
        """Return the divisor of the mean: weighting by it averages batches exactly.

        For a loss inside the model, whose divisor is not known, this is the number of examples. NaN where
        `label_smoothing` meets a batch of which all classes have weight 0: PyTorch divides by zero there.

        Raises:
            BridgeError: the reduction is "sum", which is not a weighted mean over batches.
        """
        if self.options.get("reduction", "mean") != "mean":
            raise BridgeError("batches are averaged, so a sum over them has no weight: use reduction='mean'")
        if self.name is None:
            return jnp.asarray(batch_size(batch), float)
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
        total = jnp.sum(jnp.where(keep, picked, 0))
        # Smoothing gives targets of weight 0 a loss; of these alone there is no mean that others could join.
        lost = (total == 0) & jnp.any(keep) & (self.options.get("label_smoothing", 0) > 0)
        return jnp.where(lost, jnp.nan, total)

    def _num_classes(self, targets: jax.Array) -> int:
        return targets.shape[0 if targets.ndim == 1 else self.options.get("class_axis", 1)]

    def _split(self, batch: Any) -> tuple[Any, Any]:
        """Separate inputs and targets; where the model has the loss in it, all are inputs."""
        if self.name is None:
            return batch, None
        if isinstance(batch, Mapping):
            if self.targets not in batch:
                raise BridgeError(
                    f"the batch has no {self.targets!r}, only {sorted(batch, key=str)}: name the targets "
                    "with targets="
                )
            return {k: v for k, v in batch.items() if k != self.targets}, batch[self.targets]
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            raise BridgeError(
                "a batch must be (inputs, targets), (input, input, ..., targets) or a mapping that holds the "
                "targets"
            )
        return (batch[0] if len(batch) == 2 else tuple(batch[:-1])), batch[-1]

    def _arguments(self, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs as positional and keyword arguments, without fields that the model does not know."""
        positional, keywords = self.model.graph.input_tree["items"]
        if not isinstance(inputs, Mapping):
            return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}
        if keywords["keys"]:
            return (), {k: inputs[k] for k in keywords["keys"] if k in inputs}
        if [item["type"] for item in positional["items"]] == ["dict"]:  # the module takes the mapping itself
            known = positional["items"][0]["keys"]
            return ({k: inputs[k] for k in known if k in inputs},), {}
        names = [i.name for i in self.model.graph.inputs]
        if len(inputs) == len(names) == 1:
            return tuple(inputs.values()), {}
        if not set(names) <= set(inputs):
            raise BridgeError(
                f"the module takes {names}, the batch has {sorted(inputs, key=str)}: export it with an "
                "example that is a mapping with the batch's names, or pass (inputs, targets)"
            )
        return tuple(inputs[name] for name in names), {}


def _pick(outputs: Any, key: str | int | None, default: str) -> jax.Array:
    fields: Any = outputs._asdict() if hasattr(outputs, "_asdict") else outputs
    if key is None and isinstance(fields, Mapping) and default in fields:
        key = default
    if key is not None:
        by_place = isinstance(fields, Mapping) and type(key) is int and key not in fields
        try:
            entries: Any = list(fields.values()) if by_place else fields
            outputs = entries[key]
        except (KeyError, IndexError, TypeError):
            raise BridgeError(f"the model's output has no entry {key!r}, but {_kind(fields)}") from None
    if not isinstance(outputs, jax.Array):
        raise BridgeError(f"the model returns {_kind(fields)}: choose the array for the loss with output=")
    return outputs


def _kind(outputs: Any) -> Any:
    if isinstance(outputs, Mapping):
        return sorted(outputs, key=str)
    return f"a {type(outputs).__name__}" + (f" of {len(outputs)}" if hasattr(outputs, "__len__") else "")


def make_loss(
    model: TorchModel,
    name: Any = None,
    *,
    output: str | int | None = None,
    targets: str = "labels",
    **options: Any,
) -> Loss:
    """Combine a model with a PyTorch loss into `loss(params, batch)`, as the operators take it.

    The loss may also be part of the module, since whatever the forward pass computes is exported. Then leave
    the name out; the batch holds all arguments of the module, including the targets.

    Args:
        model: from `from_torch` or `load`.
        name: a loss module (`nn.CrossEntropyLoss(label_smoothing=0.1)`), a function of
            `torch.nn.functional`, also with `functools.partial`, or its name: "cross_entropy", "nll_loss",
            "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss" or "bce_with_logits". None: the model's
            output is the loss.
        output: the entry of the model's output that the loss takes, by name or position; default: the output
            itself, or its "logits" (without a name, its "loss").
        targets: the key of the targets, if a batch is one mapping; fields that the model does not take are
            left out. Other batches are (inputs, targets), where inputs are an array, a tuple or a mapping, or
            (input, input, ..., targets).
        **options: of the loss: `weight`, `ignore_index`, `label_smoothing`, `pos_weight`, `beta`, `delta`,
            `class_axis`, `reduction` ("mean" or "sum"); they override those of a loss module. Tensors are
            accepted.

    Returns:
        The loss. `loss.weight` is the weight of a batch in an average over a stream; `loss.outputs` and
        `loss.of_outputs` are its two halves, for operators that need the model.

    Raises:
        BridgeError: an unknown loss or option, or `reduction="none"`, which gives no scalar.

    Examples:
        >>> import jax.numpy as jnp
        >>> import spectra
        >>> import torch
        >>> model = spectra.from_torch(torch.nn.Linear(3, 2), (torch.zeros(4, 3),))
        >>> loss = spectra.bridge.make_loss(model, torch.nn.CrossEntropyLoss(label_smoothing=0.1))
        >>> loss(model.params, (jnp.ones((5, 3)), jnp.zeros(5, int))).shape
        ()
    """
    if not isinstance(model, TorchModel):
        kind = type(cast("Any", model)).__name__
        raise BridgeError(f"model is a {kind}: pass what from_torch(module, example_inputs) returns")
    if name is None:
        if options:
            raise BridgeError(
                f"{sorted(options)} are options of a named loss; this one is the model's output"
            )
        return Loss(model, None, output, targets)
    name, own = _named(name)
    known = _options(name)
    options = {**own, **options}
    if unknown := sorted(set(options) - set(known)):
        raise BridgeError(f"{name} has no options {unknown}, but {known}")
    if options.get("reduction", "mean") not in ("mean", "sum"):
        raise BridgeError("a loss for curvature is a scalar: reduction must be 'mean' or 'sum'")
    options = {k: to_numpy(v) if hasattr(v, "__array__") else v for k, v in options.items()}
    return Loss(model, name, output, targets, options)


def _named(loss: Any) -> tuple[str, dict[str, Any]]:
    """The name of a loss and the options that it brings, without importing PyTorch."""
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise BridgeError(f"unknown loss {loss!r}: choose from {', '.join(LOSSES)}")
        return loss, {}
    if isinstance(loss, functools.partial):
        if loss.args:
            raise BridgeError("a loss made by functools.partial may fix options by name only")
        name, own = _named(loss.func)
        return name, {**own, **_current(loss.keywords)}
    if isinstance(loss, type):
        raise BridgeError(f"{loss.__name__} is a class: pass the loss that it makes, {loss.__name__}(...)")
    kind = type(loss)
    from_torch = str(getattr(loss, "__module__", "")).partition(".")[0] == "torch"
    if from_torch and kind.__name__ in MODULES:
        name, fields = MODULES[kind.__name__], {**vars(loss), **getattr(loss, "_buffers", {})}
        # Other fields than those that the loss or the constructor takes are PyTorch's own.
        taken = {*_options(name), *inspect.signature(kind).parameters}
        return name, _current({k: v for k, v in fields.items() if k in taken})
    name = getattr(loss, "__name__", "")
    if from_torch and name in LOSSES:
        return name, {}
    raise BridgeError(
        f"{name or kind.__name__} is none of PyTorch's losses that are known ({', '.join(MODULES)}). Compute "
        "it in the module, which then returns the loss (`make_loss(model)`), or write it in JAX: "
        "`lambda params, batch: my_loss(model.apply(params, batch[0]), batch[1])`"
    )


def _options(name: str) -> list[str]:
    return list(inspect.signature(LOSSES[name]).parameters)[2:]


def _current(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that are set; PyTorch's former `size_average` and `reduce` as the reduction they stand for."""
    options = {k: v for k, v in options.items() if v is not None}
    average, reduce = options.pop("size_average", None), options.pop("reduce", None)
    if average is not None or reduce is not None:  # they take precedence in PyTorch
        options["reduction"] = "none" if reduce is False else "sum" if average is False else "mean"
    return options
