"""PyTorch modules as pure JAX functions, and PyTorch weights in Flax trees.

`from_torch` converts a module in memory; `export` writes it as two plain files that `load` reads
where PyTorch is not installed; `to_flax` moves a state dict into an existing Flax tree; `make_loss`
combines a model with one of PyTorch's losses. PyTorch is imported only when `export` or `from_torch` is
called, or when a `.pt` file is read.
"""

from spectra.bridge.errors import (
    BridgeError,
    FrozenParametersWarning,
    StaticBatchWarning,
    UnsupportedOperatorError,
)
from spectra.bridge.files import export, from_torch, load
from spectra.bridge.flax import to_flax
from spectra.bridge.model import TorchModel
from spectra.bridge.objective import Loss, make_loss
from spectra.bridge.weights import load_weights

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
