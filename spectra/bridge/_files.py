"""Models from the two files and into them: everything is checked before anything runs."""

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectra._files import replacing
from spectra.bridge import _safetensors, _schema
from spectra.bridge._errors import BridgeError, FrozenParametersWarning
from spectra.bridge._graph import Graph
from spectra.bridge._interpreter import verify
from spectra.bridge._model import TorchModel
from spectra.bridge._promotion import canonical, category

GRAPH, WEIGHTS = "graph.json", "weights.safetensors"


def load(path: str | os.PathLike[str]) -> TorchModel:
    """Read a model from the folder that `export` wrote; PyTorch is not needed.

    The two files are checked in full before anything runs: digests, schema, every name and size,
    every operator, and a trace of the whole graph on abstract arrays against PyTorch's dtypes and
    shapes. No code and no pickle is read.

    Args:
        path: the folder with `graph.json` and `weights.safetensors`.

    Returns:
        The model. A float64 or complex128 model needs `jax.enable_x64`.

    Raises:
        BridgeError: a file is missing, damaged or of another version, or x64 is needed.
        UnsupportedOperatorError: an operator that this version does not have, with its modules.

    Warns:
        FrozenParametersWarning: some parameters had `requires_grad=False`: they are in `model.frozen`.

    Cost:
        One abstract trace (about a millisecond an operator); no forward pass.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> from spectra import bridge
        >>> folder = tempfile.mkdtemp()
        >>> bridge.export(torch.nn.Linear(3, 2), (torch.zeros(4, 3),), folder)
        >>> model = bridge.load(folder)  # in any process, with or without PyTorch
        >>> sorted(model.params)
        ['bias', 'weight']
    """
    folder = Path(path)
    try:
        if (size := (folder / GRAPH).stat().st_size) > _schema.MAX_FILE_BYTES:
            raise BridgeError(f"{folder / GRAPH} has {size} bytes, more than {_schema.MAX_FILE_BYTES}")
        document = (folder / GRAPH).read_bytes()
    except OSError as error:
        raise BridgeError(
            f"cannot read {folder / GRAPH}: {error.strerror or error}; `load` takes the folder "
            "that `export` wrote"
        ) from None
    graph = _schema.parse(document, str(folder / GRAPH))
    arrays = _safetensors.read(folder / WEIGHTS)
    if _schema.file_digest(folder / WEIGHTS) != graph.weights_digest:
        raise BridgeError(
            f"{folder / WEIGHTS} is not the file that {GRAPH} was written with: it was changed or "
            "damaged. Other weights go in as the `params` of `apply` (see `load_weights`)."
        )
    model = assemble(graph, arrays, str(folder))
    note_frozen(model)
    return model


def assemble(graph: Graph, arrays: Mapping[str, np.ndarray], where: str) -> TorchModel:
    """Join a checked graph with its arrays and verify the pair."""
    groups: dict[str, dict[str, jax.Array]] = {"parameter": {}, "frozen": {}, "buffer": {}, "constant": {}}
    # Where all are frozen, the curvature in all of them is what somebody asks for.
    some_train = any(t.trainable for t in graph.tensors if t.kind == "parameter")
    extra = set(arrays) - {t.key for t in graph.tensors}
    if extra:
        raise BridgeError(f"{where}: the weights hold unknown tensors {sorted(extra)[:8]}")
    for tensor in graph.tensors:
        array = arrays.get(tensor.key)
        if array is None:
            raise BridgeError(f"{where}: the weights lack {tensor.key!r}")
        if array.shape != tensor.shape or str(array.dtype) != tensor.dtype:
            raise BridgeError(
                f"{where}: {tensor.key!r} is {array.dtype}{list(array.shape)} in the weights and "
                f"{tensor.dtype}{list(tensor.shape)} in the graph"
            )
        frozen = tensor.kind == "parameter" and some_train and not tensor.trainable
        groups["frozen" if frozen else tensor.kind][tensor.key] = _to_jax(tensor.key, array, where)
    parameters, frozen, buffers, constants = groups.values()
    verify(graph, {**parameters, **frozen}, {**buffers, **constants}, where)
    return TorchModel(graph, parameters, buffers, constants, frozen)


def note_frozen(model: TorchModel) -> None:
    """Warn of parameters that are left out, in the name of the caller's caller."""
    if names := list(model.frozen):
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        warnings.warn(
            f"frozen parameters (requires_grad=False) are constants, in model.frozen: {shown}. For curvature "
            "in them too, pass {**model.params, **model.frozen} as the parameters.",
            FrozenParametersWarning,
            stacklevel=3,
        )


def _to_jax(key: str, array: np.ndarray, where: str) -> jax.Array:
    dtype = canonical(array.dtype)
    if dtype != array.dtype:
        if category(array.dtype) >= 2:
            raise BridgeError(
                f"{where}: {key!r} is {array.dtype}, which JAX holds only with "
                "x64: run inside `with jax.enable_x64(True)`, set JAX_ENABLE_X64=1, or export module.float()"
            )
        limits = np.iinfo(dtype)
        if array.size and (array.min() < limits.min or array.max() > limits.max):
            raise BridgeError(f"{where}: {key!r} has values outside {dtype}: enable x64")
    # A copy: the arrays may be mapped from a file or belong to a module that goes on training.
    return jnp.array(array, dtype=dtype, copy=True)


def save(folder: Path, document: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Write the two files, the weights first, so that the graph never points to nothing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _safetensors.write(folder / WEIGHTS, arrays)
        document["weights"] = _schema.file_digest(folder / WEIGHTS)
        document["digest"] = _schema.digest(document)
        with replacing(folder / GRAPH) as temporary:
            temporary.write_text(json.dumps(document, allow_nan=False, separators=(",", ":")))
    except OSError as error:
        raise BridgeError(f"cannot write {folder}: {error.strerror or error}") from None
