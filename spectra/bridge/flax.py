"""PyTorch weights into Flax trees: names matched, layouts transposed."""

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectra.bridge.errors import BridgeError
from spectra.bridge.graph import CONSTANTS
from spectra.bridge.weights import load_weights

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


Rename = Mapping[str, str] | Callable[[str], str]


def to_flax(
    weights: str | os.PathLike[str] | Mapping[str, Any],
    variables: Any,
    *,
    rename: Rename | None = None,
    transposed: tuple[str, ...] = (),
    strict: bool = True,
) -> Any:
    """Put a PyTorch state dict into an existing Flax tree.

    Dense kernels are transposed, convolution kernels go from OIHW to HWIO (and their one- and
    three-dimensional forms), weights of norms become `scale`, running statistics `mean` and `var`,
    and PyTorch's fused or separate attention projections become `query`, `key`, `value` and `out`
    with their heads split.

    Args:
        weights: what `load_weights` takes: a file, a folder, a mapping of names to arrays.
        variables: linen variables (`{"params": ..., "batch_stats": ...}`), an `nnx.State`, or any
            tree of arrays with such paths. Not changed. Arrays that are not floating (counters,
            random keys) stay as they are.
        rename: `{regular expression: replacement}`, applied in order to every PyTorch name before
            it is compared, or a function from name to name.
        transposed: regular expressions for the names of transposed convolutions, whose kernels are laid out
            (in, out, ...) and reversed. Needed only if both channel counts are equal; otherwise the shapes
            tell.
        strict: raise on missing or unexpected names; otherwise missing arrays keep their values. A
            shape conflict always raises.

    Returns:
        A tree of the structure and the dtypes of `variables`, with the new values.

    Raises:
        BridgeError: names or shapes do not fit; the message has a table of matched, missing and unexpected
            names and of conflicting shapes.

    Examples:
        >>> import flax.linen as nn
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from spectra import bridge
        >>> variables = nn.Dense(2).init(jax.random.key(0), jnp.zeros((1, 3)))
        >>> state_dict = {"head.weight": np.ones((2, 3)), "head.bias": np.zeros(2)}
        >>> variables = bridge.to_flax(state_dict, variables, rename={r"^head\\.": ""})
        >>> variables["params"]["kernel"].shape
        (3, 2)

        For nnx, `nnx.update(model, bridge.to_flax(state_dict, nnx.state(model)))`.
    """
    arrays = _prepare(load_weights(weights), rename)
    leaves, structure = jax.tree_util.tree_flatten_with_path(variables)
    targets = {_path(path): leaf for path, leaf in leaves}
    wanted = {k: v for k, v in targets.items() if _is_weight(v)}
    arrays = split_fused(arrays, wanted)
    pairs = match(arrays, wanted)
    values, conflicts = {}, []
    for key, name in pairs.items():
        reverse = any(re.search(pattern, name) for pattern in transposed)
        value = convert(arrays[name], key[-1], wanted[key].shape, reverse)
        if value is None:
            conflicts.append((name, arrays[name].shape, key, wanted[key].shape))
        else:
            values[key] = jnp.array(value, wanted[key].dtype)
    missing = [k for k in wanted if k not in pairs]
    unexpected = [n for n in arrays if n not in pairs.values()]
    if conflicts or (strict and (missing or unexpected)):
        raise BridgeError(_table(pairs, missing, unexpected, conflicts, arrays, wanted))
    return structure.unflatten([values.get(_path(path), leaf) for path, leaf in leaves])


def _prepare(arrays: dict[str, np.ndarray], rename: Rename | None) -> dict[str, np.ndarray]:
    result: dict[str, np.ndarray] = {}
    for name, value in arrays.items():
        # Counters and index tables, and constants of a forward pass in an exported file: not weights.
        if not jnp.issubdtype(value.dtype, jnp.floating) or name.startswith(CONSTANTS):
            continue
        new = rename(name) if callable(rename) else name
        for pattern, replacement in [] if rename is None or callable(rename) else rename.items():
            new = re.sub(pattern, replacement, new)
        if new in result:
            raise BridgeError(f"rename maps two weights to {new!r}")
        result[new] = value
    return result


def _path(path: tuple[Any, ...]) -> Key:
    """A tree path as strings; nnx variables end in an attribute `value` that names nothing."""
    parts = [str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path]
    while parts and parts[-1] in ("value", "raw_value"):
        parts.pop()
    return tuple(parts)


def _is_weight(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating)


def _table(pairs, missing, unexpected, conflicts, arrays, wanted) -> str:
    """One table of the whole comparison."""
    failed = {c[2] for c in conflicts}
    rows = [("matched", n, arrays[n].shape, k) for k, n in pairs.items() if k not in failed]
    rows = [(status, n, str(s), "/".join(k), str(wanted[k].shape)) for status, n, s, k in rows]
    rows += [("shape", n, str(s), "/".join(k), str(t)) for n, s, k, t in conflicts]
    rows += [("missing", "-", "-", "/".join(k), str(wanted[k].shape)) for k in missing]
    rows += [("unexpected", n, str(arrays[n].shape), "-", "-") for n in unexpected]
    head = ("status", "PyTorch name", "shape", "Flax path", "shape")
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(5)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in [head, *rows]]
    return (
        f"the weights do not fit the Flax tree: {len(missing)} missing, {len(unexpected)} "
        f"unexpected, {len(conflicts)} of another shape; use rename= or strict=False\n"
        + "\n".join(line.rstrip() for line in lines)
    )
