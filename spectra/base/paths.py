"""Names of the leaves of a parameter tree, ways to select and group them by name, and what is no array."""

import dataclasses
import fnmatch
import math
import re
import sys
from collections.abc import Callable
from typing import Any

import jax

from spectra.base import GROUPINGS
from spectra.base.errors import StructureError
from spectra.base.trees import is_array, is_torch, not_an_array, path_str

PyTree = Any
Select = str | re.Pattern[str] | Callable[[str], bool]


def leaf_paths(tree: PyTree) -> list[str]:
    """Name of each leaf in tree order: `Dense_0/kernel`, or PyTorch's own `fc1.weight`; no two are equal.

    The box that Flax puts around an array (`nn.Partitioned`, an nnx `Variable`) is no step of a path.
    """
    return ["/".join(parts) for parts in _leaf_parts(tree)]


def group_leaves(tree: PyTree, by: str) -> dict[str, tuple[int, ...]]:
    """Indices of the leaves of every group, in tree order: one leaf each, or all leaves of a layer.

    A group of empty leaves only is left out: there is no matrix of order 0.
    """
    if by not in GROUPINGS:
        raise StructureError(f"by={by!r}: use one of {GROUPINGS}.")
    groups: dict[str, list[int]] = {}
    for index, parts in enumerate(_leaf_parts(tree)):
        groups.setdefault("/".join(parts) if by == "leaf" else layer_name(parts), []).append(index)
    sizes = [math.prod(getattr(leaf, "shape", ())) for leaf in jax.tree.leaves(tree)]
    return {name: tuple(group) for name, group in groups.items() if any(sizes[i] for i in group)}


def stacked_groups(
    tree: PyTree, by: str, stacks: dict[int, str]
) -> list[tuple[str, tuple[int, ...], str | None]]:
    """(name, indices, path of its stack) of each of `group_leaves`, cut where it has leaves of stacks.

    `stacks` says under which path lie the leaves that are stacked along their leading axis.
    """
    parts: list[tuple[str, tuple[int, ...], str | None]] = []
    for name, indices in group_leaves(tree, by).items():
        for stack in dict.fromkeys(stacks.get(i) for i in indices):
            parts.append((name, tuple(i for i in indices if stacks.get(i) == stack), stack))
    return parts


def numbered(name: str, stack: str, number: int) -> str:
    """`layers/0/attention` for `layers/attention` in the stack `layers`."""
    if not stack or not f"{name}/".startswith(f"{stack}/"):  # the layers of a root, or of leaves themselves
        return f"{name}/{number}"
    return f"{stack}/{number}{name.removeprefix(stack)}"


def stacks_of(tree: PyTree, select: Select) -> dict[int, str]:
    """The leaves that are chosen, with the shortest part of each path that is."""
    chosen, names = _predicate(select), leaf_paths(tree)
    found: dict[int, str] = {}
    for index in select_leaves(tree, select):
        parts = names[index].split("/")
        heads = ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]
        found[index] = next((head for head in heads if chosen(head)), layer_name(tuple(parts)))
    return found


def common_path(names: list[str]) -> str:
    """The path that all names lie under."""
    parts = [name.split("/")[:-1] for name in names]
    shared: list[str] = []
    for step in zip(*parts, strict=False):
        if len(set(step)) > 1:
            break
        shared.append(step[0])
    return "/".join(shared)


def layer_name(parts: tuple[str, ...]) -> str:
    """The path without its last part: the module that owns the parameter."""
    if parts[-1].startswith("'"):  # a key with separators of its own
        return "/".join(parts[:-1]) or parts[-1]
    path = "/".join(parts)
    for separator in ("/", "."):
        owner, found, _ = path.rpartition(separator)
        if found:
            return owner
    return path


