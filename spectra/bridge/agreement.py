"""Whether an exported model is the module: outputs and a gradient of both, compared at one point.

`torch.export` records a forward pass. What changes gradients alone (a custom `autograd.Function`, a hook),
what autograd does not see (in-place changes under `no_grad`, `inference_mode`) and what the record leaves out
(`Embedding(max_norm=)`) would give a spectrum of another function, so each export is run once beside the
module itself.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.utils import _pytree as torch_pytree

from spectra.base import host
from spectra.bridge import interpreter
from spectra.bridge.adapter import Adapter, experts_by, has_experts
from spectra.bridge.dtypes import canonical
from spectra.bridge.errors import BridgeError
from spectra.bridge.model import TorchModel
from spectra.bridge.refusals import likely_cause, rejection
from spectra.bridge.rounding import moved, noise_of, norm, pieces
from spectra.bridge.stand_ins import written_out
from spectra.operators.batches import to_numpy

# Two correct evaluations differ by the roundings of every operation. One evaluation with all parameters and
# inputs moved by a rounding each shows how far such roundings reach (through cancellation, flat directions,
# decisions at ties). A path of k operations adds k more of them, independent of each other: √k times as far,
# and k = 256 is long. Measured, the models of the tests need 1.3 in all three precisions. Where that does not
# explain a difference, every number inside is rounded at random (`rounding`).
REACH = 16.0
# In half precision sums are kept in float32 and results are rounded once an operation, on paths of 16 or so.
HALF_REACH = 4.0
# Some of PyTorch's float64 kernels hold constants in float32 (CELU's 1/α). What is looked for, another
# derivative, is of the size of the gradient itself.
FLOAT32 = 2.0**-23


@dataclass(frozen=True)
class _Point:
    """The module's own results at one point, and the point."""

    inputs: tuple[Any, dict[str, Any]]
    params: dict[str, np.ndarray]  # those that differ from the module's
    outputs: list[Any]
    cotangents: list[Any]
    gradients: dict[str, np.ndarray] | None  # None where PyTorch cannot differentiate the module


def check(module: Adapter, args: Any, kwargs: Any, model: TorchModel) -> None:
    """Raise BridgeError unless model and module agree.

    Args:
        module: what was exported, in the mode that it was exported in.
        args: positional arguments.
        kwargs: keyword arguments.
        model: what became of the module.
    """
    inner = module.module
    trainable = {k: p for k, p in inner.named_parameters() if k in model.params and p.is_floating_point()}
    with _differentiable(trainable):
        point = _reference(module, args, kwargs, trainable)
    with host.on_cpu(), jax.default_matmul_precision("highest"):
        _compare(model, point, list(trainable), lambda: likely_cause(module, inner, args, kwargs))


@contextmanager
def _differentiable(parameters: Mapping[str, torch.nn.Parameter]) -> Iterator[None]:
    """Let autograd see the parameters also where the whole module is frozen."""
    frozen = [p for p in parameters.values() if not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


# ---- the module's side ------------------------------------------------------------------------------


def _reference(module: Any, args: Any, kwargs: Any, trainable: dict[str, torch.nn.Parameter]) -> _Point:
    """Run the module where little vanishes: an example of zeros, a layer of zeros would hide what follows.

    Constant inputs get noise and parameters of zeros, biases aside, random values, for this run only; where
    the module does not bear that, it runs as it is.
    """
    zeros = {
        k: p
        for k, p in trainable.items()
        if not k.endswith("bias") and p.numel() and not p.is_inference() and not bool(p.detach().any())
    }
    others, named = torch_pytree.tree_map_only(torch.Tensor, varied, (args, kwargs))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in zeros.values():
            p.copy_(0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p))
    try:
        point = _run(module, others, named, trainable, zeros)
        if all(bool(torch.isfinite(t).all()) for t in point.outputs if _is_float(t)):
            return point
    except Exception:  # as with any code of the user's: the plain run says what is wrong, if anything is
        pass
    finally:
        with torch.no_grad():
            for p in zeros.values():
                p.zero_()
    try:
        return _run(module, args, kwargs, trainable, {})
    except Exception as error:
        if not has_experts(module):
            raise rejection(error, args, kwargs) from error
    with experts_by("eager", module):  # the default one, of transformers, has no float64
        return _run(module, args, kwargs, trainable, {})


