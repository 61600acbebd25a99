"""Names of the leaves of a parameter tree, and the ways to select and group them by name."""

import fnmatch
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.tree_util import GetAttrKey

from spectra._errors import StructureError
from spectra._tree import path_str

PyTree = Any
Select = str | re.Pattern | Callable[[str], bool]
GROUPINGS = ("leaf", "layer")


def leaf_paths(tree: PyTree) -> list[str]:
    """Name of each leaf in tree order: `Dense_0/kernel`, or PyTorch's own `fc1.weight`.

    The last step into an nnx `Variable` says nothing, so it is left out where every leaf has it. Of leaves
    that would share a name, all but the first are numbered.
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    if all(len(path) > 1 and path[-1] == GetAttrKey("value") for path in paths):
        paths = [path[:-1] for path in paths]
    return _told_apart([path_str(path) for path in paths])


def _told_apart(names: list[str]) -> list[str]:
    """Names of which no two are the same: `{"a": {"b": x}, "a/b": y}` has `a/b` and `a/b~2`."""
    taken = set(names)
    if len(taken) == len(names):
        return names
    seen: set[str] = set()
    for i, name in enumerate(names):
        number, free = 1, name
        while free in seen or (number > 1 and free in taken):
            number += 1
            free = f"{name}~{number}"
        seen.add(free)
        names[i] = free
    return names


def layer_name(path: str) -> str:
    """The path without its last part: the module that owns the parameter."""
    for separator in ("/", "."):
        owner, found, _ = path.rpartition(separator)
        if found:
            return owner
    return path


def group_leaves(tree: PyTree, by: str) -> dict[str, tuple[int, ...]]:
    """Indices of the leaves of every group, in tree order: one leaf each, or all leaves of a layer."""
    if by not in GROUPINGS:
        raise StructureError(f"by={by!r}: use one of {GROUPINGS}.")
    groups: dict[str, list[int]] = {}
    for index, path in enumerate(leaf_paths(tree)):
        groups.setdefault(path if by == "leaf" else layer_name(path), []).append(index)
    return {name: tuple(indices) for name, indices in groups.items()}


def select_leaves(tree: PyTree, select: Select) -> tuple[int, ...]:
    """Indices of the leaves whose path matches a glob (or lies under it), a regex, or a predicate.

    Raises:
        StructureError: nothing matches; the message lists the paths.
    """
    paths = leaf_paths(tree)
    chosen = _predicate(select)
    indices = tuple(index for index, path in enumerate(paths) if chosen(path))
    if not indices:
        shown = ", ".join(paths[:20]) + (f", and {len(paths) - 20} more" if len(paths) > 20 else "")
        raise StructureError(f"no parameter matches {select!r}; the paths are {shown}.")
    return indices


def _predicate(select: Select) -> Callable[[str], Any]:
    if isinstance(select, str):
        globs = (select, f"{select}/*", f"{select}.*")
        return lambda path: any(fnmatch.fnmatchcase(path, glob) for glob in globs)
    if isinstance(select, re.Pattern):
        return select.search
    if callable(select):
        return select
    raise StructureError(
        f"select is a {type(select).__name__}; pass a glob such as 'Dense_0/*', a compiled regular "
        "expression, or a function of the path."
    )
