"""Which way of differentiating a model admits, found by tracing alone."""

import warnings
from typing import TYPE_CHECKING

import jax.numpy as jnp

from spectra._errors import DifferentiationError, SpectraError
from spectra.operators import compiled
from spectra.operators.base import product
from spectra.operators.diagnose import may_refuse_at_lowering, refusing_operations
from spectra.operators.products import MODES

if TYPE_CHECKING:
    from spectra.operators.data_operator import DataOperator


def resolve_mode(piece: "DataOperator") -> str:
    """The first mode that an operator on one batch admits; says what refused the ones before it.

    Traces of the compiled functions are kept: the next checkpoint of a model traces nothing again.

    Raises:
        DifferentiationError: there is none, or not the one asked for; carries JAX's reason.
    """
    try:
        compiled.gradient.eval_shape(piece)
    except Exception as error:
        raise DifferentiationError(
            f"the loss cannot be differentiated: {_first_line(error)} Every mode needs a gradient; "
            "look for integer arithmetic, while loops or callbacks between parameters and loss."
        ) from error
    refusals: list[tuple[str, Exception]] = []
    for mode in MODES if piece.mode == "auto" else (piece.mode,):
        try:
            _require_product(piece._with(mode=mode))
        except SpectraError:  # says more than that a mode is refused
            raise
        except Exception as error:
            refusals.append((mode, error))
            continue
        if refusals:
            blame = refusing_operations(lambda op: op._value(op._merge(op._variables()), op.data), piece)
            _warn(piece, mode, refusals, blame)
        return mode
    mode, error = refusals[-1]
    raise DifferentiationError(
        f"mode='{mode}' does not work for this loss: {_first_line(error)} Use mode='auto'."
    ) from error


def _require_product(op: "DataOperator") -> None:
    traced = product.trace(op, op.structure)
    if may_refuse_at_lowering(traced.jaxpr.jaxpr):
        traced.lower()


def _warn(op: "DataOperator", mode: str, refusals: list[tuple[str, Exception]], blame: str) -> None:
    reasons = " ".join(f"{m} failed: {_first_line(e)}" for m, e in refusals)
    accuracy = ""
    if mode == "finite-difference":
        error = float(jnp.finfo(op.dtype).eps) ** (2 / 3)
        accuracy = f" Expect relative errors near {error:.0e} in each product."
    warnings.warn(
        f"the loss refuses second derivatives in {refusals[-1][0]} mode because of {blame}; "
        f"products use {mode}.{accuracy} ({reasons})",
        stacklevel=6,
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
