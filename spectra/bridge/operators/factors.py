"""Inverses, solutions and determinants; eigenvalues, singular values, QR, LU and Cholesky factors."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from spectra.base import arrays
from spectra.bridge.dtypes import cast
from spectra.bridge.errors import BridgeError
from spectra.bridge.operators.registry import aten


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


def _adjoint(x):
    return jnp.conj(jnp.swapaxes(x, -1, -2))


def _nothing(x):
    return jnp.zeros((0,), x.dtype)


@aten("_linalg_svd.default")
def svd(A, full_matrices=False, compute_uv=True, driver=None):
    if not compute_uv:
        return _nothing(A), jnp.linalg.svd(A, compute_uv=False), _nothing(A)
    U, values, Vh = jnp.linalg.svd(A, full_matrices=False)
    if full_matrices and A.shape[-2] != A.shape[-1]:
        wide = jnp.linalg.svd(lax.stop_gradient(A), full_matrices=True)
        U, Vh = _completed(U, wide[0]), _adjoint(_completed(_adjoint(Vh), _adjoint(wide[2])))
    return U, values, Vh


def _completed(U, basis):
    """Return U with the further columns of an orthonormal basis, which only the span of U determines.

    JAX has no derivative of these, and PyTorch's is zero. With the columns Q at the point, (I - U·Uᴴ)·Q·
    (I + ½·Qᴴ·U·Uᴴ·Q) is Q there and orthonormal up to third order, so that a function of their span has its
    two derivatives, and a module with another gradient in PyTorch is refused.
    """
    Q = basis[..., U.shape[-1] :]
    inner = _adjoint(U) @ Q
    rest = Q - U @ inner
    return jnp.concatenate([U, rest + rest @ (_adjoint(inner) @ inner) / 2], -1)


@aten("_linalg_eigh.default")
def eigh(A, UPLO="L", compute_v=True):
    if UPLO not in ("L", "U"):
        raise BridgeError(f"UPLO must be 'L' or 'U', got {UPLO!r}")
    # One triangle is read; the derivative is that of the symmetric matrix, as PyTorch's.
    vectors, values = lax.linalg.eigh(A, lower=UPLO == "L", symmetrize_input=False)
    return values, vectors if compute_v else _nothing(A)


@jax.custom_jvp
def _eig(A):
    return tuple(jnp.linalg.eig(A))


@_eig.defjvp
def _(primals, tangents):
    """JAX has no derivative of the vectors: this is PyTorch's, for vectors of norm 1 (`linalg_eig_jvp`)."""
    (A,), (dA,) = primals, tangents
    values, V = _eig(A)
    inner = jnp.linalg.solve(V, cast(dA, V.dtype) @ V)
    dvalues = jnp.diagonal(inner, axis1=-2, axis2=-1)
    eye = jnp.eye(A.shape[-1], dtype=bool)
    gaps = jnp.where(eye, 1, values[..., None, :] - values[..., :, None])
    dV = V @ jnp.where(eye, 0, inner / gaps)
    along = jnp.real(jnp.sum(jnp.conj(V) * dV, -2, keepdims=True))
    return (values, V), (dvalues, dV - V * along)


@aten("linalg_eig.default")
def eig(self):
    return _eig(self)


@aten("linalg_qr.default")
def qr(A, mode="reduced"):
    if mode not in ("reduced", "complete", "r"):
        raise BridgeError(f"mode must be 'reduced', 'complete' or 'r', got {mode!r}")
    rows, columns = A.shape[-2:]
    if rows < columns:
        # The first columns decide Q, which is square; JAX differentiates only these.
        Q, R = lax.linalg.qr(A[..., :rows], full_matrices=False)
        R = jnp.concatenate([R, _adjoint(Q) @ A[..., rows:]], -1)
    else:
        Q, R = lax.linalg.qr(A, full_matrices=mode == "complete" and rows > columns)
    return (_nothing(A) if mode == "r" else Q), R


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _pinv(A, cutoff, hermitian):
    """The pseudoinverse, with singular values up to `cutoff` taken for 0."""
    if hermitian:
        vectors, values = lax.linalg.eigh(A, symmetrize_input=False)
        left, right = vectors, _adjoint(vectors)
    else:
        left, values, right = jnp.linalg.svd(A, full_matrices=False)
        left, right = _adjoint(right), _adjoint(left)
    kept = jnp.abs(values) > cutoff[..., None]
    inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
    return (left * cast(inverse[..., None, :], A.dtype)) @ right


@_pinv.defjvp
def _(hermitian, primals, tangents):
    """At constant rank (Golub and Pereyra, SIAM J. Numer. Anal. 10, 1973)."""
    (A, cutoff), (dA, _) = primals, tangents
    P = _pinv(A, cutoff, hermitian)
    dH, PH = _adjoint(dA), _adjoint(P)
    left, right = dH - (dH @ A) @ P, dH - P @ (A @ dH)
    return P, -P @ dA @ P + P @ (PH @ left) + (right @ PH) @ P


