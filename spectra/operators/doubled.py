"""Products once more in float64: what rounding does to those of a float32 program is the difference.

The user's function is traced in its own types, and the program that comes of it is evaluated with every float
and complex number in double precision, whatever it casts to. That rounds by 1e-16, so the difference is the
error of the product itself, where stochastic arithmetic gives others of its size.

A matrix may have been rounded before, from float64 to the float32 that it is given in. What that does to a
product is sampled: `rounded_once` draws numbers that would be rounded to those of the operator.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spectra.base import draws, host, meshes, programs, trees
from spectra.base.trees import PyTree
from spectra.operators import differentiate, stochastic
from spectra.operators.base import LinearOperator, product
from spectra.operators.evaluate import can_enter, evaluate
from spectra.operators.pytree import operator
from spectra.operators.stochastic import BITS, ODD, Reevaluated

QUICK = stochastic.QUICK | {"cpu": {"xla_backend_optimization_level": 0} | programs.EMITTERS}
"""Compiler options of a program that runs once or four times: for a transformer of four layers it compiles in
1.4 s of a CPU, and takes 0.77 s to run; with all optimisations 4.6 s and 0.65 s."""
HALF_RATE = {"6.0", "7.0", "8.0", "9.0", "10.0"}
"""Compute capabilities of NVIDIA cards that are at least half as fast in float64 as in float32; others are
32 or 64 times as slow (CUDA C++ Programming Guide, throughput of arithmetic instructions)."""

HELD = 4
"""Bytes of a product in float64 for each that one in float32 saves: as many again are its tangents."""
FEW = 10
"""A number that ends in so many zeros was hardly rounded: one of a thousand that were does."""


@operator(leaves=("base", "salt"))
class DoubledOperator(Reevaluated):
    """Another operator whose products are computed in float64, and rounded once; made by `in_double`."""

    base: Any
    salt: Any = None  # of `rounded_once`, where the operator's numbers are drawn

    def _evaluated(self, v: PyTree) -> PyTree:
        return self._run(_rounded_product, v, where=meshes.places(self.base.like))

    def _of(self, piece: LinearOperator) -> "DoubledOperator":
        return DoubledOperator(piece, self.salt)

    @property
    def is_given(self) -> bool:
        """Whether its numbers may have been rounded before they were given, as those of a matrix may."""
        return not self.base.known_in_double or self.base.holds_constants

    def before_rounding(self, salt: int) -> "DoubledOperator":
        """With numbers that the operator's may have been rounded from."""
        return DoubledOperator(self.base, jnp.uint32(salt))

    def distance(self, v: PyTree, image: PyTree) -> float:
        """|H v - image|, as a product with a stream and one in float64 say."""
        if self.base.on_host:
            return trees.length(trees.difference(self.mv(v), image))
        return float(self._run(_distance_of_product, v, image))

    def change(self, v: PyTree, image: PyTree) -> tuple[float, PyTree]:
        """The same distance, and the direction in which a product in float64 lies from `image`."""
        if self.base.on_host:
            off = trees.difference(self.mv(v), image)
            size = trees.length(off)
            return size, trees.scale(1 / size, off) if size else off
        size, direction = self._run(_change_of_product, v, image, where=meshes.places(self.base.like))
        return float(size), direction

    def unrounded(self, v: PyTree) -> np.ndarray:
        """The product with a vector, or with a flat array, in float64 on the host."""
        v = trees.unravel(jnp.asarray(v, self.dtype), self.structure) if isinstance(v, np.ndarray) else v
        if self.base.on_host:
            total: Any = 0.0  # of as many batches as there are: no list of them
            for w, piece in self.base._pieces():
                total = total + w * self._of(piece).unrounded(v)
            return total
        return flat(self._run(_product, v))

    def loss(self) -> float:
        """The loss of a base that has one, in float64."""
        if self.base.on_host:
            return float(sum(w * self._of(piece).loss() for w, piece in self.base._pieces()))
        return float(self._run(_loss))

    def _run(self, program: Any, *vectors: PyTree, **options: Any) -> Any:
        base, own = jax.tree.map(jnp.asarray, self.base), types()
        with jax.enable_x64(True):
            return program(base, *vectors, salt=self.salt, own=own, **options)


def flat(v: PyTree) -> np.ndarray:
    """All numbers of a vector, in float64 on the host."""
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(v)])


def doubled(op: Any) -> DoubledOperator | None:
    """The operator in float64, where its numbers are what they are, and not only known to a precision."""
    return in_double(op) if op.known_in_double else None


