"""How operators become pytrees: arrays are leaves, and all else is part of the structure.

A class of a user's registers itself when its first instance is made, when its decorators have run. One that
JAX knows by then, because its author registered it, stays as it is. The package's own declare their leaves.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast, dataclass_transform

import jax

from spectra.base import paths, trees
from spectra.base.errors import SpectraError, StructureError
from spectra.base.trees import PyTree

REBUILT = "_rebuilt"
"""Attribute of an instance that JAX made of its parts: by name these parts, which need not be arrays, and the
values that they became."""
T = TypeVar("T", bound=type[Any])
F = TypeVar("F", bound=Callable[..., Any])
Flat = tuple[list[tuple[Any, Any]], Any]  # keys and children, and what is static
_MISSING = object()
_known: set[type] = set()


@dataclass_transform(frozen_default=True, eq_default=False)
def operator(leaves: tuple[str, ...]) -> Callable[[T], T]:
    """Class decorator: a frozen dataclass that is a pytree with the named fields as children.

    Unflattening bypasses `__init__`, so a constructor may check and convert its arguments although JAX
    rebuilds operators from tracers and placeholders.
    """

    def declare(cls: T) -> T:
        init = "__init__" not in vars(cls)
        made: Any = dataclasses.dataclass(frozen=True, eq=False, repr=False, init=init)(cls)
        names = [field.name for field in dataclasses.fields(made)]
        if "mv" in vars(cls):
            made.mv = explained(made.mv)
        made._children = leaves, tuple(name for name in names if name not in leaves)
        register(made)
        return made

    return declare


class OnParameters:
    """What operators share whose vectors are those parameters that vary, see `paths.select_parameters`."""

    params: PyTree
    selected: tuple[int, ...] | None  # leaves of params that vary; None for all

    @property
    def like(self) -> PyTree:
        """The parameters that vary; None in place of all others."""
        if self.selected is None:
            return self.params
        return paths.replace_static(trees.keep_leaves(self.params, self.selected), with_value=False)

    def _merge(self, variables: PyTree) -> PyTree:
        """All parameters, with `variables` in the places of those that vary and the rest as constants."""
        if self.selected is None:
            return variables
        constants = jax.tree.map(trees.lift, self.params)
        return paths.replace_static(
            trees.replace_leaves(constants, self.selected, variables), with_value=True
        )


class Field:
    """An attribute that subclasses define, be it as a property or as a field, which an abstract one hides."""

    def __set_name__(self, owner: type, name: str):
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        raise AttributeError(f"{owner.__name__} defines no `{self.name}`")


class Order:
    """The shape (n, n) of an operator, unless a subclass has an attribute or a field of that name."""

    def __get__(self, instance: Any, owner: type) -> tuple[int, int]:
        if instance is None:  # so that no field finds a default here
            raise AttributeError(f"the shape is that of an operator, not of {owner.__name__}")
        return instance.size, instance.size


def register(cls: type[Any]) -> None:
    """Make a class of operators known to JAX, once."""
    if cls in _known:
        return
    _known.add(cls)
    declared = vars(cls).get("_children")
    if not declared:
        cls.mv = explained(true_float32(cls.mv))
    functions = _of_fields(cls, *declared) if declared else (_flatten, _unflatten(cls))
    with contextlib.suppress(ValueError):  # its author has registered it
        jax.tree_util.register_pytree_with_keys(cls, *functions)  # pyright: ignore[reportUnknownMemberType]


def true_float32(product: F) -> F:
    """A user's product whose matrix products are as exact as its dtype, unless they say otherwise themselves.

    JAX's default rounds them to TF32 on a GPU and to bfloat16 on a TPU, and `precision` speaks of the dtype.
    """

    @functools.wraps(product)
    def precise(*args: Any) -> Any:
        with jax.default_matmul_precision("float32"):
            return product(*args)

    return cast("F", precise)


def explained(product: F) -> F:
    """A product that says what is wrong with its vector, where it raises for one."""

    @functools.wraps(product)
    def call(self: Any, v: PyTree) -> PyTree:
        try:
            return product(self, v)
        except Exception as error:
            explain_vector(self, v, error)
            raise

    return cast("F", call)


def explain_vector(op: Any, v: PyTree, error: Exception) -> None:
    """Raise a StructureError in place of what `op.mv` raised for something that is no vector of its own.

    Nothing is looked at before a product, which is not slower for it.
    """
    if isinstance(error, SpectraError) or not hasattr(op, "is_flat"):  # a Jacobian says so itself
        return
    try:
        trees.check_computable(op, "the operator's leaf")
        trees.check_computable(v, "the vector's leaf")
        if op.is_flat(v):
            raise StructureError("op.mv takes a pytree like the parameters; op @ v takes a flat array, too.")
        trees.check_structure(v, op.structure, "the vector")
    except SpectraError as refusal:
        raise refusal from error


def _of_fields(
    cls: type[Any], leaves: tuple[str, ...], static: tuple[str, ...]
) -> tuple[Callable[[Any], Flat], Callable[[Any, Any], Any]]:
    """Flattening and unflattening for a class that declares which fields are its children."""

    def flatten(op: Any) -> Flat:
        keys = [(jax.tree_util.GetAttrKey(name), getattr(op, name)) for name in leaves]
        return keys, tuple(getattr(op, name) for name in static)

    def unflatten(aux: Any, children: Any) -> Any:
        op: Any = object.__new__(cls)
        for name, value in zip((*leaves, *static), (*children, *aux), strict=True):
            object.__setattr__(op, name, value)
        return op

    return flatten, unflatten


def _flatten(op: Any) -> Flat:
    """The fields of an operator of any class: what is no array within them becomes static."""
    names, static = _names(op)
    rebuilt = op.__dict__.get(REBUILT, {})
    keys: list[tuple[Any, Any]] = []
    for name in names:
        value = getattr(op, name)
        part, made = rebuilt.get(name, (None, _MISSING))
        # An attribute that was assigned since then is not the one that JAX made.
        part = part if made is value else jax.tree.map(_wrapped, value)
        keys.append((jax.tree_util.GetAttrKey(name), part))
    return keys, (names, static, tuple(paths.Static(getattr(op, name)) for name in static))


def _unflatten(cls: type[Any]) -> Callable[[Any, Any], Any]:
    def unflatten(aux: Any, children: Any) -> Any:
        names, static, values = aux
        op: Any = object.__new__(cls)
        rebuilt: dict[str, tuple[Any, Any]] = {}
        for name, part in zip(names, children, strict=True):
            value = paths.replace_static(part, with_value=True)
            rebuilt[name] = part, value
            object.__setattr__(op, name, value)
        for name, value in zip(static, values, strict=True):
            object.__setattr__(op, name, value.value)
        object.__setattr__(op, REBUILT, rebuilt)
        return op

    return unflatten


def _names(op: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The fields that may hold arrays, and those marked as static; of no dataclass all attributes."""
    if not dataclasses.is_dataclass(op):
        return tuple(name for name in (*_slots(op), *vars(cast("object", op))) if name != REBUILT), ()
    fields = dataclasses.fields(op)
    static = tuple(field.name for field in fields if field.metadata.get("static"))
    return tuple(field.name for field in fields if field.name not in static), static


def _slots(op: object) -> Iterator[str]:
    """Attributes that are set in the `__slots__` of a class, which its `__dict__` does not hold."""
    for cls in type(op).__mro__:
        names = vars(cls).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            private = name.startswith("__") and not name.endswith("__")
            name = f"_{cls.__name__.lstrip('_')}{name}" if private else name
            if name not in ("__dict__", "__weakref__") and hasattr(op, name):
                yield name


def _wrapped(leaf: Any) -> Any:
    is_static = isinstance(leaf, jax.ShapeDtypeStruct) or not trees.is_array(leaf)
    return paths.Static(leaf) if is_static else leaf
