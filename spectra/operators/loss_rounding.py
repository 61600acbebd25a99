"""The coarsest rounding between parameters and loss, read in the loss's jaxpr."""

import dataclasses
from collections.abc import Iterator
from typing import Any, cast

import jax.numpy as jnp
from jax import lax

from spectra.operators.jaxprs import line_of, scan_parts

# What a product computes in where it says so itself; whoever leaves it open gets matmul_precision.
_ALGORITHMS = {"BF16": "bfloat16", "F16": "float16", "TF32": "tensorfloat32"}
_EPS = {"tensorfloat32": 2.0**-10}
# TF32 on a GPU, bfloat16 in one pass or three on a TPU, float32 on a CPU: what is said does not depend on it.
_PRECISIONS = {
    lax.Precision.DEFAULT: ("default precision", 2.0**-8),
    lax.Precision.HIGH: ("tensorfloat32", 2.0**-10),
}


@dataclasses.dataclass(frozen=True)
class Rounding:
    """One operation and what it rounds to."""

    dtype: str
    eps: float
    where: str  # its name, its layer and the line of the user's file, as far as they are known

    def __str__(self) -> str:
        return f"the loss computes in {self.dtype}: {self.where}"


def coarsest_rounding(jaxpr: Any, varying: list[bool], eps: float) -> Rounding | None:
    """The first of the coarsest operations on what varies that reach the loss; None if none exceeds `eps`.

    Args:
        jaxpr: closed, of a function with one real value.
        varying: for each of its arguments, whether derivatives are taken with respect to it.
        eps: of the type that the parameters have.
    """
    found: list[tuple[float, str, Any]] = []
    _follow(jaxpr.jaxpr, varying, [True] * len(jaxpr.jaxpr.outvars), eps, found)
    if not found:
        return None
    coarse, dtype, eqn = max(found, key=lambda row: row[0])
    return Rounding(dtype, coarse, _describe(eqn, dtype))


def reaches(jaxpr: Any, varying: list[bool]) -> bool:
    """Whether the value varies with these arguments, through operations that have derivatives."""
    return any(_follow(jaxpr.jaxpr, varying, [True] * len(jaxpr.jaxpr.outvars), float("inf"), []))


def _follow(jaxpr: Any, varying: list[bool], used: list[bool], eps: float, found: list[Any]) -> list[bool]:
    """Which results vary; adds to `found` what is rounded on the way."""
    equations = _used_equations(jaxpr, used)
    moving = {id(var) for var, moves in zip(jaxpr.invars, varying, strict=True) if moves}
    for eqn in equations:
        inputs = [id(var) in moving for var in eqn.invars]
        if not any(inputs):
            continue
        outputs = _inside(eqn, inputs, eps, found)
        if outputs is None:
            outputs = [_is_floating(var) for var in eqn.outvars]
            found += [(coarse, dtype, eqn) for dtype, coarse in _results(eqn) if coarse > eps]
        moving |= {id(var) for var, moves in zip(eqn.outvars, outputs, strict=True) if moves}
    return [id(var) in moving for var in jaxpr.outvars]


def _used_equations(jaxpr: Any, used: list[bool]) -> list[Any]:
    """The equations that the derivatives of results in use depend on, in order."""
    live = {id(var) for var, is_used in zip(jaxpr.outvars, used, strict=True) if is_used}
    equations: list[Any] = []
    for eqn in reversed(jaxpr.eqns):
        has_derivative = any(id(var) in live and _is_floating(var) for var in eqn.outvars)
        if has_derivative and eqn.primitive.name != "stop_gradient":
            live.update(id(var) for var in eqn.invars)
            equations.append(eqn)
    return equations[::-1]


def _is_floating(var: Any) -> bool:
    dtype = getattr(var.aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating)


def _inside(eqn: Any, inputs: list[bool], eps: float, found: list[Any]) -> list[bool] | None:
    """Which results of a loop, a branch or a call vary; None for a plain operation."""
    params, name = eqn.params, eqn.primitive.name
    if name == "cond":
        branches = [_call(branch, inputs[1:], eps, found) for branch in params["branches"]]
        return [any(flags) for flags in zip(*branches, strict=True)]
    if name == "scan":
        return _loop(params["jaxpr"], inputs, *scan_parts(eqn), eps, found)
    if name == "while":
        rest = inputs[params["cond_nconsts"] :]
        consts = params["body_nconsts"]
        return _loop(params["body_jaxpr"], rest, consts, len(rest) - consts, eps, found)
    if name == "pallas_call":  # its body works on references
        return None
    for value in params.values():
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns") and len(inner.invars) == len(inputs):
            return _call(value, inputs, eps, found)
    return None


def _call(jaxpr: Any, inputs: list[bool], eps: float, found: list[Any]) -> list[bool]:
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    return _follow(inner, inputs, [True] * len(inner.outvars), eps, found)


def _loop(
    jaxpr: Any, inputs: list[bool], consts: int, carry: int, eps: float, found: list[Any]
) -> list[bool]:
    """As `_call`, until what is carried from one pass to the next varies no more of it."""
    while True:
        outputs = _call(jaxpr, inputs, eps, found)
        carried = [a or b for a, b in zip(inputs[consts : consts + carry], outputs[:carry], strict=True)]
        if carried == inputs[consts : consts + carry]:
            return outputs
        inputs = [*inputs[:consts], *carried, *inputs[consts + carry :]]


def _results(eqn: Any) -> Iterator[tuple[str, float]]:
    """What an operation computes in: (name, eps) of each floating result, or of what it says itself."""
    if eqn.primitive.name == "reduce_precision":
        bits = eqn.params["mantissa_bits"]
        yield f"{bits} bits of mantissa", 2.0**-bits
        return
    stated = eqn.params.get("precision")
    for prefix, name in _ALGORITHMS.items():
        if str(stated).startswith(prefix):
            yield name, _EPS.get(name) or float(jnp.finfo(name).eps)
    if isinstance(stated, tuple) and eqn.outvars[0].aval.dtype == jnp.float32:
        yield from (_PRECISIONS[each] for each in cast("tuple[Any, ...]", stated) if each in _PRECISIONS)
    for var in eqn.outvars:
        if _is_floating(var):
            yield str(var.aval.dtype), float(jnp.finfo(var.aval.dtype).eps)


def _describe(eqn: Any, dtype: str) -> str:
    source = eqn.invars[0].aval
    what = f"'{eqn.primitive.name}'"
    if eqn.primitive.name == "convert_element_type":
        what = f"a cast of {source.dtype}{list(source.shape)} to {dtype}"
    layer = str(eqn.source_info.name_stack)
    return what + (f" in {layer}" if layer else "") + line_of(eqn)
