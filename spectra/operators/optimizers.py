"""What the states of optax's optimizers hold: second moments, rules that make P of them, names."""

import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp

from spectra.base import trees
from spectra.base.errors import SpectraError, StructureError
from spectra.base.paths import leaf_paths
from spectra.base.trees import PyTree
from spectra.operators.base import LinearOperator


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one of optax's transformations divides its update: by P, made of fields of its state."""

    scale: Callable[..., jax.Array]  # (moment, state's fields and hyperparameters) -> P of one leaf
    moment: str  # the field that holds the second moment
    b2: float = 0.999
    eps: float = 1e-8
    has_momentum: bool = True  # of Adam's kind, whose bias correction (1 - b1^t) belongs to P
    needs_b2: bool = False  # P depends on it


def _adam(nu: jax.Array, count: jax.Array, b2: float, eps: float, eps_root: float, **_: Any) -> jax.Array:
    return jnp.sqrt(nu / (1 - b2**count) + eps_root) + eps


def _amsgrad(
    nu_max: jax.Array, eps: float, eps_root: float, **_: Any
) -> jax.Array:  # its maximum is taken over corrected moments
    return jnp.sqrt(nu_max + eps_root) + eps


def _belief(
    nu: jax.Array, count: jax.Array, b2: float, eps: float, **_: Any
) -> jax.Array:  # eps_root is in its moment already
    return jnp.sqrt(nu / (1 - b2**count)) + eps


def _adamax(nu: jax.Array, **_: Any) -> jax.Array:
    return nu


def _rms(nu: jax.Array, eps: float, eps_in_sqrt: bool, **_: Any) -> jax.Array:
    return jnp.sqrt(nu + eps) if eps_in_sqrt else jnp.sqrt(nu) + eps


def _rms_corrected(nu: jax.Array, count: jax.Array, b2: float, **rest: Any) -> jax.Array:
    return _rms(nu / (1 - b2**count), **rest)


def _rss(
    total: jax.Array, eps: float, **_: Any
) -> jax.Array:  # optax does not move parameters that have seen no gradient
    return jnp.where(total > 0, jnp.sqrt(total + eps), jnp.inf)


RULES = {  # optax 0.2.8, transforms of the same names
    "ScaleByAdamState": Rule(_adam, "nu", needs_b2=True),
    "ScaleByAmsgradState": Rule(_amsgrad, "nu_max"),
    "ScaleByBeliefState": Rule(_belief, "nu", eps=1e-16, needs_b2=True),
    "ScaleByRmsState": Rule(_rms, "nu", b2=0.9, has_momentum=False),
    "ScaleByRmsWithCountState": Rule(_rms_corrected, "nu", b2=0.9, has_momentum=False, needs_b2=True),
    "ScaleByRssState": Rule(_rss, "sum_of_squares", eps=1e-7, has_momentum=False),
}
SAME_STATE = {  # optimizers whose state is that of Adam in name and form
    "adam": RULES["ScaleByAdamState"],
    "yogi": Rule(_adam, "nu", eps=1e-3, needs_b2=True),
    "adamax": Rule(_adamax, "nu"),
}
FORMS = {  # a state restored without its class has the names of its fields only
    frozenset({"count", "mu", "nu"}): "ScaleByAdamState",
    frozenset({"count", "mu", "nu", "nu_max"}): "ScaleByAmsgradState",
    frozenset({"nu"}): "ScaleByRmsState",
    frozenset({"count", "nu"}): "ScaleByRmsWithCountState",
    frozenset({"sum_of_squares"}): "ScaleByRssState",
}


@dataclasses.dataclass(frozen=True)
class Found:
    """The one part of an optimizer's state that holds a second moment."""

    part: Any
    kind: str  # key of RULES
    injected: dict[str, Any]  # hyperparameters that the state holds
    has_class: bool  # false for the fields of a state that was restored without it

    @property
    def fields(self) -> dict[str, PyTree]:
        """The part's fields by name."""
        part: Any = self.part
        return dict(_items(part)) if isinstance(part, dict) else part._asdict()

    def count(self) -> Any:
        """Steps taken; None where the part does not count them.

        Raises:
            SpectraError: none has been taken.
        """
        if "count" not in self.fields:
            return None
        count = value(self.fields["count"])
        if not trees.is_traced(count) and int(count) == 0:
            raise SpectraError("the optimizer has taken no step yet: its second moment is empty.")
        return count


def _items(node: Any) -> dict[str, Any]:
    return node


def states(node: Any, injected: dict[str, Any] | None = None) -> Iterator[Found]:
    """All parts of a state that have a rule, with the hyperparameters that were injected above them."""
    injected = injected or {}
    if type(node).__name__ in RULES:
        yield Found(node, type(node).__name__, injected, True)
        return
    names = frozenset(_items(node)) if isinstance(node, dict) else frozenset[str]()
    if names in FORMS:
        yield Found(node, FORMS[names], injected, False)
        return
    own: Any = (
        _items(node).get("hyperparams") if isinstance(node, dict) else getattr(node, "hyperparams", None)
    )
    if isinstance(own, dict):
        injected = injected | {name: value(x) for name, x in _items(own).items()}
    children: Iterable[Any] = ()
    if isinstance(node, dict):
        children = _items(node).values()
    elif isinstance(node, (tuple, list)):
        children = cast("list[Any]", node)
    for child in children:
        yield from states(child, injected)


