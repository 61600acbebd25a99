"""Preconditioners of a linear system: from a randomised sketch, or from pairs known already."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spectra import _stacks, _tree
from spectra._errors import SpectraError, StructureError
from spectra.operators.base import LinearOperator, operator
from spectra.operators.function import FunctionOperator
from spectra.results import Eigenpairs

PyTree = Any
LEAST, MOST = 16, 256
"""Columns of the first sketch, and of the largest: it doubles until its last eigenvalue is near the shift."""
NEAR = 10.0
"""The sketch is wide enough where its last eigenvalue is below this many shifts: the condition number that is
left is about as large (Frangella, Tropp and Udell, arXiv:2110.02820, theorem 4.2)."""
BATCH = 16


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
        coefficients = jax.vmap(lambda u: _tree.vdot(u, v))(self.vectors)
        return jax.tree.map(jnp.add, v, _stacks.combine(self.gains * coefficients, self.vectors))


def as_preconditioner(
    preconditioner: Any, op: LinearOperator, shift: Any, key: jax.Array | None, traced: bool
) -> tuple[LinearOperator | None, int]:
    """What was asked for as an operator near (H + shift I)⁻¹, and the products that it took."""
    if preconditioner is None:
        return None, 0
    if isinstance(preconditioner, str):
        if preconditioner != "nystrom":
            raise SpectraError(
                f"preconditioner={preconditioner!r}: use 'nystrom', Eigenpairs or an operator."
            )
        if key is None:
            raise SpectraError("preconditioner='nystrom' draws a sketch: pass key, say jax.random.key(0).")
        return nystrom(op, shift, key, traced)
    if isinstance(preconditioner, Eigenpairs):
        return deflation(op, preconditioner, shift), 0
    if not isinstance(preconditioner, LinearOperator):
        function = preconditioner if callable(preconditioner) else getattr(preconditioner, "mv", None)
        if function is None:
            raise StructureError(
                f"preconditioner is a {type(preconditioner).__name__}: pass 'nystrom', Eigenpairs, or an "
                "operator or a function that multiplies with an approximate inverse."
            )
        preconditioner = FunctionOperator(function, op.like)
    _tree.check_structure(preconditioner.structure, op.structure, "the preconditioner's vector")
    if preconditioner.on_host:
        raise SpectraError("a preconditioner is applied in every step: it cannot stream its data.")
    return preconditioner, 0


def deflation(op: LinearOperator, pairs: Eigenpairs, shift: Any) -> SpectralPreconditioner:
    """The preconditioner that moves known eigenvalues of H + shift I to the edge of what is not known."""
    _tree.check_structure(
        jax.tree.map(lambda x: x[0], pairs.vectors), op.structure, "a vector of the known pairs"
    )
    sizes = jnp.abs(jnp.asarray(pairs.values, op.dtype) + shift)
    edge = jnp.max(sizes) if pairs.which == "SM" else jnp.min(sizes)
    return SpectralPreconditioner(pairs.vectors, _gains(sizes, edge))


def nystrom(
    op: LinearOperator, shift: Any, key: jax.Array, traced: bool
) -> tuple[SpectralPreconditioner, int]:
    """The randomised Nyström preconditioner of H + shift I, and its products.

    H is sketched by Y = H Ω with orthonormal Ω, and approximated by Y (ΩᵀY)⁻¹ Yᵀ where it shows no negative
    curvature there. Where it does, that is no approximation; the products of an orthonormal basis of Y give
    Ritz pairs then, at twice the cost. Inside jit, where that cannot be seen, only an operator that is
    positive semi-definite by construction is taken at half the price.
    """
    limit = min(MOST, max(op.size // 2, 1))
    count, products = min(LEAST, limit), 0
    omega = images = None
    if traced:
        count = min(4 * LEAST, limit)
    while True:
        have = 0 if omega is None else _stacks.length(omega)
        fresh = _draw(key, op, have, count)
        omega, fresh = _extended(omega, fresh)
        images = _append(images, _products(op, fresh))
        products += count - have
        if traced:
            semidefinite = op.semidefinite
            break
        values, semidefinite = _core(op, omega, images)
        if count == limit or not semidefinite or values <= NEAR * abs(float(shift)):
            break
        count = min(2 * count, limit)
    if semidefinite:
        vectors, values = _nystrom_pairs(omega, images)
    else:
        basis = _orthonormal(images)
        vectors, values = _ritz_pairs(basis, _products(op, basis))
        products += count
    sizes = jnp.abs(values + shift)
    # Directions that were not resolved keep the size of the smallest that was.
    kept = values != 0
    edge = jnp.min(jnp.where(kept, sizes, jnp.inf))
    gains = jnp.where(kept, _gains(jnp.where(kept, sizes, 1), edge), 0)
    return SpectralPreconditioner(vectors, gains), products


def _gains(sizes: jax.Array, edge: jax.Array) -> jax.Array:
    tiny = jnp.finfo(sizes.dtype).tiny
    return edge / jnp.maximum(sizes, jnp.maximum(tiny, edge * jnp.finfo(sizes.dtype).eps)) - 1


def _draw(key: jax.Array, op: LinearOperator, start: int, stop: int) -> PyTree:
    keys = [jax.random.fold_in(key, i) for i in range(start, stop)]
    rows = [_tree.sphere_sample(one, op.structure) for one in keys]
    return _stacks.stacked(rows)


def _append(a: PyTree | None, b: PyTree) -> PyTree:
    return b if a is None else _stacks.concatenate([a, b])


@jax.jit
def _extended(old: PyTree | None, new: PyTree) -> tuple[PyTree, PyTree]:
    """All columns, and the new ones, made orthonormal to each other and to the old ones."""
    for _ in range(2):
        if old is not None:
            new = _stacks.subtract(new, _stacks.combine(_stacks.inner(new, old), old))
        new = _orthonormal(new)
    return _append(old, new), new


def _products(op: LinearOperator, stack: PyTree) -> PyTree:
    starts = range(0, _stacks.length(stack), BATCH)
    return _stacks.concatenate([op.mv_batch(_stacks.rows(stack, i, i + BATCH)) for i in starts])


def _core(op: LinearOperator, omega: PyTree, images: PyTree) -> tuple[float, bool]:
    """The smallest eigenvalue of the Nyström approximation, and whether ΩᵀHΩ is positive to the rounding."""
    values = np.linalg.eigvalsh(np.asarray(_symmetric(_stacks.inner(omega, images)), np.float64))
    noise = 10 * op.precision * np.sqrt(len(values)) * float(np.abs(values).max())
    if values[0] < -noise:
        return 0.0, False
    found = np.asarray(_nystrom_pairs(omega, images)[1])
    return float(found.min()), True


def _symmetric(a: jax.Array) -> jax.Array:
    return (a + a.T) / 2


@jax.jit
def _orthonormal(stack: PyTree) -> PyTree:
    """An orthonormal basis of the rows, zero where lost to rounding; two passes by Gram matrices."""
    unit = _tree.power_of_two(_tree.largest(stack))
    stack = _tree.scale(1 / unit, stack)
    for _ in range(2):
        values, vectors = jnp.linalg.eigh(_symmetric(_stacks.inner(stack, stack)))
        eps = jnp.finfo(values.dtype).eps
        kept = values > 10 * eps * len(values) * values[-1]
        inverse = jnp.where(kept, lax.rsqrt(jnp.where(kept, values, 1)), 0)
        stack = _stacks.combine(inverse[:, None] * vectors.T, stack)
    return stack


@jax.jit
def _nystrom_pairs(omega: PyTree, images: PyTree) -> tuple[PyTree, jax.Array]:
    """Eigenvectors and eigenvalues of Y (ΩᵀY)⁻¹ Yᵀ, by algorithm 2.1 of arXiv:2110.02820; zero where lost."""
    unit = _tree.power_of_two(_tree.largest(images))
    images = _tree.scale(1 / unit, images)
    count = _stacks.length(omega)
    core = _symmetric(_stacks.inner(omega, images))
    eps = jnp.finfo(core.dtype).eps
    lift = 10 * eps * count**0.5 * jnp.sqrt(jnp.trace(_stacks.inner(images, images)))
    lift = jnp.where(lift > 0, lift, 1)
    images = jax.tree.map(lambda y, o: y + (lift * o).astype(y.dtype), images, omega)
    values, vectors = jnp.linalg.eigh(core + lift * jnp.eye(count, dtype=core.dtype))
    roots = lax.rsqrt(jnp.maximum(values, lift / 2))[:, None] * vectors.T
    half = _stacks.combine(roots, images)  # B = (ΩᵀY)^(-1/2) Y: B Bᵀ has the eigenvalues of the approximation
    values, vectors = jnp.linalg.eigh(_symmetric(_stacks.inner(half, half)))
    kept = values > 2 * lift
    inverse = jnp.where(kept, lax.rsqrt(jnp.where(kept, values, 1)), 0)
    basis = _tidy(_stacks.combine(inverse[:, None] * vectors.T, half))
    return basis, jnp.where(kept, unit * (values - lift), 0)


def _tidy(basis: PyTree) -> PyTree:
    """The nearest orthonormal rows: gains near -1 amplify what is not orthonormal."""
    gram = _stacks.inner(basis, basis)
    eye = jnp.eye(len(gram), dtype=gram.dtype)
    return _stacks.combine(1.5 * eye - 0.5 * _symmetric(gram), basis)


@jax.jit
def _ritz_pairs(basis: PyTree, images: PyTree) -> tuple[PyTree, jax.Array]:
    values, vectors = jnp.linalg.eigh(_symmetric(_stacks.inner(basis, images)))
    rotated = _stacks.combine(vectors.T, basis)
    norms = jnp.diagonal(_stacks.inner(rotated, rotated))
    return rotated, jnp.where(norms > 0.5, values, 0)
