"""Which PyTorch weight belongs to which leaf of a Flax tree, and in which layout."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

Key = tuple[str, ...]

# The last part of a Flax path and the PyTorch name that fills it.
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
    "negative_slope": "weight",
}
_COLLECTIONS = ("params", "batch_stats")
_ATTENTION = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out",
              "o_proj": "out"}  # fmt: skip


def _tokens(parts: tuple[str, ...] | list[str]) -> Key:
    """Split at underscores, with one name for the attention projections."""
    named = [_ATTENTION.get(part, part) for part in parts]
    return tuple(token for part in named for token in re.split(r"[_./]+", part) if token)


def _module(key: Key) -> Key:
    parts = key[:-1]
    return _tokens(parts[1:] if parts and parts[0] in _COLLECTIONS else parts)


def split_fused(arrays: dict[str, np.ndarray], wanted: Mapping[Key, Any]) -> dict[str, np.ndarray]:
    """Cut `in_proj_weight` and `in_proj_bias` in three where Flax has separate projections."""
    modules = {_module(key) for key in wanted}
    result = {}
    for name, value in arrays.items():
        owner, _, leaf = name.rpartition(".")
        kind = {"in_proj_weight": "weight", "in_proj_bias": "bias"}.get(leaf)
        separate = (*_tokens(owner.split(".")), "query") in modules
        if kind is None or value.shape[0] % 3 or not separate:
            result[name] = value
            continue
        prefix = f"{owner}." if owner else ""
        for part, chunk in zip(("query", "key", "value"), np.split(value, 3), strict=True):
            result[f"{prefix}{part}.{kind}"] = chunk
    return result


def match(arrays: dict[str, np.ndarray], wanted: Mapping[Key, Any]) -> dict[Key, str]:
    """Pair Flax paths with PyTorch names: first by name, then whole modules by their shapes."""
    by_name: dict[tuple[Key, str], str] = {}
    for name in arrays:
        *owner, leaf = name.split(".")
        by_name[_tokens(owner), leaf] = name
    pairs: dict[Key, str] = {}
    for key in wanted:
        name = by_name.pop((_module(key), _LEAVES.get(key[-1], key[-1])), None)
        if name is not None:
            pairs[key] = name
    pairs.update(_match_shapes(arrays, wanted, pairs))
    return pairs


def _match_shapes(
    arrays: dict[str, np.ndarray], wanted: Mapping[Key, Any], pairs: dict[Key, str]
) -> dict[Key, str]:
    """Pair modules without a namesake where exactly one module on each side fits the other."""
    ours: dict[Key, list[Key]] = {}
    for key in wanted:
        if key not in pairs:
            ours.setdefault(_module(key), []).append(key)
    theirs: dict[str, list[str]] = {}
    taken = set(pairs.values())
    for name in arrays:
        if name not in taken:
            theirs.setdefault(name.rpartition(".")[0], []).append(name)
    tried = {(m, t): _fit(ours[m], theirs[t], arrays, wanted) for m in ours for t in theirs}
    fits = {pair: found for pair, found in tried.items() if found}
    rivals = Counter(m for m, _ in fits) + Counter(t for _, t in fits)
    result: dict[Key, str] = {}
    for (module, name), found in fits.items():
        if rivals[module] == rivals[name] == 1:
            result.update(found)
    return result


def _fit(
    keys: list[Key], names: list[str], arrays: dict[str, np.ndarray], wanted: Mapping[Key, Any]
) -> dict[Key, str] | None:
    """Pair all arrays of two modules, or none."""
    if len(keys) != len(names):
        return None
    leaves = {name.rpartition(".")[2]: name for name in names}
    result = {}
    for key in keys:
        name = leaves.get(_LEAVES.get(key[-1], key[-1]))
        if name is None or convert(arrays[name], key[-1], wanted[key].shape, False) is None:
            return None
        result[key] = name
    return result


def convert(value: np.ndarray, leaf: str, shape: tuple[int, ...], reverse: bool) -> Any:
    """Return the array in Flax's layout, or None where no layout has the wanted shape."""
    if leaf == "kernel":
        return _convert_kernel(value, shape, reverse)
    if value.shape == shape:
        return value
    # Biases of attention projections have their heads split in Flax.
    return value.reshape(shape) if leaf == "bias" and value.size == math.prod(shape) else None


def _convert_kernel(value: np.ndarray, shape: tuple[int, ...], reverse: bool) -> Any:
    if value.ndim == 2:
        rows, columns = value.shape
        split_out = shape[:1] == (columns,) and math.prod(shape[1:]) == rows
        split_in = shape[-1:] == (rows,) and math.prod(shape[:-1]) == columns
        return value.T.reshape(shape) if split_out or split_in else None
    if value.ndim < 3:
        return None
    axes = tuple(range(2, value.ndim))
    plain, adjoint = value.transpose(*axes, 1, 0), value.transpose(*axes, 0, 1)
    if plain.shape == shape and not reverse:
        return plain
    if adjoint.shape == shape:
        return np.flip(adjoint, tuple(range(len(axes))))
    return None