def varied(tensor: torch.Tensor) -> torch.Tensor:
    """An input with noise on it if all its elements are equal, as in an example of zeros."""
    if not tensor.is_floating_point() or tensor.numel() < 2 or tensor.layout is not torch.strided:
        return tensor
    if bool((tensor != tensor.flatten()[0]).any()):
        return tensor
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return tensor + noise.to(tensor)


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _run(module: Any, args: Any, kwargs: Any, trainable: Any, moved: Mapping[str, torch.Tensor]) -> _Point:
    usable = not any(p.is_inference() for p in trainable.values())  # else autograd refuses them
    with torch.inference_mode(False), torch.set_grad_enabled(usable):
        outputs = torch_pytree.tree_leaves(module(*args, **kwargs))
        cotangents = [_cotangent(t, i) if _is_float(t) else None for i, t in enumerate(outputs)]
        params = {k: to_numpy(p).copy() for k, p in moved.items()}
        pairs = [
            (t, c) for t, c in zip(outputs, cotangents, strict=True) if c is not None and t.requires_grad
        ]
        gradients: Sequence[Any] | None = [None] * len(trainable) if usable else None
        if pairs and trainable:
            try:
                heads, directions = zip(*pairs, strict=True)
                gradients = torch.autograd.grad(
                    heads, list(trainable.values()), directions, allow_unused=True
                )
            except (RuntimeError, NotImplementedError):
                gradients = None  # an operation without a derivative in PyTorch: nothing to compare with
    named = None
    if gradients is not None:
        named = {
            k: np.zeros(p.shape) if g is None else to_numpy(g.to_dense())  # of Embedding(sparse=True)
            for (k, p), g in zip(trainable.items(), gradients, strict=True)
        }
    outputs = [t.detach() if isinstance(t, torch.Tensor) else t for t in outputs]
    return _Point((args, kwargs), params, outputs, cotangents, named)


def _cotangent(output: torch.Tensor, index: int) -> torch.Tensor:
    """Random weights that make every output count alike."""
    draw = torch.randn(
        (2, *output.shape), generator=torch.Generator().manual_seed(index), dtype=torch.float64
    )
    size = float(torch.linalg.vector_norm(output.detach().to(torch.complex128)))
    scale = 1 / size if 0 < size < float("inf") else 1.0
    weights = torch.complex(draw[0], draw[1]) if output.is_complex() else draw[0]
    return (scale * weights).to(output)


# ---- both sides -------------------------------------------------------------------------------------


