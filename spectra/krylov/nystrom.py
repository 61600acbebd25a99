"""Preconditioners of few directions: known eigenpairs, or a Nyström sketch that is as wide as it pays."""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spectra.base import arrays, draws, host, programs, stacks, trees
from spectra.base.trees import PyTree
from spectra.krylov.linear_block import WIDEST
from spectra.operators.base import LinearOperator
from spectra.operators.pytree import operator
from spectra.results import Eigenpairs
from spectra.runs.watch import Journal

LEAST, MOST = 16, 256
"""Columns of the first sketch, and of the largest: it doubles as long as that saves products."""
SHARE = 0.6
"""Of the products that the condition number bounds, CG takes these: 0.6 to 0.7 measured at κ = 1 to 10."""
OUTLIER = 2.5
"""Products of CG for each eigenvalue that stands out: it takes one, and rounding brings some back. On the
Gauss-Newton matrix of a CNN and five spectra, with 1 to 64 right-hand sides, shifts of 1e-3 to 1e-5 λ₁ and
tolerances of 1e-3 and 1e-8 (36 cases), sketch and CG take 1.09 times the products of the best width in the
mean, and at worst 1.83. It is 1.22 and 3.5 with 1 to 2, where no sketch widens, and 1.56 and 5.3 where one
widens until what it leaves is near 10 shifts. No sketch at all takes 1.26 and 3.6."""
BATCH = 16


def deflation(op: LinearOperator, pairs: Eigenpairs, shift: Any) -> "SpectralPreconditioner":
    """The preconditioner that moves known eigenvalues of H + shift I to the edge of what is not known."""
    trees.check_structure(
        jax.tree.map(lambda x: x[0], pairs.vectors), op.structure, "a vector of the known pairs"
    )
    sizes = jnp.abs(jnp.asarray(pairs.values, op.dtype) + shift)
    edge = jnp.max(sizes) if pairs.which == "SM" else jnp.min(sizes)
    return SpectralPreconditioner(pairs.vectors, gains(sizes, edge))


@operator(leaves=("vectors", "gains"))
class SpectralPreconditioner(LinearOperator):
    """P = I + U diag(g) Uᵀ with orthonormal U: moves known eigenvalues to one size, leaves the rest alone."""

    vectors: PyTree  # (r, *leaf.shape)
    gains: jax.Array  # (r,), above -1

    @property
    def like(self) -> PyTree:
        """The first of the vectors."""
        return jax.tree.map(lambda u: u[0], self.vectors)

    def mv(self, v: PyTree) -> PyTree:
        """P v."""
        coefficients = jax.vmap(lambda u: trees.vdot(u, v))(self.vectors)
        return jax.tree.map(jnp.add, v, stacks.combine(self.gains * coefficients, self.vectors))


def gains(sizes: jax.Array, edge: jax.Array) -> jax.Array:
    """What moves eigenvalues of these sizes to the edge."""
    tiny = jnp.finfo(sizes.dtype).tiny
    return edge / jnp.maximum(sizes, jnp.maximum(tiny, edge * jnp.finfo(sizes.dtype).eps)) - 1


def nystrom(
    op: LinearOperator,
    shift: Any,
    key: jax.Array,
    traced: bool,
    sides: int,
    tol: float,
    journal: Journal | None = None,
) -> tuple[SpectralPreconditioner, int]:
    """The randomised Nyström preconditioner of H + shift I for some right-hand sides, and its products.

    H is sketched by Y = H Ω with orthonormal Ω, and approximated by Y (ΩᵀY)⁻¹ Yᵀ where it shows no negative
    curvature there. Where it does, that is no approximation; the products of an orthonormal basis of Y give
    Ritz pairs then, at twice the cost. Inside jit, where that cannot be seen, only an operator that is
    positive semi-definite by construction is taken at half the price.
    """
    limit = _widest(op)
    if journal is not None:  # as before, since the free memory may have changed
        limit = int(journal.keep(lambda: jnp.int32(limit), 0))
    if traced:
        sketch = _Sketch(op, key).widened(min(4 * LEAST, limit))
        sketch = sketch if op.semidefinite else sketch.with_basis()
        return _from_pairs(*sketch.pairs(), shift), sketch.products
    sketch = _Sketch(op, key, journal)
    while True:
        sketch = sketch.widened(min(max(2 * sketch.count, LEAST), limit))
        if sketch.basis is not None or not _is_positive(op, sketch.omega, sketch.images):
            sketch = sketch.with_basis()
        vectors, values = sketch.pairs()
        sizes = np.sort(np.abs(np.asarray(values, np.float64)))[::-1]
        more = min(sketch.count, limit - sketch.count)
        products = more if sketch.basis is None else 2 * more
        if not more or (shift and sides * _saved(sizes / abs(float(shift)), more, tol, sides) <= products):
            return _from_pairs(vectors, values, shift), sketch.products


