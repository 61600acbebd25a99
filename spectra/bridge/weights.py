"""Weights from files: safetensors, sharded safetensors, and PyTorch state dicts.

The library checks the header of a safetensors file; its errors become the bridge's.
"""

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from spectra.base import files
from spectra.base.files import replacing
from spectra.bridge.errors import BridgeError
from spectra.operators.batches import to_numpy


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


INDEX = "model.safetensors.index.json"
_ROOM = 2**27  # bytes beyond the length of a PyTorch file that its tensors may take: views, lists of names


def load_weights(source: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Read a state dict as `{dotted name: NumPy array}`.

    Args:
        source: one of a `.safetensors` file; a `*.index.json` file of a sharded model, or the
            folder that holds it, or a folder with `model.safetensors` or `weights.safetensors`; a
            `.pt`, `.pth` or `.bin` state dict, which needs PyTorch and is read with
            `weights_only=True`, so that no pickled code runs; or a mapping of names to arrays or
            tensors.

    Returns:
        Copies of the arrays, under PyTorch's names.

    Raises:
        BridgeError: the file is missing or damaged, a shard is missing or outside its folder, or
            PyTorch is needed and absent.

    Examples:
        >>> import numpy as np
        >>> from spectra import bridge
        >>> bridge.load_weights({"bias": np.zeros(3)})["bias"].shape
        (3,)
    """
    if isinstance(source, Mapping):
        return {str(name): np.array(to_numpy(value)) for name, value in source.items()}
    path = Path(source)
    if path.is_dir():
        names = (INDEX, "model.safetensors", "weights.safetensors")
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise BridgeError(f"{path} holds none of {', '.join(names)}")
        path = found[0]
    if path.name.endswith(".index.json"):
        return _read_sharded(path)
    if path.suffix == ".safetensors":
        return read(path)
    if path.suffix in (".pt", ".pth", ".bin"):
        return _read_torch(path)
    raise BridgeError(f"{path}: expected .safetensors, .index.json, .pt, .pth, .bin or a folder")


def _read_sharded(path: Path) -> dict[str, np.ndarray]:
    try:
        document = files.parse(path.read_bytes())
    except (OSError, files.JsonError) as error:
        raise BridgeError(f"cannot read {path}: {error}") from None
    places = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise BridgeError(f"{path} has no weight_map from names to files")
    arrays: dict[str, np.ndarray] = {}
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise BridgeError(f"{path}: {shard!r} is not the name of a shard in its folder")
        content = read(path.parent / shard)
        wanted = [name for name, place in places.items() if place == shard]
        absent = [name for name in wanted if name not in content]
        if absent:
            raise BridgeError(f"{path.parent / shard} lacks {absent[:5]}, which {path.name} lists")
        arrays.update({name: content[name] for name in wanted})
    return arrays


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError:
        raise BridgeError(
            f"{path} is a PyTorch file and PyTorch is not installed: convert it once to safetensors"
        ) from None
    try:
        room = path.stat().st_size + _ROOM
        _check_archive(path, room)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except BridgeError:
        raise
    except Exception as error:  # unpickling a damaged file can raise anything
        raise BridgeError(f"cannot read {path} with weights_only=True: {error}") from None
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise BridgeError(f"{path} does not hold a state dict of tensors")
    if (needed := sum(tensor.numel() * tensor.element_size() for tensor in state.values())) > 4 * room:
        # Views of one storage, each of which would become an array: tied weights are a few.
        raise BridgeError(f"{path} holds tensors of {needed:,} bytes, many times its own length")
    return {str(name): np.array(to_numpy(tensor)) for name, tensor in state.items()}


def _check_archive(path: Path, room: int) -> None:
    """Refuse a packed archive that claims to hold more than the file: PyTorch packs nothing."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            held = sum(entry.file_size for entry in archive.infolist())
        if held > room:
            raise BridgeError(f"{path} claims to hold {held:,} bytes, more than its own length")
