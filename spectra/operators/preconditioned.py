"""An operator in the metric of an adaptive optimizer, from the optimizer's own state."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from spectra import _tree
from spectra._errors import SpectraError, StructureError
from spectra._mesh import automatic
from spectra._paths import leaf_paths
from spectra.operators.arithmetic import Wrapped
from spectra.operators.base import LinearOperator, operator, require_operator

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one of optax's transformations divides its update: by P, made of fields of its state."""

    scale: Callable[..., jax.Array]  # (moment, state's fields and hyperparameters) -> P of one leaf
    moment: str  # the field that holds the second moment
    b2: float = 0.999
    eps: float = 1e-8
    has_momentum: bool = True  # of Adam's kind, whose bias correction (1 - b1^t) belongs to P


def _adam(nu, count, b2, eps, eps_root, **_):
    return jnp.sqrt(nu / (1 - b2**count) + eps_root) + eps


def _amsgrad(nu_max, eps, eps_root, **_):  # its maximum is taken over corrected moments
    return jnp.sqrt(nu_max + eps_root) + eps


def _belief(nu, count, b2, eps, **_):  # eps_root is in its moment already
    return jnp.sqrt(nu / (1 - b2**count)) + eps


def _adamax(nu, **_):
    return nu


def _rms(nu, eps, eps_in_sqrt, **_):
    return jnp.sqrt(nu + eps) if eps_in_sqrt else jnp.sqrt(nu) + eps


def _rms_corrected(nu, count, b2, **rest):
    return _rms(nu / (1 - b2**count), **rest)


def _rss(total, eps, **_):  # optax does not move parameters that have seen no gradient
    return jnp.where(total > 0, jnp.sqrt(total + eps), jnp.inf)


RULES = {  # optax 0.2.8, transforms of the same names
    "ScaleByAdamState": Rule(_adam, "nu"),
    "ScaleByAmsgradState": Rule(_amsgrad, "nu_max"),
    "ScaleByBeliefState": Rule(_belief, "nu", eps=1e-16),
    "ScaleByRmsState": Rule(_rms, "nu", b2=0.9, has_momentum=False),
    "ScaleByRmsWithCountState": Rule(_rms_corrected, "nu", b2=0.9, has_momentum=False),
    "ScaleByRssState": Rule(_rss, "sum_of_squares", eps=1e-7, has_momentum=False),
}
SAME_STATE = {  # optimizers whose state is Adam's in name and form
    "yogi": Rule(_adam, "nu", eps=1e-3),
    "adamax": Rule(_adamax, "nu"),
}


