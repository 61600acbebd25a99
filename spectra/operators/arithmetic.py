"""Sums, multiples and shifts of operators, and products called one by one from the host.

They prepare and explain themselves through their parts.
"""

import abc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from spectra.base import stacks, trees
from spectra.base.draws import moved_parameters
from spectra.base.trees import PyTree
from spectra.operators.base import LinearOperator, product
from spectra.operators.pytree import operator
from spectra.results.base import provides


class Composed(LinearOperator):
    """An operator made of others, which it prepares, moves and explains itself through."""

    @property
    @abc.abstractmethod
    def made_of(self) -> tuple[LinearOperator, ...]:
        """The others."""

    @abc.abstractmethod
    def _remade(self, parts: tuple[LinearOperator, ...]) -> LinearOperator:
        """The same made of others in their places."""

    def prepare(self) -> LinearOperator:
        """The same made of prepared parts."""
        return self._remade(tuple(part.prepare() for part in self.made_of))

    def prepared_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.prepared_bytes() for part in self.made_of)

    def recomputed_bytes(self) -> int | None:
        """The most that a part holds: one follows the other."""
        held = [part.recomputed_bytes() for part in self.made_of]
        return max((size for size in held if size is not None), default=None)

    @property
    def known_in_double(self) -> bool:
        """Whether all parts are."""
        return all(part.known_in_double for part in self.made_of)

    def evaluated_bytes(self) -> int:
        """The most that a part holds."""
        return max(part.evaluated_bytes() for part in self.made_of)

    def moved(self, key: jax.Array) -> LinearOperator | None:
        """The same made of parts at moved parameters, and of those that have none as they are."""
        keys = [jax.random.fold_in(key, i) if i else key for i in range(len(self.made_of))]
        moved = [part.moved(own) for part, own in zip(self.made_of, keys, strict=True)]
        pairs = zip(moved, self.made_of, strict=True)
        return self._remade(tuple(new or part for new, part in pairs)) if any(moved) else None

    def _block_of(self, whole: LinearOperator) -> LinearOperator:
        if type(whole) is not type(self):
            return self
        pairs = zip(self.made_of, whole.made_of, strict=True)
        return self._remade(tuple(part._block_of(its_whole) for part, its_whole in pairs))

    def of_moved_parts(self, key: jax.Array) -> LinearOperator:
        """The same with each part moved by a rounding, whether it has parameters or not."""
        return self._remade(each_moved(self.made_of, key))


class OfTerms(Composed):
    """An operator made of several on the same vectors: their sum, or their product."""

    terms: tuple[LinearOperator, ...]

    @property
    def made_of(self) -> tuple[LinearOperator, ...]:
        """The terms."""
        return self.terms

    @property
    def like(self) -> PyTree:
        """The vectors of the first term."""
        return self.terms[0].like

    @property
    def known_in_double(self) -> bool:
        """Whether all terms are, and hold no constants: what rounded these counts where terms cancel."""
        return super().known_in_double and not self.holds_constants

    def moved(self, key: jax.Array) -> LinearOperator:
        """The same of moved terms: each is rounded relative to itself, and they may cancel."""
        return self.of_moved_parts(key)

    def _stacks(self) -> dict[int, str]:
        return self.terms[0]._stacks()


@operator(leaves=("terms",))
class SumOperator(OfTerms):
    """The sum of operators on the same vectors; written `a + b` or `a - b`."""

    terms: tuple[LinearOperator, ...]

    def __init__(self, terms: tuple[LinearOperator, ...]):
        flat = [t for term in terms for t in (term.terms if isinstance(term, SumOperator) else (term,))]
        for term in flat[1:]:
            trees.check_structure(term.structure, flat[0].structure, "the second operator of a sum")
        object.__setattr__(self, "terms", tuple(flat))

    def mv(self, v: PyTree) -> PyTree:
        """The sum of the terms' products."""
        first, *rest = [term.mv(v) for term in self.terms]
        for image in rest:
            first = jax.tree.map(jnp.add, first, image)
        return first

    @property
    def semidefinite(self) -> bool:
        """As all terms."""
        return all(term.semidefinite for term in self.terms)

    def mv_batch(self, vectors: PyTree) -> PyTree:
        """The sum of the terms' batched products."""
        first, *rest = [term.mv_batch(vectors) for term in self.terms]
        for image in rest:
            first = jax.tree.map(jnp.add, first, image)
        return first

    def explain_asymmetry(self) -> str:
        """What the coarsest term knows, and that terms may cancel."""
        return (
            f"{super().explain_asymmetry()} Each term of a sum is rounded relative to itself: where terms "
            "nearly cancel, that is much of what is left, and float64 makes it smaller."
        )

    def _remade(self, parts: tuple[LinearOperator, ...]) -> "SumOperator":
        return SumOperator(parts)

    def _principal(self, indices: tuple[int, ...]) -> LinearOperator:
        return SumOperator(tuple(term._principal(indices) for term in self.terms))


class Derived(LinearOperator):
    """An operator made from another one, whose vectors it has."""

    base: LinearOperator

    @property
    def made_of(self) -> tuple[LinearOperator, ...]:
        """The other operator."""
        return (self.base,)

    @property
    def like(self) -> PyTree:
        """The vectors of the other operator."""
        return self.base.like

    def _stacks(self) -> dict[int, str]:
        return (
            self.base._stacks()
            if len(jax.tree.leaves(self.like)) == len(jax.tree.leaves(self.base.like))
            else {}
        )


