"""The two ways out of PyTorch. PyTorch is imported when they are called, not before."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from spectra.bridge import _files, _schema
from spectra.bridge._errors import BridgeError
from spectra.bridge._model import TorchModel

if TYPE_CHECKING:
    import torch

    from spectra.bridge._trace import Traced

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
        batch_axis: the axis that may change its size: one for all tensors, or a list with one entry
            for each tensor of `example_inputs` in order (None: fixed; (0, 1): both). With a single number,
            only tensors whose size there equals the first tensor's are taken to be batched. In a module
            with recurrent layers their time axis may change too.
        train: export in training mode instead: BatchNorm then uses the batch's statistics and its
            running statistics stay as they are. Dropout with a positive rate is refused.

    Where releases of PyTorch differ in a derivative (of a clamp at its bounds, between 2.13 and 2.14), the
    model keeps the choice of the one that exported it.

    The result is compared once with the module itself, at the example (at noise where an input is
    constant, at random values for weights that are zero): outputs, and the gradient of a random
    combination of them.

    Raises:
        UnsupportedOperatorError: operators without a counterpart, each with its module paths.
        BridgeError: the module or `torch.export` refuses the example; the exported model is not the module (a
            hook, an `autograd.Function` whose backward is another function, changes that autograd does not
            see); or the folder cannot be written. The message names the line and what to write instead.

    Warns:
        StaticBatchWarning: the module's Python code fixes the batch size; the model then accepts
            the example's only.

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
        traced.check(_files.assemble(_schema.build(traced.document, WHERE), traced.arrays, WHERE))
    _files.save(Path(path), traced.document, traced.arrays)


def from_torch(
    module: "torch.nn.Module | torch.export.ExportedProgram",
    example_inputs: Any,
    *,
    batch_axis: int | list[int | tuple[int, ...] | None] | None = 0,
    train: bool = False,
) -> TorchModel:
    """Turn a PyTorch module into a pure JAX function with PyTorch's parameter names, in memory.

    The same as `export` followed by `load`, without files; arguments, errors and warnings are those
    of `export`. The arrays are copies: training the module further does not change the model.

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
    model = _files.assemble(_schema.build(traced.document, WHERE), traced.arrays, WHERE)
    traced.check(model)
    _files.note_frozen(model)
    return model


def _traced(module: Any, example_inputs: Any, batch_axis: Any, train: bool) -> "Traced":
    try:
        import torch  # noqa: F401
    except ImportError:
        raise BridgeError(
            "converting a module needs PyTorch: pip install 'spectra-jax[torch]'. What it exported, "
            "`spectra.bridge.load` reads without it."
        ) from None
    from spectra.bridge._trace import trace

    return trace(module, example_inputs, batch_axis, train)
