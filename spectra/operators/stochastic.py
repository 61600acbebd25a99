"""Products in stochastic arithmetic: each number inside of them is rounded up or down at random.

Where a program subtracts what is nearly equal, as the Hessian of a confident classifier does with its
probabilities, what counts is the rounding of the numbers in between. Parameters that move by one rounding may
leave these where they are: p = 1 - 7e-6 lies on a grid of 6e-8, and none of its neighbours is seen.
"""

import abc
import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spectra.base import draws, meshes, programs, stacks, trees
from spectra.base.trees import PyTree
from spectra.operators.accumulate import weighted_sum
from spectra.operators.arithmetic import Derived
from spectra.operators.base import LinearOperator, product
from spectra.operators.evaluate import bind, can_enter, evaluate
from spectra.operators.jaxprs import inner_jaxprs
from spectra.operators.pytree import operator

EXACT = frozenset[str]().union(
    ("abs", "clamp", "max", "min", "neg", "sign", "ceil", "floor", "round", "stop_gradient"),
    ("broadcast_in_dim", "concatenate", "expand_dims", "pad", "reshape", "rev", "split", "squeeze"),
    ("dynamic_slice", "dynamic_update_slice", "gather", "scatter", "select_n", "slice", "sort", "top_k"),
    ("cummax", "cummin", "reduce_max", "reduce_min", "reduce_window_max", "reduce_window_min", "transpose"),
    ("all_gather", "all_to_all", "pbroadcast", "ppermute", "pvary"),
    ("copy", "device_put", "mesh_cast", "optimization_barrier", "reshard", "sharding_constraint"),
)
"""Primitives that move numbers and round none."""
SUMS = frozenset[str]().union(
    ("cumsum", "psum", "reduce_sum", "reduce_window_sum", "scatter-add"),
    ("conv_general_dilated", "dot_general", "ragged_dot_general"),
)
"""Primitives that add many numbers: what they round is relative to these, and may be more than their sum."""
BITS = {2: (jnp.uint16, jnp.int16), 4: (jnp.uint32, jnp.int32), 8: (jnp.uint64, jnp.int64)}
SPREAD = 0.7
ODD = 0x9E3779B97F4A7C15  # the golden ratio, of which every bit of a number changes the first of the product
QUICK: dict[str, dict[str, bool | int]] = {
    "cpu": {"xla_backend_optimization_level": 1} | programs.EMITTERS,
    "gpu": {"xla_gpu_autotune_level": 0} | programs.OPTIONS["gpu"],
}
"""Compiler options, by platform, of a program that is several times as long as a product and runs four times.
For a transformer of four layers that takes 15 s of a CPU, and 25 s with fusion emitters; with no optimisation
at all it would be five times as slow."""
LONG = 1000
"""Equations of a product from which on they are used on a CPU: that of an MLP, which has a fifth of them,
compiles in a second with all optimisations, and runs in half the time."""


class Reevaluated(Derived):
    """Another operator whose products are its program, evaluated otherwise than as it stands."""

    base: Any  # with `_pieces` if its data are streamed

    @abc.abstractmethod
    def _evaluated(self, v: PyTree) -> PyTree:
        """The product of a base that is no stream."""

    @abc.abstractmethod
    def _of(self, piece: LinearOperator) -> LinearOperator:
        """The same of another base."""

    @property
    def on_host(self) -> bool:
        """True: its programs are compiled by themselves, quickly."""
        return True

    @property
    def known_in_double(self) -> bool:
        """False: its products are not those of the program as it stands."""
        return False

    def prepare(self) -> Self:
        """Itself: what products share is rounded in each of them, too."""
        return self

    def mv(self, v: PyTree) -> PyTree:
        """The product; with a stream, the sum of those with its batches."""
        if self.base.on_host:
            return weighted_sum(lambda piece: piece.mv(v), self._pieces())
        return self._evaluated(v)

    def mv_batch(self, vectors: PyTree) -> PyTree:
        """Products one by one."""
        return stacks.stacked([self.mv(v) for v in stacks.split(vectors)])

    def _pieces(self) -> Iterator[tuple[float, LinearOperator]]:
        weight: float
        for weight, piece in self.base._pieces():
            yield weight, self._of(piece)


@operator(leaves=("base", "salt"))
class StochasticOperator(Reevaluated):
    """Another operator whose products are rounded at random, as the number `salt` says.

    The difference between two products is what rounding does to one of them (Parker, Monte Carlo arithmetic,
    1997; Vignes, doi:10.1016/0378-4754(93)90003-D).
    """

    base: Any
    salt: Any

    def _evaluated(self, v: PyTree) -> PyTree:
        if trees.is_traced((self, v)):
            return _product(self.base, self.salt, v, ())
        return _program(self.base, v)(self.base, self.salt, v, meshes.places(self.base.like))

    def _of(self, piece: LinearOperator) -> "StochasticOperator":
        return StochasticOperator(piece, self.salt)


