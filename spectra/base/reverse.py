"""Tangents that reverse mode carries and forward mode does not.

`jax.custom_vjp` refuses forward mode with an error of JAX, or only where a program is compiled. Here a
tangent passes through a linear operation of its own: going backward, it is transposed like any other; going
forward, it is evaluated, and does what it has been told to.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false
# The interfaces of JAX to operations of one's own name few types.

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from spectra.base.errors import SpectraError
from spectra.base.trees import PyTree

T = TypeVar("T")
Leaves = Sequence[Any]


class Rule(NamedTuple):
    """What to do with leaves of tangents going forward, and with those of cotangents going backward."""

    forward: Callable[[Leaves], Leaves]
    backward: Callable[[Leaves], Leaves]


def _refuse(message: str, tangents: Leaves) -> Leaves:
    del tangents
    raise SpectraError(message)


_carry = Primitive("spectra_reverse_mode")
_carry.multiple_results = True
_carry.def_impl(lambda *tangents, rule: list(rule.forward(tangents)))
_carry.def_abstract_eval(lambda *avals, rule: list(avals))


def _transpose(cotangents: Leaves, *tangents: Any, rule: Rule) -> Leaves:
    if all(isinstance(one, ad.Zero) for one in cotangents):
        return [None] * len(tangents)
    return rule.backward([ad.instantiate_zeros(one) for one in cotangents])


def _lower(context: Any, *tangents: Any, rule: Rule) -> Any:
    return mlir.lower_fun(lambda *x: list(rule.forward(x)), multiple_results=True)(context, *tangents)


def _jvp(primals: Leaves, tangents: Leaves, *, rule: Rule) -> Any:
    moved = [ad.instantiate_zeros(one) for one in tangents]
    return _carry.bind(*primals, rule=rule), _carry.bind(*moved, rule=rule)


ad.primitive_jvps[_carry] = _jvp
ad.primitive_transposes[_carry] = _transpose
batching.primitive_batchers[_carry] = lambda x, axes, rule: (_carry.bind(*x, rule=rule), axes)
mlir.register_lowering(_carry, _lower)


def carried(tangents: T, rule: Rule) -> T:
    """The tangents after the rule; those of numbers that have none stay what they are."""
    leaves, form = jax.tree.flatten(tangents)
    moving = [i for i, x in enumerate(leaves) if x.dtype != jax.dtypes.float0]
    if moving:
        for i, x in zip(moving, _carry.bind(*[leaves[i] for i in moving], rule=rule), strict=True):
            leaves[i] = x
    return cast("T", jax.tree.unflatten(form, leaves))


def reverse_only(x: T, message: str) -> T:
    """The same, through which forward mode is a SpectraError with this message."""
    rule = Rule(partial(_refuse, message), lambda cotangents: cotangents)

    @jax.custom_jvp
    def gate(x: T) -> T:
        return x

    @gate.defjvp
    def _(primals: tuple[T], tangents: tuple[T]) -> tuple[T, T]:
        return gate(primals[0]), carried(tangents[0], rule)

    return gate(x)


@contextmanager
def refused_as(message: str) -> Generator[None]:
    """What JAX says where it batches forward mode of a `custom_vjp` inside jit, as this SpectraError."""
    try:
        yield
    except TypeError as error:
        if "custom_vjp" in str(error) and "forward-mode" in str(error):
            raise SpectraError(message) from error
        raise


def unknown_forward(x: PyTree, y: PyTree, backward: Callable[[PyTree], PyTree]) -> PyTree:
    """y, a function of x in the same form whose cotangents `backward` pulls back; forward, NaN."""
    form = jax.tree.structure(y)

    def pulled(cotangents: Leaves) -> Leaves:
        return jax.tree.leaves(backward(jax.tree.unflatten(form, cotangents)))

    rule = Rule(lambda tangents: [jnp.full_like(one, np.nan) for one in tangents], pulled)

    @jax.custom_jvp
    def function(x: PyTree) -> PyTree:
        del x
        return y

    @function.defjvp
    def _(primals: tuple[PyTree], tangents: tuple[PyTree]) -> tuple[PyTree, PyTree]:
        return function(primals[0]), carried(tangents[0], rule)

    return function(x)
