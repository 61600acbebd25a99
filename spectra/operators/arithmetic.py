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
from spectra.operators.jaxprs import slow_in_loops
from spectra.operators.pytree import operator
from spectra.results.base import provides


@operator(leaves=("terms",))
class SumOperator(LinearOperator):
    """The sum of operators on the same vectors; written `a + b` or `a - b`."""

    terms: tuple[LinearOperator, ...]

    def __init__(self, terms: tuple[LinearOperator, ...]):
        flat = [t for term in terms for t in (term.terms if type(term) is SumOperator else (term,))]
        for term in flat[1:]:
            trees.check_structure(term.structure, flat[0].structure, "the second operator of a sum")
        object.__setattr__(self, "terms", tuple(flat))

    @property
    def like(self) -> PyTree:
        """The vectors of the first term."""
        return self.terms[0].like

    def mv(self, v: PyTree) -> PyTree:
        """The sum of the terms' products."""
        first, *rest = [term.mv(v) for term in self.terms]
        for image in rest:
            first = jax.tree.map(jnp.add, first, image)
        return first

    @property
    def known_linear(self) -> bool:
        """If all terms are."""
        return all(term.known_linear for term in self.terms)

    @property
    def semidefinite(self) -> bool:
        """As all terms."""
        return all(term.semidefinite for term in self.terms)

    @property
    def on_host(self) -> bool:
        """True as soon as one term is driven from the host."""
        return any(term.on_host for term in self.terms)

    @property
    def precision(self) -> float:
        """The worst of the terms."""
        return max(term.precision for term in self.terms)

    @property
    def computes_in(self) -> str:
        """That of the coarsest term."""
        return max(self.terms, key=lambda term: term.precision).computes_in

    def mv_batch(self, vectors: PyTree) -> PyTree:
        """The sum of the terms' batched products."""
        first, *rest = [term.mv_batch(vectors) for term in self.terms]
        for image in rest:
            first = jax.tree.map(jnp.add, first, image)
        return first

    def prepare(self) -> "SumOperator":
        """The sum of the prepared terms."""
        return SumOperator(tuple(term.prepare() for term in self.terms))

    def prepared_bytes(self) -> int:
        """Bytes of all terms."""
        return sum(term.prepared_bytes() for term in self.terms)

    def recomputed_bytes(self) -> int | None:
        """The most that a term holds: one follows the other."""
        held = [term.recomputed_bytes() for term in self.terms]
        return max((size for size in held if size is not None), default=None)

    def _stacks(self) -> dict[int, str]:
        return self.terms[0]._stacks()

    def explain_non_finite(self) -> str:
        """What the terms know."""
        return " ".join(term.explain_non_finite() for term in self.terms)

    def require_finite(self) -> None:
        """As all terms."""
        for term in self.terms:
            term.require_finite()

    def explain_asymmetry(self) -> str:
        """What the coarsest term knows, and that terms may cancel."""
        known = max(self.terms, key=lambda term: term.precision).explain_asymmetry()
        return (
            f"{known} Each term of a sum is rounded relative to itself: where terms nearly cancel, that is "
            "much of what is left, and float64 makes it smaller."
        )

    @property
    def known_in_double(self) -> bool:
        """Whether all terms are."""
        return all(term.known_in_double for term in self.terms)

    def evaluated_bytes(self) -> int:
        """Those of the largest term."""
        return max(term.evaluated_bytes() for term in self.terms)

    def moved(self, key: jax.Array) -> "SumOperator":
        """The sum of the moved terms: each is rounded relative to itself, and they may cancel."""
        return SumOperator(each_moved(self.terms, key))

    def _principal(self, indices: tuple[int, ...]) -> LinearOperator:
        return SumOperator(tuple(term._principal(indices) for term in self.terms))


class Derived(LinearOperator):
    """An operator made from another one, whose vectors, precision and explanations it has."""

    base: LinearOperator

    @property
    def like(self) -> PyTree:
        """The vectors of the other operator."""
        return self.base.like

    @property
    def known_linear(self) -> bool:
        """As the other operator."""
        return self.base.known_linear

    @property
    def on_host(self) -> bool:
        """As the other operator."""
        return self.base.on_host

    @property
    def precision(self) -> float:
        """As the other operator."""
        return self.base.precision

    @property
    def computes_in(self) -> str:
        """As the other operator."""
        return self.base.computes_in

    def _stacks(self) -> dict[int, str]:
        return (
            self.base._stacks()
            if len(jax.tree.leaves(self.like)) == len(jax.tree.leaves(self.base.like))
            else {}
        )

    def explain_non_finite(self) -> str:
        """As the other operator."""
        return self.base.explain_non_finite()

    def require_finite(self) -> None:
        """As the other operator."""
        self.base.require_finite()

    def explain_asymmetry(self) -> str:
        """As the other operator."""
        return self.base.explain_asymmetry()


class Wrapped(Derived):
    """An operator that multiplies and prepares itself through another one."""

    @abc.abstractmethod
    def _apply(self, multiply: Callable[[PyTree], PyTree], v: PyTree) -> PyTree:
        """The product, given the base's: `mv` for a vector or `mv_batch` for a stack of them."""

    @abc.abstractmethod
    def _with_base(self, base: LinearOperator) -> "Wrapped":
        """The same made from another base."""

    def mv(self, v: PyTree) -> PyTree:
        """The product."""
        return self._apply(self.base.mv, v)

    def mv_batch(self, vectors: PyTree) -> PyTree:
        """The products with a stack of vectors."""
        return self._apply(self.base.mv_batch, vectors)

    def prepare(self) -> LinearOperator:
        """The same made from the prepared base."""
        return self._with_base(self.base.prepare())

    def prepared_bytes(self) -> int:
        """As the wrapped operator."""
        return self.base.prepared_bytes()

    def recomputed_bytes(self) -> int | None:
        """As the wrapped operator."""
        return self.base.recomputed_bytes()

    @property
    def known_in_double(self) -> bool:
        """As the wrapped operator."""
        return self.base.known_in_double

    def evaluated_bytes(self) -> int:
        """As the wrapped operator."""
        return self.base.evaluated_bytes()

    def moved(self, key: jax.Array) -> "LinearOperator | None":
        """The same made from the base at moved parameters."""
        base = self.base.moved(key)
        return None if base is None else self._with_base(base)

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
        return term.moved(key) or DiagonallyScaledOperator(
            term, _roundings(key, term.structure, term.precision)
        )

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
            f"{self.base.explain_asymmetry()} The shift by {float(self.delta):g} may cancel most of "
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


def outside_loops(op: LinearOperator) -> LinearOperator:
    """The operator itself, or driven from the host if its products are slow in compiled loops."""
    return StepwiseOperator(op) if slow_in_loops(op) else op


# `LinearOperator` stands below these classes, and makes them by name.
provides("sum")(SumOperator)
provides("multiple")(ScaledOperator)
provides("shift")(ShiftedOperator)