class Wrapped(Derived, Composed):
    """An operator that multiplies and prepares itself through another one."""

    @abc.abstractmethod
    def _apply(self, multiply: Callable[[PyTree], PyTree], v: PyTree) -> PyTree:
        """The product, given the base's: `mv` for a vector or `mv_batch` for a stack of them."""

    @abc.abstractmethod
    def _with_base(self, base: LinearOperator) -> "Wrapped":
        """The same made from another base."""

    def _remade(self, parts: tuple[LinearOperator, ...]) -> LinearOperator:
        return self._with_base(*parts)

    def mv(self, v: PyTree) -> PyTree:
        """The product."""
        return self._apply(self.base.mv, v)

    def mv_batch(self, vectors: PyTree) -> PyTree:
        """The products with a stack of vectors."""
        return self._apply(self.base.mv_batch, vectors)

    def _principal(self, indices: tuple[int, ...]) -> LinearOperator:
        return self._with_base(self.base._principal(indices))


@operator(leaves=("base", "scale"))
class DiagonallyScaledOperator(Wrapped):
    """D A D with a diagonal D: an optimizer's, or 1 ± the precision of a product for another rounding."""

    base: LinearOperator
    scale: PyTree  # the diagonal of D

    def _apply(self, multiply: Callable[[PyTree], PyTree], v: PyTree) -> PyTree:
        return self._scaled(multiply(self._scaled(v)))

    def _scaled(self, v: PyTree) -> PyTree:
        return jax.tree.map(jnp.multiply, self.scale, v)

    def _with_base(self, base: LinearOperator) -> "DiagonallyScaledOperator":
        return DiagonallyScaledOperator(base, self.scale)

    def _principal(self, indices: tuple[int, ...]) -> LinearOperator:
        return DiagonallyScaledOperator(self.base._principal(indices), trees.keep_leaves(self.scale, indices))


def each_moved(terms: tuple[LinearOperator, ...], key: jax.Array) -> tuple[LinearOperator, ...]:
    """Parts of one product, moved by a rounding each, independently: at moved parameters if they have any."""

    def one(term: LinearOperator, key: jax.Array) -> LinearOperator:
        if moved := term.moved(key):
            return moved
        if isinstance(term, Composed):  # what a shift inside of it leaves may be far less than was rounded
            return term.of_moved_parts(key)
        return DiagonallyScaledOperator(term, _roundings(key, term.structure, term.precision))

    return tuple(one(term, jax.random.fold_in(key, i)) for i, term in enumerate(terms))


def _roundings(key: jax.Array, structure: PyTree, precision: float) -> PyTree:
    ones = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), structure)
    return moved_parameters(ones, key, precision)


@operator(leaves=("base", "factor"))
class ScaledOperator(Wrapped):
    """A multiple of an operator; written `factor * op`."""

    base: LinearOperator
    factor: Any

    def _apply(self, multiply: Callable[[PyTree], PyTree], v: PyTree) -> PyTree:
        return trees.scale(self.factor, multiply(v))

    def _with_base(self, base: LinearOperator) -> "ScaledOperator":
        return ScaledOperator(base, self.factor)


@operator(leaves=("base", "delta"))
class ShiftedOperator(Wrapped):
    """H + delta I; written `op.shift(delta)`."""

    base: LinearOperator
    delta: Any

    def _apply(self, multiply: Callable[[PyTree], PyTree], v: PyTree) -> PyTree:
        return trees.axpy(self.delta, v, multiply(v))

    def _with_base(self, base: LinearOperator) -> "ShiftedOperator":
        return ShiftedOperator(base, self.delta)

    def explain_asymmetry(self) -> str:
        """What the operator knows, and that the shift may cancel it."""
        return (
            f"{super().explain_asymmetry()} The shift by {float(self.delta):g} may cancel most of "
            "a product and leave its rounding: float64 makes that smaller."
        )


@operator(leaves=("base",))
class StepwiseOperator(Derived):
    """An operator each of whose products is a program of its own; made by `outside_loops`, for one run."""

    base: LinearOperator

    @property
    def on_host(self) -> bool:
        """True: that is what it is for."""
        return True

    def mv(self, v: PyTree) -> PyTree:
        """The compiled product."""
        return product(self.base, v)

    def mv_batch(self, vectors: PyTree) -> PyTree:
        """Compiled products, one after the other."""
        return stacks.stacked([self.mv(v) for v in stacks.split(vectors)])


# `LinearOperator` stands below these classes, and makes them by name.
provides("sum")(SumOperator)


@provides("multiple")
def multiple(op: LinearOperator, factor: Any) -> LinearOperator:
    """factor H; of a shifted operator, a shifted multiple, so that shifts meet and cancel as numbers."""
    if isinstance(op, ShiftedOperator):
        return ShiftedOperator(multiple(op.base, factor), factor * op.delta)
    return ScaledOperator(op, factor)


@provides("shift")
def shifted(op: LinearOperator, delta: Any) -> LinearOperator:
    """H + delta I; of a shifted operator, with the sum of both shifts: of products the rounding of the
    larger one would be left."""
    if isinstance(op, ShiftedOperator):
        return ShiftedOperator(op.base, op.delta + delta)
    return ShiftedOperator(op, delta)