@aten("linalg_pinv.atol_rtol_tensor", "linalg_pinv.atol_rtol_float")
def pinv(self, atol=None, rtol=None, hermitian=False):
    if 0 in self.shape:
        return jnp.zeros((*self.shape[:-2], *self.shape[:-3:-1]), self.dtype)
    fixed = lax.stop_gradient(self)
    if hermitian:
        largest = jnp.max(jnp.abs(lax.linalg.eigh(fixed, symmetrize_input=False)[1]), -1)
    else:
        largest = jnp.max(jnp.linalg.svd(fixed, compute_uv=False), -1)
    absolute = jnp.zeros((), largest.dtype) if atol is None else jnp.asarray(atol, largest.dtype)
    if rtol is None:  # PyTorch's default holds only where no absolute one is given
        default = max(self.shape[-2:]) * jnp.finfo(self.dtype).eps
        rtol = jnp.where(absolute > 0, 0, default)
    return _pinv(self, jnp.maximum(absolute, jnp.asarray(rtol, largest.dtype) * largest), hermitian)


@aten("linalg_pinv.default", "linalg_pinv.rcond_tensor")
def pinv_rcond(self, rcond, hermitian=False):
    return pinv(self, None, rcond, hermitian)


def _factored(A, pivot):
    if not pivot:
        raise BridgeError("LU factors without pivoting have no counterpart in JAX: leave pivot=True")
    return lax.linalg.lu(A)


@aten("linalg_lu_factor_ex.default")
def lu_factor(A, pivot=True, check_errors=False):
    LU, pivots, _ = _factored(A, pivot)
    return LU, pivots + 1, no_error(A)


@aten("lu_unpack.default")
def lu_unpack(LU_data, LU_pivots, unpack_data=True, unpack_pivots=True):
    rows, columns = LU_data.shape[-2:]
    k = min(rows, columns)
    P = L = U = _nothing(LU_data)
    if unpack_pivots:
        order = lax.linalg.lu_pivots_to_permutation(LU_pivots - 1, rows)
        P = jnp.swapaxes(jnp.eye(rows, dtype=LU_data.dtype)[order], -1, -2)
    if unpack_data:
        L = jnp.tril(LU_data[..., :k], -1) + jnp.eye(rows, k, dtype=LU_data.dtype)
        U = jnp.triu(LU_data[..., :k, :])
    return P, L, U


@aten("linalg_lu.default")
def lu(A, pivot=True):
    LU, pivots, _ = _factored(A, pivot)
    return lu_unpack(LU, pivots + 1)


@aten("linalg_lu_solve.default")
def lu_solve(LU, pivots, B, left=True, adjoint=False):
    """Solve A·X = B, X·A = B, or the same with Aᴴ, where A = P·L·U."""
    if not left:  # the adjoint of the equation has A on the other side
        return _adjoint(lu_solve(LU, pivots, _adjoint(B), True, not adjoint))
    shape = jnp.broadcast_shapes(LU.shape[:-2], B.shape[:-2])
    B = jnp.broadcast_to(B, shape + B.shape[-2:])
    P = lu_unpack(LU, pivots, False)[0]
    if not adjoint:
        X = solve_triangular(LU, jnp.matmul(jnp.swapaxes(P, -1, -2), B), False, True, True)
        return solve_triangular(LU, X, True)
    X = solve_triangular(_adjoint(LU), B, False)
    return jnp.matmul(P, solve_triangular(_adjoint(LU), X, True, True, True))


@aten("linalg_householder_product.default")
def householder_product(input, tau):
    """The first columns of H₁·H₂·…, with Hᵢ = I - τᵢ·vᵢ·vᵢᴴ and vᵢ the i-th column, 1 on the diagonal."""
    rows, columns = input.shape[-2:]
    count = tau.shape[-1]
    vectors = jnp.tril(input, -1) + jnp.eye(rows, columns, dtype=input.dtype)
    start = jnp.broadcast_to(jnp.eye(rows, columns, dtype=input.dtype), input.shape)
    start = arrays.carried(start, input, tau)

    def reflect(Q, factors):
        v, t = factors
        return Q - t[..., None, None] * v[..., :, None] * (jnp.conj(v)[..., None, :] @ Q), None

    steps = (jnp.moveaxis(vectors[..., :count], -1, 0), jnp.moveaxis(tau, -1, 0))
    return lax.scan(reflect, start, steps, reverse=True)[0]


@aten("linalg_matrix_exp.default")
def matrix_exp(self):
    matrices = self.reshape(-1, *self.shape[-2:])
    if not matrices.size:
        return self
    wide = cast(matrices, jnp.promote_types(self.dtype, jnp.float32))
    return cast(lax.map(_exponential, wide).reshape(self.shape), self.dtype)


_PADE = {4: 3.925724783138660, 8: 5.371920351148152}  # 1-norms up to which JAX's approximants are exact
_SQUARINGS = 16  # as many as JAX's own


def _exponential(A):
    """exp(A) = exp(A / 2ˢ) to the power of 2ˢ, the quotient within the norm of the Padé approximant.

    JAX rounds s down, to up to twice that norm, which loses 1e-11 of an exponential in float64 and 4e-5 in
    float32 (Higham 2005, doi:10.1137/04061101X, takes the smallest s that suffices).
    """
    norm = lax.stop_gradient(jnp.linalg.norm(A, 1))
    count = jnp.maximum(0, jnp.ceil(jnp.log2(norm / _PADE[jnp.finfo(A.dtype).bits // 8])))

    def squared(X, i):
        return lax.cond(i < count, lambda Y: Y @ Y, lambda Y: Y, X), None

    start = jax.scipy.linalg.expm(A / jnp.exp2(count).astype(norm.dtype))
    result = lax.scan(squared, start, jnp.arange(_SQUARINGS))[0]
    return jnp.where(count > _SQUARINGS, jnp.nan, result)
