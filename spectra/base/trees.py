"""Vectors as pytrees: structure, checks, and arithmetic leaf by leaf."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.tree_util import PyTreeDef
from jax.typing import ArrayLike, DTypeLike

from spectra.base import arrays, programs
from spectra.base.errors import SpectraError, StructureError
from spectra.base.programs import is_traced

PyTree = Any
Kinds = tuple[tuple[tuple[int, ...], jnp.dtype], ...]  # shape and dtype of each leaf
one_program = functools.partial(programs.jit, inline=True)
"""For all leaves: outside of any, JAX compiles each operation for each shape by itself."""


def path_str(path: tuple[Any, ...]) -> str:
    """`params/Dense_0/kernel` for a key path, the form in which errors name a leaf."""
    return (
        jax.tree_util.keystr(path, simple=True, separator="/")  # pyright: ignore[reportUnknownMemberType]
        or "<root>"
    )


def working_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Dtype of the vectors that belong to parameters of `dtype`: at least float32."""
    if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 16:  # which JAX promotes to nothing
        return jnp.dtype(jnp.float32)
    return jnp.promote_types(dtype, jnp.float32)


def scalar_dtype(tree: PyTree) -> jnp.dtype:
    """Dtype of inner products over `tree`: float64 as soon as one leaf is."""
    dtypes = [jax.dtypes.canonicalize_dtype(leaf.dtype) for leaf in jax.tree.leaves(tree)]
    return jnp.result_type(jnp.float32, *dtypes)


def roundoff(tree: PyTree) -> float:
    """The unit roundoff of the coarsest leaf of vectors over `tree`, which is that of a product."""
    return max((float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(tree)), default=0.0)


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array, or the shape of one."""
    return hasattr(leaf, "dtype") and hasattr(leaf, "shape")


def is_torch(value: Any) -> bool:
    """Whether something is PyTorch's: a tensor, a parameter, a layer, or a subclass of one."""
    return any(kind.__module__.partition(".")[0] == "torch" for kind in type(value).__mro__)


_FLOATS = (
    "pass floating-point arrays only: those of an Equinox module are `params, static = eqx.partition(model, "
    "eqx.is_inexact_array)`, which the loss combines."
)


def not_an_array(path: str, leaf: Any) -> StructureError:
    """What to do about a leaf that should be an array."""
    if is_torch(leaf):
        return StructureError(
            f"parameter leaf '{path}' is PyTorch's ({type(leaf).__name__}), and spectra differentiates JAX "
            "functions of JAX arrays: spectra.from_torch(module, example_inputs) gives .params and .apply, "
            "spectra.bridge.make_loss the loss."
        )
    return StructureError(
        f"parameter leaf '{path}' is a {type(leaf).__name__}, not an array. Make it one, jnp.asarray(...), "
        f"if it is a parameter; leave it out with wrt= if not, or {_FLOATS}"
    )


def check_alive(tree: PyTree, what: str) -> None:
    """Raise a `StructureError` for an array whose memory JAX has given to another.

    Raises one, too, for a dict that JAX cannot take as a tree, and for an iterator.
    """
    whose = what.removesuffix(" leaf").removesuffix(":")
    if isinstance(tree, Iterator):
        kind = type(cast("Any", tree)).__name__
        raise StructureError(f"{whose}: a {kind} can be read only once: pass a list or a dict of arrays.")
    try:
        leaves = jax.tree.leaves(tree)
    except ValueError as error:
        raise StructureError(
            f"{whose}: JAX sorts the keys of a dict, and cannot ({error}) Use keys of "
            "one type in each dict, all strings or all whole numbers."
        ) from error
    dead = [isinstance(x, jax.Array) and not isinstance(x, Tracer) and x.is_deleted() for x in leaves]
    if not any(dead):
        return
    path, _ = jax.tree.leaves_with_path(tree)[dead.index(True)]
    raise StructureError(
        f"{what} '{path_str(path)}' was deleted: it was donated to a compiled function (donate_argnums=), "
        "which wrote its result in its place. Use the arrays that the function returned, or give it a copy: "
        "jax.tree.map(jnp.copy, params)."
    )


def check_computable(tree: PyTree, what: str) -> None:
    """Raise as `check_alive`, and for a leaf that is a shape without numbers.

    These are enough to plan with, so they are looked for only where something could not be computed.
    """
    check_alive(tree, what)
    for path, leaf in jax.tree.leaves_with_path(tree):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise StructureError(
                f"{what} '{path_str(path)}' is a jax.ShapeDtypeStruct, a shape without numbers, which is "
                "enough for spectra.plan alone: pass an operator of arrays."
            )


