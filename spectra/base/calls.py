"""Where a user's call comes in: its plain arguments are checked; the rules of JAX are this package's own."""

import contextlib
import difflib
import functools
import inspect
import operator
import os
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh

from spectra.base import meshes, trees
from spectra.base.errors import SpectraError, StructureError

P = ParamSpec("P")
T = TypeVar("T")
Call = tuple[tuple[Any, ...], dict[str, Any]]  # arguments by place and by name
MOST = 2**31 - 1
"""Of what is counted: probes, steps, products."""
KEY_ADVICE = "pass a JAX random key, for example jax.random.key(0)."
_EXPLICIT_LOSS = (
    "spectra computes on automatic axes. Wrap a function that names explicit axes with the shardings of its "
    "arguments: jax.sharding.explicit_axes(loss_fn, in_sharding=(params_specs, data_specs))."
)
_WAYS = ("host_to_device", "device_to_device", "device_to_host")


def checked(fn: Callable[P, T]) -> Callable[P, T]:
    """Decorator of what users call: arguments of a plain type are checked, and random keys.

    These are the arguments annotated `int`, `float`, `bool`, `str`, with a Literal or as a path. A None is
    left alone where the annotation allows it: not every way of computing draws numbers. Limits, and which
    names there are to choose from, are the function's own affair.
    """
    check = checks(fn)

    @functools.wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        args, kwargs = cast("Any", check(args, cast("dict[str, Any]", kwargs)))
        try:
            return fn(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError) as error:
            explain_leaves(fn, args, kwargs, error)
            raise

    return call


def automatic(fn: Callable[P, T]) -> Callable[P, T]:
    """Decorator of what users call with an operator, or its spectrum: run on automatic axes.

    With a mesh of explicit axes (`jax.set_mesh`) the call runs under its automatic twin: arrays among
    the arguments are moved there, those of the result back. Arguments are checked as by `checked`, and
    the rules of JAX are `own_rules`.
    """
    check = checks(fn)

    @functools.wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with own_rules():
            args, kwargs = cast("Any", check(args, cast("dict[str, Any]", kwargs)))
            try:
                if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
                    return fn(*args, **kwargs)
                return _on_twin(fn, args, kwargs)
            except (RuntimeError, TypeError, ValueError) as error:
                explain_leaves(fn, args, kwargs, error)
                raise

    return call


def _on_twin(fn: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
    """The call under the automatic twin of the mesh that is set."""
    try:
        mesh = jax.sharding.get_mesh()
    except ValueError as error:
        raise StructureError(
            "spectra was called inside jit, vmap or grad on a mesh with explicit axes: wrap the function "
            "that calls it as in jax.sharding.auto_axes(f, out_sharding=PartitionSpec())."
        ) from error
    assert isinstance(mesh, Mesh)
    with jax.set_mesh(meshes.twin(mesh)):
        first, rest = (
            args[:1],
            meshes.on_automatic_axes((args[1:], kwargs)),
        )  # first: an operator, moved already
        try:
            result = fn(*first, *rest[0], **rest[1])
        except ValueError as error:
            if "of type Auto" in str(error):  # JAX's words for a sharding that needs explicit axes
                error.add_note(_EXPLICIT_LOSS)
            raise
    return meshes.moved_from_twin(result, mesh)


def require_arguments(
    function: str, signature: inspect.Signature, args: tuple[Any, ...], kwargs: Iterable[str]
) -> None:
    """Raise Python's `TypeError` for arguments that the signature has not, with what is meant."""
    own = [x for x in signature.parameters.values() if x.name != "self"]
    of_place = [x.name for x in own if x.kind == x.POSITIONAL_OR_KEYWORD]
    more = len(args) - len(of_place) - ("self" in signature.parameters)
    if more > 0:
        raise TypeError(
            f"{function}() takes {', '.join(of_place)} by position, and was given {more} more: a batch is "
            "one argument, such as (inputs, targets), and options are named."
        )
    require_names(function, signature, kwargs)


def require_names(function: str, signature: inspect.Signature, kwargs: Iterable[str]) -> None:
    """Raise Python's `TypeError` for a name that no argument has, with the one that is meant."""
    names = [name for name in signature.parameters if name != "self"]
    for name in kwargs:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            meant = f"Did you mean {close[0]!r}?" if close else f"It has {', '.join(names)}."
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}. {meant}")


