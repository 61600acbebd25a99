"""Whether a loss is a function of its parameters: one program at every trace, in which they have a say.

Each product may trace the loss anew. What NumPy, Python's `random` or the clock gave at one trace is a
constant of that program alone, so products would belong to several matrices.
"""

# pyright: reportPrivateUsage=false
# Operators have parts that only this package uses.

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import trees
from spectra.base.errors import StructureError, warn_user
from spectra.base.files import array_digest
from spectra.operators import differentiate
from spectra.operators.jaxprs import inner_jaxprs, line_of, traced
from spectra.operators.loss_rounding import reaches

if TYPE_CHECKING:
    from spectra.operators.data import DataOperator

MAX_KINDS = 64
_known: set[Any] = set()  # operators by structure and shapes: the next checkpoint is not looked at


def require_function(op: "DataOperator") -> None:
    """Look at the loss of an operator on one batch. Nothing is computed, unless no parameter reaches it.

    Raises:
        StructureError: the loss is another program at each trace.

    Warns where the loss does not depend on the parameters that vary: a matrix of zeros is right, and hardly
    what was meant.
    """
    if trees.is_traced(op):
        return
    leaves, treedef = jax.tree.flatten(op)
    kind = treedef, *map(jax.typeof, leaves)
    if kind in _known:
        return
    jaxpr, first = traced(differentiate.loss, op)
    nothing = None, ["the end"]
    for (eqn, one), (_, other) in itertools.zip_longest(
        _steps(jaxpr), _steps(traced_anew(op)), fillvalue=nothing
    ):
        if not _are_same(one, other):
            where = line_of(eqn) if eqn is not None else ""
            raise StructureError(
                f"the loss is another program each time that it is traced{where}. Numbers of NumPy, of "
                "Python's random or of the clock are constants of one trace, and products would belong to "
                "several matrices: draw them outside of the loss, or in it by jax.random from a key in the "
                "batch (shared= names the key). check_data=False leaves this out."
            )
    varying = [i - first in op._leaves for i in range(len(jaxpr.jaxpr.invars))]
    if not reaches(jaxpr, varying) and trees.has_values((op.params, op.data)) and _is_flat(op):
        warn_user(
            "the loss does not depend on the parameters that vary, so the matrix is zero: compute it from "
            "the params that the loss is given, not from a model or arrays that it closes over."
        )
    if len(_known) >= MAX_KINDS:
        _known.clear()
    _known.add(kind)


def traced_anew(op: "DataOperator") -> Any:
    """The program of the loss from a call of its own, where `loss` has one of an earlier call."""

    def loss(op: Any) -> jax.Array:  # a new function, of which JAX has cached no trace
        return differentiate.mean_loss(op)

    return jax.make_jaxpr(loss)(op)


def _steps(jaxpr: Any) -> Iterator[tuple[Any, list[Any]]]:
    """Each equation of a program and of those inside, with what it is and the numbers that it holds."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    held = dict(zip(map(id, inner.constvars), getattr(jaxpr, "consts", ()), strict=False))
    for eqn in inner.eqns:
        numbers = (getattr(var, "val", held.get(id(var))) for var in eqn.invars)
        readable = [x for x in numbers if x is not None and not trees.is_tracer(x)]
        options = [f"{name}={value}" for name, value in sorted(eqn.params.items()) if _is_plain(value)]
        yield eqn, [eqn.primitive.name, *options, *(str(var.aval) for var in eqn.outvars), *readable]
        for body in inner_jaxprs(eqn):
            yield from _steps(body)


def _is_plain(value: Any) -> bool:
    """Whether it is made of numbers and words, such as an exponent or the bounds of a slice."""
    return all(isinstance(leaf, (bool, int, float, str)) for leaf in jax.tree.leaves(value))


def _are_same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(map(_is_same, one, other))


def _is_same(a: Any, b: Any) -> bool:
    if a is b or isinstance(a, str) or isinstance(b, str):
        return a is b or a == b
    if jnp.shape(a) != jnp.shape(b) or jnp.result_type(a) != jnp.result_type(b):
        return False
    if isinstance(a, jax.Array) and isinstance(b, jax.Array):  # keys, and arrays that several processes hold
        return array_digest(a) == array_digest(b)
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


def _is_flat(op: "DataOperator") -> bool:
    """Whether the gradient is zero throughout: a rule of the user's may give one where the value has none."""
    return not any(jnp.any(leaf != 0) for leaf in jax.tree.leaves(differentiate.gradient(op)))
