"""PyTorch's side of every comparison: outputs, gradients and Hessian-vector products.

The scalar of a case is s(θ) = Σ over its outputs o of mean(o²)/2 + mean(o·cos k), k the flat index:
smooth in the outputs, and with a Hessian that has both the Gauss-Newton and the second-order part.
"""

from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from spectra.bridge import TorchModel

# Optimisation costs more time than it saves on models of this size.
FAST: dict[str, bool | int] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
if jax.__version_info__ < (0, 11):  # twice the time to compile; XLA has had no choice since
    FAST["xla_cpu_use_fusion_emitters"] = False


def numpy_tree(value: Any) -> Any:
    """Replace tensors by NumPy arrays in nested containers."""
    return _pytree.tree_map_only(torch.Tensor, lambda t: t.detach().numpy(), value)


def call(module: Any, inputs: Any) -> Any:
    return module(**inputs) if isinstance(inputs, dict) else module(*inputs)


def apply(model: TorchModel, params: Any, inputs: Any) -> Any:
    return model.apply(params, **inputs) if isinstance(inputs, dict) else model.apply(params, *inputs)


def torch_outputs(module: Any, inputs: Any) -> list[torch.Tensor]:
    """The floating outputs, in order."""
    leaves = _pytree.tree_leaves(call(module, inputs))
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]


def torch_loss(outputs: list[torch.Tensor]) -> torch.Tensor:
    """The scalar of the module docstring."""
    total = torch.zeros((), dtype=outputs[0].dtype)
    for out in outputs:
        weight = torch.cos(torch.arange(out.numel(), dtype=out.dtype)).reshape(out.shape)
        total = total + (out * out).mean() / 2 + (out * weight).mean()
    return total


def torch_derivatives(
    module: torch.nn.Module, inputs: Any, vector: dict[str, np.ndarray], twin: Any = None
) -> tuple[list[np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Outputs, gradient and H·vector by double backward, as dictionaries under PyTorch's names."""
    params = dict(module.named_parameters())
    # The fused attention kernels have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        outputs = torch_outputs(partial(twin, module) if twin else module, inputs)
        total = torch_loss(outputs)
        grads = torch.autograd.grad(total, list(params.values()), create_graph=True, allow_unused=True)
        grads = _filled(params, grads)
        inner = sum((g * torch.tensor(vector[k])).sum() for k, g in grads.items())
        products = torch.autograd.grad(inner, list(params.values()), allow_unused=True)
    products = _filled(params, products)
    return numpy_tree((outputs, grads, products))


def _filled(params: dict[str, torch.Tensor], gradients: Any) -> dict[str, torch.Tensor]:
    """Name the gradients; one that autograd leaves out is zero."""
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(params.items(), gradients, strict=True)
    }


def floating(outputs: Any) -> list[jax.Array]:
    """The floating arrays in PyTorch's order of leaves: dictionaries as they were filled, not sorted."""
    leaves = _pytree.tree_leaves(outputs)
    return [x for x in leaves if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)]


def scalar(outputs: list[jax.Array]) -> jax.Array:
    """The scalar of the module docstring."""
    total = jnp.zeros((), outputs[0].dtype)
    for out in outputs:
        weight = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
        total = total + (out * out).mean() / 2 + (out * weight).mean()
    return total


def jax_derivatives(model: TorchModel, inputs: Any, vector: Any):
    """Outputs, gradient and H·vector by `jvp` of `grad`, in one compilation."""
    arrays, rebuild = split(inputs)

    @jax.jit
    def run(params, arrays, vector):
        def loss(p):
            outputs = floating(apply(model, p, rebuild(arrays)))
            return scalar(outputs), outputs

        (gradient, outputs), (product, _) = jax.jvp(jax.grad(loss, has_aux=True), (params,), (vector,))
        return outputs, gradient, product

    return run.lower(model.params, arrays, vector).compile(FAST)(model.params, arrays, vector)


def compiled_outputs(model: TorchModel, inputs: Any) -> list[jax.Array]:
    """The floating outputs, by one compiled forward pass."""
    arrays, rebuild = split(inputs)
    run = jax.jit(lambda params, arrays: floating(apply(model, params, rebuild(arrays))))
    return run.lower(model.params, arrays).compile(FAST)(model.params, arrays)


def split(inputs: Any):
    """Separate arrays from the constants of an input, which must not be traced."""
    leaves, tree = jax.tree.flatten(inputs, is_leaf=lambda x: x is None)
    is_array = [isinstance(x, np.ndarray) for x in leaves]

    def rebuild(arrays):
        arrays = iter(arrays)
        return jax.tree.unflatten(
            tree, [next(arrays) if a else x for a, x in zip(is_array, leaves, strict=True)]
        )

    return [jnp.asarray(x) for x, a in zip(leaves, is_array, strict=True) if a], rebuild


def relative(ours: Any, theirs: Any) -> float:
    """‖ours - theirs‖ / ‖theirs‖ in the Euclidean norm over all entries of two trees."""
    a, b = jax.tree.leaves(ours), jax.tree.leaves(theirs)
    assert [np.shape(x) for x in a] == [np.shape(x) for x in b]
    a, b = (np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in t]) for t in (a, b))
    assert np.isfinite(b).all()
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), np.finfo(np.float64).tiny))


class _Wide(TorchFunctionMode):
    """Turn every request for float32 into float64.

    Several language models compute norms, softmax or rotary angles in float32 whatever their
    weights' dtype; a comparison in float64 needs a float64 model.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def wide(x):
            return torch.float64 if x is torch.float32 else x

        args, kwargs = _pytree.tree_map(wide, (args, kwargs or {}))
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*args, **kwargs)


def precision(dtype: torch.dtype, heavy: bool):
    """Return the context in which a model computes in `dtype` throughout.

    Only the large models have casts of their own; tracing tensors that a small one holds outside of
    its buffers does not bear the mode.
    """
    return _Wide() if heavy and dtype == torch.float64 else nullcontext()
