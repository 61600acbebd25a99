"""An operator in the metric of an adaptive optimizer, from the optimizer's own state."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import programs, trees
from spectra.base.calls import automatic
from spectra.base.errors import SpectraError
from spectra.base.paths import leaf_paths
from spectra.base.trees import PyTree
from spectra.operators.arithmetic import DiagonallyScaledOperator
from spectra.operators.base import LinearOperator, require_operator
from spectra.operators.optimizers import (
    RULES,
    SAME_STATE,
    Found,
    Rule,
    by_name,
    matching,
    second_moment,
    template_of,
)
from spectra.operators.pytree import operator
from spectra.operators.response import AGREE, preconditioner


@operator(leaves=("base", "scale"))
class PreconditionedOperator(DiagonallyScaledOperator):
    """P^(-1/2) H P^(-1/2), the curvature in the metric of an adaptive optimizer; P is the optimizer's own.

    An adaptive optimizer moves the parameters by -η P⁻¹ m with a diagonal P, which it keeps in its state. In
    the coordinates P^(1/2) θ, this is a step of η along m, so the spectrum of P^(-1/2) H P^(-1/2) plays the
    role that the spectrum of H plays for gradient descent with momentum. The largest eigenvalue is the
    preconditioned sharpness. Training with Adam is stable while it is below (2 + 2 b1) / ((1 - b1) η), which
    is 38 / η for b1 = 0.9, and full-batch training settles at this edge.

        Adam, AdamW  P = (1 - b1^t) (sqrt(ν / (1 - b2^t) + eps_root) + eps)
        AMSGrad      P = (1 - b1^t) (sqrt(ν_max + eps_root) + eps)
        AdaBelief    P = (1 - b1^t) (sqrt(ν / (1 - b2^t)) + eps)
        RMSProp      P = sqrt(ν + eps), or sqrt(ν) + eps with eps_in_sqrt=False
        Adagrad      P = sqrt(Σ g² + eps)

    with ν and the step t from the state. m is the momentum buffer as it is stored: Adam's bias correction
    is part of P.

    Args:
        op: operator on the parameters, such as a `HessianOperator`, or a block of one.
        optimizer_state: optax's state, or the `opt_state` of an nnx `Optimizer`, for all parameters of `op`
            or for those under one name such as "params". Its second moment is found inside chains, masks,
            partitions, schedules, `flatten` and `MultiSteps`. Alternatively, the diagonal of any P: a pytree
            like the parameters, or a flat array.
        update_fn: `optimizer.update`, or the optimizer itself. P is then measured from its updates (see
            `spectra.operators.response`), and nothing below is needed; arguments that are given are checked
            against it. An optimizer without a diagonal P is refused.
        b1: decay of the momentum; default: that in the state (`inject_hyperparams`), or 0.9.
        b2: decay of the second moment (`decay` of RMSProp); default: that in the state.
        eps: default: that in the state, or optax's for this transformation.
        eps_root: default: that in the state, or 0.
        eps_in_sqrt: as for optax's RMSProp.
        rule: "adam" (and AdamW), "yogi" or "adamax", whose states cannot be told from one another, nor from
            those of RAdam, ADOPT and LAMB. Without `update_fn`, a state of this form needs it.

    Raises:
        SpectraError: no second moment in the state, or several; no step has been taken; unknown rule;
            neither `update_fn` nor `rule` and `b2` for a state like Adam's; an update that is not a diagonal
            multiple of the momentum.
        StructureError: a parameter of `op` has no second moment, or its second moment has another shape.

    Cost: a product of `op` and two multiplications by a diagonal; one vector of memory. With `update_fn`,
    about 30 updates of the optimizer, once.

    References:
        Cohen et al., Adaptive gradient methods at the edge of stability, arXiv:2207.14484.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, spectra
        >>> op = spectra.MatrixOperator(jnp.diag(jnp.array([1.0, 100.0])))
        >>> w = jnp.ones(2)
        >>> optimizer = optax.rmsprop(0.01)
        >>> _, state = optimizer.update(op @ w, optimizer.init(w), w)
        >>> matrix = spectra.PreconditionedOperator(op, state, update_fn=optimizer.update).as_matrix()
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
        update_fn: Any = None,
        b1: float | None = None,
        b2: float | None = None,
        eps: float | None = None,
        eps_root: float | None = None,
        eps_in_sqrt: bool = True,
        rule: str | None = None,
    ):
        require_operator(op)
        numbers = {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root}
        given = {name: x for name, x in numbers.items() if x is not None}
        _check_numbers(given)
        scale = _roots(_preconditioner(op, optimizer_state, update_fn, rule, given, eps_in_sqrt), op)
        if not trees.is_traced((scale, op)):
            _check(scale)
        object.__setattr__(self, "base", op)
        object.__setattr__(self, "scale", scale)

    def _with_base(self, base: LinearOperator) -> "PreconditionedOperator":
        return _make(base, self.scale)

    def _principal(self, indices: tuple[int, ...]) -> "PreconditionedOperator":
        return _make(self.base._principal(indices), trees.keep_leaves(self.scale, indices))


