"""The model that a graph file or a PyTorch module becomes."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from spectra.bridge import graph as _structure
from spectra.bridge.dtypes import canonical, category
from spectra.bridge.errors import BridgeError
from spectra.bridge.graph import Graph, Input
from spectra.bridge.interpreter import evaluate
from spectra.operators.batches import to_numpy

GRAPH, WEIGHTS = "graph.json", "weights.safetensors"


@dataclass(frozen=True, eq=False, repr=False)
class TorchModel:
    """A PyTorch module as a pure JAX function and flat dictionaries of arrays.

    Compared by identity, so `model.apply` can be a static argument of `jax.jit`. Everything in
    `params` is differentiated; buffers (BatchNorm statistics, masks) and frozen parameters are constants of
    the function.

    Attributes:
        graph: the checked graph.
        params: `{dotted PyTorch name: array}`; a tied weight appears once, under its first name.
        buffers: `{dotted PyTorch name: array}`.
        constants: tensors that the forward function creates or holds outside of buffers.
        frozen: the parameters with `requires_grad=False`, by name, if others require gradients.
    """

    graph: Graph
    params: dict[str, jax.Array]
    buffers: dict[str, jax.Array]
    constants: dict[str, jax.Array]
    frozen: dict[str, jax.Array] = field(default_factory=dict)

    def apply(self, params: Mapping[str, jax.Array], *inputs: Any, **named: Any) -> Any:
        """Evaluate the module's forward pass at `params`.

        Pure, and made of primitives with forward and reverse mode: it works under `jit`, `grad`,
        `jvp`, `linearize` and `vmap`. Matrix products follow `jax.default_matmul_precision`.

        Args:
            params: arrays under the names and with the shapes of `self.params`; any floating dtype. Frozen
                parameters may be included, and then replace those of `self.frozen`.
            *inputs: the positional arguments of the example, nested as in the example. If the
                example was a mapping, one mapping is accepted too.
            **named: the keyword arguments of the example.

        Returns:
            The module's output: arrays in tuples, lists and dictionaries. Dataclass-like outputs of
            `transformers` become dictionaries.

        Raises:
            BridgeError: names, shapes or dtypes differ from the exported ones, or the batch size differs from
                the example's in a module that could only be exported for that size.

        Cost:
            One forward pass. Call it under `jax.jit`; without it, each operator is dispatched separately.

        Examples:
            >>> import jax.numpy as jnp
            >>> import spectra
            >>> import torch
            >>> model = spectra.from_torch(torch.nn.Linear(3, 2), (torch.zeros(4, 3),))
            >>> model.apply(model.params, jnp.ones((7, 3))).shape
            (7, 2)
        """
        self._check_params(params)
        leaves = self.bind(inputs, named)
        tensors = {**self.buffers, **self.constants, **self.frozen, **params}
        outputs = evaluate(self.graph, tensors, leaves)
        return _structure.unflatten(self.graph.output_tree, outputs)

    def __repr__(self) -> str:
        numbers = sum(array.size for array in self.params.values())
        sizes = "any batch size" if self.dynamic_batch else "the example's sizes only"
        return (
            f"TorchModel({numbers:,} parameters in {len(self.params)} arrays, {len(self.frozen)} frozen, "
            f"{len(self.buffers)} buffers; {len(self.graph.nodes)} operations; {sizes})"
        )

    @property
    def operators(self) -> dict[str, int]:
        """The number of nodes of each operator, most frequent first."""
        return dict(Counter(node.op for node in self.graph.nodes).most_common())

    @property
    def dynamic_batch(self) -> bool:
        """Whether other batch sizes than the example's are accepted."""
        return bool(self.graph.symbols)

    @property
    def trainable(self) -> tuple[str, ...]:
        """The names of the parameters that had `requires_grad=True`; the others are in `frozen`."""
        return tuple(t.key for t in self.graph.tensors if t.kind == "parameter" and t.trainable)

    def state_dict(self, params: Mapping[str, jax.Array] | None = None) -> dict[str, np.ndarray]:
        """Return parameters and buffers under every name of the module's state dict.

        Tied parameters appear under each of their names, so that
        `module.load_state_dict({k: torch.tensor(v) for k, v in ...})` takes the result.
        """
        values = {**self.buffers, **self.frozen, **(self.params if params is None else params)}
        for name, key in self.graph.aliases.items():
            values[name] = values[key]
        return {name: np.asarray(value) for name, value in values.items()}

    def _check_params(self, params: Mapping[str, jax.Array]) -> None:
        known = {**self.params, **self.frozen}
        if not isinstance(params, Mapping):
            kind = type(cast("Any", params)).__name__
            raise BridgeError(f"params is a {kind}: pass a mapping of names to arrays, like .params, first")
        if not set(self.params) <= set(params) <= set(known):
            missing = sorted(set(self.params) - set(params))
            unexpected = sorted(set(params) - set(known))
            raise BridgeError(f"params: missing {missing[:8]}, unexpected {unexpected[:8]}")
        for name, value in params.items():
            if jnp.shape(value) != known[name].shape:
                raise BridgeError(
                    f"params[{name!r}] has shape {jnp.shape(value)}, the module's has {known[name].shape}"
                )

    def bind(self, inputs: tuple[Any, ...], named: dict[str, Any]) -> list[jax.Array]:
        """Flatten the arguments and check each against the exported dtype and shape."""
        positional, keywords = self.graph.input_tree["items"]
        lone = not positional["items"] and len(inputs) == 1 and not named
        if lone and isinstance(inputs[0], Mapping):
            inputs, named = (), dict(inputs[0])
        leaves: dict[int, Any] = {}
        _structure.flatten(positional, inputs, "inputs", leaves)
        _structure.flatten(keywords, named, "keyword inputs", leaves)
        sizes: dict[str, tuple[int, str]] = {}
        return [
            _bind_one(spec, leaves[index], sizes, self.graph.symbols)
            for index, spec in enumerate(self.graph.inputs)
        ]