def in_double(op: Any) -> DoubledOperator | None:
    """Products in float64 with the numbers of an operator; None where that says nothing, or costs more than
    products that are moved.

    That is: where it computes in float64 already, on accelerators that are slow in it, without memory for it,
    and where a program has parts of a fixed type (a kernel of its own, a call of the host, `shard_map`).
    """
    if not _at_half_rate(op) or op.dtype == jnp.float64:
        return None
    free, own = host.available_bytes(op.device), sum(getattr(x, "nbytes", 0) for x in jax.tree.leaves(op))
    if free is not None and HELD * op.evaluated_bytes() + 2 * own > free:
        return None
    if op.on_host and not hasattr(op, "_pieces"):  # made from what is streamed
        return None
    return DoubledOperator(op) if _possible(op.first_piece() if op.on_host else op) else None


def symmetric_in_double(op: LinearOperator) -> DoubledOperator | None:
    """The operator in float64, if products with two random vectors are symmetric there; None if they are not,
    or cannot be had."""
    exact = doubled(op)
    if exact is None:
        return None
    vectors = [draws.unit_vector(jax.random.key(i), op) for i in range(2)]
    (u, v), (of_u, of_v) = map(flat, vectors), map(exact.unrounded, vectors)
    limit = float(np.finfo(np.float64).eps) ** 0.5 * float(np.linalg.norm(of_u) + np.linalg.norm(of_v))
    return exact if abs(u @ of_v - v @ of_u) <= limit else None


def _at_half_rate(op: LinearOperator) -> bool:
    return op.device.platform == "cpu" or getattr(op.device, "compute_capability", None) in HALF_RATE


def _possible(op: LinearOperator) -> bool:
    op, own = jax.tree.map(jnp.asarray, op), types()
    v = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), op.structure)
    try:
        with jax.enable_x64(True):
            _product.trace(op, v, salt=None, own=own)
    except (TypeError, ValueError, NotImplementedError):
        return False
    return True


def types() -> bool:
    """Whether JAX has 64 bits here: in a program traced without them random numbers are others, and labels of
    64 bits are cut."""
    return jnp.result_type(float) == jnp.float64


def in_wide(function: Any, *args: PyTree, own: bool) -> list[Any]:
    """The results of a function, flat, with every number of its program in double precision; inside jit.

    `own` are the `types` that the program has where the user calls.
    """
    return evaluate(_traced(function, *args, own=own)[0], jax.tree.leaves(args), _rule, can_enter, _lifted)


def _traced(function: Any, *args: PyTree, own: bool) -> tuple[Any, PyTree]:
    args = args if own else jax.tree.map(_narrow, args)
    with jax.enable_x64(own):
        program, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    if program.effects:
        raise TypeError("A call of the host sees each product, and float64 is not what it expects.")
    return program, shapes


def _narrow(x: Any) -> Any:
    """For its type: one float64 among float32, as a shift may be, is no type where float64 is off."""
    return x.astype(jnp.float32) if getattr(x, "dtype", None) == jnp.float64 else x


def _in_double(op: LinearOperator, v: PyTree, salt: jax.Array | None, own: bool) -> PyTree:
    program, shapes = _traced(product, op, v, own=own)
    vector = [x.astype(_wide(x.dtype)) for x in jax.tree.leaves(v)]  # which is what it is
    lift = _lifted if salt is None else partial(_drawn, salt=salt)
    found = evaluate(program, [*jax.tree.leaves(op), *vector], _rule, can_enter, lift)
    return jax.tree.unflatten(jax.tree.structure(shapes), found)