def _check_numbers(given: dict[str, Any]) -> None:
    """Raise for what no optimizer has: with a decay of 1 P is infinite, and the matrix zero."""
    for name, value in given.items():
        if trees.is_traced(value):
            continue
        if name in ("b1", "b2") and not 0 <= value < 1:
            raise SpectraError(f"{name}={value} is the decay of an average: use a number in [0, 1).")
        if not 0 <= value < np.inf:
            raise SpectraError(f"{name}={value} is added to what P divides by: use zero or more.")


def _preconditioner(
    op: LinearOperator,
    optimizer_state: Any,
    update_fn: Callable[..., Any] | None,
    rule: str | None,
    given: dict[str, Any],
    eps_in_sqrt: bool,
) -> list[jax.Array]:
    """P of each leaf: as given, as measured, or by the rule of its optimizer."""
    diagonal = _diagonal(optimizer_state, op)
    if diagonal is not None:
        return diagonal
    found = second_moment(optimizer_state)
    if rule is not None and (rule not in SAME_STATE or found.kind != "ScaleByAdamState"):
        raise SpectraError(
            f"rule={rule!r} with a {found.kind}: use one of {', '.join(SAME_STATE)} with a state like "
            "Adam's, or leave it out."
        )
    chosen = RULES[found.kind] if rule is None else SAME_STATE[rule]
    if update_fn is None:
        _require_known(found, chosen, rule, given)
        return _by_rule(op, found, chosen, given, eps_in_sqrt)

    def by_rule(measured: dict[str, Any], in_sqrt: bool) -> list[jax.Array]:
        return _by_rule(op, found, chosen, given | measured, in_sqrt)

    measured = preconditioner(update_fn, optimizer_state, op, by_rule)
    if (given or rule) and not trees.is_traced(measured):
        stated = by_rule({}, eps_in_sqrt)
        if not all(np.allclose(a, b, rtol=AGREE, atol=0) for a, b in zip(stated, measured, strict=True)):
            raise SpectraError(
                "one update of the optimizer contradicts the P of the numbers that are given "
                f"({', '.join([*given, *(['rule'] if rule else [])])}): leave them out; update_fn suffices."
            )
    return measured


def _diagonal(state: PyTree, op: LinearOperator) -> list[jax.Array] | None:
    """The leaves of P, where that is what was passed in place of a state."""
    if op.is_flat(state):
        state = op.as_vector(state, "P")
    leaves = jax.tree.leaves(state)
    if leaf_paths(state) != leaf_paths(op.like) or not all(map(trees.is_array, leaves)):
        return None
    for path, leaf in zip(leaf_paths(state), leaves, strict=True):
        # NumPy compares complex numbers by their real parts first.
        if jnp.iscomplexobj(leaf) or (not trees.is_traced(leaf) and not np.all(np.asarray(leaf) > 0)):
            raise SpectraError(f"the diagonal of '{path}' is not positive everywhere, so it has no root.")
    return matching(by_name(state), op, "diagonal")


