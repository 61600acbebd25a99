"""PyTorch modules as pure JAX functions, and PyTorch weights in Flax trees.

`from_torch` converts a module in memory; `export` writes it as two plain files that `load` reads
where PyTorch is not installed; `to_flax` moves a state dict into an existing Flax tree; `make_loss`
joins a model with one of PyTorch's losses. PyTorch is imported by `export`, by `from_torch` and for
`.pt` files, when they are called.
"""

from spectra.bridge._errors import (
    BridgeError,
    FrozenParametersWarning,
    StaticBatchWarning,
    UnsupportedOperatorError,
)
from spectra.bridge._export import export, from_torch
from spectra.bridge._files import load
from spectra.bridge._flax import to_flax
from spectra.bridge._model import TorchModel
from spectra.bridge._objective import Loss, make_loss
from spectra.bridge._weights import load_weights

__all__ = [
    "BridgeError",
    "FrozenParametersWarning",
    "Loss",
    "StaticBatchWarning",
    "TorchModel",
    "UnsupportedOperatorError",
    "export",
    "from_torch",
    "load",
    "load_weights",
    "make_loss",
    "to_flax",
]