def _product(op: LinearOperator, salt: jax.Array, v: PyTree, where: meshes.Places) -> PyTree:
    """H v with every number rounded; on a mesh it lies as the parameters do."""
    result = jax.tree.unflatten(jax.tree.structure(v), rounded_at_random(product, salt, op, v))
    return meshes.placed(result, where) if where else result


def rounded_at_random(function: Any, salt: jax.Array, *args: PyTree, spread: float = SPREAD) -> list[Any]:
    """The results of a function, flat, with every number of its program rounded, or moved by `spread` eps."""
    program = jax.make_jaxpr(function)(*args)
    count, salt = itertools.count(1), (salt + 1) * jnp.uint32(0x85EBCA6B)  # so that all bits differ

    def rule(eqn: Any, inputs: list[Any]) -> list[Any]:
        own = salt + jnp.uint32(next(count) * 0x9E3779B9 % 2**32)  # steps of the golden ratio
        if eqn.primitive.name in SUMS:
            inputs[0] = _rounded(inputs[0], own ^ 1, spread)
        found = bind(eqn, inputs)
        return [_rounded(x, own, spread) for x in found] if _rounds(eqn) else found

    return evaluate(program, jax.tree.leaves(args), rule, can_enter)


def _equations(jaxpr: Any) -> int:
    return sum(1 + sum(map(_equations, inner_jaxprs(eqn))) for eqn in jaxpr.eqns)


def _program(op: Any, v: PyTree) -> Any:
    """`_product`, compiled as suits its length."""
    on_cpu = op.device.platform == "cpu"
    return _short if on_cpu and _equations(product.trace(op, v).jaxpr.jaxpr) < LONG else _long


_short = programs.jit(_product, static_argnames="where")
_long = programs.jit(_product, static_argnames="where", options=QUICK)


def _rounds(eqn: Any) -> bool:
    name, operands = eqn.primitive.name, eqn.invars
    if name in ("mul", "div"):
        return not any(_scales(var) for var in operands[name == "div" :])
    if name != "convert_element_type":
        return name not in EXACT
    before, after = operands[0].aval.dtype, eqn.outvars[0].aval.dtype
    return jnp.issubdtype(before, jnp.floating) and before.itemsize > after.itemsize


def _scales(var: Any) -> bool:
    """Whether an operand is a constant that is a power of two, or zero: multiples of it are exact."""
    value = getattr(var, "val", np.ones(1))
    return np.ndim(value) == 0 and abs(float(np.frexp(value)[0])) in (0.0, 0.5)


def _rounded(x: Any, salt: jax.Array, spread: float) -> Any:
    dtype = getattr(x, "dtype", np.dtype(bool))
    floating = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize in BITS
    return _neighbour(x, salt, spread) if floating else x


@partial(programs.jit, static_argnums=2)
def _neighbour(x: jax.Array, salt: jax.Array, spread: float = SPREAD) -> jax.Array:
    """x (1 + spread eps u), rounded: with SPREAD in half of the cases, about, a number next to x.

    u, between -1 and 1, is made of the bits of x and of the salt.
    """
    info = jnp.finfo(x.dtype)
    unsigned, signed = BITS[x.dtype.itemsize]
    mixed = (lax.bitcast_convert_type(x, unsigned) ^ salt.astype(unsigned)) * unsigned(ODD % 2**info.bits)
    share = lax.bitcast_convert_type(mixed, signed).astype(x.dtype)
    moved = x + x * (share * jnp.asarray(spread * float(info.eps) / 2.0 ** (info.bits - 1), x.dtype))
    # What is masked may be infinite or the largest number: the one would become NaN, the other infinite.
    return jnp.where(jnp.isfinite(moved), moved, x)


def largest_of_product(op: LinearOperator) -> float:
    """The largest number of H v for a random unit vector v."""
    v = draws.unit_vector(jax.random.key(0), op)
    return float(trees.largest(op.mv(v) if op.on_host else product(op, v)))


def explain_underflow(largest: float, dtype: Any, what: str) -> str:
    """What to do where a type loses digits of numbers as small as these, or of their terms; else nothing.

    A number below tiny / eps has digits below tiny, the least normal number, where XLA has zero.
    """
    info = jnp.finfo(dtype)
    if not largest < float(info.tiny) / float(info.eps):
        return ""
    return (
        f"The largest of its {what} is {largest:.1g}, and below {float(info.tiny):.2g} "
        f"{jnp.dtype(dtype).name} has zero alone: digits and whole terms are lost (underflow). Multiply the "
        "loss by a power of two, such as 2.0**60, and divide what comes of it, or scale the data."
    )


def change_by_rounding(op: LinearOperator) -> float:
    """The largest |H' v - H v| / |H v| of a random v and four H' that are moved; 0 where H v = 0."""
    v = draws.unit_vector(jax.random.key(0), op)
    image = op.mv(v) if op.on_host else product(op, v)
    size, moved = trees.length(image), [op.moved(jax.random.key(i)) for i in range(4)]
    changes = [trees.length(jax.tree.map(jnp.subtract, x.mv(v), image)) for x in moved if x is not None]
    return max(changes, default=0.0) / size if size else 0.0
