"""A family of operators in one compiled program, each compared with `torch.ops.aten`.

Compiling every operator alone would cost most of the suite's time. A call that cannot be traced or that
differs does not hide the others: all of them are named.

Tolerances: one operator rounds each result a few times, so 1e-6 relative to the largest result in float32
for elementary functions, 1e-5 where sums of up to a hundred terms are involved; bfloat16 has 8 bits.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from bridge_reference import FAST
from operator_calls import Call

from spectra.bridge.operators.registry import OPERATORS


def to_jax(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        if value.dtype == torch.bfloat16:
            return jnp.asarray(value.float().numpy(), jnp.bfloat16)
        return jnp.asarray(value.numpy())
    if isinstance(value, torch.dtype):
        return jnp.dtype(str(value).removeprefix("torch."))
    return [to_jax(v) for v in value] if isinstance(value, list) else value


def differences(calls: Sequence[Call]) -> dict[str, str]:
    """Return what is wrong, by position and operator of the call; nothing where all agree.

    Under x64, so that int64 results keep their width and dtypes can be compared exactly.
    """
    found: dict[str, str] = {}
    with jax.enable_x64(True):
        results = _evaluate(calls, found)
        for position, (call, ours) in enumerate(zip(calls, results, strict=True)):
            name, args, kwargs = call
            if (label := f"{position} {name}") in found:
                continue
            half = any(getattr(a, "dtype", None) == torch.bfloat16 for a in args)
            theirs = _torch_call(name, args, kwargs)
            if "embedding_bag" in name or "_linalg" in name:  # the others serve PyTorch's own backward
                theirs = theirs[: len(ours)]
            try:
                _compare(ours, theirs, 2e-2 if half else 1e-5)
            except AssertionError as error:
                found[label] = str(error).strip()
    return found


def _evaluate(calls: Sequence[Call], found: dict[str, str]) -> list[Any]:
    """Every call's result. Arrays are arguments of the program: XLA cannot compute with them beforehand."""
    converted = [([to_jax(a) for a in args], {k: to_jax(v) for k, v in kw.items()}) for _, args, kw in calls]
    leaves, tree = jax.tree.flatten(converted, is_leaf=lambda x: x is None)
    is_array = [isinstance(x, jax.Array) for x in leaves]

    def run(arrays):
        rest = iter(arrays)
        filled = [next(rest) if a else x for a, x in zip(is_array, leaves, strict=True)]
        results = []
        for position, (args, kwargs) in enumerate(jax.tree.unflatten(tree, filled)):
            name = calls[position][0]
            try:
                result = OPERATORS[name](*args, **kwargs)
            except Exception as error:  # whatever an operator raises is that operator's failure
                found[f"{position} {name}"] = f"{type(error).__name__}: {error}"
                result = None
            results.append(result)
        return results

    arrays = [x for x, a in zip(leaves, is_array, strict=True) if a]
    return jax.jit(run).lower(arrays).compile(FAST)(arrays)


def _torch_call(name: str, args: tuple, kwargs: dict) -> Any:
    _, packet, overload = name.split(".")
    return getattr(getattr(torch.ops.aten, packet), overload)(*args, **kwargs)


def _compare(ours: Any, theirs: Any, tolerance: float) -> None:
    if isinstance(theirs, (tuple, list)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            _compare(a, b, tolerance)
        return
    assert ours.shape == tuple(theirs.shape)
    assert str(ours.dtype) == str(theirs.dtype).removeprefix("torch.")
    a, b = np.asarray(ours, np.complex128), theirs.to(torch.complex128).numpy()
    scale = max(1.0, np.max(np.abs(b[np.isfinite(b)]), initial=0.0))
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * scale)
