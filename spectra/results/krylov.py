"""Results of Krylov methods: decompositions and eigenpairs."""

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from spectra import _mesh, _quadrature
from spectra._status import Status
from spectra.results._base import Array, PyTree, Result, call, notebook_view, result, text_table
from spectra.results._digits import rounded
from spectra.results._plain import plain

_dense = jax.jit(functools.partial(_quadrature.dense, xp=jnp))


def _is_jax(x) -> bool:
    return isinstance(x, jax.Array)


@result("layout", "status")
class Tridiagonal(Result):
    """The Lanczos decomposition H Qᵀ = Qᵀ T + r e_mᵀ of m steps; rows of Q are orthonormal.

    `T` has `alpha` on its diagonal and `beta` beside it. Entries beyond `length` are zero: the Krylov
    space became invariant there and T[:length, :length] holds exact eigenvalues of H.

    The [glossary](glossary.md#ritz-value) says what is meant by step, basis and breakdown.
    """

    _BULKY: ClassVar = ("segments", "layout")

    alpha: Array  # (m,)
    beta: Array  # (m - 1,)
    residual_norm: Array  # (), |r|: zero after a breakdown
    length: Array  # (), integer
    asymmetry: Array  # (), largest |q_iᵀ H q_j| that symmetry makes zero, in units of |T|
    second_passes: Array  # (), steps that needed a second Gram-Schmidt pass
    segments: Any  # the basis in segments of rows, see krylov.basis; empty if not kept
    layout: Any  # how segments map to pytrees
    status: Status

    @property
    @_mesh.automatic
    def basis(self) -> PyTree:
        """The rows of Q as one pytree with leaves (m, *leaf.shape). A copy, made on each access."""
        return call("stack", self._kept().segments, self.layout, 0, self.alpha.shape[-1])

    @property
    @_mesh.automatic
    def orthogonality(self) -> Array:
        """max |Q Qᵀ - I| over the first `length` rows. Costs m² n operations, at each access."""
        kept = self._kept()
        return call("orthogonality", kept.segments, kept.length)

    def matrix(self) -> Array:
        """T as a dense (m, m) array."""
        if _is_jax(self.alpha):
            return _dense(self.alpha, self.beta)
        return _quadrature.dense(self.alpha, self.beta, np)

    def _kept(self) -> "Tridiagonal":
        if not self.segments:
            raise ValueError("the basis was not kept: run lanczos with reorthogonalize='full' to have it.")
        return _mesh.on_automatic_axes(self)

    def __repr__(self) -> str:
        return f"Tridiagonal(num_steps={self.alpha.shape[-1]}, length={self.length}, {self.status.code})"


@result("which", "size", "num_matvecs", "num_restarts", "missed", "noise_floor", "status")
class Eigenpairs(Result):
    """Eigenvalues with eigenvectors: H v_i ≈ values[i] v_i, in ascending order of the values.

    Vectors are orthonormal, in the form of the parameters. An eigenvalue of H lies within
    `residuals[i] + noise_floor` of `values[i]`.

    The [glossary](glossary.md#copy) says what is meant by residual, copy, restart and noise floor.
    """

    _BULKY: ClassVar = ("vectors",)

    values: Array  # (k,) ascending
    vectors: PyTree  # leaves (k, *leaf.shape)
    residuals: Array  # (k,) |H v - λ v|
    converged: Array  # (k,) bool
    which: str
    size: int  # n, order of the operator
    num_matvecs: int
    num_restarts: int
    missed: float  # bound on the probability that a repeated wanted eigenvalue was left out
    noise_floor: float  # rounding of an eigenvalue; |λ| below it is not resolved from zero
    status: Status

    @property
    def num_null(self) -> int:
        """How many of the eigenvalues are zero to the noise floor."""
        return int(np.sum(np.abs(self.values) <= self.noise_floor))

    def matrix(self) -> np.ndarray:
        """The vectors as the columns of an (n, k) array, parameters ravelled in tree order."""
        leaves = [np.asarray(x).reshape(len(self.values), -1) for x in jax.tree.leaves(self.vectors)]
        return np.concatenate(leaves, axis=1).T

    def records(self) -> list[dict[str, Any]]:
        """A row for each pair: value, residual, error (with rounding), and whether it converged."""
        columns = zip(self.values, self.residuals, self.converged, strict=True)
        return [
            plain({"value": x, "residual": r, "error": r + self.noise_floor, "converged": done})
            for x, r, done in columns
        ]

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each line of the printed result."""
        pairs = zip(self.values, self.residuals + self.noise_floor, self.converged, strict=True)
        lines = [
            (f"{i}", f"{rounded(value, error)} ± {error:.1g}" + ("" if done else "  not converged"))
            for i, (value, error, done) in enumerate(pairs)
        ]
        missed = f"{self.missed:.2g}" if self.missed < 1 else "not bounded"
        return [
            *lines,
            ("products", f"{self.num_matvecs:,} ({self.num_restarts} restarts)"),
            ("noise floor", f"{self.noise_floor:.1e}"),
            ("probability of a missed copy", f"at most {missed}" if self.missed < 1 else missed),
            ("status", str(self.status)),
        ]

    def __repr__(self) -> str:
        return text_table(f"Eigenpairs ({self.which}, {len(self.values)} of {self.size:,})", self.rows())

    def _repr_html_(self) -> str:
        title = f"Eigenpairs ({self.which}, {len(self.values)} of {self.size:,})"
        return notebook_view(self, title, self.rows())
