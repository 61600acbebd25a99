"""Safetensors files as NumPy arrays. The library checks the header; its errors become the bridge's."""

import os
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from spectra._files import replacing
from spectra.bridge._errors import BridgeError


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Return `{name: array}`.

    Raises:
        BridgeError: the file is missing or truncated, its header does not describe its bytes, or a
            tensor has a dtype without a counterpart (the narrow floats of quantised models).
    """
    try:
        with safe_open(path, framework="np") as file:
            arrays = {name: _tensor(file, name) for name in file.keys()}  # noqa: SIM118, not a mapping
    except OSError as error:
        raise BridgeError(f"cannot read {path}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise BridgeError(f"{path} is not a safetensors file, or a damaged one: {error}") from None
    except ValueError as error:
        raise BridgeError(f"{path}: {error}") from None
    return arrays


def _tensor(file, name: str) -> np.ndarray:
    code = file.get_slice(name).get_dtype()
    if code not in _CODES:
        raise ValueError(f"tensor {name[:80]!r} has dtype {code}; the bridge reads {sorted(_CODES)}")
    array = file.get_tensor(name)
    if code == "BOOL" and array.view(np.uint8).max(initial=0) > 1:
        raise ValueError(f"tensor {name[:80]!r} holds bytes that are not booleans")
    return array


_CODES = {
    "BOOL": "bool", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64",
    "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64",
}  # fmt: skip


def write(path: str | os.PathLike[str], arrays: dict[str, np.ndarray]) -> None:
    """Write `{name: array}`; the file appears complete or not at all.

    Raises:
        BridgeError: a dtype that the format does not have.
    """
    for name, array in arrays.items():
        if str(array.dtype) not in _CODES.values():
            raise BridgeError(f"tensor {name!r} has dtype {array.dtype}, which safetensors cannot store")
    # The library writes the memory as it lies: order="C" makes that the array's own order.
    ordered = {k: np.asarray(v, order="C") for k, v in arrays.items()}
    try:
        with replacing(Path(path)) as temporary:
            save_file(ordered, temporary, {"format": "pt"})
    except SafetensorError as error:
        raise BridgeError(f"cannot write {path}: {error}") from None
