"""Flax models as pure functions (variables, inputs) -> outputs, the form that operators take.

What does not vary (batch statistics, integer and random state) stays a leaf of the variables, so the
next checkpoint reuses the compiled code; `wrt="params"` says what varies. Other libraries need no
adapter: any pure function of a pytree will do, such as Equinox's `eqx.combine(params, static)(x)` with
`params, static = eqx.partition(model, eqx.is_inexact_array)`.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

from spectra.base.errors import SpectraError, StructureError
from spectra.base.trees import PyTree

BATCH_STATS = ("running", "batch")


@dataclasses.dataclass(frozen=True)
class Attention:
    """A function (query, key, value, mask=, is_causal=) as Flax's layers call it, with axes in front."""

    function: Callable[..., Any]

    def __call__(  # linen passes what the signature names, nnx everything
        self,
        query,
        key,
        value,
        bias=None,
        mask=None,
        is_causal=False,
        dropout_rate=0.0,
        deterministic=True,
        **_,
    ):
        """What the function gives; dropout would make the loss random, and is refused."""
        if dropout_rate and not deterministic:
            raise SpectraError(
                "dropout of attention's weights draws random numbers: call the module with "
                "deterministic=True."
            )
        lead = query.shape[:-3]
        extra = {} if bias is None else {"bias": _flat(bias, lead)}
        mask = None if mask is None else _flat(mask, lead).astype(bool)  # Flax makes masks of floats
        flat = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
        out = self.function(*flat, mask=mask, is_causal=is_causal, **extra)
        return out.reshape(*lead, *out.shape[-3:])


def _flat(x, lead: tuple[int, ...]):
    """A mask of (*lead, heads, queries, keys) with one axis in front."""
    import jax.numpy as jnp

    x = jnp.asarray(x)
    return jnp.broadcast_to(x, (*lead, *x.shape[-3:])).reshape(-1, *x.shape[-3:])


@dataclasses.dataclass(frozen=True)
class Options:
    """Keyword arguments of a call, equal where all of them are: arrays, such as keys, by their contents."""

    keywords: dict[str, Any] = dataclasses.field(compare=False)
    contents: tuple[Any, ...]

    @classmethod
    def of(cls, keywords: dict[str, Any]) -> "Options":
        """The arrays are read once, here: `==` between arrays is an array, and has no truth value."""
        import jax

        leaves, tree = jax.tree.flatten(keywords)
        return cls(keywords, (tree, *map(_content, leaves)))


def _content(leaf: Any) -> Any:
    """What two equal options share: True and 1 are different ones."""
    import jax
    import numpy as np
    from jax.core import Tracer

    if not isinstance(leaf, jax.Array | np.ndarray) or isinstance(leaf, Tracer):
        return type(leaf), leaf
    is_key = jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return str(leaf.dtype), leaf.shape, np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes()


@dataclasses.dataclass(frozen=True)
class LinenModel:
    """A pure function of variables and inputs; equal for equal modules, so compiled code is shared."""

    module: Any
    batch_stats: str
    options: Options
    attention: Callable[..., Any] | None = None

    def __call__(self, variables: PyTree, inputs: PyTree) -> PyTree:
        """The outputs of the module; `inputs` is one argument, or a tuple of positional ones."""
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        with self._attending():
            if self.batch_stats == "running":
                return self.module.apply(variables, *inputs, **self.options.keywords)
            outputs, _ = self.module.apply(
                variables, *inputs, mutable=["batch_stats"], **self.options.keywords
            )
            return outputs

    def _attending(self) -> contextlib.AbstractContextManager[Any]:
        if self.attention is None:
            return contextlib.nullcontext()
        from flax import linen as nn

        function = Attention(self.attention)

        def use(call, args, kwargs, context):
            if hasattr(context.module, "attention_fn"):
                object.__setattr__(context.module, "attention_fn", function)  # modules are frozen
            return call(*args, **kwargs)

        return nn.intercept_methods(use)


