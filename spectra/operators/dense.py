"""Matrices as operators, dense, diagonal or of low rank; functions as operators; operators as matrices.

A matrix is made column by column, and refused where the map has no symmetric one.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spectra.base import arrays, draws, host, programs, stacks, trees
from spectra.base.calls import automatic
from spectra.base.errors import NotSymmetricError, StructureError
from spectra.base.meshes import on_automatic_axes
from spectra.base.trees import PyTree
from spectra.operators.base import LinearOperator, product
from spectra.operators.doubled import DoubledOperator, doubled, flat, symmetric_in_double
from spectra.operators.jaxprs import captured
from spectra.operators.loss_rounding import Rounding, coarsest_rounding
from spectra.operators.pytree import operator, true_float32
from spectra.operators.stochastic import change_by_rounding
from spectra.results.base import call, provides

if TYPE_CHECKING:
    from jaxtyping import Float

IN_FLIGHT = 64
"""Columns in one vmapped product at most: more are no faster."""
CACHED, CACHE = 32, 2**25
"""The same on a CPU, and bytes of activations of all of them, which its cache about holds. On two cores, with
1 to 15 MB of activations each, columns of Hessians took up to twice as long with 64 side by side."""
ENTRIES = 16
"""By how much more rounding may change the entry that it changes most, in units of the largest, than a
product with a random vector, in units of its length."""


def in_flight(op: LinearOperator) -> int:
    """Columns in one vmapped product, at least one: half of what is free holds their activations, or a CPU's
    cache."""
    each = 0 if trees.is_traced(op) else op.evaluated_bytes()
    free = host.available_bytes(op.device) if each else None
    most, room = IN_FLIGHT, None if free is None else free // 2
    if each and op.device.platform == "cpu":
        most, room = CACHED, CACHE if room is None else min(room, CACHE)
    return most if room is None else min(most, 2 ** max((room // each).bit_length() - 1, 0))


@provides("matrix")
def symmetric_matrix(op: LinearOperator) -> jax.Array:
    """(A + Aᵀ) / 2 of the n columns A, which have to be symmetric and to be those of a linear map.

    What may differ is the square root of the precision of products, as in a Lanczos run. One product more
    than there are columns tells an affine map, whose columns may be symmetric, from a linear one. Columns
    that are not symmetric are multiplied once more, one by one: see `matrix_one_by_one`. Those that rounding
    alone makes so, as where a classifier is sure of every example, are products in float64, where there are
    some; elsewhere half the sum of derivatives is returned if it is off by no more than what products show,
    and a function, which may be anything, is refused.
    """
    given, streamed, count, op = op, op.on_host, min(in_flight(op), op.size), op.prepare()
    # Those of a stream share each pass over the data.
    matrix = times_matrix(op, jnp.eye(op.size, dtype=op.dtype)) if streamed else _columns(op, count)
    if trees.is_tracer(matrix):
        return _symmetrise(matrix)
    found = defects(op, matrix)
    if count > 1 and not streamed and max(found) > call("asymmetry_limit", op, max(found)):
        matrix = _columns(op, 1)
        found = defects(op, matrix)
    limit = call("asymmetry_limit", op, max(found))
    if max(found) > limit:
        exact = symmetric_in_double(given)
        if exact is not None:
            return _columns_in_double(exact)
        if not given.known_linear or max(found) > ENTRIES * change_by_rounding(given):
            raise _not_symmetric(op, limit, *found)
    return with_digits(given, _symmetrise(matrix))


def with_digits(op: LinearOperator, matrix: jax.Array) -> jax.Array:
    """The matrix, or where one product in float64 tells that less digits are left of it than the half that
    symmetry is required to, the one that float64 finds.

    Of a classifier that is sure of every example p (1 - p) is left, of which p = 1 - 6e-8 has no digit; in
    float16 all below 6e-8 is zero. Where float32 has zero alone its columns remain as they are.
    """
    exact = doubled(op)
    if exact is None:
        return matrix
    v = draws.unit_vector(jax.random.key(0), op)
    expected, found = exact.unrounded(v), np.asarray(matrix, np.float64) @ flat(v)
    lost = np.linalg.norm(found - expected) > op.precision**0.5 * np.linalg.norm(expected)
    info = jnp.finfo(op.dtype)
    representable = np.abs(expected).max() > float(info.tiny) / float(info.eps)
    return _columns_in_double(exact) if lost and representable else matrix


def _columns_in_double(exact: DoubledOperator) -> jax.Array:
    """(A + Aᵀ) / 2 of n columns that are computed in float64, one by one, and rounded once."""
    return _symmetrise(times_matrix(exact, jnp.eye(exact.size, dtype=exact.dtype)))


def matrix_one_by_one(op: LinearOperator) -> jax.Array:
    """(A + Aᵀ) / 2 of the n columns A, of which no two are multiplied at a time.

    A program for several vectors may fuse what one for a single vector keeps apart. In the derivatives of
    GELU, v + v t with t = -1 is zero, but where v = a b is fused it is the rounding of v, which grows as x⁵.
    """
    return _symmetrise(_columns(op.prepare(), 1))


@provides("matrix_product")
def times_matrix(op: LinearOperator, matrix: jax.Array) -> jax.Array:
    """A V for a matrix (n, k) whose columns are flat vectors."""
    if not jnp.issubdtype(matrix.dtype, jnp.floating):
        raise StructureError(f"the matrix has dtype {matrix.dtype}, expected {op.dtype}.")
    leaves, treedef = jax.tree.flatten(op.structure)
    kinds = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    parts: list[jax.Array] = []
    count = in_flight(op)
    for start in range(0, matrix.shape[1], count):
        vectors = treedef.unflatten(_as_vectors(matrix[:, start : start + count], kinds))
        parts.append(_as_columns(op.mv_batch(vectors)))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


@partial(programs.jit, static_argnames="kinds")
def _as_vectors(matrix: jax.Array, kinds: trees.Kinds) -> list[jax.Array]:
    """The columns of a matrix as a stack of vectors."""
    like = [jax.ShapeDtypeStruct(*kind) for kind in kinds]
    return jax.vmap(lambda column: trees.unravel(column, like), in_axes=1)(matrix)


@programs.jit
def _as_columns(vectors: PyTree) -> jax.Array:
    """A stack of vectors as the columns of a matrix."""
    return jax.vmap(trees.ravel, out_axes=1)(vectors)


def defects(op: LinearOperator, matrix: jax.Array) -> tuple[float, float]:
    """How far columns are from symmetric, in units of the largest entry, and from linear: what the product of
    one more vector differs by from theirs, in units of its size. NaN where a number is not finite."""
    start = draws.unit_vector(jax.random.key(0), op)
    image = op.mv(start) if op.on_host else product(op, start)
    largest, asymmetry, size, defect = map(float, jax.device_get(_defects(matrix, start, image)))
    if not np.isfinite([largest, size, defect]).all():
        return np.nan, np.nan  # the caller says so
    first, second = (
        x / unit if unit else np.inf if x else 0.0 for x, unit in ((asymmetry, largest), (defect, size))
    )
    return first, second


def _not_symmetric(op: LinearOperator, limit: float, asymmetry: float, defect: float) -> NotSymmetricError:
    """What `defects` beyond what rounding may leave say of an operator."""
    above = f"above {limit:.1e}, the square root of the precision of its products."
    if asymmetry > limit:
        return NotSymmetricError(
            f"the operator is not symmetric: |A - Aᵀ| of its columns A reaches {asymmetry:.1e} "
            f"max |A|, {above} {op.explain_asymmetry()} If half the sum with its transpose is "
            "meant, pass that."
        )
    return NotSymmetricError(
        f"the operator is not linear: H v is {defect:.1e} |H v| away from the sum of v_i H e_i, {above} "
        f"A constant that is added is not linear. {op.explain_asymmetry()}"
    )


@programs.jit
def _defects(matrix: jax.Array, start: PyTree, image: PyTree) -> tuple[jax.Array, ...]:
    """max |A|, max |A - Aᵀ|, a size for products and the error of one, over the numbers of a vector."""
    start, image = trees.ravel(start), trees.ravel(image)
    with jax.default_matmul_precision("highest"):
        expected = matrix @ start
    scale = jnp.max(jnp.abs(matrix))
    unit = jnp.where(scale > 0, scale, jnp.maximum(jnp.max(jnp.abs(image)), jnp.finfo(image.dtype).tiny))
    size = arrays.norm(matrix / unit) * arrays.norm(start) / len(start) ** 0.5 * unit
    return scale, jnp.max(jnp.abs(matrix - matrix.T)), size, arrays.norm((image - expected) / unit) * unit


def _column(op: LinearOperator, i: int | jax.Array) -> jax.Array:
    unit = jnp.zeros(op.size, op.dtype).at[i].set(1)
    return trees.ravel(op.mv(trees.unravel(unit, op.structure)))


@partial(programs.jit, static_argnames="count")
def _columns(op: LinearOperator, count: int) -> jax.Array:
    return stacks.mapped(lambda i: _column(op, i), jnp.arange(op.size), count).T


@programs.jit
def _symmetrise(matrix: jax.Array) -> jax.Array:
    return (matrix + matrix.T) / 2


@operator(leaves=("matrix",))
class MatrixOperator(LinearOperator):
    """A dense symmetric matrix as an operator on flat vectors.

    Args:
        matrix: real; integers and half precision become float32.

    Raises:
        StructureError: not a square real matrix.
        NotSymmetricError: max |A - Aᵀ| exceeds sqrt(eps) max |A|.

    Cost: n² operations per product, in full precision.

    Examples:
        >>> import jax.numpy as jnp, spectra
        >>> spectra.MatrixOperator(jnp.array([[2.0, 1.0], [1.0, 2.0]])) @ jnp.array([1.0, 0.0])
        Array([2., 1.], dtype=float32)
    """

    matrix: 'Float[jax.Array, "n n"]'

    @automatic
    def __init__(self, matrix: Any):
        matrix = jnp.asarray(matrix)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
            raise StructureError(f"a MatrixOperator needs a square matrix, got shape {matrix.shape}.")
        if jnp.iscomplexobj(matrix):
            raise StructureError(f"a MatrixOperator needs a real matrix, got dtype {matrix.dtype}.")
        matrix = on_automatic_axes(matrix).astype(trees.working_dtype(matrix.dtype))
        if not trees.is_traced(matrix):
            difference, largest = map(float, _asymmetry(matrix))
            if difference > float(jnp.finfo(matrix.dtype).eps) ** 0.5 * largest:
                raise NotSymmetricError(
                    f"the matrix is not symmetric: |A - Aᵀ| reaches {difference:.2e}. Pass "
                    "(A + A.T) / 2 if the difference is rounding, or AᵀA for singular values."
                )
        object.__setattr__(self, "matrix", matrix)

    @property
    def known_linear(self) -> bool:
        """True: it is a matrix."""
        return True

    @property
    def cancels(self) -> bool:
        """Columns are right to the unit roundoff, each relative to itself."""
        return False

    @property
    def like(self) -> jax.Array:
        """One row of the matrix."""
        return stacks.row(self.matrix, 0)

    def mv(self, v: jax.Array) -> jax.Array:
        """A v."""
        return jnp.matmul(self.matrix, v, precision=lax.Precision.HIGHEST)


@programs.jit
def _asymmetry(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """max |A - Aᵀ| and max |A|."""
    return jnp.max(jnp.abs(matrix - matrix.T)), jnp.max(jnp.abs(matrix))


@operator(leaves=("example", "captured"))
class FunctionOperator(LinearOperator):
    """A symmetric operator given by its product with a vector.

    Args:
        mv: function from a vector to a vector of the same structure; traceable by JAX and linear. It is
            static: pass the same function object each time, since a new lambda recompiles. Arrays that it
            closes over become constants of the compiled program. Its matrix products are true float32 on
            every device, unless they say otherwise themselves. It defines the matrix: that its constants may
            be differences of larger numbers, rounded, it does not tell. What its own operations round is
            measured by products in float64 where these are fast, as on a CPU or an H100, and elsewhere stated
            by the precision of its types.
        like: pytree of arrays or `jax.ShapeDtypeStruct`, the structure of a vector.

    Raises:
        StructureError: `mv` returns a different structure or shapes than `like`.

    Examples:
        >>> import jax, jax.numpy as jnp, spectra
        >>> def negative_laplacian(v):
        ...     padded = jnp.pad(v, 1)
        ...     return 2 * v - padded[:-2] - padded[2:]
        >>> op = spectra.FunctionOperator(negative_laplacian, jnp.zeros(50))
        >>> report = spectra.lanczos(op, jnp.ones(50), 10)
    """

    function: Callable[[PyTree], PyTree]
    example: PyTree
    rounding: Rounding | None  # of the function itself, where it computes in less than the vectors have
    captured: tuple[Any, ...]  # traced values that it closes over, in a caller's `grad` or `vmap`

    @automatic
    def __init__(self, mv: Callable[[PyTree], PyTree], like: PyTree):
        if not callable(mv):
            raise StructureError(f"mv is a {type(mv).__name__}; pass a function of a vector.")
        object.__setattr__(self, "function", mv)
        object.__setattr__(self, "example", on_automatic_axes(like))
        structure = self.structure
        jaxpr, result = jax.make_jaxpr(true_float32(mv), return_shape=True)(structure)
        trees.check_structure(result, structure, "the result of mv")
        varying = [True] * len(jaxpr.jaxpr.invars)
        object.__setattr__(self, "rounding", coarsest_rounding(jaxpr, varying, super().precision))
        object.__setattr__(self, "captured", captured(jaxpr))

    @property
    def like(self) -> PyTree:
        """The example of a vector."""
        return self.example

    @property
    def precision(self) -> float:
        """Unit roundoff of the vectors' dtype, or that of the function's own casts and products."""
        return max(super().precision, self.rounding.eps if self.rounding else 0.0)

    @property
    def computes_in(self) -> str:
        """The coarser of what the vectors have and the function computes in."""
        return self.rounding.dtype if self.rounding else super().computes_in

    @property
    def known_in_double(self) -> bool:
        """True: all that it computes is inside of a product."""
        return True

    @property
    def holds_constants(self) -> bool:
        """True: whatever the function closes over."""
        return True

    @true_float32
    def mv(self, v: PyTree) -> PyTree:
        """The user's product, in the working dtypes."""
        return trees.cast_like(self.function(v), v)


