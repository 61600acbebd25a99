"""Readers of weights: safetensors against its own library, shards, state dicts."""

import json
import pickle
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch as safetensors_torch
import torch

from spectra import bridge
from spectra.bridge import BridgeError, load_weights, weights

DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16,
          torch.bfloat16, torch.float32, torch.float64, torch.complex64]  # fmt: skip


def _state() -> dict[str, torch.Tensor]:
    state = {str(d): torch.arange(6).reshape(2, 3).to(d) for d in DTYPES}
    return {**state, "empty": torch.zeros(0, 4), "scalar": torch.tensor(1.5)}


def _same(array: np.ndarray, tensor: torch.Tensor) -> None:
    assert array.shape == tuple(tensor.shape)
    assert str(array.dtype) == str(tensor.dtype).removeprefix("torch.")
    wide = array.astype(np.complex128)
    np.testing.assert_array_equal(wide, tensor.to(torch.complex128).numpy())


def test_reads_what_the_library_writes(tmp_path):
    state = _state()
    safetensors_torch.save_file(state, tmp_path / "x.safetensors", {"format": "pt"})
    arrays = load_weights(tmp_path / "x.safetensors")
    assert set(arrays) == set(state)
    for name, tensor in state.items():
        _same(arrays[name], tensor)


def test_the_library_reads_what_is_written(tmp_path):
    state = _state()
    arrays = load_weights(state)
    weights.write(tmp_path / "x.safetensors", arrays)
    for name, tensor in safetensors_torch.load_file(tmp_path / "x.safetensors").items():
        assert torch.equal(tensor, state[name])
    with pytest.raises(BridgeError, match="cannot store"):
        weights.write(tmp_path / "x.safetensors", {"a": np.zeros(2, ml_dtypes.float8_e5m2)})


def _shards(folder, weight_map):
    for name in ("a", "b"):
        safetensors_torch.save_file({name: torch.ones(2)}, folder / f"{name}.safetensors")
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def test_sharded(tmp_path):
    _shards(tmp_path, {"a": "a.safetensors", "b": "b.safetensors"})
    assert set(load_weights(tmp_path)) == {"a", "b"}
    assert set(load_weights(tmp_path / "model.safetensors.index.json")) == {"a", "b"}


@pytest.mark.parametrize(
    "weight_map",
    [{"a": "b.safetensors"}, {"a": "../a.safetensors"}, {"a": "c.safetensors"}, {"a": 3}, ["a"]],
)
def test_bad_shards(tmp_path, weight_map):
    _shards(tmp_path, weight_map)
    with pytest.raises(BridgeError):
        load_weights(tmp_path)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_state_dicts(tmp_path, suffix):
    module = torch.nn.Linear(3, 2)
    torch.save(module.state_dict(), tmp_path / f"x{suffix}")
    torch.save({"state_dict": module.state_dict()}, tmp_path / f"y{suffix}")
    for name in ("x", "y"):
        arrays = load_weights(tmp_path / f"{name}{suffix}")
        np.testing.assert_array_equal(arrays["weight"], module.weight.detach().numpy())


class _Attack:
    def __reduce__(self):
        return (open, ("attacked", "w"))


def test_pickles_do_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pt").write_bytes(pickle.dumps({"weight": _Attack()}))
    torch.save({"weight": _Attack()}, tmp_path / "y.pt")
    for name in ("x.pt", "y.pt"):
        with pytest.raises(BridgeError, match="weights_only"):
            load_weights(tmp_path / name)
    assert not (tmp_path / "attacked").exists()


def test_other_sources(tmp_path, monkeypatch):
    torch.save([torch.ones(2)], tmp_path / "x.pt")
    with pytest.raises(BridgeError, match="state dict"):
        load_weights(tmp_path / "x.pt")
    with pytest.raises(BridgeError, match="expected"):
        load_weights(tmp_path / "x.h5")
    with pytest.raises(BridgeError, match="holds none"):
        load_weights(tmp_path)
    with pytest.raises(BridgeError, match="cannot read"):
        load_weights(tmp_path / "x.safetensors")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(BridgeError, match="not installed"):
        load_weights(tmp_path / "x.pt")
    with pytest.raises(BridgeError, match="needs PyTorch"):
        bridge.from_torch(torch.nn.ReLU(), torch.ones(2))
