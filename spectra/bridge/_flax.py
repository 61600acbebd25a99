"""PyTorch weights into Flax trees: names matched, layouts transposed.

A PyTorch name is compared with a Flax path token by token, after splitting both at dots, slashes
and underscores: `encoder.layer.0.fc.weight` is `encoder/layer_0/fc/kernel`. Modules whose names
differ (`Dense_0`) are matched by the shapes of all their arrays where only one pair fits.
"""

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectra.bridge._errors import BridgeError
from spectra.bridge._graph import CONSTANTS
from spectra.bridge._match import Key, convert, match, split_fused
from spectra.bridge._weights import load_weights

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
        transposed: regular expressions for the names of transposed convolutions, whose kernels are
            laid out (in, out, ...) and reversed. Needed only where both channel counts are equal:
            otherwise the shapes tell.
        strict: raise on missing or unexpected names; otherwise missing arrays keep their values. A
            shape conflict always raises.

    Returns:
        A tree of the structure and the dtypes of `variables`, with the new values.

    Raises:
        BridgeError: with one table of what matched, what is missing, what is unexpected, and the
            conflicting shapes, both of them.

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
