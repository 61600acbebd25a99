"""Running a module without a trace of it: its state, its mode and the random states stay as they were."""

import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any

import numpy as np
import torch

_FRESH = random.Random(0)


@contextmanager
def preserved(module: torch.nn.Module, train: bool) -> Iterator[None]:
    """Set training or evaluation mode, and put back whatever running the module may move.

    That is buffers (BatchNorm's statistics), parameters that a layer changes in place (`max_norm=`),
    attributes that the forward pass sets, every submodule's own mode, and the random states of torch, NumPy
    and Python. Gradients are never accumulated here, so `.grad` needs no care.
    """
    attributes: list[tuple[Any, dict[str, Any]]] = [
        (holder, dict(holder)) for m in module.modules() for holder in (m.__dict__, m._parameters, m._buffers)
    ]
    tensors = [t for t in chain(module.parameters(), module.buffers()) if not t.is_inference()]
    values = [(t, t.detach().clone()) for t in tensors]
    numbers, python = np.random.get_state(), random.getstate()  # noqa: NPY002
    devices = {t.device.index for t in tensors if t.device.type == "cuda"}
    with suppress(NotImplementedError):  # an exported program keeps the mode that it was exported in
        module.train(train)
    try:
        with torch.random.fork_rng(devices=devices):
            # Another state each time: a number drawn in the forward pass, which a graph holds as a
            # constant, differs when the module is run beside it.
            np.random.seed(_FRESH.randrange(2**32))  # noqa: NPY002
            random.seed(_FRESH.random())
            yield
    finally:
        np.random.set_state(numbers)  # noqa: NPY002
        random.setstate(python)
        for holder, items in attributes:
            holder.clear()
            holder.update(items)
        with torch.no_grad():
            for tensor, value in values:
                if not torch.equal(tensor, value):  # kernels of norms move buffers without a new version
                    tensor.copy_(value)
