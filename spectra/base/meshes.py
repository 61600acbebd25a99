"""Axes of meshes: those that JAX calls explicit become automatic where a user's call comes in.

`jax.make_mesh` makes explicit axes unless told otherwise. Under them every operation has to say how its
result is split, and arrays on explicit and on automatic axes do not mix. The package computes on automatic
axes: it moves its input there and its results back, which copies nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding

PyTree = Any
Places = tuple[NamedSharding | None, ...]
"""Of the leaves of a vector, see `places`."""


def mesh_of(tree: PyTree) -> Mesh | None:
    """The mesh of several devices on which the arrays lie; None where there is none, or several."""
    meshes = {_mesh(leaf) for leaf in jax.tree.leaves(tree)} - {None}
    several = [mesh for mesh in meshes if mesh is not None and mesh.size > 1]
    return several[0] if len(several) == 1 else None


def on_automatic_axes(tree: PyTree) -> PyTree:
    """Arrays on a mesh with explicit axes as the same arrays on its automatic twin."""

    def one(leaf: Any) -> Any:
        mesh = _mesh(leaf)
        return leaf if mesh is None or AxisType.Explicit not in mesh.axis_types else _moved(leaf, twin(mesh))

    return jax.tree.map(one, tree)


def twin(mesh: Mesh) -> Mesh:
    """The same mesh with automatic axes."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def moved_from_twin(tree: PyTree, mesh: Mesh) -> PyTree:
    """Arrays on the automatic twin of a mesh as the same arrays on the mesh itself.

    Operators stay where they multiply.
    """
    own = twin(mesh)

    def one(leaf: Any) -> Any:
        return _moved(leaf, mesh) if _mesh(leaf) == own else leaf

    def multiplies(node: Any) -> bool:
        return hasattr(node, "mv")

    return jax.tree.map(one, tree, is_leaf=multiplies)


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


def _moved(leaf: Any, mesh: Mesh) -> Any:
    sharding = NamedSharding(mesh, leaf.sharding.spec)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.device_put(leaf, sharding)
