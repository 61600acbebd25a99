"""Axes of meshes: those that JAX calls explicit become automatic where a user's call comes in.

`jax.make_mesh` makes explicit axes unless told otherwise. Under them every operation has to say how its
result is split, and arrays on explicit and on automatic axes do not mix. The package computes on automatic
axes: it moves its input there and its results back, which copies nothing.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding

from spectra.base.calls import checks, explain_deleted, own_rules
from spectra.base.errors import StructureError

PyTree = Any
P = ParamSpec("P")
T = TypeVar("T")
Places = tuple[NamedSharding | None, ...]
"""Of the leaves of a vector, see `places`."""
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
    the arguments are moved there, those of the result back. Arguments are checked as by `calls.checked`, and
    the rules of JAX are `calls.own_rules`.
    """
    check = checks(fn)

    @functools.wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with own_rules():
            args, kwargs = cast("Any", check(args, cast("dict[str, Any]", kwargs)))
            try:
                if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
                    return fn(*args, **kwargs)
                return _on_twin(fn, args, kwargs)
            except (RuntimeError, ValueError) as error:
                explain_deleted(fn, args, kwargs, error)
                raise

    return call


def _on_twin(fn: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
    """The call under the automatic twin of the mesh that is set."""
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
            result = fn(*first, *rest[0], **rest[1])
        except ValueError as error:
            if "of type Auto" in str(error):  # JAX's words for a sharding that needs explicit axes
                error.add_note(_EXPLICIT_LOSS)
            raise
    return jax.tree.map(lambda leaf: _moved(leaf, mesh) if _mesh(leaf) == twin else leaf, result)


def places(like: PyTree) -> Places:
    """Where the leaves of a vector lie on a mesh of several devices; None on one, and for tracers."""
    meshes = [(leaf, _mesh(leaf)) for leaf in jax.tree.leaves(like)]
    return tuple(leaf.sharding if mesh is not None and mesh.size > 1 else None for leaf, mesh in meshes)


def placed(vector: PyTree, where: Places) -> PyTree:
    """The vector, its leaves `where` that says, as part of a program."""
    leaves, treedef = jax.tree.flatten(vector)
    pairs = zip(leaves, where, strict=True)
    return treedef.unflatten([x if p is None else lax.with_sharding_constraint(x, p) for x, p in pairs])


def zeros(structure: PyTree, beside: PyTree) -> PyTree:
    """A vector of zeros that lies as the arrays of `beside` do."""
    leaves, treedef = jax.tree.flatten(structure)
    pairs = zip(leaves, places(beside), strict=True)
    return treedef.unflatten([jnp.zeros(leaf.shape, leaf.dtype, device=place) for leaf, place in pairs])


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
