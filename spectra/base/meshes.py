"""Where a user's call comes in: key and numbers are checked, axes that JAX calls explicit become automatic.

`jax.make_mesh` makes explicit axes unless told otherwise. Under them every operation has to say how its
result is split, and arrays on explicit and on automatic axes do not mix. The package computes on automatic
axes: it moves its input there and its results back, which copies nothing.
"""

import contextlib
import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding

from spectra.base.errors import SpectraError, StructureError

PyTree = Any
P = ParamSpec("P")
T = TypeVar("T")
KEY_ADVICE = "pass a JAX random key, for example jax.random.key(0)."
_EXPLICIT_LOSS = (
    "spectra computes on automatic axes. Wrap a function that names explicit axes with the shardings of its "
    "arguments: jax.sharding.explicit_axes(loss_fn, in_sharding=(params_specs, data_specs))."
)


def mesh_of(tree: PyTree) -> Mesh | None:
    """The mesh of several devices on which the arrays lie; None where there is none, or several."""
    meshes = {_mesh(leaf) for leaf in jax.tree.leaves(tree)} - {None}
    several = [mesh for mesh in meshes if mesh is not None and mesh.size > 1]
    return several[0] if len(several) == 1 else None


def on_automatic_axes(tree: PyTree) -> PyTree:
    """Arrays on a mesh with explicit axes as the same arrays on its automatic twin."""

    def one(leaf: Any) -> Any:
        mesh = _mesh(leaf)
        return leaf if mesh is None or AxisType.Explicit not in mesh.axis_types else _moved(leaf, _twin(mesh))

    return jax.tree.map(one, tree)


def automatic(fn: Callable[P, T]) -> Callable[P, T]:
    """Decorator of what users call with an operator, or its spectrum: run on automatic axes.

    With a mesh of explicit axes (`jax.set_mesh`) the call runs under its automatic twin: arrays among
    the arguments are moved there, those of the result back. Arguments annotated `int` or `float` are checked,
    and a random `key`, but for a None that the annotation allows: not every way of computing draws numbers.
    Limits are the function's own affair.
    """
    signature = inspect.signature(fn)
    kinds = {name: kind for name, one in signature.parameters.items() if (kind := _kind(one))}

    def checked(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        try:
            bound = signature.bind(*args, **kwargs) if kinds else None
        except TypeError:
            bound = None  # the call says what is missing
        if bound is None:
            return args, kwargs
        for name in [name for name in bound.arguments if name in kinds]:
            value, (kind, may_be_none) = bound.arguments[name], kinds[name]
            if value is not None or not may_be_none:
                value = require_key(value) if kind is jax.Array else _number(name, value, kind, may_be_none)
                bound.arguments[name] = value
        return bound.args, bound.kwargs

    @functools.wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        args, kwargs = cast("Any", checked(args, cast("dict[str, Any]", kwargs)))
        if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
            return fn(*args, **kwargs)
        try:
            mesh = jax.sharding.get_mesh()
        except ValueError as error:
            raise StructureError(
                "spectra was called inside jit, vmap or grad on a mesh with explicit axes: wrap the function "
                "that calls it as in jax.sharding.auto_axes(f, out_sharding=PartitionSpec())."
            ) from error
        assert isinstance(mesh, Mesh)
        twin = _twin(mesh)
        with jax.set_mesh(twin):
            first, rest = args[:1], on_automatic_axes((args[1:], kwargs))  # first: an operator, moved already
            try:
                result = fn(*first, *rest[0], **rest[1])  # pyright: ignore[reportCallIssue]
            except ValueError as error:
                if "of type Auto" in str(error):  # JAX's words for a sharding that needs explicit axes
                    error.add_note(_EXPLICIT_LOSS)
                raise
        return jax.tree.map(lambda leaf: _moved(leaf, mesh) if _mesh(leaf) == twin else leaf, result)

    return call


def require_key(key: jax.Array | None, name: str = "key") -> jax.Array:
    """One JAX random key, in the typed form; raises for anything else.

    Args:
        key: what a user passed: a typed key, or the numbers of one as `jax.random.PRNGKey` makes them.
        name: of the argument.

    Raises:
        SpectraError: no key, or several.
    """
    if key is None:
        raise SpectraError(f"{name}=None: random probes need a key; {KEY_ADVICE}")
    if not isinstance(key, jax.Array | np.ndarray):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise SpectraError(f"{name}={key!r} is not a random key: {KEY_ADVICE}")
    found: Any = key
    if not jnp.issubdtype(found.dtype, jax.dtypes.prng_key):
        refusal = SpectraError(
            f"{name} is an array of {key.dtype} of shape {key.shape}, and no random key: {KEY_ADVICE}"
        )
        if found.dtype != jnp.uint32:  # 64 bits would be cut
            raise refusal
        try:  # JAX knows how many numbers a key has: that depends on its configuration
            found = cast("Any", jax.random.wrap_key_data)(jnp.asarray(found))
        except (TypeError, ValueError) as error:
            raise refusal from error
    if found.shape:
        raise SpectraError(
            f"{name} is an array of keys of shape {found.shape}: pass one of them, or jax.vmap over them."
        )
    return found


def _mesh(leaf: Any) -> Mesh | None:
    sharding = None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        return sharding.mesh
    return None


def _twin(mesh: Mesh) -> Mesh:
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def _moved(leaf: Any, mesh: Mesh) -> Any:
    sharding = NamedSharding(mesh, leaf.sharding.spec)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.device_put(leaf, sharding)


def _kind(parameter: inspect.Parameter) -> tuple[type, bool] | None:
    """int, float, or jax.Array for a random key, and whether it may be None; None for what is not checked."""
    annotation = parameter.annotation
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    if parameter.name == "key":
        return jax.Array, "None" in text
    kind = {"int": int, "float": float}.get(text.removesuffix(" | None"))
    return None if kind is None else (kind, text.endswith(" | None"))


def _number(name: str, value: Any, kind: type, may_be_none: bool) -> Any:
    """A number of a user's: 64, of any type that stands for it, 64.0 among them, where a whole one is due."""
    given = value
    if isinstance(value, Tracer):
        return given
    if not isinstance(value, bool | str | bytes):
        with contextlib.suppress(TypeError, ValueError):
            if kind is int:
                whole = isinstance(value, float | np.floating) and given.is_integer()
                return int(given) if whole else operator.index(given)
            if np.ndim(value) == 0:
                float(value)
                return value
    wanted = "whole" if kind is int else "real"
    raise SpectraError(f"{name}={value!r}: use a {wanted} number{', or None' if may_be_none else ''}.")
