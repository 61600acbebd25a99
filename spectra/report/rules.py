"""Rules for the values that fields of results hold: kinds, ranges, shapes, and what is wrong with a value.

Axes with one name have one length throughout an object. NaN and infinity are numbers here: results of
diverged or of traced computations hold them.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from spectra.results import Interval

Sizes = dict[str, int]  # of the axes of one object, by name, as far as they are known
Rule = Callable[[Any, Sizes], str | None]  # what is wrong with a value, if anything


def array(axes: str, kinds: str = "f", low: float = -np.inf) -> Rule:
    """An array with these axes; one that was made under `vmap` may have more in front of them."""
    labels = axes.split()

    def rule(value: Any, sizes: Sizes) -> str | None:
        if not isinstance(value, np.ndarray):
            return f"is a {type(value).__name__}, not an array"
        if not _is_of(value.dtype, kinds):
            return f"has dtype {value.dtype}"
        shape = value.shape[-len(labels) :] if "*" in sizes else value.shape
        if len(shape) != len(labels):
            return f"has shape {value.shape}, not ({axes})"
        for name, size in zip(labels, shape, strict=True):
            if size != (int(name) if name.isdigit() else sizes.setdefault(name, size)):
                return f"has shape {value.shape}: {size} for {name} = {sizes.get(name, name)}"
        return f"has entries below {low:g}" if low > -np.inf and (value < low).any() else None

    return rule


def _is_of(dtype: np.dtype, kinds: str) -> bool:
    return dtype.kind in kinds or ("f" in kinds and dtype.name == "bfloat16")


def number(low: float = -np.inf, high: float = np.inf) -> Rule:
    """A number in this range; inside `vmap`, one for each run."""

    def rule(value: Any, sizes: Sizes) -> str | None:
        if isinstance(value, np.ndarray) and "*" in sizes and value.dtype.kind in "fiu":
            return None  # one number for each of several runs under `vmap`
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return f"is a {type(value).__name__}, not a number"
        return f"is {value:g}, outside [{low:g}, {high:g}]" if value < low or value > high else None

    return rule


def count(low: int = 0) -> Rule:
    """An integer that is not below this; inside `vmap`, one for each run."""

    def rule(value: Any, sizes: Sizes) -> str | None:
        if isinstance(value, np.ndarray) and "*" in sizes and value.dtype.kind in "iu":
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            return f"is a {type(value).__name__}, not an integer"
        return f"is {value}, less than {low}" if value < low else None

    return rule


def instance(*classes: type) -> Rule:
    """An object of one of these classes."""

    def rule(value: Any, sizes: Sizes) -> str | None:
        return (
            None
            if isinstance(value, classes)
            else f"is a {type(value).__name__}, not a {classes[0].__name__}"
        )

    return rule


def optional(rule: Rule) -> Rule:
    """None, or what the rule takes."""
    return lambda value, sizes: None if value is None else rule(value, sizes)


def numbers(value: Any, sizes: Sizes) -> str | None:
    """A number, an array or a tree of them."""
    for leaf in jax.tree.leaves(value):
        if isinstance(leaf, (bool, str)) or not isinstance(leaf, (int, float, np.ndarray)):
            return f"holds a {type(leaf).__name__}, not numbers"
    return None


def vectors(value: Any, sizes: Sizes) -> str | None:
    """A tree of arrays with one row for each vector."""
    for leaf in jax.tree.leaves(value):
        if not isinstance(leaf, np.ndarray) or not _is_of(leaf.dtype, "f") or leaf.ndim < 1:
            return "holds something else than arrays of vectors"
        if leaf.shape[0] != sizes.setdefault("k", leaf.shape[0]):
            return f"holds an array of shape {leaf.shape} for {sizes['k']} vectors"
    return None


def interval(value: Any, sizes: Sizes) -> str | None:
    """Three numbers."""
    if not isinstance(value, Interval):
        return f"is a {type(value).__name__}, not an Interval"
    return None if all(type(end) in (int, float) for end in value) else "is not made of numbers"


def intervals(value: Any, sizes: Sizes) -> str | None:
    """Intervals by name."""
    if not isinstance(value, dict):
        return f"is a {type(value).__name__}, not a dict"
    return next((wrong for x in value.values() if (wrong := interval(x, sizes))), None)


def flags(value: Any, sizes: Sizes) -> str | None:
    """True or false, or an array of them."""
    is_array = isinstance(value, np.ndarray) and _is_of(value.dtype, "b")
    return None if is_array or isinstance(value, bool) else f"is a {type(value).__name__}, not a bool"


def scalars(value: Any, sizes: Sizes) -> str | None:
    """Numbers by name."""
    if not isinstance(value, dict):
        return f"is a {type(value).__name__}, not a dict"
    return next((f"'{k[:40]}' {wrong}" for k, x in value.items() if (wrong := number()(x, sizes))), None)


def sequence_of(cls: type) -> Rule:
    """A sequence of results of one class."""

    def rule(value: Any, sizes: Sizes) -> str | None:
        if not isinstance(value, tuple):
            return f"is a {type(value).__name__}, not a tuple"
        return next((wrong for x in value if (wrong := instance(cls)(x, sizes))), None)

    return rule


def named(cls: type) -> Rule:
    """Results of one class by name."""

    def rule(value: Any, sizes: Sizes) -> str | None:
        if not isinstance(value, dict):
            return f"is a {type(value).__name__}, not a dict"
        return next((wrong for x in value.values() if (wrong := instance(cls)(x, sizes))), None)

    return rule


def steps(value: Any, sizes: Sizes) -> str | None:
    """A tuple of integers."""
    plain = isinstance(value, tuple) and all(type(step) is int for step in value)
    return None if plain else "is not a tuple of steps"


def shape(value: Any, sizes: Sizes) -> str | None:
    """The shape of a matrix: two positive integers."""
    plain = isinstance(value, tuple) and len(value) == 2 and all(type(n) is int and n > 0 for n in value)
    return None if plain else "is not the shape of a matrix"


def directions(value: Any, sizes: Sizes) -> str | None:
    """The names of one or two directions."""
    texts = isinstance(value, tuple) and all(isinstance(name, str) for name in value)
    whole = texts and len(value) in (1, 2) and sizes.setdefault("d", len(value)) == len(value)
    return None if whole else "is not a tuple with the names of one or two directions"


def names(value: Any, sizes: Sizes) -> str | None:
    """A tuple of texts, as many as there are along the axis p."""
    if not isinstance(value, tuple) or not all(isinstance(name, str) for name in value):
        return "is not a tuple of names"
    return None if sizes.setdefault("p", len(value)) == len(value) else "has another length than its numbers"


def curve_or_number(value: Any, sizes: Sizes) -> str | None:
    """A number, or an array of them."""
    if isinstance(value, np.ndarray):
        return None if _is_of(value.dtype, "fiu") else f"has dtype {value.dtype}"
    return number()(value, sizes)


def facts(value: Any, sizes: Sizes | None = None) -> str | None:
    """What is wrong with a provenance: texts and numbers by name."""
    if not isinstance(value, dict):
        return f"is a {type(value).__name__}, not a dict"
    for name, fact in value.items():
        wanted = _FACTS.get(name)
        plain = fact is None or isinstance(fact, (bool, int, float, str, list, tuple, dict))
        if not plain or (wanted is not None and (not isinstance(fact, wanted) or isinstance(fact, bool))):
            return f"holds a {type(fact).__name__} for '{name[:40]}'"
    return None


_FACTS = {
    "seconds": (int, float), "num_devices": int,
    **dict.fromkeys(("name", "spectra", "jax", "python", "device", "date", "operator", "dtype", "key"), str),
}  # fmt: skip