@operator(leaves=("entries",))
class DiagonalOperator(LinearOperator):
    """diag(d): a preconditioner, a metric, the precision of a prior.

    Args:
        entries: d, a pytree like the parameters.

    Cost: n operations per product.

    Examples:
        >>> import jax.numpy as jnp, spectra
        >>> op = spectra.DiagonalOperator({"w": jnp.array([1.0, 2.0]), "b": jnp.array(3.0)})
        >>> op @ jnp.ones(3)  # leaves in tree order: b, w
        Array([3., 1., 2.], dtype=float32)
    """

    entries: PyTree

    @automatic
    def __init__(self, entries: PyTree):
        entries = jax.tree.map(jnp.asarray, on_automatic_axes(entries))
        object.__setattr__(self, "entries", trees.cast_like(entries, trees.vector_structure(entries)))

    @property
    def like(self) -> PyTree:
        """The diagonal."""
        return self.entries

    @property
    def known_linear(self) -> bool:
        """True: it is a matrix."""
        return True

    @property
    def cancels(self) -> bool:
        """Every entry is right to the unit roundoff of itself."""
        return False

    def mv(self, v: PyTree) -> PyTree:
        """d ⊙ v."""
        return jax.tree.map(jnp.multiply, self.entries, v)

    def _principal(self, indices: tuple[int, ...]) -> "DiagonalOperator":
        return DiagonalOperator(trees.keep_leaves(self.entries, indices))


