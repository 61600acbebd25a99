"""Results of Krylov methods: decompositions, eigenpairs, solutions, and what a run will cost."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import calls, meshes, programs
from spectra.base.errors import Status
from spectra.base.trees import PyTree
from spectra.quadrature import rules
from spectra.results.base import Array, Interval, Result, call, notebook_view, plain, result
from spectra.results.text import directed, html_table, text_table, within

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

_dense = programs.jit(functools.partial(rules.dense, xp=jnp))


def _is_jax(x) -> bool:
    return isinstance(x, jax.Array)


@result("layout", "status")
class Tridiagonal(Result):
    """The Lanczos decomposition H Qᵀ = Qᵀ T + r e_mᵀ of m steps; rows of Q are orthonormal.

    `T` has `alpha` on its diagonal and `beta` next to it. Entries beyond `length` are zero: the Krylov
    space became invariant there, and the eigenvalues of T[:length, :length] are eigenvalues of H.

    Returned by `lanczos`, whose page states the cost and the sources.

    The [glossary](glossary.md#ritz-value) defines step, basis and breakdown.

    Examples:
        >>> import jax.numpy as jnp, spectra
        >>> op = spectra.DiagonalOperator(jnp.array([1.0, 2.0, 3.0]))
        >>> found = spectra.lanczos(op, jnp.ones(3), 3)
        >>> [round(float(x), 5) for x in jnp.linalg.eigvalsh(found.matrix())]
        [1.0, 2.0, 3.0]
        >>> found.basis.shape, float(found.orthogonality) < 1e-5
        ((3, 3), True)
    """

    _BULKY: ClassVar = ("segments", "layout")

    alpha: Float[Array, " steps"]
    beta: Float[Array, " steps-1"]
    residual_norm: Float[Array, ""]  # |r|: zero after a breakdown
    length: Int[Array, ""]
    asymmetry: Float[Array, ""]  # largest |q_iᵀ H q_j| that symmetry makes zero, in units of |T|
    second_passes: Int[Array, ""]  # steps that needed a second Gram-Schmidt pass
    segments: Any  # the basis in segments of rows, see krylov.basis; empty if not kept
    layout: Any  # how segments map to pytrees
    status: Status

    @property
    @calls.automatic
    def basis(self) -> PyTree:
        """The rows of Q as one pytree with leaves (m, *leaf.shape). A copy, made on each access."""
        return call("stack", self._kept().segments, self.layout, 0, self.alpha.shape[-1])

    @property
    @calls.automatic
    def orthogonality(self) -> Float[Array, ""]:
        """max |Q Qᵀ - I| over the first `length` rows. Costs m² n operations, at each access."""
        kept = self._kept()
        return call("orthogonality", kept.segments, kept.length)

    def matrix(self) -> Float[Array, "steps steps"]:
        """T as a dense array."""
        if _is_jax(self.alpha):
            return _dense(self.alpha, self.beta)
        return rules.dense(self.alpha, self.beta, np)

    def _kept(self) -> Tridiagonal:
        if not self.segments:
            raise ValueError("the basis was not kept: run lanczos with reorthogonalize='full' to have it.")
        return meshes.on_automatic_axes(self)

    def __repr__(self) -> str:
        return f"Tridiagonal(num_steps={self.alpha.shape[-1]}, length={self.length}, {self.status.code})"


@result("which", "size", "num_matvecs", "num_restarts", "missed", "noise_floor", "status")
class Eigenpairs(Result):
    """Eigenvalues with eigenvectors: H v_i ≈ values[i] v_i, in ascending order of the values.

    Vectors are orthonormal pytrees like the parameters. Some eigenvalue of H lies within
    `residuals[i] + noise_floor` of `values[i]`.

    Returned by `eigsh`, whose page states the cost and the sources.

    The [glossary](glossary.md#copy) defines residual, copy, restart and noise floor.

    Examples:
        >>> import jax, jax.numpy as jnp, spectra
        >>> op = spectra.DiagonalOperator({"w": jnp.array([5.0, -1.0]), "b": jnp.array(2.0)})
        >>> pairs = spectra.eigsh(op, 2, which="LA", key=jax.random.key(0))
        >>> [round(float(x), 4) for x in pairs.values]
        [2.0, 5.0]
        >>> {name: leaf.shape for name, leaf in pairs.vectors.items()}
        {'b': (2,), 'w': (2, 2)}
    """

    _BULKY: ClassVar = ("vectors",)

    values: Float[Array, " pairs"]  # ascending
    vectors: PyTree  # leaves (k, *leaf.shape)
    residuals: Float[Array, " pairs"]  # |H v - λ v|
    converged: Bool[Array, " pairs"]
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

    def matrix(self) -> Float[np.ndarray, "n pairs"]:
        """The vectors as the columns of an array, parameters ravelled in tree order."""
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
            (f"{i}", within(float(value), float(error)) + ("" if done else "  not converged"))
            for i, (value, error, done) in enumerate(pairs)
        ]
        return [
            *lines,
            ("products", f"{self.num_matvecs:,} ({self.num_restarts} restarts)"),
            ("noise floor", f"{self.noise_floor:.1e}"),
            _missed_row(self.missed),
            ("status", str(self.status)),
        ]

    def __repr__(self) -> str:
        return text_table(f"Eigenpairs ({self.which}, {len(self.values)} of {self.size:,})", self.rows())

    def _repr_html_(self) -> str:
        title = f"Eigenpairs ({self.which}, {len(self.values)} of {self.size:,})"
        return notebook_view(self, title, self.rows())


@result("which", "shape", "num_matvecs", "missed", "noise_floor", "gram_floor", "status")
class SingularTriplets(Result):
    """Singular values of a Jacobian with their vectors: J v_i ≈ values[i] u_i, in descending order.

    Some singular value of J lies within `errors[i]` of `values[i]`, rounding included. The run used the Gram
    matrix, which cannot tell singular values below `gram_floor` apart, so of these, others than the wanted
    ones may have been found.

    Returned by `svds`, whose page has an example, the cost and the sources.
    """

    _BULKY: ClassVar = ("left", "right")

    values: Float[Array, " triplets"]  # descending
    left: PyTree  # u_i, leaves (k, *leaf.shape) like the outputs; zero where the value is zero
    right: PyTree  # v_i, leaves (k, *leaf.shape) like the parameters
    errors: Float[Array, " triplets"]
    converged: Bool[Array, " triplets"]
    which: str
    shape: tuple[int, int]  # (m, n) of J
    num_matvecs: int  # products with J, each with one with its transpose
    missed: float  # bound on the probability that a repeated wanted singular value was left out
    noise_floor: float  # rounding of a singular value
    gram_floor: float  # root of the rounding of an eigenvalue of the Gram matrix
    status: Status

    def records(self) -> list[dict[str, Any]]:
        """A row for each singular value: value, error, and whether it converged."""
        columns = zip(self.values, self.errors, self.converged, strict=True)
        return [plain({"value": x, "error": error, "converged": done}) for x, error, done in columns]

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each line of the printed result."""
        lines = [
            (f"{i}", within(float(value), float(error)) + ("" if done else "  not converged"))
            for i, (value, error, done) in enumerate(
                zip(self.values, self.errors, self.converged, strict=True)
            )
        ]
        return [
            *lines,
            ("products", f"{self.num_matvecs:,} with J, as many with its transpose"),
            ("noise floor", f"{self.noise_floor:.1e}; not told apart below {self.gram_floor:.1e}"),
            _missed_row(self.missed),
            ("status", str(self.status)),
        ]

    def __repr__(self) -> str:
        return text_table(self._title(), self.rows())

    def _repr_html_(self) -> str:
        return html_table(self._title(), self.rows())

    def _title(self) -> str:
        m, n = self.shape
        return f"Singular values ({self.which}, {len(self.values)} of a Jacobian of {m:,} x {n:,})"


@result("num_matvecs", "preconditioner_matvecs", "method", "bound", "status")
class Solution(Result):
    """x with (H + shift I) x = b, and a bound on its distance from the exact solution.

    For several right-hand sides, x is stacked in the same way as they were, and the arrays have shape (k,).
    If there is no solution, `x` is NaN, `status` is SINGULAR, and `residual_norm` with its `rounding`, of the
    x at which the run ended, bounds how far b is from the range.

    Returned by `solve`, whose page has an example, the cost and the sources.

    The [glossary](glossary.md#residual) defines residual, bound and product.
    """

    _BULKY: ClassVar = ("x",)

    x: PyTree  # in the form of b
    residual_norm: Float[Array, " *sides"]  # |b - (H + shift I) x|, computed from x at the end
    rounding: Float[Array, " *sides"]  # how far rounding can have moved that norm
    error_bound: Float[Array, " *sides"]  # |x - x*| is not above this; inf where the spectrum may come near 0
    quadratic_form: Interval  # bᵀ(H + shift I)⁻¹b: bracketed where error_bound is finite, else by infinity
    converged: Bool[Array, " *sides"]
    num_matvecs: int  # of all right-hand sides, checks included
    preconditioner_matvecs: int  # products that built the preconditioner
    method: str  # "cg", "minres", or "dense"
    bound: str  # what error_bound rests on
    status: Status

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each line of the printed result."""
        error = _largest(self.error_bound)
        built = f" and {self.preconditioner_matvecs:,} of the preconditioner" * bool(
            self.preconditioner_matvecs
        )
        residual, rounding = _largest(self.residual_norm), _largest(self.rounding)
        left = ("|b - A x|", within(residual, rounding))
        if self.status is Status.SINGULAR:  # of an x that is not given
            left = (
                "distance of b from the range",
                f"at most {directed(residual + rounding, up=True, digits=6)}",
            )
        return [
            left,
            ("|x - x*|", _at_most(error) + (f" ({self.bound})" if np.isfinite(error) else "")),
            ("method", f"{self.method}, {self.num_matvecs:,} products{built}"),
            ("status", str(self.status)),
        ]

    def __repr__(self) -> str:
        if not isinstance(self.residual_norm, (float, np.ndarray)):
            return f"Solution({self.method}, {self.status.code})"
        return text_table(self._title(), self.rows())

    def _repr_html_(self) -> str:
        return html_table(self._title(), self.rows())

    def _title(self) -> str:
        count = np.size(self.residual_norm)
        return "Solution" + f" of {count} right-hand sides, the worst of them" * (count > 1)


@result("num_matvecs", "num_steps", "function", "bound", "status")
class FunctionProduct(Result):
    """f(H) v, and a bound on its distance from the exact value.

    Returned by `funm`, whose page has an example, the cost and the sources. A bound of `inf` says that the
    function is not bounded where eigenvalues may lie; `bound` says on what the bound rests.
    """

    _BULKY: ClassVar = ("value",)

    value: PyTree  # in the form of v
    error_bound: Float[Array, ""]  # |value - f(H) v| is not above this; see `bound` for what it rests on
    num_matvecs: int
    num_steps: int  # Lanczos steps of the longest run
    function: str
    bound: str
    status: Status

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each line of the printed result."""
        error = _largest(self.error_bound)
        return [
            ("|value - f(H) v|", _at_most(error)),
            ("rests on", self.bound),
            ("products", f"{self.num_matvecs:,} ({self.num_steps} steps)"),
            ("status", str(self.status)),
        ]

    def __repr__(self) -> str:
        if not isinstance(self.error_bound, (float, np.ndarray)):
            return f"FunctionProduct({self.function}, {self.status.code})"
        return text_table(f"FunctionProduct ({self.function})", self.rows())

    def _repr_html_(self) -> str:
        return html_table(f"FunctionProduct ({self.function})", self.rows())


def _largest(x: Any) -> float:
    return float(np.max(x))


def _missed_row(missed: float) -> tuple[str, str]:
    return "probability of a missed copy", _at_most(missed if missed < 1 else np.inf)


def _at_most(error: float) -> str:
    return f"at most {directed(error, up=True)}" if np.isfinite(error) else "not bounded"
