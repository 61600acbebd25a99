"""Operations of JAX whose signatures name no type for some argument: the same, with types.

A type checker knows nothing of what it is given for such an argument, and says so at every call. Those that
sum products do it in full precision, whatever `jax_default_matmul_precision` is.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownLambdaType=false, reportUnknownArgumentType=false
# The one place where JAX is called through signatures that are partly unknown.

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import ArrayLike, DTypeLike

T = TypeVar("T")
Indices = jax.Array | np.ndarray
Axes = tuple[Sequence[int], Sequence[int]]  # of the one array, and of the other


def contract(x: jax.Array, y: jax.Array, axes: Axes, batch: Axes = ((), ())) -> jax.Array:
    """Sums of products over `axes`; those of `batch` stay, and come first."""
    return lax.dot_general(x, y, (axes, batch), precision=lax.Precision.HIGHEST)


def inner(x: jax.Array, y: jax.Array, first: int = 0, *, paired: bool = False) -> jax.Array:
    """Sums of products over all axes of `y` from the `first` on, which are the last ones of `x`.

    Where the arrays are `paired`, axis 0 of both is the same, and comes first.
    """
    axes = tuple(range(x.ndim - y.ndim + first, x.ndim)), tuple(range(first, y.ndim))
    batch: Axes = ((0,), (0,)) if paired else ((), ())
    dtype = jnp.promote_types(x.dtype, y.dtype)
    return lax.dot_general(x.astype(dtype), y.astype(dtype), (axes, batch), precision=lax.Precision.HIGHEST)


def einsum(spec: str, *operands: jax.Array) -> jax.Array:
    """Sums of products as the letters of `spec` say."""
    return jnp.einsum(spec, *operands, precision=lax.Precision.HIGHEST)


def pad(x: jax.Array, widths: Sequence[tuple[int, int]], value: ArrayLike = 0) -> jax.Array:
    """`x` with so many entries before and after along each axis."""
    return jnp.pad(x, widths, constant_values=value)


def carried(start: T, *seen: ArrayLike) -> T:
    """What a loop starts from, as its type will be after a turn that sees these arrays.

    Inside `jax.shard_map` an array's type says over which axes of the mesh it varies. A constant varies over
    none, and a loop refuses a carry whose type changes.
    """
    axes = sum((jnp.zeros_like(x, shape=(), dtype=jnp.int8) for x in seen), jnp.int8(0))
    return jax.tree.map(lambda x: x + axes.astype(x.dtype), start)


@jax.custom_batching.custom_vmap
def anywhere(flag: jax.Array) -> jax.Array:
    """`flag`; under `vmap` one for all lanes, true where it is in any of them.

    A conditional on it stays one under `vmap`, where one on `flag` would compute both branches in every lane.
    """
    return flag


@anywhere.def_vmap
def _anywhere(size: int, batched: list[bool], flag: jax.Array) -> tuple[jax.Array, bool]:
    del size, batched
    return anywhere(jnp.any(flag)), False  # for the `vmap` around this one, too


def diagonal(x: jax.Array) -> jax.Array:
    """The diagonal of a matrix."""
    return jnp.diagonal(x)


def norm(x: jax.Array) -> jax.Array:
    """The Euclidean norm of all entries."""
    return jnp.linalg.norm(x)


def norms(x: np.ndarray, axis: int) -> np.ndarray:
    """Euclidean norms along an axis, on the host, whose squares neither under- nor overflow.

    The unit is a power of two, so that other exponents change no digit.
    """
    largest = np.max(np.abs(x), axis=axis, keepdims=True, initial=0.0)
    power = np.frexp(np.where(np.isfinite(largest), largest, 1.0))[1]
    return np.ldexp(np.linalg.norm(np.ldexp(x, -power), axis=axis), np.squeeze(power, axis))


def root(x: Any, xp: Any = jnp) -> Any:
    """The square root, with the derivative zero at zero: JAX's is infinite there, and NaN times zero."""
    if xp is np:
        return np.sqrt(x)
    none = x == 0
    return jnp.where(none, 0, jnp.sqrt(jnp.where(none, 1, x)))


def cholesky(x: jax.Array) -> jax.Array:
    """The lower triangular factor of a positive definite matrix."""
    return jnp.linalg.cholesky(x)


def eigh(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues of a symmetric matrix, ascending, and the eigenvectors as columns.

    On a GPU by QR iterations, as on a CPU. JAX's choice there, Jacobi's rotations, was off by eight times as
    much on an H200, in float32 and in float64, and a trace that stood on it by thirty times.
    """
    return lax.platform_dependent(x, cuda=_eigh_by_qr, rocm=_eigh_by_qr, default=_eigh)


def _eigh(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    values, vectors = jnp.linalg.eigh(x)
    return values, vectors


def _eigh_by_qr(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    vectors, values = lax.linalg.eigh(x, implementation=lax.linalg.EighImplementation.QR)
    return values, vectors


def eigvalsh(x: jax.Array) -> jax.Array:
    """Eigenvalues of a symmetric matrix, ascending."""
    return eigh(x)[0]


def svd(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Left singular vectors, singular values, descending, right ones as rows; see `eigh`. x: square."""
    return lax.platform_dependent(x, cuda=_svd_by_qr, rocm=_svd_by_qr, default=_svd)


def _svd(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    left, values, right = jnp.linalg.svd(x)
    return left, values, right


def _svd_by_qr(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    left, values, right = lax.linalg.svd(x, algorithm=lax.linalg.SvdAlgorithm.QR)
    return left, values, right


def barrier(x: T) -> T:
    """`x`, computed before anything that uses it, and apart from it."""
    return lax.optimization_barrier(x)


def in_order(x: jax.Array) -> jax.Array:
    """`x` with its axes in order in memory, where the compiler may choose another one."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def cut_out(pieces: list[jax.Array]) -> list[jax.Array]:
    """Slices of a vector, on a TPU each cut out before it is given a shape.

    XLA gives the whole vector a shape first, with the last axis of the slice's: there a copy of all of it to
    other tiles.
    """
    return lax.platform_dependent(
        pieces, tpu=lambda pieces: [barrier(piece) for piece in pieces], default=lambda pieces: pieces
    )


def positions(dtype: DTypeLike, shape: Sequence[int], axis: int) -> jax.Array:
    """The index of each entry along an axis."""
    return lax.broadcasted_iota(dtype, shape, axis)