def second_moment(optimizer_state: PyTree) -> Found:
    """The one second moment of a state.

    Raises:
        SpectraError: there is none that is known, or more than one.
    """
    found = list(states(optimizer_state))
    if not found:
        raise SpectraError(
            f"the optimizer state ({type(optimizer_state).__name__}) contains no known second moment: "
            f"looked for {', '.join(RULES)}. Plain gradient descent has no preconditioner: its curvature is "
            "that of `op` itself. For other optimizers, pass the diagonal of P instead of the state: a "
            "pytree like the parameters."
        )
    if len(found) > 1:
        raise SpectraError(
            f"the optimizer state holds {len(found)} second moments ({', '.join(x.kind for x in found)}): "
            "pass the part that belongs to these parameters, such as state.inner_states['group'], and "
            "op.block(...) of them."
        )
    return found[0]


def value(leaf: Any) -> Any:
    """The array in a leaf, which nnx wraps."""
    return jax.tree.leaves(leaf)[0] if jax.tree.leaves(leaf) else leaf


def pure(tree: PyTree) -> PyTree:
    """The tree with plain arrays in place of nnx's variables."""
    nnx = sys.modules.get("flax.nnx")
    return nnx.as_pure(tree) if nnx else tree


def parameters(op: LinearOperator) -> PyTree:
    """All parameters of the operator that `op` is made of, constants among them."""
    inner: Any = op
    while hasattr(inner, "base"):
        inner = inner.base
    return getattr(inner, "params", inner.like)


def by_name(tree: PyTree, template: PyTree = None) -> dict[str, Any]:
    """Leaves by path; those of a flat vector (`optax.flatten`) by the paths of its `template`."""
    leaves, paths = jax.tree.leaves(tree), leaf_paths(tree)
    if template is not None and is_flat(tree):
        parts = trees.unravel(leaves[0], jax.tree.map(_like(leaves[0].dtype), template))
        leaves, paths = jax.tree.leaves(parts), leaf_paths(template)
    if paths and all(path.endswith("/value") for path in paths):  # of nnx, restored without its classes
        paths = [path.removesuffix("/value") for path in paths]
    return dict(zip(paths, leaves, strict=True))


def _like(dtype: Any) -> Callable[[Any], jax.ShapeDtypeStruct]:
    return lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype)


def is_flat(moments: PyTree) -> bool:
    """Whether moments are one vector for a whole tree of parameters."""
    return jax.tree_util.all_leaves((moments,)) and value(moments).ndim == 1


def template_of(moments: PyTree, op: LinearOperator) -> PyTree:
    """A tree like the one that the optimizer was made for, of the operator's parameters where it has them."""
    whole = parameters(op)
    children = _items(whole).values() if isinstance(whole, dict) else ()
    candidates: list[PyTree] = [whole, op.like, *children]
    if is_flat(moments):
        size = value(moments).size
        fitting = [tree for tree in candidates if jax.tree.leaves(tree) and trees.tree_size(tree) == size]
        return fitting[0] if fitting else moments
    names = set(leaf_paths(moments))
    if any(type(x).__name__ == "MaskedNode" for x in jax.tree.leaves(moments, is_leaf=_is_masked)):
        fitting = [tree for tree in candidates if names <= set(leaf_paths(tree))]
        return fitting[0] if fitting else moments
    known = by_name(pure(whole))
    values = aligned(list(names), known)
    if values is None:
        return jax.tree.map(jnp.ones_like, moments)
    chosen = dict(zip(names, values, strict=True))
    return jax.tree.unflatten(jax.tree.structure(moments), [chosen[path] for path in leaf_paths(moments)])


def _is_masked(node: Any) -> bool:
    return type(node).__name__ == "MaskedNode"


def aligned(paths: list[str], known: dict[str, Any]) -> list[Any] | None:
    """What is known under each path, or under all of them with one prefix taken away or put before.

    An optimizer may have been made for `variables["params"]`, the operator for `variables`.
    """
    if not paths:
        return []
    parts = paths[0].split("/")
    for end in range(len(parts)):
        prefix = "/".join(parts[:end]) + "/" if end else ""
        if all(path.startswith(prefix) and path.removeprefix(prefix) in known for path in paths):
            return [known[path.removeprefix(prefix)] for path in paths]
    for name in known:
        prefix = name.removesuffix(paths[0])
        if name.endswith(f"/{paths[0]}") and all(prefix + path in known for path in paths):
            return [known[prefix + path] for path in paths]
    return None


def matching(known: dict[str, Any], op: LinearOperator, what: str = "second moment") -> list[Any]:
    """What is known of each of the operator's parameters, in their order.

    Raises:
        StructureError: one is missing, or has another shape.
    """
    paths, leaves = leaf_paths(op.like), jax.tree.leaves(op.like)
    found = aligned(paths, known)
    if found is None:
        missing = next((path for path in paths if path not in known), paths[0])
        raise StructureError(
            f"the optimizer state has no {what} of the parameter '{missing}'; it has those of "
            f"{', '.join(known) or 'none'}. Take op.block(...) of parameters that this optimizer moves."
        )
    for path, leaf, moment in zip(paths, leaves, found, strict=True):
        if moment.shape != leaf.shape:
            raise StructureError(
                f"the {what} of '{path}' has shape {moment.shape}, the parameter {leaf.shape}."
            )
    return found