def linen_model(
    module: Any,
    *,
    batch_stats: str = "running",
    attention: Callable[..., Any] | None = None,
    **options: Any,
) -> LinenModel:
    """Turn a Flax linen module into a pure function of (variables, inputs).

    Args:
        module: `flax.linen.Module`.
        batch_stats: with "running", BatchNorm normalises by its running statistics, which are constants of
            the loss. With "batch", it normalises by the statistics of the batch; the loss is differentiated
            through these, and updates of the running statistics are dropped. A mean over batches is then not
            the loss of the whole data set. The module's own arguments decide which of the two it computes:
            pass them in `options`.
        attention: function that Flax's attention layers call instead of `dot_product_attention`, such as
            `spectra.attention`, whose memory is linear in the sequence length.
        **options: keyword arguments of the module's call, such as `train=False` or `deterministic=True`.

    Returns:
        A callable `(variables, inputs) -> outputs`, with `variables` as from `module.init`: pass them as
        the operator's parameters, with `wrt="params"`.

    Raises:
        SpectraError: `module` is no such module, or `batch_stats` is unknown.

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
    from flax import linen

    _check(module, linen.Module, "linen_model", batch_stats)
    return LinenModel(module, batch_stats, Options.of(options), attention)


@dataclasses.dataclass(frozen=True)
class NnxModel:
    """A pure function of variables and inputs; equal for modules of equal structure."""

    graphdef: Any

    def __call__(self, variables: PyTree, inputs: PyTree) -> PyTree:
        """The outputs of the module; `inputs` is one argument, or a tuple of positional ones."""
        from flax import nnx

        # A copy: running statistics that the call updates would be written into `variables`.
        module = nnx.merge(self.graphdef, variables["params"], variables["state"], copy=True)
        return module(*inputs) if isinstance(inputs, tuple) else module(inputs)


def nnx_model(
    module: Any,
    *,
    batch_stats: str = "running",
    trainable: Any = None,
    attention: Callable[..., Any] | None = None,
) -> tuple[NnxModel, PyTree]:
    """Split a Flax nnx module into a pure function of (variables, inputs) and its variables.

    The module itself is not changed. Dropout is switched off.

    Args:
        module: `flax.nnx.Module`.
        batch_stats: "running" or "batch"; see `linen_model`.
        trainable: nnx filter of the variables that vary; default `nnx.Param`.
        attention: see `linen_model`.

    Returns:
        A callable `(variables, inputs) -> outputs` and `variables = {"params": ..., "state": ...}`: pass
        them to an operator with `wrt="params"`.

    Raises:
        SpectraError: `module` is no such module, or `batch_stats` is unknown.

    Examples:
        >>> import jax.numpy as jnp, spectra
        >>> from flax import nnx
        >>> model_fn, variables = spectra.nnx_model(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
        >>> model_fn(variables, jnp.ones((4, 2))).shape
        (4, 3)
    """
    from flax import nnx

    _check(module, nnx.Module, "nnx_model", batch_stats)
    module = nnx.clone(module)
    module.set_attributes(deterministic=True, raise_if_not_found=False)
    module.set_attributes(use_running_average=batch_stats == "running", raise_if_not_found=False)
    if attention is not None:
        module.set_attributes(attention_fn=Attention(attention), raise_if_not_found=False)
    graphdef, params, state = nnx.split(module, nnx.Param if trainable is None else trainable, ...)
    return NnxModel(graphdef), {"params": params, "state": state}


def _check(module: Any, kind: type, name: str, batch_stats: str) -> None:
    if not isinstance(module, kind):
        what = f"the class {module.__name__}" if isinstance(module, type) else f"a {type(module).__name__}"
        raise StructureError(
            f"{name}(module) takes a module of {kind.__module__.rpartition('.')[0]}, and is given {what}: "
            "pass the module itself, neither its class nor its variables or state. linen_model takes modules "
            "of flax.linen and nnx_model those of flax.nnx; an Equinox module or a function of Haiku needs "
            "neither."
        )
    if batch_stats not in BATCH_STATS:
        raise SpectraError(f"batch_stats={batch_stats!r}: use one of {BATCH_STATS}.")
