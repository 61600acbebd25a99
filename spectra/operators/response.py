"""The diagonal P that an optimizer divides by, measured from its own update.

Where the state holds the momentum m, an update is u = -η P⁻¹ m' + rest. P depends on the second moment and
on the step count, which are set so that the update leaves behind those of the state; what a change of the
momentum adds to u is then -η P⁻¹ b1 times the change, whatever else moves the parameters (weight decay, a
gradient, another momentum). η b1 is the response at a second moment N so large that P is a power of N, after
infinitely many steps. The rectification of RAdam, Nesterov's momentum, and numbers that no state holds (b1,
b2, eps) are in it without being asked for. Where u is not linear in the momentum, entry by entry, no diagonal
P exists, and the optimizer is refused.

RMSProp and Adagrad have no momentum to change. There the gradient is, and what is measured is compared with
the rule.
"""

# pyright: reportPrivateUsage=false
# Operators have parts that only this package uses.

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import programs, trees
from spectra.base.errors import SpectraError
from spectra.base.paths import leaf_paths
from spectra.base.trees import PyTree
from spectra.operators import optimizers
from spectra.operators.base import LinearOperator
from spectra.operators.optimizers import Found

Arrays = list[jax.Array]
AGREE = 1e-3
"""Relative difference of what should be equal but for rounding, of float32 at a second moment of bfloat16."""
ROUNDINGS = 8
"""Of sums of two products, and a quotient of them."""
FAINT = 1e-12
"""Gradient where none has been seen: the rounding of its square, whose root is 1e-16, is below eps."""
FADED = 1e-6
"""Largest update that may be rounding, for a momentum as large as the root of the second moment."""
SECOND = ("nu", "nu_max", "sum_of_squares")
FOREVER = 2**30
"""Steps after which no bias is left to correct."""


class Response:
    """An optimizer's update, as a function of its momentum (or gradient) at a fixed second moment."""

    def __init__(self, update_fn: Any, state: PyTree, op: LinearOperator):
        self.update, self.op = _update_of(update_fn), op
        first = optimizers.second_moment(optimizers.pure(state))
        self.template = optimizers.template_of(first.fields[optimizers.RULES[first.kind].moment], op)
        self.state = _with_classes(update_fn, optimizers.pure(state), self.template)
        self.found = optimizers.second_moment(self.state)
        self.fields = self.found.fields
        self.momentum = optimizers.RULES[self.found.kind].has_momentum
        self.count = self.found.count()
        self.held = {name: self.fields[name] for name in SECOND if name in self.fields}
        self.moment = self.held[optimizers.RULES[self.found.kind].moment]

    def to(self, held: dict[str, PyTree], count: Any, drive: PyTree) -> Arrays:
        """-(u(+d) - u(-d)) / 2d for each of the operator's parameters, with `held` left behind."""
        plus, minus = (self._leaving(held, count, jax.tree.map(lambda x, s=s: s * x, drive)) for s in (1, -1))
        d = self._of_op(drive)
        return [-(a - b) / (2 * x) for a, b, x in zip(plus, minus, d, strict=True)]

    def _leaving(self, held: dict[str, PyTree], count: Any, drive: PyTree) -> Arrays:
        """The update that leaves `held` behind: what a step makes of it is affine, with one slope a leaf."""
        at = jax.tree.map(lambda x: jnp.where(jnp.any(x != 0), x, jnp.full_like(x, FAINT**2)), held)
        once, twice = (
            self._evaluate(jax.tree.map(lambda x, s=s: s * x, at), count, drive)[1] for s in (1, 2)
        )
        start = jax.tree.map(_preimage, held, at, once, twice)
        updates, left = self._evaluate(start, count, drive)
        if not trees.is_traced(left):
            for want, got, *terms in zip(*map(jax.tree.leaves, (held, left, start, at)), strict=True):
                # Where a zero is left behind, the drive's own square has to cancel, up to its rounding.
                if not np.all(np.abs(got - want) <= AGREE * np.abs(want) + 2 * _rounding(*terms)):
                    raise _refused("its second moment is not a running mean that a step continues")
        return self._of_op(updates)

    def _evaluate(self, held: dict[str, PyTree], count: Any, drive: PyTree) -> tuple[PyTree, dict[Any, Any]]:
        fields = held | ({} if self.count is None else {"count": jnp.asarray(count - 1, jnp.int32)})
        gradient = jax.tree.map(jnp.zeros_like, self.template)
        if self.momentum:
            fields = fields | {"mu": drive}
        else:
            gradient = self._like_template(drive)
        try:
            return _evaluate(self.update, self.state, fields, gradient, self.template)
        except Exception as error:
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise SpectraError(
                f"update_fn(gradients, state, params) failed: {line} It is called as optax does, with "
                "gradients and parameters like those the optimizer was made for. Pass the transformation "
                "itself, update_fn=optimizer, for a state that was restored without its classes."
            ) from error

    def _like_template(self, drive: PyTree) -> PyTree:
        known = optimizers.by_name(drive, self.template)
        leaves = zip(leaf_paths(self.template), jax.tree.leaves(self.template), strict=True)
        values = [known.get(path, jnp.zeros_like(leaf)) for path, leaf in leaves]
        return jax.tree.unflatten(jax.tree.structure(self.template), values)

    def _of_op(self, tree: PyTree) -> Arrays:
        return optimizers.matching(optimizers.by_name(tree, self.template), self.op)

    def drive(self, size: float | None = None, seed: int | None = None) -> PyTree:
        """A change as large as the root of the second moment, or as `size`; with a seed of random signs."""
        share, floor = (1.0, 1.0) if self.momentum else (0.25, FAINT)
        leaves, treedef = jax.tree.flatten(self.moment)
        driven = jax.tree.leaves(self.fields["mu"]) if self.momentum else leaves
        rng = np.random.default_rng(seed)
        values: list[jax.Array] = []
        for x, like in zip(leaves, driven, strict=True):
            root = share * jnp.sqrt(jnp.maximum(x, 0))
            change = jnp.where(root > 0, root, floor) if size is None else jnp.full(x.shape, size)
            if seed is not None:
                change = change * jnp.asarray(rng.choice([-1, 1], x.shape) * rng.uniform(0.5, 1, x.shape))
            values.append(change.astype(trees.working_dtype(like.dtype)))
        return treedef.unflatten(values)