def as_jax(value: Any) -> jax.Array:
    """An array, tracer, tensor or number as a JAX array."""
    return value if isinstance(value, jax.Array) else jnp.asarray(to_numpy(value))


def _text(shape: tuple[int | str, ...]) -> str:
    """A shape in words: sizes that are free have names of PyTorch's, which say nothing."""
    sizes = ["any" if isinstance(size, str) else str(size) for size in shape]
    return f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"


def _is_one(array: jax.Array, spec: Input) -> bool:
    """Whether an array has the shape of an input without its first axis, that of examples."""
    rest = spec.shape[1:]
    if len(rest) != array.ndim or len(rest) == len(spec.shape) or not isinstance(spec.shape[0], str):
        return False
    return all(isinstance(size, str) or size == own for size, own in zip(rest, array.shape, strict=True))


def _bind_one(
    spec: Input, value: Any, sizes: dict[str, tuple[int, str]], symbols: dict[str, int]
) -> jax.Array:
    array = as_jax(value)
    dtype = canonical(spec.dtype)
    if category(array.dtype) != category(dtype):
        raise BridgeError(f"input {spec.name} must be {spec.dtype}, got {array.dtype}")
    if array.ndim != len(spec.shape):
        advice = ": one example, to which x[None] gives the first axis" if _is_one(array, spec) else ""
        raise BridgeError(f"input {spec.name} must have shape {_text(spec.shape)}, got {array.shape}{advice}")
    for axis, (expected, size) in enumerate(zip(spec.shape, array.shape, strict=True)):
        if isinstance(expected, str):
            known, place = sizes.setdefault(expected, (size, f"input {spec.name}"))
            if known != size:
                raise BridgeError(
                    f"input {spec.name} has size {size} on axis {axis}, {place} has {known} there"
                )
        elif expected != size:
            advice = (
                ""
                if symbols
                else " (the module could only be exported for the example's sizes: export it again "
                "with an example of this size)"
            )
            wanted = _text(spec.shape)
            raise BridgeError(f"input {spec.name} must have shape {wanted}, got {array.shape}{advice}")
    # Integers are brought to the exported width; floats keep theirs, so that a float32 export can
    # be evaluated on float64 parameters and inputs.
    return array.astype(dtype) if category(dtype) < 2 else array
