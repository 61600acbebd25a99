"""Block diagonal operators whose blocks are Kronecker products, and what has a closed form for them.

The vector of a block is a stack of matrices X, one for each group, of shape (inputs, outputs): a layer's
weight in the layout of `Layout`, with the bias as its last row. A block is X -> A X B, or
X -> U (Λ ∘ (Uᵀ X V)) Vᵀ. A side is a stack of symmetric matrices (groups, d, d), or of their
diagonals (groups, d).
"""

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spectra.base import arrays, draws, programs, trees
from spectra.base.errors import SpectraError
from spectra.base.trees import PyTree
from spectra.operators.base import LinearOperator
from spectra.operators.layouts import Layout
from spectra.operators.pytree import operator

if TYPE_CHECKING:
    from jaxtyping import Float

DAMPINGS = ("exact", "heuristic")
INDEFINITE = "indefinite"
"""An exact inverse of factors that may have negative eigenvalues."""
_einsum = arrays.einsum


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a block lies: its leaves, in the order of the vector's, and how they are made a matrix."""

    name: str
    leaf: int
    bias: int | None  # the leaf that is the last row
    layout: Layout
    kind: str  # "kronecker", "exact" or "diagonal"

    @property
    def leaves(self) -> tuple[int, ...]:
        """All leaves of the block."""
        return (self.leaf,) if self.bias is None else (self.leaf, self.bias)

    def gather(self, leaves: list[jax.Array]) -> jax.Array:
        """X of a vector's leaves."""
        matrix = self.layout.matrix(leaves[self.leaf])
        if self.bias is None:
            return matrix
        row = leaves[self.bias].reshape(self.layout.groups, 1, self.layout.outputs)
        return jnp.concatenate([matrix, row.astype(matrix.dtype)], axis=1)

    def scatter(self, matrix: jax.Array, shapes: list[tuple[int, ...]]) -> dict[int, jax.Array]:
        """The leaves of X, the inverse of `gather`."""
        if self.bias is None:
            return {self.leaf: self.layout.leaf(matrix)}
        return {
            self.leaf: self.layout.leaf(matrix[:, :-1]),
            self.bias: matrix[:, -1].reshape(shapes[self.bias]),
        }

    def moved(self, places: dict[int, int]) -> "Place":
        """The place among fewer leaves."""
        bias = None if self.bias is None else places[self.bias]
        return dataclasses.replace(self, leaf=places[self.leaf], bias=bias)


