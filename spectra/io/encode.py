"""Results as JSON: classes and their fields by name, arrays set apart or written out, never a pickle."""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from spectra._errors import SpectraError
from spectra._paths import leaf_paths
from spectra._status import Status
from spectra.report import SpectrumReport
from spectra.results import (
    ConditionNumber,
    Density,
    Eigenpairs,
    Estimate,
    Interval,
    LayerConditions,
    LossSlice,
    Moments,
    Plan,
    Quadrature,
    Sharpness,
    Snapshot,
    SpectrumHistory,
    Tridiagonal,
)
from spectra.variability import DataVariability

CLASSES = {
    cls.__name__: cls
    for cls in (
        SpectrumReport,
        Quadrature,
        Moments,
        Density,
        Estimate,
        Interval,
        ConditionNumber,
        LayerConditions,
        Eigenpairs,
        Tridiagonal,
        Plan,
        LossSlice,
        DataVariability,
        Sharpness,
        Snapshot,
        SpectrumHistory,
    )
}
_NOT_SAVED = {("Tridiagonal", "segments"): (), ("Tridiagonal", "layout"): None}  # the basis: m n numbers
Store = Callable[[str, np.ndarray], Any]  # (path, array) -> what stands in the JSON for the array


def encode(value: Any, store: Store, prefix: str = "") -> Any:
    """The JSON form of a value; `store` is given every array with its path."""
    if type(value).__name__ in CLASSES:
        plain = dataclasses.is_dataclass(value)
        names = [field.name for field in dataclasses.fields(value)] if plain else list(value._fields)
        kind = type(value).__name__
        fields = {
            name: encode(_NOT_SAVED.get((kind, name), getattr(value, name)), store, _join(prefix, name))
            for name in names
        }
        return {"class": kind, "fields": fields}
    if isinstance(value, Status):
        return {"status": value.code}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": {k: encode(v, store, _join(prefix, k)) for k, v in value.items()}}
    if type(value) in (list, tuple):
        items = [encode(v, store, _join(prefix, str(i))) for i, v in enumerate(value)]
        return {type(value).__name__: items}
    if isinstance(value, (np.generic, np.ndarray)) or hasattr(value, "__array__"):
        array = np.asarray(value)
        return array.item() if array.ndim == 0 else {"array": store(prefix, array)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    leaves = jax.tree.leaves(value)
    if leaves and all(hasattr(leaf, "__array__") for leaf in leaves):
        pairs = zip(leaf_paths(value), leaves, strict=True)
        return {"tree": {name: encode(leaf, store, _join(prefix, name)) for name, leaf in pairs}}
    raise SpectraError(f"cannot save a {type(value).__name__} ('{prefix}') in a result file.")


def decode(value: Any, fetch: Callable[[Any], np.ndarray]) -> Any:
    """The value of a JSON form; `fetch` turns what `store` returned into an array."""
    if not isinstance(value, dict):
        return value
    if "class" in value:
        fields = {name: decode(v, fetch) for name, v in value["fields"].items()}
        return CLASSES[value["class"]](**fields)
    if "status" in value:
        return Status.from_code(value["status"])
    if "dict" in value:
        return {name: decode(v, fetch) for name, v in value["dict"].items()}
    if "list" in value:
        return [decode(v, fetch) for v in value["list"]]
    if "tuple" in value:
        return tuple(decode(v, fetch) for v in value["tuple"])
    if "float" in value:  # NaN or infinite, which JSON does not know
        return float(value["float"])
    if "tree" in value:  # of a class that this process may not have: its leaves, in their order
        return OrderedDict((name, decode(v, fetch)) for name, v in value["tree"].items())
    return fetch(value["array"])


def _join(prefix: str, name: str) -> str:
    return f"{prefix}/{name}" if prefix else name