def _require_known(found: Found, chosen: Rule, rule: str | None, given: dict[str, Any]) -> None:
    """Raise where the state alone does not say what divides the update."""
    stored = set(given) | set(found.injected) | set(["b2"] if "decay" in found.injected else [])
    if chosen.needs_b2 and "b2" not in stored:
        missing = "b2, the decay of its second moment,"
    elif found.kind == "ScaleByAdamState" and rule is None:
        missing = "which optimizer it belongs to,"
    else:
        return
    like_adam = found.kind == "ScaleByAdamState"
    same = " RAdam, ADOPT, Yogi, AdaMax and LAMB keep a state of the same form as Adam's."
    numbers = 'rule="adam", b2=0.999 if it is that of Adam or AdamW' if like_adam else "the number, b2=0.999"
    raise SpectraError(
        f"a {found.kind} does not say {missing} and optax does not store it.{same * like_adam} Pass "
        f"update_fn=optimizer.update, from which P is measured; or {numbers}."
    )


def _by_rule(
    op: LinearOperator, found: Found, chosen: Rule, given: dict[str, Any], eps_in_sqrt: bool
) -> list[jax.Array]:
    fields = found.fields
    default = {"b1": 0.9, "b2": chosen.b2, "eps": chosen.eps, "eps_root": 0.0}
    stored = {name: found.injected[name] for name in default if name in found.injected}
    stored |= {"b2": found.injected["decay"]} if "decay" in found.injected else {}
    numbers = default | stored | given
    count = found.count()
    if count is not None:
        numbers["count"] = count
    moments = fields[chosen.moment]
    moments = matching(by_name(moments, template_of(moments, op)), op)
    dtypes = tuple(leaf.dtype for leaf in jax.tree.leaves(op.structure))
    return _scales(moments, numbers, rule=chosen, dtypes=dtypes, eps_in_sqrt=eps_in_sqrt)


@partial(programs.jit, static_argnames=("rule", "dtypes", "eps_in_sqrt"))
def _scales(
    moments: list[jax.Array],
    numbers: dict[str, Any],
    *,
    rule: Rule,
    dtypes: tuple[Any, ...],
    eps_in_sqrt: bool,
) -> list[jax.Array]:
    """P of each leaf."""
    corrected = rule.has_momentum and "count" in numbers
    momentum = 1 - numbers["b1"] ** numbers["count"] if corrected else 1.0

    def one(moment: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return momentum * rule.scale(moment.astype(dtype), eps_in_sqrt=eps_in_sqrt, **numbers)

    return [one(*pair) for pair in zip(moments, dtypes, strict=True)]


def _roots(p: list[jax.Array], op: LinearOperator) -> PyTree:
    """P^(-1/2), a vector in the operator's dtypes."""
    leaves, treedef = jax.tree.flatten(op.structure)
    return treedef.unflatten(_inverse_roots(p, tuple(leaf.dtype for leaf in leaves)))


@partial(programs.jit, static_argnames="dtypes")
def _inverse_roots(p: list[jax.Array], dtypes: tuple[Any, ...]) -> list[jax.Array]:
    return [(1 / jnp.sqrt(x)).astype(dtype) for x, dtype in zip(p, dtypes, strict=True)]


def _make(base: LinearOperator, scale: PyTree) -> PreconditionedOperator:
    op = object.__new__(PreconditionedOperator)
    object.__setattr__(op, "base", base)
    object.__setattr__(op, "scale", scale)
    return op


def _check(scale: PyTree) -> None:
    if trees.all_finite(scale):
        return
    for path, leaf in zip(leaf_paths(scale), jax.tree.leaves(scale), strict=True):
        if not trees.all_finite(leaf):
            raise SpectraError(
                f"the preconditioner of '{path}' is zero or not a number somewhere: with eps=0 a parameter "
                "that has seen no gradient has no scale. Pass the eps of the optimizer."
            )
