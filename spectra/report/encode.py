"""Results as JSON: classes and their fields by name, arrays set apart or written out, never a pickle."""

import dataclasses
import json
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from spectra.base.errors import SpectraError, Status
from spectra.base.files import MAX_BYTES, MAX_DEPTH, memory_of
from spectra.base.paths import leaf_paths
from spectra.report.fields import checked, contradiction
from spectra.report.spectrum import SpectrumReport
from spectra.report.summary import Summary
from spectra.report.variability import DataVariability
from spectra.results import (
    ClassSplit,
    ConditionNumber,
    Density,
    Eigenpairs,
    Estimate,
    FunctionProduct,
    GradientOverlap,
    Interval,
    LayerConditions,
    LossSlice,
    Moments,
    NoiseScale,
    OperatorComparison,
    Perturbation,
    Plan,
    Population,
    Quadrature,
    Sharpness,
    SingularTriplets,
    Snapshot,
    Solution,
    SpectrumHistory,
    StableStep,
    StepQuality,
    Tridiagonal,
)

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
        OperatorComparison,
        DataVariability,
        Summary,
        NoiseScale,
        Population,
        Perturbation,
        ClassSplit,
        StepQuality,
        GradientOverlap,
        StableStep,
        Sharpness,
        Snapshot,
        SpectrumHistory,
        Solution,
        FunctionProduct,
        SingularTriplets,
    )
}
_NOT_SAVED = {("Tridiagonal", "segments"): (), ("Tridiagonal", "layout"): None}  # the basis: m n numbers
DAMAGE = (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError)
"""What `decode` raises where the JSON is not that of a result."""
_STATUSES = {status.code: status for status in Status}
_FORMS = ("class", "status", "dict", "list", "tuple", "float", "tree", "array")
Store = Callable[[str, np.ndarray], Any]  # (path, array) -> what stands in the JSON for the array


def encode(value: Any, store: Store, prefix: str = "", depth: int = 0) -> Any:
    """The JSON form of a value; `store` is given every array with its path."""
    if depth > MAX_DEPTH:
        raise SpectraError(f"cannot save what is nested more than {MAX_DEPTH} levels deep ('{prefix[:80]}').")

    def inner(part: Any, name: str) -> Any:
        return encode(part, store, _join(prefix, name), depth + 1)

    if type(value).__name__ in CLASSES:
        plain = dataclasses.is_dataclass(value)
        names = [field.name for field in dataclasses.fields(value)] if plain else list(value._fields)
        kind = type(value).__name__
        if (wrong := contradiction(value)) is not None:
            raise SpectraError(f"cannot save a {kind}: {wrong}.")
        fields = {name: inner(_NOT_SAVED.get((kind, name), getattr(value, name)), name) for name in names}
        return {"class": kind, "fields": fields}
    if isinstance(value, Status):
        return {"status": value.code}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": {k: inner(v, k) for k, v in value.items()}}
    if type(value) in (list, tuple):
        return {type(value).__name__: [inner(v, str(i)) for i, v in enumerate(value)]}
    if isinstance(value, (np.generic, np.ndarray)) or hasattr(value, "__array__"):
        array = np.asarray(value)
        return _plain(array.item()) if array.ndim == 0 else {"array": store(prefix, array)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return _plain(value)
    leaves = jax.tree.leaves(value)
    if leaves and all(hasattr(leaf, "__array__") for leaf in leaves):
        pairs = zip(leaf_paths(value), leaves, strict=True)
        return {"tree": {name: inner(leaf, name) for name, leaf in pairs}}
    raise SpectraError(f"cannot save a {type(value).__name__} ('{prefix}') in a result file.")


def _plain(value: Any) -> Any:
    """A number or text as JSON has it, which knows no NaN and no infinity: they become `{"float": "nan"}`."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(float(value))}
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**64:
        raise SpectraError(f"cannot save the integer {str(value)[:40]}, which has more than 64 bits.")
    if not isinstance(value, (bool, int, float, str, type(None))):
        raise SpectraError(f"cannot save a {type(value).__name__} in a result file.")
    return value


def checked_text(form: Any) -> str:
    """JSON that can be read again, within its limits."""
    text = json.dumps(form, allow_nan=False)
    if (needed := memory_of(text.encode())) > MAX_BYTES:
        raise SpectraError(
            f"the result has too many parts for one file: they would take {needed >> 20} MiB, besides "
            "arrays. Save it in several."
        )
    return text


def decode(value: Any, fetch: Callable[[Any], np.ndarray], depth: int = 0) -> Any:
    """The value of a JSON form; `fetch` turns what `store` returned into an array.

    Raises:
        one of `DAMAGE`: this is not the form of a result, or its fields do not fit together.
    """
    if not isinstance(value, dict):
        if isinstance(value, list):
            raise TypeError("a bare list")
        _plain(value)
        return value
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    kind = _kind_of(value)
    content = value[kind]
    if kind == "array":
        return fetch(content)
    if kind == "status":
        return _STATUSES[content]
    if kind == "float":  # NaN or infinite, which JSON does not know
        return float({"nan": "nan", "inf": "inf", "-inf": "-inf"}[content])

    def inner(part: Any) -> Any:
        return decode(part, fetch, depth + 1)

    if kind in ("list", "tuple"):
        if not isinstance(content, list):
            raise TypeError(f"a {kind} that is none")
        return [inner(v) for v in content] if kind == "list" else tuple(inner(v) for v in content)
    if kind == "class":
        return checked(CLASSES[content], {name: inner(v) for name, v in value["fields"].items()})
    # "tree": of a class that this process may not have: its leaves, in their order
    return (dict if kind == "dict" else OrderedDict)((name, inner(v)) for name, v in content.items())


def _kind_of(form: dict[str, Any]) -> str:
    """The key that says what a form stands for; a class has fields beside it."""
    kinds = set(form) - {"fields"}
    kind = next(iter(kinds)) if len(kinds) == 1 else None
    if kind not in _FORMS or (kind == "class") != ("fields" in form):
        raise TypeError(f"an object with the keys {sorted(form)[:8]}")
    return kind


def _join(prefix: str, name: str) -> str:
    return f"{prefix}/{name}" if prefix else name