def _leaf_parts(tree: PyTree) -> list[tuple[str, ...]]:
    boxes = _boxes()
    paths: list[tuple[Any, ...]] = []
    for path, node in jax.tree.leaves_with_path(tree, is_leaf=lambda x: isinstance(x, boxes)):
        inner = jax.tree.leaves_with_path(node)
        paths += [path if len(inner) == 1 else path + rest for rest, _ in inner]
    return _told_apart([tuple(path_str((step,)) for step in path) or (path_str(()),) for path in paths])


def _boxes() -> tuple[type, ...]:
    """The classes that Flax wraps an array in; none of a part of Flax that nobody has imported."""
    linen, nnx = sys.modules.get("flax.core.meta"), sys.modules.get("flax.nnx")
    return (*([linen.AxisMetadata] if linen else []), *([nnx.Variable] if nnx else []))


def _told_apart(paths: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The paths with quotes around a key 'a/b' where it reads like the path of something else."""
    if not any("/" in part for path in paths for part in path):
        return paths
    read: dict[str, set[tuple[str, ...]]] = {}
    for path in paths:
        for end in range(1, len(path) + 1):
            read.setdefault("/".join(path[:end]), set()).add(path[:end])
    alike = {prefix for prefixes in read.values() if len(prefixes) > 1 for prefix in prefixes}
    return [
        tuple(
            f"'{part}'" if "/" in part and path[: end + 1] in alike else part for end, part in enumerate(path)
        )
        for path in paths
    ]


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


def select_parameters(params: PyTree, select: Select | None) -> tuple[PyTree, tuple[int, ...] | None]:
    """The parameters with all that is no array made static, and the indices of those arrays that vary.

    The indices are None where all leaves do. A function or an integer that is chosen stays as it is; a Python
    number with a fraction may be meant to vary, and nobody can tell.

    Raises:
        StructureError: nothing matches, a Python float or complex number is among what is to vary, or a
            leaf is PyTorch's.
    """
    leaves, treedef = jax.tree.flatten(params)
    for i, leaf in enumerate(leaves):
        if is_torch(leaf):
            raise not_an_array(leaf_paths(params)[i], leaf)
    arrays = [is_array(leaf) for leaf in leaves]
    chosen = None if select is None else select_leaves(params, select)
    if all(arrays):
        return params, chosen
    chosen = range(len(leaves)) if chosen is None else chosen
    for i in chosen:
        if isinstance(leaves[i], (float, complex)):
            raise not_an_array(leaf_paths(params)[i], leaves[i])
    kept = tuple(sum(arrays[:i]) for i in chosen if arrays[i])
    if not kept:
        raise not_an_array(leaf_paths(params)[chosen[0]], leaves[chosen[0]])
    pairs = zip(leaves, arrays, strict=True)
    return treedef.unflatten([leaf if array else Static(leaf) for leaf, array in pairs]), kept


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class Static:
    """What is no array among the parameters: part of the tree's structure, not one of its leaves."""

    value: Any

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Static) or type(self.value) is not type(other.value):
            return False
        return self.value is other.value or (_hashable(self.value) and self.value == other.value)

    def __hash__(self) -> int:
        return hash(self.value) if _hashable(self.value) else id(self.value)


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def replace_static(tree: PyTree, with_value: bool) -> PyTree:
    """`tree` with what `Static` holds in its place, or with None there."""

    def one(node: Any) -> Any:
        return (node.value if with_value else None) if isinstance(node, Static) else node

    return jax.tree.map(one, tree, is_leaf=lambda node: isinstance(node, Static))


def _predicate(select: Select) -> Callable[[str], Any]:
    if isinstance(select, str):
        globs = (select, f"{select}/*", f"{select}.*")
        return lambda path: any(fnmatch.fnmatchcase(path, glob) for glob in globs)
    if isinstance(select, re.Pattern):
        return select.search
    if callable(select) and not isinstance(select, type):  # which is no question about a path
        return select
    raise StructureError(
        f"select is a {type(select).__name__}; pass a glob such as 'Dense_0/*', a compiled regular "
        "expression (re.compile('a|b') for several names), or a function of the path."
    )
