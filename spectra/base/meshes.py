"""Meshes of devices: which one arrays lie on, and how axes that JAX calls explicit are run as automatic ones.

`jax.make_mesh` makes explicit axes unless told otherwise. Under them every operation has to say how its
result is split, and arrays on explicit and on automatic axes do not mix. The package computes on automatic
axes: it moves its input there and its results back, which copies nothing.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from spectra.base.errors import StructureError
from spectra.base.keys import key_check
from spectra.base.numbers import number_check

PyTree = Any
P = ParamSpec("P")
T = TypeVar("T")
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
        return leaf if mesh is None or not _is_explicit(mesh) else _moved(leaf, _twin(mesh))

    return jax.tree.map(one, tree)


def automatic(fn: Callable[P, T]) -> Callable[P, T]:
    """Decorator of what users call with an operator: run under the automatic twin of `jax.set_mesh`'s mesh.

    Arrays among the arguments are moved to the twin, those of the result back to the user's mesh. A random
    key and numbers are checked.
    """
    checked, with_numbers = key_check(fn), number_check(fn)

    @functools.wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if checked is not None:
            kwargs = cast("Any", checked(kwargs))
        if with_numbers is not None:
            args, kwargs = with_numbers(args, kwargs)
        if not _is_explicit(jax.sharding.get_abstract_mesh()):
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


def _mesh(leaf: Any) -> Mesh | None:
    sharding = None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        return sharding.mesh
    return None


def _is_explicit(mesh: Mesh | AbstractMesh) -> bool:
    return AxisType.Explicit in mesh.axis_types


def _twin(mesh: Mesh) -> Mesh:
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def _moved(leaf: Any, mesh: Mesh) -> Any:
    sharding = NamedSharding(mesh, leaf.sharding.spec)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.device_put(leaf, sharding)