def rounded_once(x: Any, salt: jax.Array) -> jax.Array:
    """Numbers in float64 that are rounded to those of `x`, which has 16 or 32 bits.

    How far each is from x is made of the digits of x and of the salt, so that numbers that are alike, but for
    their sign and a power of two, have been rounded alike. Those of few digits have not: zero, one, a half,
    nor has infinity, with which a mask fills logits.
    """
    x = jnp.asarray(x)
    info, (unsigned, signed) = jnp.finfo(x.dtype), BITS[x.dtype.itemsize]
    digits = lax.bitcast_convert_type(x, unsigned) & unsigned(2**info.nmant - 1)
    salt = ((salt + 1) * jnp.uint32(0x85EBCA6B)).astype(unsigned)  # so that all bits differ
    mixed = (digits ^ salt) * unsigned(ODD % 2**info.bits)
    share = lax.bitcast_convert_type(mixed, signed).astype(jnp.float64) * 2.0 ** (1 - info.bits)
    few = min(FEW, info.nmant // 2)
    share = jnp.where(digits % unsigned(2**few) == 0, 0, share)
    wide = x.astype(jnp.float64)
    unit = wide / (1 + digits.astype(jnp.float64) * 2.0**-info.nmant)  # the power of two, with the sign
    return jnp.where(share == 0, wide, wide + unit * share * float(info.eps) / 2)


_compiled = partial(programs.jit, options=QUICK)
_product = _compiled(_in_double, static_argnames="own")


@partial(_compiled, static_argnames="own")
def _loss(op: Any, salt: None, own: bool) -> jax.Array:
    return in_wide(differentiate.loss, op, own=own)[0]


@partial(_compiled, static_argnames=("own", "where"))
def _rounded_product(
    op: LinearOperator, v: PyTree, salt: jax.Array | None, own: bool, where: meshes.Places
) -> PyTree:
    result = jax.tree.map(_rounded, _in_double(op, v, salt, own), v)
    return meshes.placed(result, where) if where else result


@partial(_compiled, static_argnames="own")
def _distance_of_product(
    op: LinearOperator, v: PyTree, image: PyTree, salt: jax.Array | None, own: bool
) -> jax.Array:
    changes = jax.tree.map(lambda x, y: jnp.vdot(x - y, x - y), _in_double(op, v, salt, own), image)
    return jnp.sqrt(sum(jax.tree.leaves(changes)))  # no square is out of the range of float64


@partial(_compiled, static_argnames=("own", "where"))
def _change_of_product(
    op: LinearOperator, v: PyTree, image: PyTree, salt: jax.Array | None, own: bool, where: meshes.Places
) -> tuple[jax.Array, PyTree]:
    off = jax.tree.map(jnp.subtract, _in_double(op, v, salt, own), image)
    size = jnp.sqrt(sum(jnp.vdot(x, x) for x in jax.tree.leaves(off)))
    unit = jax.tree.map(lambda x, y: (x / jnp.where(size > 0, size, 1)).astype(y.dtype), off, image)
    return size, meshes.placed(unit, where) if where else unit


def _rounded(x: jax.Array, like: jax.Array) -> jax.Array:
    """Numbers in the type of `like`. Those below its least normal one are that one: zero would be what XLA
    makes of them in a product, which is then said to have lost nothing."""
    tiny = float(jnp.finfo(like.dtype).tiny)
    flushed = (x != 0) & (jnp.abs(x) < tiny)
    return jnp.where(flushed, jnp.copysign(tiny, x), x).astype(like.dtype)


def _wide(dtype: Any) -> Any:
    """Double precision of the same kind; other types as they are."""
    if jnp.issubdtype(dtype, jnp.floating):
        return np.dtype(np.float64)
    return np.dtype(np.complex128) if jnp.issubdtype(dtype, jnp.complexfloating) else dtype


def _lifted(x: Any, var: Any) -> Any:
    """A number or array of the variable's type, in double precision."""
    dtype = getattr(var.aval, "dtype", None)
    if dtype is None or jnp.issubdtype(dtype, jax.dtypes.extended):
        return x
    return (x if isinstance(x, jax.Array) else np.asarray(x, dtype)).astype(_wide(dtype))


def _drawn(x: Any, var: Any, salt: jax.Array) -> Any:
    """The same, or what may have been rounded to it."""
    dtype = getattr(var.aval, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize not in (2, 4):
        return _lifted(x, var)
    given = x if isinstance(x, jax.Array) else np.asarray(x, dtype)
    return given if given.dtype == np.float64 else rounded_once(given, salt)


def _rule(eqn: Any, inputs: list[Any]) -> list[Any]:
    name, params = eqn.primitive.name, eqn.primitive.get_bind_params(eqn.params)
    if name == "reduce_precision":
        return inputs
    if name == "bitcast_convert_type":  # of random bits, mostly
        narrow = inputs[0].astype(eqn.invars[0].aval.dtype)
        return [_lifted(eqn.primitive.bind(narrow, **params), eqn.outvars[0])]
    params = {key: _widened(key, value) for key, value in params.items()}
    found = eqn.primitive.bind(*inputs, **params)
    found = list(found) if eqn.primitive.multiple_results else [found]
    for x, var in zip(found, eqn.outvars, strict=True):
        if x.dtype != _wide(var.aval.dtype):
            raise TypeError(f"{name} computes in {x.dtype}, whatever its operands.")
    return found


def _widened(key: str, value: Any) -> Any:
    """A parameter of a primitive, where that is the type of its result or combines two of its entries."""
    if key in ("new_dtype", "dtype", "preferred_element_type") and value is not None:
        return _wide(value)
    if key in ("update_jaxpr", "jaxpr") and value is not None:
        inner = getattr(value, "jaxpr", value)
        args = [jax.ShapeDtypeStruct(x.aval.shape, _wide(x.aval.dtype)) for x in inner.invars]
        made = jax.make_jaxpr(lambda *args: evaluate(value, args, _rule, can_enter, _lifted))(*args)
        return made.jaxpr if inner is value else made
    return None if isinstance(value, jax.lax.DotAlgorithmPreset | jax.lax.DotAlgorithm) else value
