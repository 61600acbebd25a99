"""Tridiagonal reduction for callers: one start vector, traced or driven in chunks from the host."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import trees
from spectra.base.errors import SpectraError, Status
from spectra.base.meshes import automatic
from spectra.base.trees import PyTree
from spectra.krylov.layout import Layout
from spectra.krylov.recurrence import CHUNK, LanczosState, advance, check_steps, init, run
from spectra.operators.arithmetic import outside_loops
from spectra.operators.base import LinearOperator, require_operator
from spectra.quadrature.copies import invariant_length
from spectra.results import Tridiagonal


@automatic
def lanczos(op: LinearOperator, v0: PyTree, num_steps: int, *, reorthogonalize: str = "full") -> Tridiagonal:
    """Reduce a symmetric operator to tridiagonal form on the Krylov space of a start vector.

    Computes H Qᵀ = Qᵀ T + r e_mᵀ with orthonormal rows q_0 = v0/|v0|, ..., q_{m-1}. The run ends early, with
    the true `length`, if the space is invariant; the eigenvalues of T are then eigenvalues of H. It ends at a
    residual that rounding alone can explain, β_j <= (10 + √n / 2) eps |T|; outside `jit`, also at a larger
    one from amplified rounding, after which the run repeats itself. `lanczos` works inside `jit` and `vmap`;
    outside, products are checked for NaN and for symmetry during the run.

    Args:
        op: a symmetric `LinearOperator` of order n.
        v0: start vector, a pytree like the parameters or a flat array (n,); need not be normalised.
        num_steps: m, from 1 to n.
        reorthogonalize: "full" keeps the basis and makes every new vector orthogonal to it; "none" is
            the bare three-term recurrence, which needs no basis but returns copies ("ghosts") of
            converged eigenvalues: `slq(basis="none")` merges them.

    Returns:
        `Tridiagonal` with alpha (m,), beta (m-1,), length, basis and orthogonality.

    Raises:
        SpectraError: num_steps out of range, or v0 zero or not finite.
        StructureError: v0 does not match the operator.
        NonFiniteError: a product is NaN or infinite.
        NotSymmetricError: the operator is not symmetric.

    Cost: m products, m n numbers of memory for the basis, and one read and write sweep of it per step
    (m² n numbers in all; twice that in steps that need a second Gram-Schmidt pass).

    References:
        Parlett, The Symmetric Eigenvalue Problem, doi:10.1137/1.9781611971163, ch. 13.

    Examples:
        >>> import jax.numpy as jnp, spectra
        >>> op = spectra.MatrixOperator(jnp.diag(jnp.array([1.0, 1.0, 2.0, 2.0, 3.0, 3.0])))
        >>> result = spectra.lanczos(op, jnp.ones(6), 5)
        >>> int(result.length)  # three distinct eigenvalues
        3
    """
    if reorthogonalize not in ("full", "none"):
        raise SpectraError(f"reorthogonalize={reorthogonalize!r}: use 'full' or 'none'.")
    require_operator(op)
    check_steps(num_steps, op.size)
    v0 = op.as_vector(v0, "v0")
    keep = reorthogonalize == "full"
    traced = trees.is_traced((op, v0))
    layout = Layout.leafwise(op.structure) if traced else Layout.of(op.like)
    if traced:
        op = op.prepare()
        state = run(op, layout, init(layout, v0, num_steps, keep_basis=keep), 0, num_steps)
        return finished(state, layout, Status.TRACED)
    size = trees.length(v0)
    if not np.isfinite(size) or size == 0:
        raise SpectraError(f"v0 has norm {size}; pass a finite vector that is not zero.")
    op, state = outside_loops(op.prepare()), _init(layout, v0, num_steps, keep_basis=keep)
    for start in range(0, num_steps, CHUNK):
        stop = min(start + CHUNK, num_steps)
        state = advance(op, layout, state, start, stop, batched=False)
        alpha, beta, done = jax.device_get((state.alpha, state.beta, state.length))
        length = invariant_length(alpha, beta, int(done), op.size, op.precision, orthogonal=keep)
        if length is not None:
            return finished(_cut(state, length), layout, Status.INVARIANT)
    return finished(state, layout, Status.COMPLETE)


def _cut(state: LanczosState, length: int) -> LanczosState:
    """The first `length` steps, with no residual: what rounding carried on is left out."""
    steps = np.arange(len(state.alpha))
    return dataclasses.replace(
        state,
        alpha=jnp.where(steps < length, state.alpha, 0),
        beta=jnp.where(steps < length - 1, state.beta, 0),
        length=jnp.asarray(length, jnp.int32),
    )


_init = jax.jit(init, static_argnames=("layout", "num_steps", "keep_basis"))


def finished(state: LanczosState, layout: Layout, status: Status) -> Tridiagonal:
    """The reduction that a state holds."""
    beta, last, asymmetry = _numbers(state.beta, state.length, state.asymmetry, state.scale)
    return Tridiagonal(
        alpha=state.alpha,
        beta=beta,
        residual_norm=last,
        length=state.length,
        asymmetry=asymmetry,
        second_passes=state.second_passes,
        segments=state.basis,
        layout=layout,
        status=status,
    )


@jax.jit
def _numbers(
    beta: jax.Array, length: jax.Array, asymmetry: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    return beta[:-1], beta[length - 1], asymmetry / jnp.where(scale > 0, scale, 1)
