"""Sums, multiples and shifts of operators; they prepare and explain themselves through their parts."""

from typing import Any

import jax
import jax.numpy as jnp

from spectra import _tree
from spectra.operators.base import LinearOperator, operator

PyTree = Any


@operator(leaves=("terms",))
class SumOperator(LinearOperator):
    """The sum of operators on the same vectors; written `a + b` or `a - b`."""

    terms: tuple[LinearOperator, ...]

    def __init__(self, terms: tuple[LinearOperator, ...]):
        flat = [t for term in terms for t in (term.terms if isinstance(term, SumOperator) else (term,))]
        for term in flat[1:]:
            _tree.check_structure(term.structure, flat[0].structure, "the second operator of a sum")
        object.__setattr__(self, "terms", tuple(flat))

    @property
    def like(self) -> PyTree:
        """The vectors of the first term."""
        return self.terms[0].like

    def mv(self, v: PyTree) -> PyTree:
        """The sum of the terms' products."""
        first, *rest = [term.mv(v) for term in self.terms]
        for product in rest:
            first = jax.tree.map(jnp.add, first, product)
        return first

    @property
    def on_host(self) -> bool:
        """True as soon as one term is driven from the host."""
        return any(term.on_host for term in self.terms)

    @property
    def precision(self) -> float:
        """The worst of the terms."""
        return max(term.precision for term in self.terms)

    def mv_batch(self, vectors: PyTree) -> PyTree:
        """The sum of the terms' batched products."""
        first, *rest = [term.mv_batch(vectors) for term in self.terms]
        for product in rest:
            first = jax.tree.map(jnp.add, first, product)
        return first

    def prepare(self) -> "SumOperator":
        """The sum of the prepared terms."""
        return SumOperator(tuple(term.prepare() for term in self.terms))

    def prepared_bytes(self) -> int:
        """Bytes of all terms."""
        return sum(term.prepared_bytes() for term in self.terms)

    def explain_non_finite(self) -> str:
        """What the terms know."""
        return " ".join(term.explain_non_finite() for term in self.terms)


class _Wrapped(LinearOperator):
    """An operator that changes another one's products pointwise."""

    base: LinearOperator

    def _map(self, v: PyTree, product: PyTree) -> PyTree:
        raise AssertionError  # every final subclass defines it

    def _with_base(self, base: LinearOperator) -> "_Wrapped":
        raise AssertionError  # every final subclass defines it

    @property
    def like(self) -> PyTree:
        """The vectors of the wrapped operator."""
        return self.base.like

    def mv(self, v: PyTree) -> PyTree:
        """The changed product."""
        return self._map(v, self.base.mv(v))

    @property
    def on_host(self) -> bool:
        """As the wrapped operator."""
        return self.base.on_host

    @property
    def precision(self) -> float:
        """As the wrapped operator."""
        return self.base.precision

    def mv_batch(self, vectors: PyTree) -> PyTree:
        """The changed batched products."""
        return self._map(vectors, self.base.mv_batch(vectors))

    def prepare(self) -> LinearOperator:
        """The same change of the prepared operator."""
        return self._with_base(self.base.prepare())

    def prepared_bytes(self) -> int:
        """As the wrapped operator."""
        return self.base.prepared_bytes()

    def explain_non_finite(self) -> str:
        """As the wrapped operator."""
        return self.base.explain_non_finite()


@operator(leaves=("base", "factor"))
class ScaledOperator(_Wrapped):
    """A multiple of an operator; written `factor * op`."""

    base: LinearOperator
    factor: Any

    def _map(self, v: PyTree, product: PyTree) -> PyTree:
        del v
        return _tree.scale(self.factor, product)

    def _with_base(self, base: LinearOperator) -> "ScaledOperator":
        return ScaledOperator(base, self.factor)


@operator(leaves=("base", "delta"))
class ShiftedOperator(_Wrapped):
    """H + delta I; written `op.shift(delta)`."""

    base: LinearOperator
    delta: Any

    def _map(self, v: PyTree, product: PyTree) -> PyTree:
        return _tree.axpy(self.delta, v, product)

    def _with_base(self, base: LinearOperator) -> "ShiftedOperator":
        return ShiftedOperator(base, self.delta)
