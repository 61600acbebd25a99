"""Results as plain values: what JSON, tables and loggers of other packages take."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from spectra._errors import SpectraError
from spectra._paths import leaf_paths
from spectra._status import Status


def plain(value: Any) -> Any:
    """A value as numbers, texts, lists and dicts, which `json.dumps(..., allow_nan=False)` takes.

    Raises:
        SpectraError: it holds values of a trace, or what is neither number, text nor container.
    """
    if isinstance(value, Tracer):
        raise SpectraError("inside jit a result has no numbers yet: return it from the function first.")
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(float(value))
    if isinstance(value, Status):
        return value.code
    if dataclasses.is_dataclass(value):
        bulky = getattr(value, "_BULKY", ())
        names = [field.name for field in dataclasses.fields(value) if field.name not in bulky]
        return {name: plain(getattr(value, name)) for name in names}
    if (names := getattr(value, "_fields", None)) is not None:  # an Interval
        return {name: plain(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if hasattr(value, "__array__"):
        return _numbers(np.asarray(value))
    leaves = jax.tree.leaves(value)
    if leaves and all(hasattr(leaf, "__array__") for leaf in leaves):  # a module, or a state of Flax
        return {name: plain(leaf) for name, leaf in zip(leaf_paths(value), leaves, strict=True)}
    raise SpectraError(f"a {type(value).__name__} has no plain form.")


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """The single numbers and texts of a plain value by their path; lists are left out."""
    if isinstance(value, dict):
        parts = (flat(part, f"{prefix}/{name}" if prefix else name) for name, part in value.items())
        return {name: part for found in parts for name, part in found.items()}
    return {} if isinstance(value, list) else {prefix: value}


def _numbers(array: np.ndarray) -> Any:
    if array.dtype.kind in "biuU":
        return array.tolist()
    array = array.astype(np.float64)
    return array.tolist() if np.isfinite(array).all() else plain(array.tolist())
