"""Singular triplets of a Jacobian: eigenvectors of the smaller Gram matrix, and J itself applied to them."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import draws, programs, stacks, trees
from spectra.base.calls import automatic
from spectra.base.errors import SpectraError, Status, StructureError
from spectra.base.host import one_thread
from spectra.base.trees import PyTree
from spectra.krylov.eigsh import eigsh
from spectra.operators.jacobian import GramOperator, JacobianOperator
from spectra.results import Eigenpairs, SingularTriplets
from spectra.runs.checkpoint import Checkpoint

WHICH = ("LM", "SM")


@automatic
def svds(
    jacobian: JacobianOperator,
    k: int,
    *,
    which: str = "LM",
    key: jax.Array,
    tol: float = 1e-4,
    num_basis: int | None = None,
    max_matvecs: int | None = None,
    verify: bool | str = "auto",
    progress: bool = False,
    checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
    basis: str = "inherit",
) -> SingularTriplets:
    """Compute k singular values of a Jacobian, with their left and right vectors.

    J v = σ u and Jᵀ u = σ v, with v a pytree like the parameters and u one like the outputs. `eigsh` finds
    eigenvectors of the smaller of Jᵀ J and J Jᵀ. The square roots of its eigenvalues λ = σ² would lose half
    of the digits: a rounding error of ε σ₁² in λ becomes ε σ₁² / 2σ in σ, and √ε σ₁ at σ = 0, which is 3e-4
    σ₁ in float32. So J is applied to the eigenvectors V, and the singular values of the thin matrix J V are
    taken, whose rounding error is ε σ₁ again. One cost of squaring remains: singular values below √ε σ₁
    cannot be told apart by the Gram matrix (`gram_floor`), so it is not certain which of them were found, and
    their errors say so.

    The error stated is the smaller of two bounds, plus rounding: |Jᵀ u - σ v| / √2, the residual of the
    symmetric matrix [[0, J], [Jᵀ, 0]], and half the distance between the square roots of σ² ± (|Jᵀ J v - σ²
    v| + rounding).

    Args:
        jacobian: J, of shape (m, n), or a transpose of one.
        k: number of singular values, 1 to min(m, n).
        which: "LM" the largest, "SM" the smallest of the min(m, n).
        key: JAX random key.
        tol: largest accepted error in units of σ₁; for "SM", of σ itself. The Gram matrix is iterated to
            tol², so that all errors are below tol σ₁; the values are more accurate than these bounds.
        num_basis: as for `eigsh`, of vectors of the smaller side.
        max_matvecs: as for `eigsh`; k more products follow.
        verify: look for missed copies, as `eigsh` does.
        progress: show the number of products, the converged pairs and the largest residual.
        checkpoint: a folder, or a `Checkpoint`, to save the run on the Gram matrix in.
        basis: where basis vectors are stored, as for `eigsh`.

    Returns:
        `SingularTriplets`: values descending, left and right vectors stacked, `errors`, `converged`. Vectors
        of the smaller side are orthonormal to ε, of the larger to ε σ₁ / σ. `status` is NOT_CONVERGED
        if the products ran out, STAGNATED if rounding is above the tolerance. As for `eigsh`, `status` and
        `converged` say nothing about copies of a singular value: `missed` does.

    Raises:
        StructureError: not a `JacobianOperator`; for the singular values |λ| of a symmetric matrix, use
            `eigsh`.
        SpectraError: k, which or tol out of range; called inside jit, vmap or grad.
        NonFiniteError: a product is NaN or infinite.

    Cost: the products of `eigsh` on the smaller Gram matrix, each one with J and one with Jᵀ, and k more; for
    "SM" about ten to find σ₁. Memory: the basis of `eigsh`, and k vectors of both sides.

    References:
        Golub and Kahan, doi:10.1137/0702016, for [[0, J], [Jᵀ, 0]]; Wu and Simon,
        doi:10.1137/S0895479898334605.

    Examples:
        >>> import jax, jax.numpy as jnp, spectra
        >>> def model_fn(params, x):
        ...     return x @ params
        >>> x = jnp.diag(jnp.arange(1.0, 41.0))[:, :30]
        >>> J = spectra.JacobianOperator(model_fn, jnp.ones(30), x)
        >>> found = spectra.svds(J, 2, key=jax.random.key(0))
        >>> found.values.round(3)
        array([30., 29.])
        >>> found.left.shape, found.right.shape
        ((2, 40), (2, 30))
    """
    if not isinstance(jacobian, JacobianOperator):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise StructureError(
            f"svds takes a JacobianOperator, got a {type(jacobian).__name__}. The singular values of a "
            "symmetric operator are |λ|: use eigsh."
        )
    if which not in WHICH:
        raise SpectraError(f"which={which!r}: use one of {WHICH}.")
    if not isinstance(k, int | np.integer) or not 1 <= k <= min(jacobian.shape):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise SpectraError(f"k={k} is not between 1 and min(m, n) = {min(jacobian.shape)}.")
    if not 0 <= tol < 1:
        raise SpectraError(f"tol={tol} is an error in units of the largest singular value: use [0, 1).")
    if trees.is_traced((jacobian, key)):
        raise SpectraError("svds restarts from the host: call it outside jit, vmap and grad.")
    m, n = jacobian.shape
    small = jacobian if n <= m else jacobian.T  # from the smaller side to the larger
    unit = _unit(small, key)
    gram = GramOperator(small, unit)
    pairs = eigsh(
        gram,
        int(k),
        which="LA" if which == "LM" else "SM",
        key=key,
        tol=tol**2 if which == "LM" else tol,
        num_basis=num_basis,
        max_matvecs=max_matvecs,
        verify=verify,
        progress=progress,
        checkpoint=checkpoint,
        basis=basis,
    )
    top, spent = _largest(gram, pairs, which, key)
    return _triplets(small, unit, pairs, top, which, tol, turned=n > m, spent=spent)


def _unit(jacobian: JacobianOperator, key: jax.Array) -> float:
    """A power of two of the size of J, from one product."""
    image = jacobian.product(draws.unit_vector(key, jacobian))
    return float(trees.power_of_two(trees.largest(image)))


def _largest(gram: GramOperator, pairs: Eigenpairs, which: str, key: jax.Array) -> tuple[float, int]:
    """σ₁ in the unit, and the products that it took."""
    if which == "LM":
        return float(np.sqrt(max(pairs.values.max(), 0.0))), 0
    top = eigsh(gram, 1, which="LA", key=key, tol=0.1, verify=False)
    return float(np.sqrt(max(top.values[0], 0.0))), top.num_matvecs


def _triplets(
    small: Any, unit: float, pairs: Eigenpairs, top: float, which: str, tol: float, turned: bool, spent: int
) -> Any:
    """The singular values of J on the span of the eigenvectors, with vectors and errors."""
    images = stacks.stacked([_in_unit(small, v, unit) for v in stacks.split(pairs.vectors)])
    sizes, cosines = (np.asarray(x, np.float64) for x in _geometry(images))
    with one_thread():
        weights, axes = np.linalg.eigh(cosines)
        thin = np.sqrt(np.maximum(weights, 0))[:, None] * axes.T * sizes  # R of J V = Q R
        _, values, turn = np.linalg.svd(thin)
    shares = turn * np.where(values > 0, sizes / np.where(values > 0, values, 1)[:, None], 0)
    near, far = _rotated(jnp.asarray(turn), jnp.asarray(shares), pairs.vectors, images)
    back = stacks.stacked([_in_unit(small.T, u, unit) for u in stacks.split(far)])
    residuals = np.asarray(_residuals(back, near, jnp.asarray(values)), np.float64)
    gram_floor = float(np.sqrt(pairs.noise_floor))
    # Products with J, and the k x k problem, whose rounding grows with k at most.
    floor = float(pairs.noise_floor / top) if top > 0 else gram_floor
    floor += len(values) * float(jnp.finfo(small.dtype).eps) * top
    errors = _errors(values, residuals, floor, pairs.noise_floor)
    converged = errors <= np.maximum(tol * (top if which == "LM" else values), floor)
    left, right = (near, far) if turned else (far, near)
    m, n = small.shape[::-1] if turned else small.shape
    return SingularTriplets(
        values=values * unit,
        left=left,
        right=right,
        errors=errors * unit,
        converged=converged,
        which=which,
        shape=(m, n),
        num_matvecs=pairs.num_matvecs + len(values) + spent,
        missed=pairs.missed,
        noise_floor=floor * unit,
        gram_floor=gram_floor * unit,
        status=_status(pairs, converged),
    )


def _status(pairs: Eigenpairs, converged: np.ndarray) -> Status:
    if converged.all():
        return Status.CONVERGED
    return Status.STAGNATED if np.all(pairs.converged) else Status.NOT_CONVERGED


def _errors(values: np.ndarray, residuals: np.ndarray, floor: float, gram_floor: float) -> np.ndarray:
    """The smaller of the two bounds, see `svds`; a left vector of zero has the second only."""
    spread = values * residuals + gram_floor
    below = values - np.sqrt(np.maximum(values**2 - spread, 0))
    above = np.sqrt(values**2 + spread) - values
    direct = np.where(values > 0, residuals / np.sqrt(2) + floor, np.inf)
    return np.minimum(direct, np.maximum(below, above))


def _in_unit(jacobian: JacobianOperator, v: PyTree, unit: float) -> PyTree:
    return trees.scale(1 / unit, jacobian.product(v))


@programs.jit
def _geometry(images: PyTree) -> tuple[jax.Array, jax.Array]:
    """Lengths of the images, and the cosines between them, zero for those of length zero."""
    sizes = jax.vmap(trees.norm)(images)
    inverse = jnp.where(sizes > 0, 1 / jnp.where(sizes > 0, sizes, 1), 0)
    unit = jax.vmap(trees.scale)(inverse, images)
    return sizes, stacks.inner(unit, unit)


@programs.jit
def _rotated(turn: jax.Array, shares: jax.Array, vectors: PyTree, images: PyTree) -> tuple[PyTree, PyTree]:
    """The singular vectors on both sides, of length one; zero where the value is."""
    sizes = jax.vmap(trees.norm)(images)
    unit = jax.vmap(trees.scale)(jnp.where(sizes > 0, 1 / jnp.where(sizes > 0, sizes, 1), 0), images)
    far = stacks.combine(shares, unit)
    length = jax.vmap(trees.norm)(far)
    far = jax.vmap(trees.scale)(jnp.where(length > 0, 1 / jnp.where(length > 0, length, 1), 0), far)
    return stacks.combine(turn, vectors), far


@programs.jit
def _residuals(back: PyTree, near: PyTree, values: jax.Array) -> jax.Array:
    """|Jᵀ u - σ v| of each triplet."""
    return jax.vmap(lambda b, v, s: trees.norm(trees.axpy(-s, v, b)))(back, near, values)
