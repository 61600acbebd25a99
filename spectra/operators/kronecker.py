"""Kronecker products as blocks of an operator, and what has a closed form for one of them.

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
from jax import lax

from spectra.base import arrays, draws
from spectra.operators.layouts import Layout

if TYPE_CHECKING:
    pass

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

    def in_rounding(self) -> jax.Array:
        """Which of them are not known to be positive: those that are rounding of others of a factor."""
        a, b = (_in_rounding(_values(x), (1,) if x.ndim == 3 else ()) for x in (self.input, self.output))
        return a[:, :, None] | b[:, None, :]

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

    def in_rounding(self) -> jax.Array:
        """Which of them are not known to be positive: those that are rounding of others along a basis."""
        bases = (self.input_basis, self.output_basis)
        return _in_rounding(self.values, tuple(i + 1 for i, basis in enumerate(bases) if basis is not None))

    def inverse(self, damping: Any, method: str) -> "Corrected":
        """The same bases with 1 / (Λ + δ)."""
        return dataclasses.replace(self, values=1 / (self.values + damping))


Block = Kronecker | Corrected


@jax.custom_jvp
def solved(inverse: Corrected, part: Kronecker, damping: jax.Array, x: jax.Array) -> jax.Array:
    """(K + δ)⁻¹ X, by the eigenvectors of K = A ⊗ B, but with the derivative of an inverse.

    Those of eigenvectors divide by the gaps of eigenvalues, which in a null space are roundings.
    """
    del part, damping
    return inverse.apply(x)


@solved.defjvp
def _solved_forward(  # pyright: ignore[reportUnusedFunction]
    primals: tuple[Corrected, Kronecker, jax.Array, jax.Array],
    tangents: tuple[Corrected, Kronecker, jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """(K + δ)⁻¹ (dX - (dK + dδ) Y) for Y = (K + δ)⁻¹ X."""
    inverse, part, damping, _ = primals
    y = solved(*primals)

    def product(part: Kronecker, damping: jax.Array) -> jax.Array:
        return part.apply(y) + damping * y

    change = jax.jvp(product, (part, damping), tangents[1:3])[1]
    return y, solved(inverse, part, damping, tangents[3] - change)


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


def _in_rounding(values: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Which are within d eps of the largest along axes of eigenvectors, of up to d; or zero, along none."""
    d, largest = max((values.shape[i] for i in axes), default=0), jnp.max(values, axes, keepdims=True)
    return values / jnp.where(largest > 0, largest, 1) <= d * jnp.finfo(values.dtype).eps


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