@operator(leaves=("base", "scale"))
class PreconditionedOperator(Wrapped):
    """P^(-1/2) H P^(-1/2), the curvature that an adaptive optimizer feels; P is the optimizer's own.

    An adaptive optimizer moves the parameters by -η P⁻¹ m with a diagonal P, which it keeps in its state.
    In the coordinates P^(1/2) θ that is a step of η along m, so the spectrum of P^(-1/2) H P^(-1/2) takes
    the part that the spectrum of H plays for gradient descent with momentum. Its largest eigenvalue is the
    preconditioned sharpness: with Adam's b1 it is stable up to (2 + 2 b1) / ((1 - b1) η), 38 / η for 0.9,
    and full-batch training settles at this edge.

        Adam, AdamW  P = (1 - b1^t) (sqrt(ν / (1 - b2^t) + eps_root) + eps)
        AMSGrad      P = (1 - b1^t) (sqrt(ν_max + eps_root) + eps)
        AdaBelief    P = (1 - b1^t) (sqrt(ν / (1 - b2^t)) + eps)
        RMSProp      P = sqrt(ν + eps), or sqrt(ν) + eps with eps_in_sqrt=False
        Adagrad      P = sqrt(Σ g² + eps)

    with ν and the step t from the state. m is the momentum buffer as it is stored: Adam's bias correction
    is part of P.

    Args:
        op: operator on the parameters, such as a `HessianOperator`, or a block of one.
        optimizer_state: optax's state, of which the one second moment is found inside chains, masks,
            partitions, schedules and `MultiSteps`, or the `opt_state` of an nnx `Optimizer`.
        b1: decay of the momentum; default: that in the state (`inject_hyperparams`), or 0.9.
        b2: decay of the second moment (`decay` of RMSProp); default: that in the state, or optax's.
        eps: default: that in the state, or optax's for this transformation.
        eps_root: default: that in the state, or 0.
        eps_in_sqrt: as of RMSProp.
        rule: "yogi" or "adamax" for optimizers whose state cannot be told from Adam's.

    Raises:
        SpectraError: no second moment in the state, or several; no step has been taken; unknown rule.
        StructureError: a parameter of `op` has no second moment, or one of another shape.

    Cost: a product of `op` and two multiplications by a diagonal; one vector of memory.

    References:
        Cohen et al., Adaptive gradient methods at the edge of stability, arXiv:2207.14484.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, spectra
        >>> op = spectra.MatrixOperator(jnp.diag(jnp.array([1.0, 100.0])))
        >>> w = jnp.ones(2)
        >>> optimizer = optax.rmsprop(0.01)
        >>> _, state = optimizer.update(op @ w, optimizer.init(w), w)
        >>> matrix = spectra.PreconditionedOperator(op, state).as_matrix()
        >>> [round(float(x), 3) for x in matrix.diagonal()]
        [3.162, 3.162]
    """

    base: LinearOperator
    scale: PyTree  # P^(-1/2), a vector

    @automatic
    def __init__(
        self,
        op: LinearOperator,
        optimizer_state: PyTree,
        *,
        b1: float | None = None,
        b2: float | None = None,
        eps: float | None = None,
        eps_root: float | None = None,
        eps_in_sqrt: bool = True,
        rule: str | None = None,
    ):
        require_operator(op)
        state, injected, found = _second_moment(optimizer_state)
        if rule is not None:
            if rule not in SAME_STATE or type(state).__name__ != "ScaleByAdamState":
                raise SpectraError(
                    f"rule={rule!r} with a {type(state).__name__}: use one of {', '.join(SAME_STATE)} with "
                    "a state like Adam's, or leave it out."
                )
            found = SAME_STATE[rule]
        given = {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root}
        default = {"b1": 0.9, "b2": found.b2, "eps": found.eps, "eps_root": 0.0}
        stored = {name: injected[name] for name in default if name in injected}
        stored |= {"b2": injected["decay"]} if "decay" in injected else {}
        chosen = default | stored | {name: x for name, x in given.items() if x is not None}
        count = _count(state)
        if count is not None:
            chosen["count"] = count
        moments = _matching(getattr(state, found.moment), op)
        leaves, treedef = jax.tree.flatten(op.structure)
        static = {"rule": found, "dtypes": tuple(leaf.dtype for leaf in leaves), "eps_in_sqrt": eps_in_sqrt}
        scale = treedef.unflatten(_scales(jax.tree.leaves(moments), chosen, **static))
        if not _tree.is_traced((scale, op)):
            _check(scale)
        object.__setattr__(self, "base", op)
        object.__setattr__(self, "scale", scale)

    def _apply(self, multiply: Callable[[PyTree], PyTree], v: PyTree) -> PyTree:
        return self._scaled(multiply(self._scaled(v)))

    def _scaled(self, v: PyTree) -> PyTree:
        return jax.tree.map(jnp.multiply, self.scale, v)

    def _with_base(self, base: LinearOperator) -> "PreconditionedOperator":
        return _make(base, self.scale)

    def _principal(self, indices: tuple[int, ...]) -> "PreconditionedOperator":
        return _make(self.base._principal(indices), _tree.keep_leaves(self.scale, indices))


