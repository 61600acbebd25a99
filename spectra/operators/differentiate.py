"""How a loss is differentiated once more: three ways, which of them a model admits, compiled programs."""

# pyright: reportPrivateUsage=false
# Operators have parts that only this package uses.

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from spectra.base import programs, trees
from spectra.base.errors import DifferentiationError, SpectraError, StructureError, warn_user
from spectra.base.trees import PyTree
from spectra.operators.base import LinearOperator, product, product_batch
from spectra.operators.differences import Differences, measured
from spectra.operators.jaxprs import may_refuse_at_lowering, refusing_operations

if TYPE_CHECKING:
    from spectra.operators.data import DataOperator

Function = Callable[[PyTree], PyTree]
USUAL = Differences()
MODES = ("forward-over-reverse", "reverse-over-reverse", "finite-difference")


def derivative(
    mode: str, gradient: Function, params: PyTree, v: PyTree, differences: Differences = USUAL
) -> PyTree:
    """(∂g/∂θ) v for a function whose derivative is symmetric: the gradient of something."""
    if mode == "forward-over-reverse":
        return jax.jvp(gradient, (params,), (v,))[1]
    if mode == "reverse-over-reverse":
        return jax.vjp(gradient, params)[1](v)[0]
    return central_difference(gradient, params, v, differences)


def jacobian(
    mode: str, fn: Function, params: PyTree, differences: Differences = USUAL
) -> tuple[PyTree, Function, Function]:
    """(f(θ), v -> J v, u -> Jᵀ u), sharing one evaluation of the function where the mode admits it."""
    if mode == "forward-over-reverse":
        outputs, push = jax.linearize(fn, params)
        transposed = jax.linear_transpose(push, params)
        return outputs, push, lambda u: transposed(u)[0]
    outputs, pullback = jax.vjp(fn, params)

    def pull(u: PyTree) -> PyTree:
        return pullback(u)[0]

    if mode == "reverse-over-reverse":  # u -> Jᵀ u is linear, so its own vjp multiplies by J
        return outputs, lambda v: jax.vjp(pull, outputs)[1](v)[0], pull
    return outputs, lambda v: central_difference(fn, params, v, differences), pull


def central_difference(
    fn: Function,
    params: PyTree,
    v: PyTree,
    differences: Differences = USUAL,
    length: jax.Array | None = None,
) -> PyTree:
    """(∂f/∂θ) v from two evaluations along the normalised direction.

    `length` is that of all parameters, where `params` are some of those that the step is for.
    """
    eps = jnp.finfo(trees.scalar_dtype(params)).eps
    theta, size = trees.norm(params) if length is None else length, trees.norm(v)
    step = differences.step * eps ** (1 / 3) * jnp.where(theta > 0, theta, 1)
    per_unit = step / jnp.where(size > 0, size, 1)
    plus = fn(trees.axpy(per_unit, v, params))
    minus = fn(trees.axpy(-per_unit, v, params))
    return trees.scale(1 / (2 * per_unit), jax.tree.map(jnp.subtract, plus, minus))


def check_scalar(value: Any, name: str) -> jax.Array:
    """`value` if it is one real number; raises otherwise."""
    if not jax.tree_util.all_leaves((value,)):
        kind = type(value).__name__
    elif jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        kind = f"shape {jnp.shape(value)} and dtype {jnp.result_type(value)}"
    else:
        return value
    raise StructureError(
        f"{name} returned {kind}; it must return one real number, the mean over the batch (without "
        "auxiliary outputs)."
    )


def mean_loss(op: "DataOperator") -> jax.Array:
    """The mean loss of an operator on one batch; `loss` is the compiled program of it."""
    params = op._merge(op._variables())
    return op._mean(lambda piece: op._value(params, piece))


loss = programs.jit(mean_loss)


@programs.jit
def gradient(op: "DataOperator") -> PyTree:
    """The gradient of the mean loss, in the working dtypes."""
    variables = op._variables()
    return op._mean(lambda piece: op._gradient(piece)(variables))


@partial(programs.jit, options=programs.FUSED)
def linearize(op: "DataOperator") -> tuple[jax.Array, Callable[[PyTree], PyTree]]:
    """The loss, and v -> A v with all values that do not depend on v saved: pytrees that jit returns."""
    zero = jax.tree.map(jnp.zeros_like, op._variables())
    if op.mode == "reverse-over-reverse":  # the product itself may refuse forward mode
        pullback = jax.vjp(op.mv, zero)[1]  # A is symmetric: Aᵀ u is A u
        return mean_loss(op), jax.tree_util.Partial(_first, pullback)
    return mean_loss(op), jax.linearize(op.mv, zero)[1]


def _first(pullback: Callable[[PyTree], tuple[PyTree, ...]], u: PyTree) -> PyTree:
    return pullback(u)[0]


def resolve_mode(piece: "DataOperator") -> tuple[str, Differences]:
    """The first mode that an operator on one batch admits; says what refused the ones before it.

    Beside it the step of finite differences, which is measured where they are what is left.

    Traces of the compiled functions are kept: the next checkpoint of a model traces nothing again.

    Raises:
        DifferentiationError: there is none, or not the one asked for; carries JAX's reason.
    """
    try:
        gradient.eval_shape(piece)
    except Exception as error:
        raise DifferentiationError(
            f"the loss cannot be differentiated: {_first_line(error)} Every mode needs a gradient; "
            "look for integer arithmetic, while loops or callbacks between parameters and loss."
        ) from error
    refusals: list[tuple[str, Exception]] = []
    for mode in MODES if piece.mode == "auto" else (piece.mode,):
        try:
            require_product(piece._with(mode=mode))
        except SpectraError:  # says more than that a mode is refused
            raise
        except Exception as error:
            refusals.append((mode, error))
            continue
        found = measured(piece._with(mode=mode)) if mode == "finite-difference" else USUAL
        if refusals:
            blame = refusing_operations(lambda op: op._value(op._merge(op._variables()), op.data), piece)
            _warn(piece._with(mode=mode, differences=found), refusals, blame)
        return mode, found
    mode, error = refusals[-1]
    if piece.mode == "auto":
        raise DifferentiationError(
            f"no mode gives products with this operator: {_reasons(refusals)}"
        ) from error
    raise DifferentiationError(
        f"mode='{mode}' does not work for this loss: {_first_line(error)} Use mode='auto'."
    ) from error


def require_product(op: LinearOperator) -> None:
    """Raise what JAX raises where it cannot make a program of the product, or of several at once."""
    traced = product.trace(op, op.structure)
    if may_refuse_at_lowering(traced.jaxpr.jaxpr):
        traced.lower()
        # Where nothing uses the result of the refusing rule, the compiler drops it from a single product.
        two = jax.tree.map(lambda s: jax.ShapeDtypeStruct((2, *s.shape), s.dtype), op.structure)
        product_batch.trace(op, two)


def _warn(op: "DataOperator", refusals: list[tuple[str, Exception]], blame: str) -> None:
    accuracy = ""
    if op.mode == "finite-difference":
        accuracy = f" Expect relative errors near {op.precision:.0e} in each product."
    warn_user(
        f"the loss refuses second derivatives in {refusals[-1][0]} mode because of {blame}; "
        f"products use {op.mode}.{accuracy} ({_reasons(refusals)})",
    )


def _reasons(refusals: list[tuple[str, Exception]]) -> str:
    return " ".join(f"{mode} failed: {_first_line(error)}" for mode, error in refusals)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
