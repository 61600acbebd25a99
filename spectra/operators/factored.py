"""Block diagonal operators whose blocks are Kronecker products."""

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import arrays, programs, trees
from spectra.base.calls import automatic
from spectra.base.errors import SpectraError
from spectra.base.trees import PyTree
from spectra.operators.base import LinearOperator
from spectra.operators.kronecker import Block, Corrected, Kronecker, solved
from spectra.operators.pytree import operator

if TYPE_CHECKING:
    from jaxtyping import Float

DAMPINGS = ("exact", "heuristic")


@operator(leaves=("params", "parts"))
class FactoredOperator(LinearOperator):
    """A block diagonal operator whose blocks are Kronecker products, such as the inverse of a `KFACOperator`.

    A product costs one multiplication by each factor; trace, eigenvalues, determinant and damped inverse
    are closed forms of those of the factors.
    """

    params: PyTree
    parts: tuple[Block, ...]
    stacks: tuple[tuple[int, str], ...]  # leaves that are stacks of layers, with their common path

    @property
    def like(self) -> PyTree:
        """The parameters."""
        return self.params

    @property
    def precision(self) -> float:
        """One rounding for each matrix that a product multiplies by."""
        return super().precision * max([1, *(part.factors() for part in self.parts)])

    def mv(self, v: PyTree) -> PyTree:
        """The blocks' products, leaf by leaf."""
        leaves, treedef = jax.tree.flatten(trees.cast_like(v, self.structure))
        shapes = [leaf.shape for leaf in leaves]
        results: dict[int, jax.Array] = {}
        for index, part in enumerate(self.parts):
            place = part.place
            results |= place.scatter(self._product(index, place.gather(leaves)), shapes)
        return treedef.unflatten([results[i].astype(leaf.dtype) for i, leaf in enumerate(leaves)])

    def _product(self, index: int, x: jax.Array) -> jax.Array:
        """That of one block."""
        return self.parts[index].apply(x)

    @automatic
    def trace(self) -> 'Float[jax.Array, ""]':
        """The trace: Σ tr A tr B, exactly."""
        return _trace(self.parts)

    @automatic
    def eigenvalues(self) -> 'Float[jax.Array, " n"]':
        """All n eigenvalues in ascending order: the products of those of the factors.

        Cost: an eigendecomposition of each factor, O(d³) for a side of d; n numbers.
        """
        return _all_eigenvalues(self.parts)

    @automatic
    def logdet(self, damping: float = 0.0) -> 'Float[jax.Array, ""]':
        """log det(K + damping I), from the eigenvalues of the factors; -inf where it is singular.

        Those of a factor of side d are known to d eps of its largest one: without damping, what is below
        that counts as zero, and with one far below that, it is what rounding makes of it.
        """
        return _logdet(self.parts, damping)

    @automatic
    def inverse(self, damping: float, *, method: str = "exact") -> "FactoredOperator":
        """(K + damping I)⁻¹ as an operator of the same kind, which costs as much to multiply by.

        Args:
            damping: δ, in the units of eigenvalues.
            method: "exact" inverts A ⊗ B + δ I by the eigenvectors of A and B; "heuristic" is
                (A + π√δ I)⁻¹ ⊗ (B + √δ/π I)⁻¹ with π² = (tr A / d_A) / (tr B / d_B), of Martens and Grosse,
                arXiv:1503.05671, section 6.3. An eigenvalue-corrected block has the exact one only.
                Blocks of a single side are inverted exactly by both.

        Raises:
            SpectraError: another method; a damping below zero, or of zero where K is singular.

        Cost: O(d³) for a side of d, once.
        """
        if method not in DAMPINGS:
            raise SpectraError(f"method={method!r}: use one of {DAMPINGS}.")
        if method == "heuristic" and any(isinstance(part, Corrected) for part in self.parts):
            raise SpectraError(
                "an eigenvalue-corrected operator is not a Kronecker product: use method='exact'."
            )
        if not trees.is_traced((self.parts, damping)) and not damping > 0:
            self._require_definite(float(damping))
        return DampedInverse.of(self, damping, method)

    def _require_definite(self, damping: float) -> None:
        """Raise unless every block is positive definite by more than its rounding."""
        for part in self.parts:
            values = np.asarray(_all_eigenvalues((part,)))
            if damping < 0 or (values.size and not np.isfinite(_logdet((part,), 0.0))):
                raise SpectraError(
                    f"damping={damping}: the block of '{part.place.name}' has eigenvalues from "
                    f"{values[0]:.3g} to {values[-1]:.3g} and no positive definite inverse; pass a positive "
                    "damping."
                )

    def _stacks(self) -> dict[int, str]:
        return dict(self.stacks)

    def _principal(self, indices: tuple[int, ...]) -> LinearOperator:
        places = {leaf: i for i, leaf in enumerate(indices)}
        parts: list[Block] = []
        for part in self.parts:
            inside = [leaf in places for leaf in part.place.leaves]
            if any(inside) and not all(inside):  # a weight without its bias
                return super()._principal(indices)
            if all(inside):
                parts.append(dataclasses.replace(part, place=part.place.moved(places)))
        return self._restricted(indices, tuple(parts))

    def _restricted(self, indices: tuple[int, ...], parts: tuple[Block, ...]) -> "FactoredOperator":
        stacks = tuple((i, path) for i, leaf in enumerate(indices) for j, path in self.stacks if j == leaf)
        params = trees.keep_leaves(self.params, indices)
        return FactoredOperator(params=params, parts=parts, stacks=stacks)

    @property
    def factors(self) -> dict[str, tuple[jax.Array, jax.Array]]:
        """{path of the weight: (A, B)} of the Kronecker blocks.

        A is (inputs, inputs), with a last row and column for the bias where it is treated together, and
        B (outputs, outputs); both with a leading axis where a parameter holds several layers. A side that is
        kept as a diagonal has one axis less.
        """
        found: dict[str, tuple[jax.Array, jax.Array]] = {}
        for part in self.parts:
            if isinstance(part, Kronecker) and part.place.kind == "kronecker":
                single = part.place.layout.groups == 1
                a, b = part.input, part.output
                found[part.place.name] = (a[0], b[0]) if single else (a, b)
        return found

    @automatic
    def factor_eigenvalues(self) -> dict[str, tuple[jax.Array, jax.Array]]:
        """{path of the weight: eigenvalues of A and of B}, ascending, of the Kronecker blocks."""

        def one(side: jax.Array, group: int) -> jax.Array:
            return jnp.sort(side, -1) if side.ndim == group + 1 else arrays.eigvalsh(side)

        groups = {part.place.name: int(part.place.layout.groups > 1) for part in self.parts}
        return {name: (one(a, groups[name]), one(b, groups[name])) for name, (a, b) in self.factors.items()}


