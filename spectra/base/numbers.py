"""Numbers as users pass them: checked where they come in, by the annotation of the argument."""

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import numpy as np
from jax.core import Tracer

from spectra.base.errors import SpectraError

P = ParamSpec("P")
T = TypeVar("T")


def number_check(fn: Callable[..., Any]) -> Callable[[tuple[Any, ...], dict[str, Any]], Any] | None:
    """What checks arguments of a call of `fn` that are annotated `int` or `float`, or these or None.

    It returns them with whole numbers as `int`, 64.0 too; None where `fn` takes no such argument. Limits
    are the function's own affair.
    """
    signature = inspect.signature(fn)
    kinds = {name: _kind(one.annotation) for name, one in signature.parameters.items()}
    kinds = {name: kind for name, kind in kinds.items() if kind is not None}
    if not kinds:
        return None

    def checked(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return args, kwargs  # the call says what is missing
        for name in kinds.keys() & bound.arguments.keys():
            bound.arguments[name] = _checked(name, bound.arguments[name], *kinds[name])
        return bound.args, bound.kwargs

    return checked


def checked_numbers(fn: Callable[P, T]) -> Callable[P, T]:
    """Decorator of what users call without an operator: its numbers are checked."""
    check = number_check(fn)

    @functools.wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if check is not None:
            args, kwargs = check(args, cast("dict[str, Any]", kwargs))
        return fn(*args, **kwargs)

    return call


def one_each(values: Any, x: np.ndarray) -> np.ndarray:
    """What a function of a user's makes of an array of numbers: as many of them, or one for all."""
    found = np.asarray(values)
    if found.dtype.kind in "USmM" or found.shape not in ((), np.shape(x)):
        raise SpectraError(
            f"f makes an array of {found.dtype} of shape {found.shape} of {np.shape(x)} eigenvalues: use a "
            "function of one real number, applied to each."
        )
    return found if found.shape == np.shape(x) else np.broadcast_to(found, np.shape(x))


def _kind(annotation: Any) -> tuple[type, bool] | None:
    """int or float, and whether it may be None."""
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    kind = {"int": int, "float": float}.get(text.removesuffix(" | None"))
    return None if kind is None else (kind, text.endswith(" | None"))


def _checked(name: str, value: Any, kind: type, may_be_none: bool) -> Any:
    given = value
    if isinstance(value, Tracer) or (value is None and may_be_none):
        return given
    if kind is int:
        found = _whole(value)
        if found is not None:
            return found
    elif not isinstance(given, bool | str | bytes) and np.ndim(given) == 0 and _is_real(given):
        return given
    wanted = "whole" if kind is int else "real"
    raise SpectraError(f"{name}={value!r}: use a {wanted} number{', or None' if may_be_none else ''}.")


def _whole(value: Any) -> int | None:
    """64, of any type that stands for it, 64.0 among them; None for what is no whole number."""
    if isinstance(value, bool):
        return None
    if isinstance(value, float | np.floating):
        number = float(cast("Any", value))
        return int(number) if number.is_integer() else None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _is_real(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True