@partial(jax.tree_util.register_dataclass, data_fields=["input", "output"], meta_fields=["place"])
@dataclasses.dataclass(frozen=True, eq=False)
class Kronecker:
    """X -> A X B."""

    input: jax.Array
    output: jax.Array
    place: Place

    def apply(self, x: jax.Array) -> jax.Array:
        """A X B."""
        return _right(_left(self.input, x), self.output)

    def factors(self) -> int:
        """Matrices that a product multiplies by, one after the other."""
        return sum(side.ndim == 3 for side in (self.input, self.output))

    def moved(self, key: jax.Array) -> "Kronecker":
        """With each factor moved by one rounding, and symmetric."""
        a, b = draws.moved_parameters((self.input, self.output), key, 0.0)
        return Kronecker(_symmetric(a), _symmetric(b), self.place)

    def trace(self) -> jax.Array:
        """Σ tr A tr B over the groups."""
        return jnp.sum(_traces(self.input) * _traces(self.output))

    def eigenvalues(self) -> jax.Array:
        """All products of eigenvalues, (groups, inputs, outputs); those of rounding below zero are zero."""
        return _values(self.input)[:, :, None] * _values(self.output)[:, None, :]

    def eigh(self, *, definite: bool = True) -> "Corrected":
        """The same block by the eigenvectors of its factors; if definite, without negative eigenvalues."""
        (a, u), (b, v) = _eigh(self.input, definite), _eigh(self.output, definite)
        return Corrected(u, v, a[:, :, None] * b[:, None, :], self.place)

    def inverse(self, damping: Any, method: str) -> "Kronecker | Corrected":
        """(A ⊗ B + δ)⁻¹, or (A + π√δ)⁻¹ ⊗ (B + √δ/π)⁻¹ with π² the ratio of their mean eigenvalues."""
        if method == INDEFINITE:
            return self.eigh(definite=False).inverse(damping, method)
        if method == "exact" or self.place.kind != "kronecker" or self.input.shape[1] == 1:
            return self.eigh().inverse(damping, method)
        a, b = (_traces(side) / side.shape[1] for side in (self.input, self.output))
        ratio = jnp.where((a > 0) & (b > 0), jnp.sqrt(a / jnp.where(b > 0, b, 1)), 1)
        root = jnp.sqrt(jnp.asarray(damping, ratio.dtype))
        return Kronecker(_inverse(self.input, root * ratio), _inverse(self.output, root / ratio), self.place)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["input_basis", "output_basis", "values"],
    meta_fields=["place"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Corrected:
    """X -> U (Λ ∘ (Uᵀ X V)) Vᵀ; a basis of None is the identity."""

    input_basis: jax.Array | None
    output_basis: jax.Array | None
    values: jax.Array  # (groups, inputs, outputs)
    place: Place

    def apply(self, x: jax.Array) -> jax.Array:
        """The product."""
        inner = self.values * self.rotate(x)
        if self.input_basis is not None:
            inner = _left(self.input_basis, inner)
        return inner if self.output_basis is None else _right(inner, jnp.swapaxes(self.output_basis, 1, 2))

    def rotate(self, x: jax.Array) -> jax.Array:
        """Uᵀ X V."""
        if self.input_basis is not None:
            x = _left(jnp.swapaxes(self.input_basis, 1, 2), x)
        return x if self.output_basis is None else _right(x, self.output_basis)

    def factors(self) -> int:
        """Matrices that a product multiplies by, one after the other: each basis, and its transpose."""
        return sum(2 for basis in (self.input_basis, self.output_basis) if basis is not None)

    def moved(self, key: jax.Array) -> "Corrected":
        """With bases and values moved by one rounding."""
        return draws.moved_parameters(self, key, 0.0)

    def trace(self) -> jax.Array:
        """Σ Λ."""
        return jnp.sum(self.values)

    def eigenvalues(self) -> jax.Array:
        """Λ."""
        return self.values

    def inverse(self, damping: Any, method: str) -> "Corrected":
        """The same bases with 1 / (Λ + δ)."""
        return dataclasses.replace(self, values=1 / (self.values + damping))


Block = Kronecker | Corrected


@jax.custom_jvp
def _solved(inverse: Corrected, part: Kronecker, damping: jax.Array, x: jax.Array) -> jax.Array:
    """(K + δ)⁻¹ X, by the eigenvectors of K = A ⊗ B, but with the derivative of an inverse.

    Those of eigenvectors divide by the gaps of eigenvalues, which in a null space are roundings.
    """
    del part, damping
    return inverse.apply(x)


@_solved.defjvp
def _solved_forward(  # pyright: ignore[reportUnusedFunction]
    primals: tuple[Corrected, Kronecker, jax.Array, jax.Array],
    tangents: tuple[Corrected, Kronecker, jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """(K + δ)⁻¹ (dX - (dK + dδ) Y) for Y = (K + δ)⁻¹ X."""
    inverse, part, damping, _ = primals
    y = _solved(*primals)

    def product(part: Kronecker, damping: jax.Array) -> jax.Array:
        return part.apply(y) + damping * y

    change = jax.jvp(product, (part, damping), tangents[1:3])[1]
    return y, _solved(inverse, part, damping, tangents[3] - change)


def _left(side: jax.Array, x: jax.Array) -> jax.Array:
    return side[:, :, None] * x if side.ndim == 2 else _einsum("gij,gjo->gio", side, x)


def _right(x: jax.Array, side: jax.Array) -> jax.Array:
    return x * side[:, None, :] if side.ndim == 2 else _einsum("gio,gop->gip", x, side)


def _traces(side: jax.Array) -> jax.Array:
    return jnp.sum(side, -1) if side.ndim == 2 else jnp.trace(side, axis1=1, axis2=2)


def _symmetric(side: jax.Array) -> jax.Array:
    return side if side.ndim == 2 else (side + jnp.swapaxes(side, 1, 2)) / 2


def _values(side: jax.Array) -> jax.Array:
    return jnp.maximum(side if side.ndim == 2 else arrays.eigvalsh(side), 0)


def _eigh(side: jax.Array, definite: bool) -> tuple[jax.Array, jax.Array | None]:
    values, basis = (side, None) if side.ndim == 2 else arrays.eigh(side)
    return jnp.maximum(values, 0) if definite else values, basis


def _inverse(side: jax.Array, shift: jax.Array) -> jax.Array:
    if side.ndim == 2:
        return 1 / (side + shift[:, None])
    eye = jnp.eye(side.shape[-1], dtype=side.dtype)
    root = arrays.cholesky(side + shift[:, None, None] * eye)
    half = jax.vmap(lambda r: lax.linalg.triangular_solve(r, eye, left_side=True, lower=True))(root)
    return _einsum("gki,gkj->gij", half, half)


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

    def trace(self) -> 'Float[jax.Array, ""]':
        """The trace: Σ tr A tr B, exactly."""
        return _trace(self.parts)

    def eigenvalues(self) -> 'Float[jax.Array, " n"]':
        """All n eigenvalues in ascending order: the products of those of the factors.

        Cost: an eigendecomposition of each factor, O(d³) for a side of d; n numbers.
        """
        return _all_eigenvalues(self.parts)

    def logdet(self, damping: float = 0.0) -> 'Float[jax.Array, ""]':
        """log det(K + damping I), from the eigenvalues of the factors; -inf where it is singular."""
        return jnp.sum(jnp.log(self.eigenvalues() + damping))

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
        """Raise unless every block is positive definite by more than its rounding, d eps of its largest."""
        for part in self.parts:
            values = np.asarray(_all_eigenvalues((part,)))
            rounding = max(part.eigenvalues().shape) * float(jnp.finfo(self.dtype).eps)
            if damping < 0 or (values.size and not values[0] > rounding * values[-1]):
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
            return _solved(inverse, part, self.damping, x)
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


@partial(programs.jit, static_argnames="method")
def _inverses(parts: tuple[Block, ...], damping: Any, method: str) -> tuple[Block, ...]:
    return tuple(part.inverse(damping, method) for part in parts)
