"""Products once more in float64: what rounding does to those of a float32 program is the difference.

The user's function is traced in its own types, and the program that comes of it is evaluated with every float
and complex number in double precision, whatever it casts to. That rounds by 1e-16, so the difference is the
error of the product itself, where stochastic arithmetic gives others of its size.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import host, meshes, programs, trees
from spectra.base.trees import PyTree
from spectra.operators import stochastic
from spectra.operators.base import LinearOperator, product
from spectra.operators.evaluate import can_enter, evaluate
from spectra.operators.pytree import operator
from spectra.operators.stochastic import EMITTERS, Reevaluated

QUICK = stochastic.QUICK | {"cpu": {"xla_backend_optimization_level": 0} | EMITTERS}
"""Compiler options of a program that runs once or four times: for a transformer of four layers it compiles in
1.4 s of a CPU, and takes 0.77 s to run; with all optimisations 4.6 s and 0.65 s."""
HALF_RATE = {"6.0", "7.0", "8.0", "9.0", "10.0"}
"""Compute capabilities of NVIDIA cards that are at least half as fast in float64 as in float32; others are
32 or 64 times as slow (CUDA C++ Programming Guide, throughput of arithmetic instructions)."""

HELD = 4
"""Bytes of a product in float64 for each that one in float32 saves: as many again are its tangents."""


@operator(leaves=("base",))
class DoubledOperator(Reevaluated):
    """Another operator whose products are computed in float64, and rounded once; made by `doubled`."""

    base: Any

    def _evaluated(self, v: PyTree) -> PyTree:
        return self._run(_rounded_product, v, where=meshes.places(self.base.like))

    def _of(self, piece: LinearOperator) -> "DoubledOperator":
        return DoubledOperator(piece)

    def distance(self, v: PyTree, image: PyTree) -> float:
        """|H v - image|, as a product with a stream and one in float64 say."""
        if self.base.on_host:
            return trees.length(jax.tree.map(jnp.subtract, self.mv(v), image))
        return float(self._run(_distance_of_product, v, image))

    def unrounded(self, v: np.ndarray) -> np.ndarray:
        """The product with a flat vector in float64, on the host; with a stream, rounded once."""
        tree = trees.unravel(jnp.asarray(v, self.dtype), self.structure)
        found = self.mv(tree) if self.base.on_host else self._run(_product, tree)
        return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(found)])

    def _run(self, program: Any, *vectors: PyTree, **options: Any) -> Any:
        base = jax.tree.map(jnp.asarray, self.base)
        with jax.enable_x64(True):
            return program(base, *vectors, **options)


def doubled(op: Any) -> DoubledOperator | None:
    """The operator in float64; None where that says nothing, or costs more than products that are moved.

    That is: where it computes in float64 already, where parts of it are only known to a precision, on
    accelerators that are slow in float64, without memory for it, and where a program has parts of a fixed
    type (a kernel of its own, a call of the host, `shard_map`).
    """
    if not op.known_in_double or not _at_half_rate(op) or op.dtype == jnp.float64:
        return None
    free = host.available_bytes(op.device)
    if free is not None and HELD * op.evaluated_bytes() > free:
        return None
    if op.on_host and not hasattr(op, "_pieces"):  # made from what is streamed
        return None
    return DoubledOperator(op) if _possible(op.first_piece() if op.on_host else op) else None


def _at_half_rate(op: LinearOperator) -> bool:
    return op.device.platform == "cpu" or getattr(op.device, "compute_capability", None) in HALF_RATE


def _possible(op: LinearOperator) -> bool:
    op = jax.tree.map(jnp.asarray, op)
    v = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), op.structure)
    try:
        with jax.enable_x64(True):
            _product.trace(op, v)
    except (TypeError, ValueError, NotImplementedError):
        return False
    return True


def _in_double(op: LinearOperator, v: PyTree) -> PyTree:
    with jax.enable_x64(False):
        program, shapes = jax.make_jaxpr(product, return_shape=True)(op, v)
    found = evaluate(program, jax.tree.leaves((op, v)), _rule, can_enter, _lifted)
    return jax.tree.unflatten(jax.tree.structure(shapes), found)


_compiled = partial(programs.jit, options=QUICK)
_product = _compiled(_in_double)


@partial(_compiled, static_argnames="where")
def _rounded_product(op: LinearOperator, v: PyTree, where: meshes.Places) -> PyTree:
    result = jax.tree.map(lambda x, y: x.astype(y.dtype), _in_double(op, v), v)
    return meshes.placed(result, where) if where else result


@_compiled
def _distance_of_product(op: LinearOperator, v: PyTree, image: PyTree) -> jax.Array:
    changes = jax.tree.map(lambda x, y: jnp.vdot(x - y, x - y), _in_double(op, v), image)
    return jnp.sqrt(sum(jax.tree.leaves(changes)))  # no square is out of the range of float64


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