def checked_fields(cls: type[T]) -> type[T]:
    """Decorator of a dataclass that users make: its fields are checked as arguments are by `checked`."""
    cls.__init__ = checked(cls.__init__)
    return cls


def checks(fn: Callable[..., Any]) -> Callable[[tuple[Any, ...], dict[str, Any]], Call]:
    """What checks the arguments of a call, and returns them: keys in their typed form."""
    signature = inspect.signature(fn)
    kinds = {name: kind for name, one in signature.parameters.items() if (kind := _kinds(one))}

    def check(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            if all(one.kind != one.VAR_KEYWORD for one in signature.parameters.values()):
                require_names(fn.__qualname__.removesuffix(".__init__"), signature, kwargs)
            return args, kwargs  # the call says what is missing
        if not kinds:
            return args, kwargs
        for name in [name for name in bound.arguments if name in kinds]:
            value, allowed = bound.arguments[name], kinds[name]
            if value is None and "None" in allowed:
                continue
            if "Array" in allowed:
                bound.arguments[name] = require_key(value, name)
                continue
            for kind in (kind for kind in _TYPES if kind in allowed):
                with contextlib.suppress(TypeError, ValueError):
                    bound.arguments[name] = _TYPES[kind][1](value)
                    break
            else:
                raise _refusal(name, value, allowed)
            found: Any = bound.arguments[name]
            if name.startswith("num_") and isinstance(found, int) and found > MOST:
                raise SpectraError(f"{name}={value}: use at most {MOST:,}, as JAX counts in 32 bits.")
        return bound.args, bound.kwargs

    return check


def explain_leaves(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception
) -> None:
    """Raise a StructureError in place of JAX's error where an argument was donated, or is a shape alone."""
    if isinstance(error, SpectraError):
        return
    try:
        arguments = inspect.signature(fn).bind(*args, **kwargs).arguments
    except TypeError:  # the call says what is missing
        return
    for name, value in arguments.items():
        if name == "self" and fn.__name__ in ("__init__", "_open"):  # not made yet
            continue
        what = "the operator's leaf" if name in ("self", "op") else f"{name}: leaf"
        try:
            trees.check_computable(value, what)
        except SpectraError as refusal:
            raise refusal from error


def own_rules() -> contextlib.AbstractContextManager[Any]:
    """The rules of JAX that this package is written for, in this thread and until the block ends.

    JAX can refuse what is often a mistake in a user's code: promotion of dtypes and of shapes, transfers that
    nobody asked for, numbers that are NaN or infinite, keys that are used twice. The package promotes, moves
    numbers between host and device, tries functions where they may have no value, and draws the same numbers
    in every product, on purpose; what is not finite in a loss it names itself. A user's loss that keeps to
    the stricter rules computes the same under these.
    """
    config: Any = jax.config
    rules: list[contextlib.AbstractContextManager[Any]] = []
    if config.jax_numpy_dtype_promotion != "standard":
        rules.append(jax.numpy_dtype_promotion("standard"))
    if config.jax_numpy_rank_promotion != "allow":
        rules.append(jax.numpy_rank_promotion("allow"))
    if any(getattr(config, f"jax_transfer_guard_{way}") not in (None, "allow") for way in _WAYS):
        rules.append(jax.transfer_guard("allow"))
    if config.jax_debug_nans:
        rules.append(jax.debug_nans(False))
    if config.jax_debug_infs:
        rules.append(jax.debug_infs(False))
    if config.jax_debug_key_reuse:
        rules.append(jax.debug_key_reuse(False))
    if not rules:
        return contextlib.nullcontext()
    stack = contextlib.ExitStack()
    for rule in rules:
        stack.enter_context(rule)
    return stack


def require_key(key: Any, name: str = "key") -> jax.Array:
    """One JAX random key, in the typed form; raises for anything else.

    Args:
        key: what a user passed: a typed key, or the numbers of one as `jax.random.PRNGKey` makes them.
        name: of the argument.

    Raises:
        SpectraError: no key, or several.
    """
    if key is None:
        raise SpectraError(f"{name}=None: random probes need a key; {KEY_ADVICE}")
    found: Any = key
    if not isinstance(key, jax.Array | np.ndarray):
        raise SpectraError(f"{name}={found!r} is not a random key: {KEY_ADVICE}")
    if not jnp.issubdtype(found.dtype, jax.dtypes.prng_key):
        refusal = SpectraError(
            f"{name} is an array of {found.dtype} of shape {found.shape}, and no random key: {KEY_ADVICE}"
        )
        if found.dtype != jnp.uint32:  # 64 bits would be cut
            raise refusal
        try:  # JAX knows how many numbers a key has: that depends on its configuration
            found = cast("Any", jax.random.wrap_key_data)(jnp.asarray(found))
        except (TypeError, ValueError) as error:
            raise refusal from error
    if found.shape:
        raise SpectraError(
            f"{name} is an array of keys of shape {found.shape}: pass one of them, or jax.vmap over them."
        )
    return found


def _kinds(parameter: inspect.Parameter) -> frozenset[str]:
    """The types that are allowed for an argument, if it is of those that are checked; else none."""
    parts = _parts(parameter.annotation)
    if parameter.name.endswith("key") and "Array" in parts:
        return parts
    if "PathLike" in parts:  # a string stands for a path
        parts = parts - {"str"}
    return parts if parts <= _TYPES.keys() | {"None"} else frozenset()


def _parts(annotation: Any) -> frozenset[str]:
    """The names of the types in an annotation, which may be text; those of the values of a Literal."""
    origin = typing.get_origin(annotation)
    if isinstance(annotation, str):
        names = annotation.split(" | ")
    elif origin in (typing.Union, types.UnionType):
        return frozenset(part for one in typing.get_args(annotation) for part in _parts(one))
    elif origin is typing.Literal:
        names = [type(value).__name__ for value in typing.get_args(annotation)]
    elif annotation in (None, types.NoneType):
        names = ["None"]
    else:
        names = [getattr(origin or annotation, "__name__", "")]
    return frozenset(name.partition("[")[0].rpartition(".")[2] for name in names)


def _refusal(name: str, value: Any, kinds: frozenset[str]) -> SpectraError:
    shape = getattr(value, "shape", ())
    told = f" is an array of shape {tuple(shape)}" if shape else f"={value!r:.80}"
    use = ", or ".join([*(_TYPES[kind][0] for kind in _TYPES if kind in kinds), *kinds & {"None"}])
    return SpectraError(f"{name}{told}: use {use}.")


def _refuse() -> Any:
    raise TypeError


def _whole(value: Any) -> Any:
    """64, of any type that stands for it, 64.0 among them."""
    given: Any = value
    if isinstance(value, Tracer):
        return given
    if isinstance(value, bool | str | bytes):
        raise TypeError
    whole = isinstance(value, float | np.floating) and given.is_integer()
    return int(given) if whole else operator.index(given)


def _real(value: Any) -> Any:
    given: Any = value
    if isinstance(value, Tracer):
        return given
    if isinstance(value, bool | np.bool_ | str | bytes) or np.ndim(value):
        raise TypeError
    number = float(value)
    return number if isinstance(value, int) else given


def _path(value: Any) -> Any:
    if isinstance(value, str | os.PathLike) and value != "":
        return cast("Any", value)
    raise TypeError


_TYPES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "bool": (
        "True or False",
        lambda x: bool(cast("Any", x)) if isinstance(x, bool | np.bool_) else _refuse(),
    ),
    "int": ("a whole number", _whole),
    "float": ("a real number", _real),
    "str": ("a string", lambda x: x if isinstance(x, str) else _refuse()),
    "PathLike": ("a path, a string or an os.PathLike", _path),
}
"""What an argument may be, in words, and what returns it or raises; a True is never a number."""