@partial(programs.jit, static_argnames="update")
def _evaluate(
    update: Callable[..., Any], state: PyTree, fields: dict[str, PyTree], gradient: PyTree, params: PyTree
) -> Any:
    part = next(optimizers.states(state)).part
    kept = {name: _cast(new, getattr(part, name)) for name, new in fields.items()}
    new = part._replace(**kept)
    state = jax.tree.map(lambda x: new if x is part else x, state, is_leaf=lambda x: x is part)
    updates, after = update(gradient, state, params)
    left = next(optimizers.states(after)).part
    return updates, {name: getattr(left, name) for name in fields if name in SECOND}


def _cast(new: PyTree, old: PyTree) -> PyTree:
    """In the state's types, but no floats below float32: a step computes with them before it rounds."""

    def dtype(leaf: Any) -> Any:
        return trees.working_dtype(leaf.dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype

    return jax.tree.map(lambda x, y: x.astype(dtype(y)), new, old)


def _rounding(start: jax.Array, at: jax.Array) -> jax.Array:
    return ROUNDINGS * jnp.finfo(start.dtype).eps * (jnp.abs(start) + jnp.abs(at))


def _preimage(want: jax.Array, at: jax.Array, once: jax.Array, twice: jax.Array) -> jax.Array:
    """Where an affine map, with values at `at` and at twice that, is `want`; `want` itself if it is constant.

    A little more than zero where that is wanted: of less, a root is no number.
    """
    size = jnp.max(jnp.abs(at), initial=0)
    slope = jnp.max(jnp.abs(twice - once), initial=0) / jnp.where(size > 0, size, 1)
    start = (want - once) / jnp.where(slope > 0, slope, 1) + at
    start = start + jnp.where(want == 0, _rounding(start, at), 0)
    return jnp.where(slope > 0, start, want)


def preconditioner(
    update_fn: Any, state: PyTree, op: LinearOperator, rule: Callable[..., list[Any]]
) -> Arrays:
    """P of each of the operator's parameters, from updates; `rule` gives it where there is no momentum.

    Raises:
        SpectraError: the update is zero, is no diagonal multiple of the momentum, or contradicts the rule.
    """
    response = Response(update_fn, state, op)
    moments = jax.tree.leaves(response.moment)
    if not (response.momentum or trees.is_traced(moments) or any(np.any(x) for x in moments)):
        raise SpectraError(
            "the optimizer has seen no gradient yet: its second moment is zero everywhere, and its P a "
            "single number. Take a step first."
        )
    found = response.to(response.held, response.count, response.drive())
    if not trees.is_traced(found) and _largest(found, response._of_op(response.drive())) < FADED:
        found = _before_the_end(response, found)
    if not trees.is_traced(found):
        _require_diagonal(found, response.to(response.held, response.count, response.drive(seed=0)))
    return _normalised(response, found) if response.momentum else _compared(response, found, rule)


def _before_the_end(response: Response, found: Arrays) -> Arrays:
    """The responses at half of the schedule's steps, if `found` is the rounding of a rate that has ended.

    A schedule that ends at zero computes start + (0 - start) in float32, which may leave some of it.
    """
    state = response.state
    response.state = _earlier(state, response.found)
    earlier = response.to(response.held, response.count, response.drive())
    if _largest(found) <= ROUNDINGS * jnp.finfo(jnp.float32).eps * _largest(earlier):
        return earlier
    response.state = state
    return found


def _largest(found: Arrays, drive: Arrays | None = None) -> float:
    parts = found if drive is None else [x * d for x, d in zip(found, drive, strict=True)]
    return max(float(np.max(np.abs(x), initial=0)) for x in parts)


def _normalised(response: Response, found: Arrays) -> Arrays:
    """P from the responses, in the unit of the response at a second moment that leaves nothing else of P."""
    roots = 1e14, 1e12
    count = None if response.count is None else FOREVER
    limits: list[Arrays] = []
    for root in roots:
        held = jax.tree.map(lambda x, n=root: jnp.full_like(x, n**2), response.held)
        limits.append(response.to(held, count, response.drive(root)))
    ends = [jnp.stack([jnp.max(x) for x in limit if x.size]).max() for limit in limits]
    if trees.is_traced(found):  # what cannot be looked at is taken for a square root
        return [ends[0] * roots[0] / x for x in found]
    for limit, end in zip(limits, ends, strict=True):
        if not all(np.allclose(x, end, rtol=AGREE, atol=0) for x in limit):
            raise _refused("its parameters have different learning rates; take op.block(...) of one group")
    power = float(np.log(float(ends[1] / ends[0])) / np.log(roots[0] / roots[1]))
    if not min(abs(power - 1), abs(power - 2)) < AGREE:
        raise _refused("the momentum is not divided by its second moment, or by the root of it")
    return [ends[0] * roots[0] ** round(power) / x for x in found]


def _compared(response: Response, found: Arrays, rule: Callable[..., list[Any]]) -> Arrays:
    """The first of the rule's P that the responses are inverse to, up to the learning rate."""
    slope = {} if response.count is None else {"b2": _slope(response)}
    if trees.is_traced(found):
        return rule(slope, True)
    for in_sqrt in (True, False):
        if _is_inverse(found, p := rule(slope, in_sqrt)):
            return p
    held = jax.tree.map(lambda x: 4 * x, response.held)
    twice = response.to(held, response.count, response.drive())  # where the root is twice as large
    bare = [np.asarray(x, np.float64).ravel() for x in rule(slope | {"eps": 0.0}, True)]
    for in_sqrt in (True, False):
        eps = _fitted_eps(np.concatenate(bare), _ravel(found), _ravel(twice), in_sqrt)
        if eps is not None and _is_inverse(found, p := rule(slope | {"eps": eps}, in_sqrt)):
            return p
    raise SpectraError(
        f"one update of the optimizer contradicts the P of a {response.found.kind}, whatever its eps. Pass "
        "the diagonal of the P that is meant in place of the state, a pytree like the parameters."
    )


def _is_inverse(found: Arrays, p: Arrays) -> bool:
    """Whether the responses times P are one number, the learning rate; P is infinite where nothing moves."""
    moves = np.isfinite(_ravel(p))
    rates = _ravel(found)[moves] * _ravel(p)[moves]
    return bool(np.allclose(rates, np.median(rates), rtol=AGREE, atol=0) and not _ravel(found)[~moves].any())


def _fitted_eps(root: np.ndarray, once: np.ndarray, twice: np.ndarray, in_sqrt: bool) -> float | None:
    """eps of c / sqrt(root² + eps), or of c / (root + eps), from responses at root and 2 root."""
    seen = np.isfinite(root) & (root > 0) & (twice != 0)
    if not seen.any():
        return None
    power = 2 if in_sqrt else 1
    alone = root == 0  # where P is eps alone, or its root
    if alone.any():
        at = int(np.argmax(np.where(seen, root, 0)))
        ratio = (np.median(once[alone]) / once[at]) ** power
        return float(root[at] ** power / (ratio - 1)) if ratio > 1 else None
    root, ratio = root[seen], (once / np.where(twice != 0, twice, 1))[seen]
    at = int(np.argmin(root))  # where eps matters most
    eps = root[at] ** power * (2**power - ratio[at] ** power) / (ratio[at] ** power - 1)
    return float(eps) if np.isfinite(eps) and eps > 0 else None


def _ravel(arrays: Arrays) -> np.ndarray:
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in arrays])