def _compare(model: TorchModel, point: _Point, trainable: list[str], cause: Any) -> None:
    args, kwargs = point.inputs
    params = {**model.params, **model.frozen, **{k: jnp.asarray(v) for k, v in point.params.items()}}
    inputs = model.bind(*torch_pytree.tree_map(written_out, (args, kwargs)))
    eps = _resolution(model)
    cotangents = [None if c is None else _as_jax(c) for c in point.cotangents]
    noise = cache(lambda: noise_of(model, params, inputs, cotangents, trainable, eps > FLOAT32))
    outputs, pullback = _evaluate(model, params, inputs, trainable)
    _check_structure(outputs, point.outputs)
    rng = np.random.default_rng(0)
    others_at = {k: moved(v, eps, rng) for k, v in params.items()}
    others, other_pullback = _evaluate(model, others_at, [moved(x, eps, rng) for x in inputs], trainable)
    for i, (ours, theirs, other) in enumerate(zip(outputs, point.outputs, others, strict=True)):
        if _is_float(theirs):
            value = to_numpy(theirs)
            excess, error = _excess(ours, value, other, eps, 0.0)
            if excess > 1:
                excess, error = _excess(ours, value, other, eps, noise()[0].get(i, 0.0))
            alike = np.array_equal(np.isfinite(ours), np.isfinite(value))
            if excess > 1 or not alike:
                where = "" if alike else ", which is finite elsewhere than the module's,"
                raise BridgeError(
                    _message(f"its output{where} differs by", error if alike else np.inf, cause())
                )
    if point.gradients is None:
        return
    gradients, noisy = pullback(cotangents), other_pullback(cotangents)
    total = eps * norm(list(point.gradients.values()))
    found = {k: _excess(gradients[k], value, noisy[k], eps, total) for k, value in point.gradients.items()}
    for k in [k for k, (excess, _) in found.items() if excess > 1]:
        more = total + noise()[1].get(k, 0.0)
        found[k] = _excess(gradients[k], point.gradients[k], noisy[k], eps, more)
    worst = max(found, key=lambda k: found[k][1] if found[k][0] > 1 else -1.0, default=None)
    if worst is not None and found[worst][0] > 1:
        raise BridgeError(
            _message(
                "its outputs agree, but the gradient of a random combination of them with respect to "
                f"{worst!r} differs by",
                found[worst][1],
                cause(),
            )
        )


def _message(what: str, error: float, cause: str) -> str:
    size = f"{100 * error:.0f} %" if error > 0.1 else f"{100 * error:.2g} %"
    size = size if np.isfinite(error) else "all that it is"
    return f"the exported model is not the module: at the example {what} {size}. {cause}"


def _evaluate(model: TorchModel, params: Any, inputs: Any, trainable: list[str]) -> Any:
    tensors = {**model.buffers, **model.constants, **params}
    return interpreter.run(model.graph, tensors, inputs, trainable)


def _check_structure(ours: Sequence[Any], theirs: Sequence[Any]) -> None:
    def shapes(values: Sequence[Any]) -> list[tuple[int, ...] | None]:
        return [tuple(x.shape) if hasattr(x, "shape") else None for x in values]

    if shapes(ours) != shapes(theirs):
        raise BridgeError(
            f"the exported model is not the module: it returns arrays of shapes {shapes(ours)}, the module "
            f"{shapes(theirs)}. Its forward pass does something else while it is exported: look for "
            "torch.compiler.is_exporting() and the like."
        )


def _as_jax(cotangent: torch.Tensor) -> jax.Array:
    # JAX pairs complex numbers without conjugation.
    return jnp.conj(jnp.asarray(to_numpy(cotangent)))


def _resolution(model: TorchModel) -> float:
    """The coarsest rounding of all floating dtypes in the graph."""
    graph = model.graph
    names = {item.dtype for item in (*graph.tensors, *graph.inputs, *graph.nodes) if item.dtype}
    dtypes = [canonical(name) for name in names]
    return max((float(jnp.finfo(d).eps) for d in dtypes if jnp.issubdtype(d, jnp.inexact)), default=2.0**-52)


def _excess(ours: Any, theirs: Any, other: Any, eps: float, floor: float) -> tuple[float, float]:
    """The difference in units of what rounding explains, and relative to PyTorch's."""
    error = size = noise = 0.0
    for parts in pieces(*(np.asarray(x) for x in (ours, theirs, other))):
        a, b, c = (x.astype(np.complex128) for x in parts)
        kept = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
        a, b, c = a[kept], b[kept], c[kept]
        error, size = math.hypot(error, norm([a - b])), math.hypot(size, norm([b]))
        noise = math.hypot(noise, norm([a - c]))
    reach = HALF_REACH if eps > FLOAT32 else REACH
    allowed = reach * (noise + max(eps, FLOAT32) * size + floor)
    return error / allowed if allowed else (np.inf if error else 0.0), error / size if size else np.inf