def lift(leaf: jax.Array) -> jax.Array:
    """A constant among the parameters: floats in the working dtype, all else as it is."""
    return leaf.astype(working_dtype(leaf.dtype)) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def vector_structure(params: PyTree) -> PyTree:
    """`ShapeDtypeStruct` of one vector over `params`; rejects leaves that are not real floats.

    Without x64 a NumPy array of float64 is one of float32 to JAX.
    """
    leaves, treedef = jax.tree.flatten(params)
    try:
        kinds = tuple((x.shape, x.dtype) for x in leaves)
    except AttributeError:  # only then the paths, which take longer to make than everything else here
        pairs = jax.tree.leaves_with_path(params)
        path, leaf = next((path, leaf) for path, leaf in pairs if not is_array(leaf))
        raise not_an_array(path_str(path), leaf) from None
    widest = jax.dtypes.canonicalize_dtype(np.float64)  # without x64 that of float64 is float32, too
    return _vector_structure(treedef, kinds, widest)


def _foreign(dtype: Any) -> bool:
    """Whether JAX has no arrays of a dtype of NumPy's: more than 8 bytes a number, or swapped ones."""
    if jnp.issubdtype(dtype, jax.dtypes.extended):  # random keys
        return False
    return not np.dtype(dtype).isnative or (np.dtype(dtype).kind == "f" and np.dtype(dtype).itemsize > 8)


@functools.lru_cache(maxsize=256)
def _vector_structure(treedef: PyTreeDef, kinds: Kinds, widest: jnp.dtype) -> PyTree:
    del widest  # in which `canonicalize_dtype` ends

    def one(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if _foreign(leaf.dtype):
            raise StructureError(
                f"parameter leaf '{path_str(path)}' has dtype {leaf.dtype}, which JAX has not: cast it, "
                "as by np.asarray(leaf, np.float32)."
            )
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            advice = f"cast it, or {_FLOATS}"
            if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):  # a random key
                advice = f"or {_FLOATS}"
            if jnp.issubdtype(leaf.dtype, jnp.complexfloating):  # a cast would drop the imaginary part
                advice = "or give its real and imaginary parts as two leaves, joined by jax.lax.complex."
            raise StructureError(
                f"parameter leaf '{path_str(path)}' has dtype {leaf.dtype}; a Hessian needs real "
                f"floating-point parameters. Make it a constant with wrt=, {advice}"
            )
        own = jax.dtypes.canonicalize_dtype(leaf.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, working_dtype(own))

    leaves = [jax.ShapeDtypeStruct(*kind) for kind in kinds]
    structure = jax.tree.map_with_path(one, treedef.unflatten(leaves))
    if not any(math.prod(leaf.shape) for leaf in jax.tree.leaves(structure)):
        raise StructureError("the parameters hold no numbers; pass a non-empty pytree of arrays.")
    return structure


def as_real(array: Any, what: str, dtype: Any = None) -> jax.Array:
    """A user's flat vectors as JAX's array; a cast would drop imaginary parts.

    Raises:
        StructureError: the array is complex.
    """
    array = jnp.asarray(array)
    if jnp.iscomplexobj(array):
        raise StructureError(
            f"{what} has dtype {array.dtype}, and the operator is real: apply it to the real part and to the "
            "imaginary part."
        )
    return array if dtype is None else array.astype(dtype)


def check_structure(tree: PyTree, structure: PyTree, what: str) -> None:
    """Raise unless `tree` has the structure and shapes of `structure`; names the first difference."""
    got, expected = jax.tree.structure(tree), jax.tree.structure(structure)
    if got != expected:
        given = f"an array of shape {tree.shape}" if hasattr(tree, "shape") else str(got)
        raise StructureError(
            f"{what} has another structure than the operator.\n  expected: {expected}\n  got:      "
            f"{given}\nPass a pytree like the parameters, or a flat array of shape ({tree_size(structure)},)."
        )
    leaves = zip(jax.tree.leaves_with_path(structure), jax.tree.leaves(tree), strict=True)
    for (path, want), leaf in leaves:
        shape = leaf.shape if hasattr(leaf, "shape") else np.shape(leaf)
        if shape != want.shape:
            raise StructureError(f"{what}: leaf '{path_str(path)}' has shape {shape}, expected {want.shape}.")
        dtype = np.asarray(leaf).dtype if is_torch(leaf) else getattr(leaf, "dtype", None)
        dtype = dtype or np.asarray(leaf).dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            raise StructureError(f"{what}: leaf '{path_str(path)}' has dtype {dtype}, expected {want.dtype}.")


def keep_leaves(tree: PyTree, indices: tuple[int, ...]) -> PyTree:
    """`tree` with None in place of all leaves but the chosen ones."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten([leaf if i in indices else None for i, leaf in enumerate(leaves)])


def replace_leaves(tree: PyTree, indices: tuple[int, ...], kept: PyTree) -> PyTree:
    """`tree` with the chosen leaves taken from `kept`, the inverse of `keep_leaves`."""
    leaves, treedef = jax.tree.flatten(tree)
    for index, leaf in zip(indices, jax.tree.leaves(kept), strict=True):
        leaves[index] = leaf
    return treedef.unflatten(leaves)


def has_values(tree: PyTree) -> bool:
    """Whether all leaves are arrays, not only shapes."""
    return all(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in jax.tree.leaves(tree))


def tree_size(structure: PyTree) -> int:
    """Number of scalars in one vector."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(structure))


def tree_bytes(structure: PyTree) -> int:
    """Bytes of one vector."""
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(structure))


