"""Models from PyTorch and from the two files, and into them: everything is checked before anything runs.

PyTorch is imported when `export` or `from_torch` is called, not before.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base.errors import warn_user
from spectra.base.files import replacing
from spectra.bridge import schema, weights
from spectra.bridge.dtypes import canonical, category
from spectra.bridge.errors import BridgeError, FrozenParametersWarning, NodeError
from spectra.bridge.graph import Graph
from spectra.bridge.interpreter import verify
from spectra.bridge.model import TorchModel

if TYPE_CHECKING:
    import torch

    from spectra.bridge.trace import Traced

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
        UnsupportedOperatorError: the graph has an operator that this version does not support; the message
            names its modules.

    Warns:
        FrozenParametersWarning: some parameters had `requires_grad=False` and are in `model.frozen`.

    Cost:
        One abstract trace (about a millisecond per operator); no forward pass.

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
        if (size := (folder / GRAPH).stat().st_size) > schema.MAX_FILE_BYTES:
            raise BridgeError(f"{folder / GRAPH} has {size} bytes, more than {schema.MAX_FILE_BYTES}")
        document = (folder / GRAPH).read_bytes()
    except OSError as error:
        raise BridgeError(
            f"cannot read {folder / GRAPH}: {error.strerror or error}; `load` takes the folder "
            "that `export` wrote"
        ) from None
    graph = schema.parse(document, str(folder / GRAPH))
    arrays = weights.read(folder / WEIGHTS)
    if schema.file_digest(folder / WEIGHTS) != graph.weights_digest:
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
        warn_user(
            f"frozen parameters (requires_grad=False) are constants, in model.frozen: {shown}. For curvature "
            "in them too, pass {**model.params, **model.frozen} as the parameters.",
            FrozenParametersWarning,
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
        if not folder.is_dir() and (folder.exists() or folder.is_symlink()):
            kind = "a file" if folder.exists() else "a link that leads nowhere"
            raise BridgeError(f"cannot write {folder}: it is {kind}, and an exported model is a folder.")
        folder.mkdir(parents=True, exist_ok=True)
        weights.write(folder / WEIGHTS, arrays)
        document["weights"] = schema.file_digest(folder / WEIGHTS)
        document["digest"] = schema.digest(document)
        with replacing(folder / GRAPH) as temporary:
            temporary.write_text(json.dumps(document, allow_nan=False, separators=(",", ":")))
    except OSError as error:
        raise BridgeError(f"cannot write {folder}: {error.strerror or error}") from None


WHERE = "the exported graph"


def export(
    module: "torch.nn.Module | torch.export.ExportedProgram",
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    batch_axis: int | list[int | tuple[int, ...] | None] | None = 0,
    train: bool = False,
) -> None:
    """Write a PyTorch module as `weights.safetensors` and `graph.json`, to be read by `load`.

    Args:
        module: any module that `torch.export` accepts. It is exported in evaluation mode (dropout
            off, BatchNorm with its running statistics) and left as it was.
        example_inputs: a tensor, a tuple of positional arguments, or a mapping of keyword
            arguments, as the module accepts them. The graph keeps their shapes, dtypes and structure;
            arguments that are not tensors become part of it.
        path: the folder to write; created if absent.
        batch_axis: the axis whose size may change: one for all tensors, or a list with one entry for each
            tensor of `example_inputs` in order (None: no axis; (0, 1): both). With a single number, only
            tensors whose size along this axis equals the first tensor's are taken to be batched. In a module
            with recurrent layers, their time axis may change too.
        train: export in training mode instead: BatchNorm then uses the batch's statistics and its
            running statistics stay as they are. Dropout with a positive rate is refused.

    If releases of PyTorch differ in a derivative (as 2.13 and 2.14 do for a clamp at its bounds), the model
    keeps the choice of the release that exported it.

    The result is compared once with the module itself: the outputs at the example, and the gradient of a
    random combination of them. In this comparison, noise replaces inputs that are constant, and random values
    replace weights that are zero.

    Raises:
        UnsupportedOperatorError: operators without a counterpart, each with its module paths.
        BridgeError: the module or `torch.export` refuses the example; the exported model is not the module (a
            hook, an `autograd.Function` whose backward is another function, changes that autograd does not
            see); or the folder cannot be written. The message names the line and what to write instead.

    Warns:
        StaticBatchWarning: the module's Python code fixes the batch size, or branches on it
            (`if x.shape[0] > 4`); the model then accepts only that of the example. Where only a size of one
            takes another branch, the model accepts any, and is the module for two and more.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import torch
        >>> from spectra import bridge
        >>> folder = tempfile.mkdtemp()
        >>> bridge.export(torch.nn.Linear(3, 2), (torch.zeros(4, 3),), folder)
        >>> sorted(p.name for p in Path(folder).iterdir())
        ['graph.json', 'weights.safetensors']
    """
    traced = _traced(module, example_inputs, batch_axis, train)
    with jax.enable_x64(True):  # the file keeps every dtype; whoever loads it decides
        traced.check(_assembled(traced))
    save(Path(path), traced.document, traced.arrays)


def from_torch(
    module: "torch.nn.Module | torch.export.ExportedProgram",
    example_inputs: Any,
    *,
    batch_axis: int | list[int | tuple[int, ...] | None] | None = 0,
    train: bool = False,
) -> TorchModel:
    """Turn a PyTorch module into a pure JAX function with PyTorch's parameter names, in memory.

    This is `export` followed by `load`, without files; arguments, errors and warnings are those of `export`.
    The arrays are copies: training the module further does not change the model.

    Returns:
        The model: `.apply(params, *inputs)`, `.params`, `.frozen`, `.buffers`.

    Examples:
        >>> import spectra
        >>> import torch
        >>> model = spectra.from_torch(torch.nn.Linear(3, 2), (torch.zeros(4, 3),))
        >>> sorted(model.params)
        ['bias', 'weight']
    """
    traced = _traced(module, example_inputs, batch_axis, train)
    model = _assembled(traced)
    traced.check(model)
    note_frozen(model)
    return model


def _traced(module: Any, example_inputs: Any, batch_axis: Any, train: bool) -> "Traced":
    try:
        import torch  # noqa: F401
    except ImportError:
        raise BridgeError(
            "converting a module needs PyTorch: pip install 'spectra-jax[torch]'. What it exported, "
            "`spectra.bridge.load` reads without it."
        ) from None
    from spectra.bridge.trace import trace

    return trace(module, example_inputs, batch_axis, train)


def _assembled(traced: "Traced") -> TorchModel:
    """The model of a module just traced; what its graph is refused for is said with the user's line."""
    try:
        return assemble(schema.build(traced.document, WHERE), traced.arrays, WHERE)
    except NodeError as error:
        raise BridgeError(f"{error}{traced.place(error.node)}") from error.__cause__
