"""A ⊗ B of any two operators, and what has a closed form in those of the factors."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from spectra.base import arrays, trees
from spectra.base.calls import automatic
from spectra.base.errors import SpectraError, StructureError
from spectra.base.trees import PyTree
from spectra.operators.arithmetic import Composed
from spectra.operators.base import LinearOperator
from spectra.operators.dense import DiagonalOperator, LowRankOperator, MatrixOperator
from spectra.operators.factored import DampedInverse, FactoredOperator
from spectra.operators.kronecker import INDEFINITE, Kronecker, Place
from spectra.operators.layouts import Layout
from spectra.operators.pytree import operator

if TYPE_CHECKING:
    from jaxtyping import Float


@operator(leaves=("left", "right"))
class KroneckerOperator(Composed):
    """A ⊗ B: the block matrix (A_ij B), which maps a matrix X of shape (a, b) to A X B.

    If both factors are arrays, vectors X have shape (a, b), and their flat form is row after row. In general,
    a vector is a tree like that of A in which each leaf is replaced by a tree like that of B, with leaves of
    shape (*leaf_of_A.shape, *leaf_of_B.shape); an outer product x ⊗ y has this form.

    Args:
        left: A, an operator, or a symmetric matrix (a, a).
        right: B, an operator, or a symmetric matrix (b, b).

    Raises:
        StructureError: a factor is neither, or is an array that is not a real square matrix.
        NotSymmetricError: a matrix is not symmetric.

    Cost: a product is b products with A and a products with B; for matrices, this is a² b + a b² operations
    and a² + b² numbers. Trace, eigenvalues, determinant and inverse follow in closed form from those of the
    factors, if the factors have them: matrices, diagonals and other Kronecker products do.

    References:
        Van Loan, doi:10.1016/S0377-0427(00)00393-9.

    Examples:
        >>> import jax.numpy as jnp, spectra
        >>> A, B = jnp.array([[2.0, 1.0], [1.0, 2.0]]), jnp.diag(jnp.array([1.0, 10.0, 100.0]))
        >>> op = spectra.KroneckerOperator(A, B)
        >>> (op @ jnp.ones((2, 3)))[0]
        Array([  3.,  30., 300.], dtype=float32)
        >>> float(op.trace())
        444.0
        >>> [round(float(value), 3) for value in op.eigenvalues()]
        [1.0, 3.0, 10.0, 30.0, 100.0, 300.0]
        >>> inverse = op.inverse(0.5)
        >>> bool(jnp.allclose(inverse @ (op.shift(0.5) @ jnp.ones(6)), jnp.ones(6), atol=1e-4))
        True
    """

    left: LinearOperator
    right: LinearOperator

    @automatic
    def __init__(self, left: Any, right: Any):
        object.__setattr__(self, "left", _factor(left, "left"))
        object.__setattr__(self, "right", _factor(right, "right"))

    @property
    def like(self) -> PyTree:
        """The shapes of an outer product x ⊗ y."""
        right = self.right.structure

        def outer(x: jax.ShapeDtypeStruct) -> PyTree:
            def one(y: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
                return jax.ShapeDtypeStruct(x.shape + y.shape, jnp.result_type(x.dtype, y.dtype))

            return jax.tree.map(one, right)

        return jax.tree.map(outer, self.left.structure)

    @property
    def made_of(self) -> tuple[LinearOperator, ...]:
        """Both factors."""
        return self.left, self.right

    @property
    def semidefinite(self) -> bool:
        """If both factors are."""
        return self.left.semidefinite and self.right.semidefinite

    @property
    def precision(self) -> float:
        """The errors of the factors add up."""
        return self.left.precision + self.right.precision

    def _remade(self, parts: tuple[LinearOperator, ...]) -> "KroneckerOperator":
        return KroneckerOperator(*parts)

    def recomputed_bytes(self) -> int | None:
        """None: of one vector, too, each factor multiplies many."""
        return None

    def evaluated_bytes(self) -> int:
        """Of one vector, too, each factor multiplies many, all at once."""
        left, right = self.left, self.right
        return max(left.evaluated_bytes() * right.size, right.evaluated_bytes() * left.size)

    def mv(self, v: PyTree) -> PyTree:
        """A X B."""
        matrix = self._matrix_of(v)
        return self._vector_of(_applied(self.left, _applied(self.right, matrix).T).T, v)

    def _matrix_of(self, v: PyTree) -> jax.Array:
        """X (a, b) of a vector."""
        sizes = [leaf.size for leaf in jax.tree.leaves(self.left.structure)]
        parts = jax.tree.structure(self.left.structure).flatten_up_to(v)
        rows = [
            jnp.concatenate([leaf.reshape(size, -1) for leaf in jax.tree.leaves(part)], axis=1)
            for size, part in zip(sizes, parts, strict=True)
        ]
        return jnp.concatenate(rows).astype(self.dtype)

    def _vector_of(self, matrix: jax.Array, like: PyTree) -> PyTree:
        leaves, row = jax.tree.leaves(self.left.structure), 0
        found: list[jax.Array] = []
        inner = jax.tree.leaves(self.right.structure)
        for outer in leaves:
            column = 0
            for leaf in inner:
                part = matrix[row : row + outer.size, column : column + leaf.size]
                found.append(part.reshape(outer.shape + leaf.shape))
                column += leaf.size
            row += outer.size
        return trees.cast_like(jax.tree.unflatten(jax.tree.structure(like), found), like)

    @automatic
    def trace(self) -> 'Float[jax.Array, ""]':
        """tr A tr B, exactly.

        Raises:
            SpectraError: a factor has no closed form of its trace; `spectra.trace` estimates that of any
                operator.
        """
        return _trace(self.left) * _trace(self.right)

    @automatic
    def eigenvalues(self) -> 'Float[jax.Array, " a*b"]':
        """All a b eigenvalues in ascending order: the products of those of the factors.

        Raises:
            SpectraError: a factor has no closed form of its eigenvalues.

        Cost: an eigendecomposition of each factor; a b numbers.
        """
        return jnp.sort(jnp.outer(_eigenvalues(self.left), _eigenvalues(self.right)).ravel())

    @automatic
    def logdet(self, damping: float = 0.0) -> 'Float[jax.Array, ""]':
        """log det(A ⊗ B + damping I); -inf where it is singular, NaN inside `jit` where it is not positive.

        Raises:
            SpectraError: the matrix has a negative eigenvalue, or a factor has no closed form.

        Cost: as `eigenvalues`.
        """
        values = self.eigenvalues() + damping
        if not trees.is_traced(values) and values[0] < 0:
            raise SpectraError(
                f"A ⊗ B + {damping} has the eigenvalue {float(values[0]):.3g}: its log-determinant "
                "exists only if all eigenvalues are positive. Raise the damping."
            )
        return jnp.sum(jnp.log(values))

    @automatic
    def inverse(self, damping: float = 0.0) -> FactoredOperator:
        """(A ⊗ B + damping I)⁻¹ for matrices A and B, by their eigenvectors; A and B may be indefinite.

        Args:
            damping: δ, in the units of eigenvalues.

        Raises:
            SpectraError: a factor is not a matrix, or an eigenvalue is zero to the rounding of the largest.

        Cost: O(a³ + b³) once; a product as one with A ⊗ B, twice.
        """
        if not isinstance(self.left, MatrixOperator) or not isinstance(self.right, MatrixOperator):
            kinds = f"{type(self.left).__name__} ⊗ {type(self.right).__name__}"
            raise SpectraError(
                f"{kinds} has no inverse in closed form: pass matrices, such as op.as_matrix(), or use "
                "spectra.solve."
            )
        shape = self.left.size, self.right.size
        layout = Layout(shape, 0, (("reshape", shape, (1, *shape)),), 1, *shape)
        place = Place("", 0, None, layout, "kronecker")
        part = Kronecker(self.left.matrix[None], self.right.matrix[None], place)
        params = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self.like)  # arrays: a leaf of jit
        whole = FactoredOperator(params=params, parts=(part,), stacks=())
        inverse = DampedInverse.of(whole, damping, INDEFINITE)
        if not trees.is_traced(inverse.parts):
            sizes = jnp.abs(1 / inverse.parts[0].eigenvalues())
            rounding = max(shape) * float(jnp.finfo(self.dtype).eps)
            if not float(sizes.min()) > rounding * float(sizes.max()):
                raise SpectraError(
                    f"damping={damping}: A ⊗ B + δ I has an eigenvalue of size {float(sizes.min()):.3g} "
                    f"next to {float(sizes.max()):.3g}, so it has no inverse; pass another damping."
                )
        return inverse


def _factor(value: Any, name: str) -> LinearOperator:
    if isinstance(value, LinearOperator):
        return value
    if trees.is_array(value) or isinstance(value, (list, tuple)):
        return MatrixOperator(value)
    raise StructureError(
        f"the {name} factor is a {type(value).__name__}; pass a symmetric matrix or an operator."
    )


def _applied(op: LinearOperator, rows: jax.Array) -> jax.Array:
    """The operator applied to each row."""
    stack = jax.vmap(lambda row: trees.unravel(row, op.structure))(rows)
    return jax.vmap(trees.ravel)(op.mv_batch(stack)).astype(rows.dtype)


def _trace(op: LinearOperator) -> jax.Array:
    if isinstance(op, MatrixOperator):
        return jnp.trace(op.matrix)
    if isinstance(op, DiagonalOperator):
        return sum((jnp.sum(leaf) for leaf in jax.tree.leaves(op.entries)), jnp.zeros(()))
    if isinstance(op, LowRankOperator):
        return jnp.sum(op.values * jax.vmap(trees.vdot)(op.vectors, op.vectors))
    if isinstance(op, (KroneckerOperator, FactoredOperator)):
        return op.trace()
    raise SpectraError(
        f"a {type(op).__name__} has no closed form of its trace: use spectra.trace, or its as_matrix()."
    )


def _eigenvalues(op: LinearOperator) -> jax.Array:
    if isinstance(op, MatrixOperator):
        return arrays.eigvalsh(op.matrix)
    if isinstance(op, DiagonalOperator):
        return trees.ravel(op.entries)
    if isinstance(op, (KroneckerOperator, FactoredOperator)):
        return op.eigenvalues()
    raise SpectraError(
        f"a {type(op).__name__} has no closed form of its eigenvalues: use spectra.eigsh or slq, or pass its "
        "as_matrix()."
    )