def cast_like(tree: PyTree, structure: PyTree) -> PyTree:
    """`tree` as JAX arrays in the dtypes of `structure`."""
    return jax.tree.map(
        lambda x, like: (  # JAX takes longer to find that nothing is to be done
            x
            if isinstance(x, jax.Array) and x.dtype == like.dtype and not x.weak_type
            else jnp.asarray(x, like.dtype)
        ),
        tree,
        structure,
    )


def require_values(what: str, tree: PyTree) -> None:
    """Raise a SpectraError where a function that reads numbers on the host has none to read."""
    if is_traced(tree):
        raise SpectraError(f"{what} reads numbers on the host: call it outside jit, vmap and grad.")


def is_tracer(leaf: Any) -> bool:
    """Whether a leaf has no value yet."""
    return isinstance(leaf, Tracer)


@one_program
def ravel(tree: PyTree) -> jax.Array:
    """One flat vector, leaves in tree order. Only for interfaces that are flat by nature."""
    dtype = scalar_dtype(tree)
    return jnp.concatenate([jnp.ravel(leaf).astype(dtype) for leaf in jax.tree.leaves(tree)])


def unravel(flat: jax.Array, structure: PyTree) -> PyTree:
    """The inverse of `ravel` for vectors of the given structure; what is on the host stays there."""
    leaves, treedef = jax.tree.flatten(structure)
    kinds = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    return treedef.unflatten((_pieces if isinstance(flat, np.ndarray) else _cut)(flat, kinds))


def _pieces(flat: Any, kinds: Kinds) -> list[Any]:
    ends = itertools.accumulate((math.prod(shape) for shape, _ in kinds), initial=0)
    pairs = zip(itertools.pairwise(ends), kinds, strict=True)
    return [flat[start:stop].reshape(shape).astype(dtype) for (start, stop), (shape, dtype) in pairs]


_cut = one_program(_pieces, static_argnums=1)


def vdot(a: PyTree, b: PyTree) -> jax.Array:
    """Inner product sum_i a_i b_i over all leaves, in full precision."""
    total = jnp.zeros((), scalar_dtype(a))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        total = total + arrays.inner(x, y).astype(total.dtype)
    return total


def largest(a: PyTree) -> jax.Array:
    """max |a_i| over all leaves; NaN if there is one."""
    parts = [jnp.max(jnp.abs(leaf), initial=0).astype(scalar_dtype(a)) for leaf in jax.tree.leaves(a)]
    return functools.reduce(jnp.maximum, parts)


def power_of_two(size: jax.Array) -> jax.Array:
    """The power of two nearest to `size`, a unit for numbers of that size; 1 for 0, NaN and infinity.

    Squares of float32 underflow below 1e-19 and overflow beyond 1e19. Division by a power of two rounds
    nothing, so that an algorithm in such a unit gives for H and for c H the same answer up to c.
    """
    size, kind = lax.stop_gradient(size), jnp.finfo(size.dtype)
    inside = jnp.clip(size, kind.tiny, 1 / kind.tiny)  # its inverse is a normal number
    unit = lax.reduce_precision(inside, exponent_bits=kind.nexp, mantissa_bits=0)
    return jnp.where(jnp.isfinite(size) & (size > 0), unit, 1)


def norm(a: PyTree, dot: Callable[[PyTree, PyTree], jax.Array] = vdot) -> jax.Array:
    """Euclidean norm over all leaves, of numbers of any size; its derivative at zero is zero, not NaN."""
    unit = power_of_two(largest(a))
    a = scale(1 / unit, a)
    square = dot(a, a)
    return jnp.where(square == 0, 0, unit * jnp.sqrt(jnp.where(square == 0, 1, square)))


_length = programs.jit(norm)


def scale(factor: ArrayLike, a: PyTree) -> PyTree:
    """factor * a, in the dtypes of a."""
    return jax.tree.map(lambda x: (factor * x).astype(x.dtype), a)


def axpy(factor: ArrayLike, a: PyTree, b: PyTree) -> PyTree:
    """factor * a + b, in the dtypes of b."""
    return jax.tree.map(lambda x, y: (factor * x + y).astype(y.dtype), a, b)


@one_program
def difference(a: PyTree, b: PyTree) -> PyTree:
    """a - b; what is below the least normal number, and so zero in XLA, is that number with its sign."""

    def one(x: jax.Array, y: jax.Array) -> jax.Array:
        found, tiny = x - y, jnp.finfo(y.dtype).tiny
        return jnp.where((found == 0) & (x != y), jnp.where(x > y, tiny, -tiny), found).astype(y.dtype)

    return jax.tree.map(one, a, b)


def all_finite(tree: PyTree) -> bool:
    """Whether no leaf holds NaN or infinity, on the host."""
    return bool(finite(tree))


@programs.jit
def finite(tree: PyTree) -> jax.Array:
    """Whether no leaf holds NaN or infinity.

    One program for all leaves: JAX compiles each operation that is not inside of one by itself."""
    return functools.reduce(jnp.logical_and, [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)])


def length(tree: PyTree) -> float:
    """The Euclidean norm, on the host."""
    return float(_length(tree))
