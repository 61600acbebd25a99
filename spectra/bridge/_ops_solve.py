"""Inverses, solutions, determinants and Cholesky factors.

Of PyTorch's several outputs only the results are computed, and zeros for the error codes: the factors
serve its own backward. A singular matrix gives NaN or infinities, which the operators report.
"""

import jax
import jax.numpy as jnp

from spectra.bridge._registry import aten


def no_error(matrices):
    """Return the error codes of a factorisation that went well."""
    return jnp.zeros(matrices.shape[:-2], jnp.int32)


@aten("linalg_inv_ex.default")
def inverse(A, check_errors=False):
    return jnp.linalg.inv(A), no_error(A)


@aten("linalg_cholesky_ex.default")
def cholesky(self, upper=False, check_errors=False):
    # PyTorch reads one triangle only; its derivative is that of the symmetric matrix, as JAX's is.
    source = jnp.swapaxes(self, -1, -2) if upper else self
    lower = jax.lax.linalg.cholesky(source, symmetrize_input=False)
    return jnp.swapaxes(lower, -1, -2) if upper else lower, no_error(self)


@aten("_linalg_solve_ex.default")
def solve(A, B, left=True, check_errors=False):
    vector = B.ndim == 1 or (B.ndim == A.ndim - 1 and B.shape == A.shape[:-1])
    right = B[..., None] if vector else B
    if not left:
        A, right = jnp.swapaxes(A, -1, -2), jnp.swapaxes(right, -1, -2)
    out = jnp.linalg.solve(A, right)
    out = out if left else jnp.swapaxes(out, -1, -2)
    return (out[..., 0] if vector else out,)


@aten("linalg_solve_triangular.default")
def solve_triangular(self, B, upper, left=True, unitriangular=False):
    shape = jnp.broadcast_shapes(self.shape[:-2], B.shape[:-2])
    A = jnp.broadcast_to(self, shape + self.shape[-2:])
    B = jnp.broadcast_to(B, shape + B.shape[-2:])
    return jax.lax.linalg.triangular_solve(A, B, left_side=left, lower=not upper, unit_diagonal=unitriangular)


@aten("triangular_solve.default")
def triangular_solve(self, A, upper=True, transpose=False, unitriangular=False):
    matrix = jnp.swapaxes(A, -1, -2) if transpose else A
    return solve_triangular(matrix, self, upper != transpose, True, unitriangular), A


@aten("cholesky_solve.default")
def cholesky_solve(self, input2, upper=False):
    """Solve A·X = B for A = L·Lᴴ, or Uᴴ·U, given the factor."""
    adjoint = jnp.conj(jnp.swapaxes(input2, -1, -2))
    lower, transposed = (adjoint, input2) if upper else (input2, adjoint)
    return solve_triangular(transposed, solve_triangular(lower, self, False), True)


@aten("cholesky_inverse.default")
def cholesky_inverse(self, upper=False):
    return cholesky_solve(jnp.eye(self.shape[-1], dtype=self.dtype), self, upper)


@aten("_linalg_det.default")
def determinant(A):
    return (jnp.linalg.det(A),)


@aten("_linalg_slogdet.default")
def log_determinant(A):
    return tuple(jnp.linalg.slogdet(A))