@operator(leaves=("vectors", "values"))
class LowRankOperator(LinearOperator):
    """Σ_i λ_i v_i v_iᵀ: a matrix from a few eigenpairs, gradients or rows of a Jacobian.

    Args:
        vectors: r stacked vectors, with leaves (r, *leaf.shape), or a matrix (r, n); they need not be
            orthonormal.
        values: (r,) λ_i; default all one.

    Raises:
        StructureError: leaves with different leading axes, or a different number of values.

    Cost: 4 r n operations per product; r n numbers.

    Examples:
        >>> import jax, jax.numpy as jnp, spectra
        >>> matrix = spectra.MatrixOperator(jnp.diag(jnp.arange(1.0, 31.0)))
        >>> pairs = spectra.eigsh(matrix, 2, which="LA", key=jax.random.key(0))
        >>> rest = matrix - spectra.LowRankOperator(pairs.vectors, pairs.values)
        >>> round(float(spectra.eigsh(rest, 1, which="LA", key=jax.random.key(0)).values[0]), 3)
        28.0
    """

    vectors: PyTree
    values: 'Float[jax.Array, " vectors"]'

    @automatic
    def __init__(self, vectors: PyTree, values: Any = None):
        vectors = jax.tree.map(jnp.asarray, on_automatic_axes(vectors))
        leading = {x.shape[:1] for x in jax.tree.leaves(vectors)}
        if len(leading) != 1 or () in leading:
            raise StructureError(
                f"the vectors of a low-rank operator share one leading axis, got {sorted(leading)}: stack "
                "them, leaves (r, *leaf.shape)."
            )
        vectors = trees.cast_like(vectors, trees.vector_structure(vectors))
        ((count,),) = leading
        values = jnp.ones(count) if values is None else jnp.asarray(values)
        if values.shape != (count,):
            raise StructureError(f"{count} vectors have values of shape {values.shape}: use ({count},).")
        object.__setattr__(self, "vectors", vectors)
        object.__setattr__(self, "values", values.astype(trees.scalar_dtype(vectors)))

    @property
    def like(self) -> PyTree:
        """The shape of one of the vectors."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), self.vectors)

    @property
    def known_linear(self) -> bool:
        """True: it is a matrix."""
        return True

    def mv(self, v: PyTree) -> PyTree:
        """V diag(λ) Vᵀ v."""
        weights = self.values * jax.vmap(lambda x: trees.vdot(x, v))(self.vectors)

        def one(x: jax.Array) -> jax.Array:
            return jnp.tensordot(weights.astype(x.dtype), x, 1, precision="highest")

        return jax.tree.map(one, self.vectors)

    def moved(self, key: jax.Array) -> "LowRankOperator":
        """With moved vectors: terms of both signs, or of parallel vectors, may cancel."""
        return LowRankOperator(draws.moved_parameters(self.vectors, key, 0.0), self.values)

    def _principal(self, indices: tuple[int, ...]) -> "LowRankOperator":
        return LowRankOperator(trees.keep_leaves(self.vectors, indices), self.values)
