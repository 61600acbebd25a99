"""Run one script on a laptop or on a pod: start processes, make meshes, place parameters and data on them.

All of this is JAX's own SPMD: arrays are placed on a mesh, and computations follow their placement. The
names of mesh axes have a meaning: the batch is split over `data` and `fsdp`, parameters over every axis
but `data`.
"""

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from spectra.base import trees
from spectra.base.errors import DataError, SpectraError, StructureError
from spectra.base.trees import PyTree
from spectra.operators.batches import Shared, as_batch, batch_size, shared_leaves
from spectra.operators.streams import are_arrays, is_stream

Partition = Callable[[str, Any], PartitionSpec]
HEARTBEAT = 30
"""Seconds after which the others end when a process has gone silent; a broken connection shows at once."""
BATCH_AXES = ("data", "fsdp")


def initialize(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Join the other processes of this run, before anything else touches a device.

    On Cloud TPU, Slurm, Open MPI and Kubernetes (GKE), JAX finds the others by itself. Elsewhere, pass the
    three arguments, or set the environment variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID.

    Raises:
        SpectraError: the other processes cannot be found.
    """
    count, index = os.environ.get("JAX_NUM_PROCESSES"), os.environ.get("JAX_PROCESS_ID")
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes if num_processes is not None or count is None else int(count),
            process_id if process_id is not None or index is None else int(index),
            heartbeat_timeout_seconds=HEARTBEAT,
        )
    except (ValueError, RuntimeError) as error:
        raise SpectraError(
            f"the processes of this run could not be joined: {str(error).splitlines()[0]} Outside Cloud TPU, "
            "Slurm, Open MPI and Kubernetes, set JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and "
            "JAX_PROCESS_ID for each process."
        ) from error


def make_mesh(axes: str | Mapping[str, int], devices: Any = None) -> Mesh:
    """Make the mesh of all devices with these axes, such as "data=4,model=2".

    Args:
        axes: names and sizes; one size may be -1, for all remaining devices.
        devices: by default all devices of all processes.

    Raises:
        SpectraError: the text cannot be read, or sizes do not multiply to the number of devices.

    Examples:
        >>> import spectra
        >>> dict(spectra.distributed.make_mesh("data=1,model=1").shape)
        {'data': 1, 'model': 1}
    """
    devices = jax.devices() if devices is None else list(devices)
    if isinstance(axes, str):
        pairs = re.findall(r"(\w+)\s*=\s*(-?\d+)", axes)
        if not pairs or re.sub(r"(\w+)\s*=\s*(-?\d+)", "", axes).strip(" ,"):
            raise SpectraError(f"mesh '{axes}': write the axes as in data=4,model=2.")
        if len(dict(pairs)) < len(pairs):
            raise SpectraError(f"mesh '{axes}': two axes have the same name.")
        axes = {name: int(size) for name, size in pairs}
    sizes = dict(axes)
    known = math.prod(size for size in sizes.values() if size != -1)
    if list(sizes.values()).count(-1) == 1 and known > 0 and len(devices) % known == 0:
        sizes = {name: len(devices) // known if size == -1 else size for name, size in sizes.items()}
    if any(size < 1 for size in sizes.values()) or math.prod(sizes.values()) != len(devices):
        raise SpectraError(
            f"mesh {sizes} needs {math.prod(sizes.values())} devices, but there are {len(devices)}: sizes "
            "must multiply to that number (one may be -1)."
        )
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=devices)


def shard_params(params: PyTree, mesh: Mesh, partition: Partition | PyTree | None = None) -> PyTree:
    """Place parameters on a mesh; arrays that are on it already stay as they are.

    Args:
        params: a pytree of arrays, the same on every process.
        mesh: from `make_mesh`.
        partition: a function (path, leaf) -> PartitionSpec, or a pytree of them. By default, all mesh axes
            but `data` split the largest axis of each leaf that they divide; other leaves are replicated.

    Raises:
        StructureError: a spec does not fit its leaf.
    """

    def place(path, leaf, spec: Any = None):
        name = trees.path_str(path)
        if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding):
            return leaf
        if spec is None:
            spec = partition(name, leaf) if callable(partition) else _default_spec(leaf, mesh)
        try:
            return _put(leaf, NamedSharding(mesh, spec))
        except ValueError as error:
            raise StructureError(
                f"parameter leaf '{name}' of shape {np.shape(leaf)} cannot be split as {spec} over the mesh "
                f"{dict(mesh.shape)}: {str(error).splitlines()[0]}"
            ) from error

    if partition is None or callable(partition):
        return jax.tree_util.tree_map_with_path(place, params)
    if jax.tree.structure(partition, is_leaf=_is_spec) != jax.tree.structure(params):
        raise StructureError(
            "partition is a pytree that does not match the parameters: give one PartitionSpec for each of "
            f"{', '.join(trees.path_str(path) for path, _ in jax.tree.leaves_with_path(params))}."
        )
    return jax.tree.map_with_path(place, params, partition)


def shard_data(data: Any, mesh: Mesh, *, local: bool = False, shared: Shared = None) -> Any:
    """Split one batch, or a stream of batches, over the mesh along the axis of examples.

    Every process reads the whole batch and sends its devices their part; with `local`, a process has only its
    own part, which is as large as every other's. If the number of examples is not divisible by the number of
    devices, the remaining examples form a second, replicated batch; results are exact, and products are
    driven from the host. Leaves that examples share, and batches whose leaves have no common axis, are
    replicated.

    Args:
        data: what operators take as data.
        mesh: from `make_mesh`; the batch is split over its axes `data` and `fsdp`, or the first axis.
        local: whether `data` is this process's part.
        shared: leaves of a batch that belong to all examples alike, as for the operators.

    Returns:
        A placed batch, or a function that returns an iterator over placed batches; a list of arrays of equal
        length, which could be either, stays a list.

    Raises:
        DataError: the number of examples in such a list is not divisible by the number of devices.
    """
    if is_stream(data):

        def batches() -> Iterator[PyTree]:
            source: Any = data() if callable(data) else data
            for batch in source:
                yield from _pieces(as_batch(batch), mesh, local, shared)

        return _list_or_batch(data, mesh, local, shared) if _could_be_one_batch(data) else batches
    if data is None:
        return None
    pieces = _pieces(as_batch(data), mesh, local, shared)
    if len(pieces) == 1:
        return pieces[0]
    # A list of arrays could be one batch.
    return partial(iter, pieces) if hasattr(data, "shape") else pieces


def _could_be_one_batch(data: Any) -> bool:
    return isinstance(data, list) and are_arrays(data) and len({np.shape(x)[:1] for x in data}) == 1


def _list_or_batch(items: list, mesh: Mesh, local: bool, shared: Shared) -> list:
    """The placed items of a list that is one batch or a stream: which, the operator sees."""
    placed = [_pieces(as_batch(item), mesh, local, shared) for item in items]
    if any(len(pieces) > 1 for pieces in placed):
        raise DataError(
            f"data is a list of {len(items)} arrays of equal length, one batch or a stream, whose examples "
            "do not divide over the mesh. Pass tuple(data) for one batch, lambda: iter(data) for a stream."
        )
    return [pieces[0] for pieces in placed]


def _pieces(batch: PyTree, mesh: Mesh, local: bool, shared: Shared) -> list[PyTree]:
    """The part of a batch that divides over the devices, split, and the rest, replicated."""
    leaves = jax.tree.leaves(batch)
    if not leaves or all(_on_mesh(leaf) for leaf in leaves):
        return [batch]
    axes = tuple(name for name in BATCH_AXES if name in mesh.axis_names) or mesh.axis_names[:1]
    split, whole = NamedSharding(mesh, PartitionSpec(axes)), NamedSharding(mesh, PartitionSpec())
    try:
        size, replicated = batch_size(batch, shared), shared_leaves(batch, shared)
    except DataError:
        if shared is not None:
            raise
        size, replicated = 1, [True] * len(leaves)

    def place(rows: slice, sharding: NamedSharding) -> PyTree:
        pairs = zip(leaves, replicated, strict=True)
        placed = [_put(x, whole) if alike else put(x[rows], sharding) for x, alike in pairs]
        return jax.tree.unflatten(jax.tree.structure(batch), placed)

    def put(x, sharding):
        return jax.make_array_from_process_local_data(sharding, np.asarray(x)) if local else _put(x, sharding)

    count = math.prod(mesh.shape[name] for name in axes)
    even = size if local or all(replicated) else size // count * count
    pieces = [place(slice(even), split)] if even else []
    if even < size:
        pieces.append(place(slice(even, None), whole))
    return pieces


def _is_spec(node: Any) -> bool:
    return isinstance(node, PartitionSpec)


def _on_mesh(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding)


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """An array on the mesh, each process sending what its devices hold."""
    if jax.process_count() == 1:
        return jax.device_put(leaf, sharding)
    host = np.asarray(leaf)
    sharding.shard_shape(host.shape)  # raises where it does not divide
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _default_spec(leaf: Any, mesh: Mesh) -> PartitionSpec:
    """The largest axis that they divide, split over all mesh axes but `data`."""
    names = tuple(name for name in mesh.axis_names if name != "data" and mesh.shape[name] > 1)
    count = math.prod(mesh.shape[name] for name in names)
    shape = np.shape(leaf)
    fitting = [i for i, size in enumerate(shape) if size and size % count == 0]
    if not names or not fitting:
        return PartitionSpec()
    axis = max(fitting, key=lambda i: shape[i])
    return PartitionSpec(*[None] * axis, names)