@operator(leaves=("params", "parts", "inverted", "damping"))
class DampedInverse(FactoredOperator):
    """(K + δ I)⁻¹ of a factored K, whose blocks tell what rounding does to it.

    The eigenvalues of a factor are off by roundings of its largest one. An inverse is as large as the
    smallest of K allows, and off by up to |K| / δ roundings, however precise its products are.
    """

    inverted: tuple[Block, ...]  # those of K
    damping: Any
    method: str

    @classmethod
    def of(cls, op: FactoredOperator, damping: Any, method: str) -> "DampedInverse":
        """The inverse of an operator."""
        damping = jnp.asarray(damping, op.dtype)
        return cls(
            params=op.params,
            parts=_inverses(op.parts, damping, method),
            stacks=op.stacks,
            inverted=op.parts,
            damping=damping,
            method=method,
        )

    def _product(self, index: int, x: jax.Array) -> jax.Array:
        inverse, part = self.parts[index], self.inverted[index]
        if isinstance(inverse, Corrected) and isinstance(part, Kronecker):
            return solved(inverse, part, self.damping, x)
        return inverse.apply(x)

    def moved(self, key: jax.Array) -> "DampedInverse":
        """The inverse of moved blocks."""
        keys = jax.random.split(key, len(self.inverted))
        inverted = tuple(part.moved(one) for part, one in zip(self.inverted, keys, strict=True))
        return self.of(dataclasses.replace(self, parts=inverted), self.damping, self.method)

    def _principal(self, indices: tuple[int, ...]) -> LinearOperator:
        own = FactoredOperator(params=self.params, parts=self.inverted, stacks=self.stacks)
        part = own._principal(indices)
        if isinstance(part, FactoredOperator):
            return self.of(part, self.damping, self.method)
        return super()._principal(indices)


@programs.jit
def _trace(parts: tuple[Block, ...]) -> jax.Array:
    return sum((part.trace() for part in parts), jnp.zeros(()))


@programs.jit
def _all_eigenvalues(parts: tuple[Block, ...]) -> jax.Array:
    return jnp.sort(jnp.concatenate([part.eigenvalues().ravel() for part in parts]))


@programs.jit
def _logdet(parts: tuple[Block, ...], damping: Any) -> jax.Array:
    total = jnp.zeros(())
    for part in parts:
        values = part.eigenvalues()
        total += jnp.sum(jnp.log(jnp.where((damping == 0) & part.in_rounding(), 0, values + damping)))
    return total


@partial(programs.jit, static_argnames="method")
def _inverses(parts: tuple[Block, ...], damping: Any, method: str) -> tuple[Block, ...]:
    return tuple(part.inverse(damping, method) for part in parts)