@partial(jax.jit, static_argnames=("rule", "dtypes", "eps_in_sqrt"))
def _scales(moments: list, numbers: dict[str, Any], *, rule: Rule, dtypes: tuple, eps_in_sqrt: bool) -> list:
    """P^(-1/2) of each leaf."""
    corrected = rule.has_momentum and "count" in numbers
    momentum = 1 - numbers["b1"] ** numbers["count"] if corrected else 1.0

    def one(moment, dtype):
        scale = momentum * rule.scale(moment.astype(dtype), eps_in_sqrt=eps_in_sqrt, **numbers)
        return (1 / jnp.sqrt(scale)).astype(dtype)

    return [one(*pair) for pair in zip(moments, dtypes, strict=True)]


def _make(base: LinearOperator, scale: PyTree) -> PreconditionedOperator:
    op = object.__new__(PreconditionedOperator)
    object.__setattr__(op, "base", base)
    object.__setattr__(op, "scale", scale)
    return op


def _states(node: Any, injected: dict[str, Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """All parts of a state that have a rule, with the hyperparameters that were injected above them."""
    if type(node).__name__ in RULES:
        yield node, injected
        return
    own = getattr(node, "hyperparams", None)
    if isinstance(own, dict):
        injected = injected | {name: _value(x) for name, x in own.items()}
    children = node.values() if isinstance(node, dict) else node if isinstance(node, (tuple, list)) else ()
    for child in children:
        yield from _states(child, injected)


def _second_moment(optimizer_state: PyTree) -> tuple[Any, dict[str, Any], Rule]:
    found = list(_states(optimizer_state, {}))
    names = [type(state).__name__ for state, _ in found]
    if not found:
        raise SpectraError(
            f"the optimizer state ({type(optimizer_state).__name__}) holds no second moment that is known: "
            f"looked for {', '.join(RULES)}. Plain gradient descent has no preconditioner: its curvature is "
            "that of `op` itself."
        )
    if len(found) > 1:
        raise SpectraError(
            f"the optimizer state holds {len(found)} second moments ({', '.join(names)}): pass the part that "
            "belongs to these parameters, such as state.inner_states['group'], and op.block(...) of them."
        )
    return *found[0], RULES[names[0]]


def _count(state: Any) -> Any:
    if "count" not in state._fields:  # every tuple has a method of this name
        return None
    count = _value(state.count)
    if not _tree.is_traced(count) and int(count) == 0:
        raise SpectraError("the optimizer has taken no step yet: its second moment is empty.")
    return count


def _value(leaf: Any) -> Any:
    """The array in a leaf, which nnx wraps."""
    return jax.tree.leaves(leaf)[0] if jax.tree.leaves(leaf) else leaf


def _matching(moments: PyTree, op: LinearOperator) -> PyTree:
    """The second moments of the operator's parameters, found by their paths, as a vector."""
    known = dict(zip(leaf_paths(moments), jax.tree.leaves(moments), strict=True))
    leaves, treedef = jax.tree.flatten(op.like)
    chosen = []
    for path, leaf in zip(leaf_paths(op.like), leaves, strict=True):
        if path not in known:
            raise StructureError(
                f"the optimizer state has no second moment of the parameter '{path}'; it has those of "
                f"{', '.join(known) or 'none'}. Take op.block(...) of parameters that this optimizer moves."
            )
        if known[path].shape != leaf.shape:
            raise StructureError(
                f"the second moment of '{path}' has shape {known[path].shape}, the parameter {leaf.shape}."
            )
        chosen.append(known[path])
    return treedef.unflatten(chosen)


def _check(scale: PyTree) -> None:
    if _tree.all_finite(scale):
        return
    for path, leaf in zip(leaf_paths(scale), jax.tree.leaves(scale), strict=True):
        if not _tree.all_finite(leaf):
            raise SpectraError(
                f"the preconditioner of '{path}' is zero or not a number somewhere: with eps=0 a parameter "
                "that has seen no gradient has no scale. Pass the eps of the optimizer."
            )
