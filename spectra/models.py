"""Flax models as pure functions (variables, inputs) -> outputs, the form that operators take.

What does not vary (batch statistics, integer and random state) stays a leaf of the variables, so the
next checkpoint re-uses the compiled code; `wrt="params"` says what varies. Other libraries need no
adapter: any pure function of a pytree will do, such as Equinox's `eqx.combine(params, static)(x)` with
`params, static = eqx.partition(model, eqx.is_inexact_array)`.
"""

import dataclasses
from typing import Any

from spectra._errors import SpectraError

PyTree = Any
BATCH_STATS = ("running", "batch")


@dataclasses.dataclass(frozen=True)
class LinenModel:
    """A pure function of variables and inputs; equal for equal modules, so compiled code is shared."""

    module: Any
    batch_stats: str
    options: tuple[tuple[str, Any], ...]

    def __call__(self, variables: PyTree, inputs: PyTree) -> PyTree:
        """The outputs of the module; `inputs` is one argument, or a tuple of positional ones."""
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        if self.batch_stats == "running":
            return self.module.apply(variables, *inputs, **dict(self.options))
        outputs, _ = self.module.apply(variables, *inputs, mutable=["batch_stats"], **dict(self.options))
        return outputs


def linen_model(module: Any, *, batch_stats: str = "running", **options: Any) -> LinenModel:
    """Turn a Flax linen module into a pure function of (variables, inputs).

    Args:
        module: `flax.linen.Module`.
        batch_stats: "running": BatchNorm normalises by its running statistics, constants of the loss;
            "batch": by the statistics of the batch, through which the loss is differentiated and whose
            updates are dropped. A mean over batches is then not the loss of the whole data set. Which
            one the module computes is up to its own arguments: pass them in `options`.
        **options: keyword arguments of the module's call, such as `train=False` or `deterministic=True`.

    Returns:
        A callable `(variables, inputs) -> outputs`, with `variables` as from `module.init`: pass them as
        the operator's parameters, with `wrt="params"`.

    Raises:
        SpectraError: unknown `batch_stats`.

    Examples:
        >>> import jax, jax.numpy as jnp, spectra
        >>> from flax import linen as nn
        >>> module = nn.Dense(3)
        >>> x = jnp.ones((4, 2))
        >>> variables = module.init(jax.random.key(0), x)
        >>> def loss_fn(outputs, targets):
        ...     return jnp.mean((outputs - targets) ** 2)
        >>> model_fn = spectra.linen_model(module)
        >>> op = spectra.GGNOperator(model_fn, loss_fn, variables, (x, jnp.ones((4, 3))), wrt="params")
        >>> op.size
        9
    """
    _check(batch_stats)
    return LinenModel(module, batch_stats, tuple(sorted(options.items())))


@dataclasses.dataclass(frozen=True)
class NnxModel:
    """A pure function of variables and inputs; equal for modules of equal structure."""

    graphdef: Any

    def __call__(self, variables: PyTree, inputs: PyTree) -> PyTree:
        """The outputs of the module; `inputs` is one argument, or a tuple of positional ones."""
        from flax import nnx

        module = nnx.merge(self.graphdef, variables["params"], variables["state"])
        return module(*inputs) if isinstance(inputs, tuple) else module(inputs)


def nnx_model(module: Any, *, batch_stats: str = "running", trainable: Any = None) -> tuple[NnxModel, PyTree]:
    """Split a Flax nnx module into a pure function of (variables, inputs) and its variables.

    The module itself is left as it is. Dropout is switched off.

    Args:
        module: `flax.nnx.Module`.
        batch_stats: "running" or "batch"; see `linen_model`.
        trainable: nnx filter of the variables that vary; default `nnx.Param`.

    Returns:
        A callable `(variables, inputs) -> outputs` and `variables = {"params": ..., "state": ...}`: pass
        them to an operator with `wrt="params"`.

    Raises:
        SpectraError: unknown `batch_stats`.

    Examples:
        >>> import jax.numpy as jnp, spectra
        >>> from flax import nnx
        >>> model_fn, variables = spectra.nnx_model(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
        >>> model_fn(variables, jnp.ones((4, 2))).shape
        (4, 3)
    """
    from flax import nnx

    _check(batch_stats)
    module = nnx.clone(module)
    module.set_attributes(deterministic=True, raise_if_not_found=False)
    module.set_attributes(use_running_average=batch_stats == "running", raise_if_not_found=False)
    graphdef, params, state = nnx.split(module, nnx.Param if trainable is None else trainable, ...)
    return NnxModel(graphdef), {"params": params, "state": state}


def _check(batch_stats: str) -> None:
    if batch_stats not in BATCH_STATS:
        raise SpectraError(f"batch_stats={batch_stats!r}: use one of {BATCH_STATS}.")