def _saved(sizes: np.ndarray, more: int, tol: float, sides: int) -> float:
    """Products of each right-hand side that a sketch with `more` columns saves, given the eigenvalues of this
    one in shifts. A sketch of r columns takes out those up to r / 2: what it leaves is about as large as that
    one (Halko, Martinsson and Tropp, arXiv:0909.4061, theorem 10.6).
    """
    return _of_cg(sizes, len(sizes) // 2, tol, sides) - _of_cg(sizes, (len(sizes) + more) // 2, tol, sides)


def _of_cg(sizes: np.ndarray, taken: int, tol: float, sides: int) -> float:
    """Products of each right-hand side where the first eigenvalues are taken out.

    `SHARE` √(1 + κ) / 2 log(2 / tol) reach tol, with κ the largest eigenvalue in shifts. A block of s
    right-hand sides converges as if the next s - 1 were not there either (O'Leary,
    doi:10.1016/0024-3795(80)90247-5, theorem 5), and deals with s more for `OUTLIER` products of each, as
    far as that is worth it.
    """
    sides, digits = min(sides, WIDEST), math.log(2 / max(tol, float(np.finfo(np.float64).eps)))

    def after(steps: np.ndarray) -> np.ndarray:
        left = _tail(sizes, taken + sides * (steps + 1) - 1)
        return OUTLIER * steps + SHARE * np.sqrt(1 + left) / 2 * digits

    at_most = int(after(np.zeros(1))[0] / OUTLIER)
    return float(np.min(after(np.arange(at_most + 1))))


def _tail(sizes: np.ndarray, which: np.ndarray) -> np.ndarray:
    """Eigenvalues by number: of a sketch of r, the first r / 2; beyond, they are taken to go on as they fell
    from r / 4 to there, as for a power law. The last ones of a sketch tell nothing: they lie far below those
    of H.
    """
    half = len(sizes) // 2
    quarter, middle = sizes[half // 2], sizes[half]
    if middle == 0:
        return np.interp(which, np.arange(half + 1), sizes[: half + 1], right=0.0)
    beyond = middle * (middle / quarter) ** np.log2(np.maximum(which, half) / half)
    return np.where(which <= half, np.interp(which, np.arange(half + 1), sizes[: half + 1]), beyond)


def _widest(op: LinearOperator) -> int:
    """Columns at most: the sketch, its images and what is computed from them take a quarter of the memory."""
    free = host.available_bytes(op.device)
    room = MOST if free is None else free // (16 * op.size * jnp.dtype(op.dtype).itemsize)
    return int(np.clip(room, 1, min(MOST, max(op.size // 2, 1))))


@dataclasses.dataclass(frozen=True)
class _Sketch:
    """Orthonormal columns Ω with H Ω; where H is indefinite an orthonormal basis Q of H Ω with H Q."""

    op: LinearOperator
    key: jax.Array
    journal: Journal | None = None
    omega: PyTree = None
    images: PyTree = None
    basis: PyTree = None
    basis_images: PyTree = None
    products: int = 0

    @property
    def count(self) -> int:
        """Columns."""
        return _rows(self.omega)

    def widened(self, count: int) -> "_Sketch":
        """With more columns of Ω; those there keep their products."""
        omega, fresh = _extended(self.omega, _draw(self.key, self.op, self.count, count))
        images = _append(self.images, _products(self.op, fresh, self.journal))
        spent = self.products + count - self.count
        return dataclasses.replace(self, omega=omega, images=images, products=spent)

    def with_basis(self) -> "_Sketch":
        """With Q for all columns of H Ω."""
        have = _rows(self.basis)
        basis, fresh = _extended(self.basis, stacks.rows(self.images, have, self.count))
        images = _append(self.basis_images, _products(self.op, fresh, self.journal))
        spent = self.products + self.count - have
        return dataclasses.replace(self, basis=basis, basis_images=images, products=spent)

    def pairs(self) -> tuple[PyTree, jax.Array]:
        """Approximate eigenvectors, and eigenvalues with zero for what is lost."""
        if self.basis is None:
            return _nystrom_pairs(self.omega, self.images)
        return _ritz_pairs(self.basis, self.basis_images)


def _rows(stack: PyTree) -> int:
    return 0 if stack is None else stacks.length(stack)


def _from_pairs(vectors: PyTree, values: jax.Array, shift: Any) -> "SpectralPreconditioner":
    """Directions that were not resolved keep the size of the smallest that was."""
    sizes, kept = jnp.abs(values + shift), values != 0
    edge = jnp.min(jnp.where(kept, sizes, jnp.inf))
    return SpectralPreconditioner(vectors, jnp.where(kept, gains(jnp.where(kept, sizes, 1), edge), 0))


def _draw(key: jax.Array, op: LinearOperator, start: int, stop: int) -> PyTree:
    keys = [jax.random.fold_in(key, i) for i in range(start, stop)]
    rows = [draws.unit_vector(one, op) for one in keys]
    return stacks.stacked(rows)


def _append(a: PyTree | None, b: PyTree) -> PyTree:
    return b if a is None else stacks.concatenate([a, b])


@programs.jit
def _extended(old: PyTree | None, new: PyTree) -> tuple[PyTree, PyTree]:
    """All columns, and the new ones, made orthonormal to each other and to the old ones."""
    for _ in range(2):
        if old is not None:
            new = stacks.subtract(new, stacks.combine(stacks.inner(new, old), old))
        new = _orthonormal(new)
    return _append(old, new), new


def _products(op: LinearOperator, stack: PyTree, journal: Journal | None) -> PyTree:
    """H v for each vector of a stack, `BATCH` side by side."""

    def step(state: None, start: int, stop: int) -> tuple[None, PyTree]:
        return state, op.mv_batch(stacks.rows(stack, start, stop))

    count = stacks.length(stack)
    parts = list(itertools.pairwise([*range(0, count, BATCH), count]))
    if journal is not None:
        return stacks.concatenate(journal.fold(step, None, parts, out=op.like)[1])
    return stacks.concatenate([step(None, *part)[1] for part in parts])


def _is_positive(op: LinearOperator, omega: PyTree, images: PyTree) -> bool:
    """Whether ΩᵀHΩ has no negative eigenvalue beyond rounding."""
    values = np.linalg.eigvalsh(np.asarray(_symmetric(stacks.inner(omega, images)), np.float64))
    return bool(values[0] >= -10 * op.precision * np.sqrt(len(values)) * np.abs(values).max())


def _symmetric(a: jax.Array) -> jax.Array:
    return (a + a.T) / 2


@programs.jit
def _orthonormal(stack: PyTree) -> PyTree:
    """An orthonormal basis of the rows, zero where lost to rounding; two passes by Gram matrices."""
    unit = trees.power_of_two(trees.largest(stack))
    stack = trees.scale(1 / unit, stack)
    for _ in range(2):
        values, vectors = arrays.eigh(_symmetric(stacks.inner(stack, stack)))
        eps = jnp.finfo(values.dtype).eps
        kept = values > 10 * eps * len(values) * values[-1]
        inverse = jnp.where(kept, lax.rsqrt(jnp.where(kept, values, 1)), 0)
        stack = stacks.combine(inverse[:, None] * vectors.T, stack)
    return stack


@programs.jit
def _nystrom_pairs(omega: PyTree, images: PyTree) -> tuple[PyTree, jax.Array]:
    """Eigenvectors and eigenvalues of Y (ΩᵀY)⁻¹ Yᵀ, by algorithm 2.1 of arXiv:2110.02820; zero where lost."""
    unit = trees.power_of_two(trees.largest(images))
    images = trees.scale(1 / unit, images)
    count = stacks.length(omega)
    core = _symmetric(stacks.inner(omega, images))
    eps = jnp.finfo(core.dtype).eps
    lift = 10 * eps * count**0.5 * jnp.sqrt(jnp.trace(stacks.inner(images, images)))
    lift = jnp.where(lift > 0, lift, 1)
    images = jax.tree.map(lambda y, o: y + (lift * o).astype(y.dtype), images, omega)
    values, vectors = arrays.eigh(core + lift * jnp.eye(count, dtype=core.dtype))
    roots = lax.rsqrt(jnp.maximum(values, lift / 2))[:, None] * vectors.T
    half = stacks.combine(roots, images)  # B = (ΩᵀY)^(-1/2) Y: B Bᵀ has the eigenvalues of the approximation
    values, vectors = arrays.eigh(_symmetric(stacks.inner(half, half)))
    kept = values > 2 * lift
    inverse = jnp.where(kept, lax.rsqrt(jnp.where(kept, values, 1)), 0)
    basis = _tidy(stacks.combine(inverse[:, None] * vectors.T, half))
    return basis, jnp.where(kept, unit * (values - lift), 0)


def _tidy(basis: PyTree) -> PyTree:
    """The nearest orthonormal rows: gains near -1 amplify what is not orthonormal."""
    gram = stacks.inner(basis, basis)
    eye = jnp.eye(len(gram), dtype=gram.dtype)
    return stacks.combine(1.5 * eye - 0.5 * _symmetric(gram), basis)


@programs.jit
def _ritz_pairs(basis: PyTree, images: PyTree) -> tuple[PyTree, jax.Array]:
    values, vectors = arrays.eigh(_symmetric(stacks.inner(basis, images)))
    rotated = stacks.combine(vectors.T, basis)
    norms = arrays.diagonal(stacks.inner(rotated, rotated))
    return rotated, jnp.where(norms > 0.5, values, 0)