def _slope(response: Response) -> Any:
    """b2: what a step without a gradient leaves of the second moment."""
    nothing = jax.tree.map(jnp.zeros_like, response.drive())
    left: PyTree = response._evaluate(response.held, response.count, nothing)[1]
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(response.held), strict=True)
    return jnp.max(jnp.stack([jnp.max(a) / jnp.max(b) for a, b in pairs if b.size]))


def _require_diagonal(found: Arrays, again: Arrays) -> None:
    if not _largest(found) > 0:
        raise SpectraError(
            "update_fn returned an update that does not depend on the momentum: a learning rate of zero, or "
            "a step that only accumulates (optax.MultiSteps). Pass those of the inner optimizer."
        )
    for a, b in zip(found, again, strict=True):
        if not np.allclose(a, b, rtol=AGREE, atol=0):
            raise _refused("an update is not a multiple of the momentum, entry by entry")


def _refused(reason: str) -> SpectraError:
    return SpectraError(
        f"this optimizer has no diagonal P in its state: {reason}. Pass the diagonal of the P that is meant "
        "in place of the state, a pytree like the parameters."
    )


def _update_of(update_fn: Any) -> Callable[..., Any]:
    """The update of optax's transformation, of an nnx `Optimizer`, or the function itself."""
    update_fn = getattr(update_fn, "tx", update_fn)
    update = getattr(update_fn, "update", update_fn)
    if not callable(update):
        raise SpectraError(f"update_fn is a {type(update_fn).__name__}; pass optimizer.update.")
    return update


def _with_classes(update_fn: Any, state: PyTree, template: PyTree) -> PyTree:
    """A state that was restored as dicts and lists, in the form that the transformation makes."""
    init = getattr(getattr(update_fn, "tx", update_fn), "init", None)
    if init is None or next(optimizers.states(state)).has_class:
        return state
    fresh, known = init(template), optimizers.by_name(state)
    paths = leaf_paths(fresh)
    missing = [path for path in paths if path not in known]
    if missing:
        raise SpectraError(
            f"the restored state has no '{missing[0]}', which a fresh state of this optimizer has; it has "
            f"{', '.join(list(known)[:8])}."
        )
    return jax.tree.unflatten(jax.tree.structure(fresh), [known[path] for path in paths])


def _earlier(state: PyTree, found: Found) -> PyTree:
    """The state with half of the steps in the counts of others, such as a schedule at its end."""

    def one(node: Any) -> Any:
        counts = hasattr(node, "dtype") and node.ndim == 0 and jnp.issubdtype(node.dtype, jnp.integer)
        return node // 2 if counts else node

    return jax.tree.map(one, state, is_leaf=lambda x: x is found.part)
