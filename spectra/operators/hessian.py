"""The Hessian of a loss as an operator, and exactly as a matrix.

Of the matrix only the blocks on and below the diagonal are differentiated.
"""

# pyright: reportPrivateUsage=false
# Operators have parts that only this package uses.

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import arrays, programs, stacks, trees
from spectra.base.calls import automatic
from spectra.base.errors import SpectraError
from spectra.base.trees import PyTree
from spectra.operators import differentiate
from spectra.operators.accumulate import weighted_sum
from spectra.operators.arguments import DataOptions
from spectra.operators.data import DataOperator, shows_options
from spectra.operators.dense import defects, in_flight, with_digits
from spectra.operators.pytree import operator
from spectra.results.base import call


@operator(leaves=("params", "data", "linear", "captured"))
class HessianOperator(DataOperator):
    """The Hessian ∇²L(θ) of a loss, as products with vectors; the matrix is never formed.

    (H v)_i = Σ_j ∂²L/∂θ_i∂θ_j v_j, with L the mean of `loss_fn` over the data.

    Args:
        loss_fn: pure function (params, batch) -> scalar, the mean over the examples of the batch. It is
            static: pass the same function object each time, since a new one recompiles.
        params: pytree of real floating arrays (dicts, Flax linen or nnx state, Equinox, ...).
        data: one batch (a tuple, dict or other pytree of arrays, which share a leading axis if the batch is
            split), or a re-iterable of batches (list, DataLoader, generator function), re-read for every
            product; None for a loss that ignores its second argument.
        **options: see `DataOperator`: wrt, mode, microbatch, linearize, matmul_precision, weight_fn,
            shared, num_batches, subsample_key, check_data.

    Raises:
        StructureError: a parameter leaf is not a real floating array, the loss is not a scalar, or cannot
            be called with the parameters and a batch.
        DataError: the data are empty, inconsistent, or change between passes; or they are split, and the loss
            is not a mean over examples.
        DifferentiationError: the loss has no gradient; the message includes JAX's reason.

    Cost: about two gradients per product, see `spectra.operators.differentiate`; streams take one pass over
    the data per product.

    References:
        Pearlmutter, Fast exact multiplication by the Hessian, doi:10.1162/neco.1994.6.1.147.

    Examples:
        >>> import jax.numpy as jnp, spectra
        >>> def loss_fn(params, batch):
        ...     inputs, targets = batch
        ...     return 0.5 * jnp.mean((inputs @ params["w"] - targets) ** 2)
        >>> x = jnp.array([[1.0, 0.0], [0.0, 3.0]])
        >>> op = spectra.HessianOperator(loss_fn, {"w": jnp.zeros(2)}, (x, jnp.ones(2)))
        >>> op @ {"w": jnp.ones(2)}
        {'w': Array([0.5, 4.5], dtype=float32)}
    """

    loss_fn: Callable[[PyTree, PyTree], jax.Array]

    @shows_options
    def __init__(
        self,
        loss_fn: Callable[[PyTree, PyTree], jax.Array],
        params: PyTree,
        data: Any,
        **options: Unpack[DataOptions],
    ):
        self._open(params, data, loss_fn=loss_fn, **options)

    def _value(self, params: PyTree, piece: PyTree) -> jax.Array:
        return differentiate.check_scalar(self.loss_fn(params, piece), "loss_fn")

    def _piece_product(self, variables: PyTree, piece: PyTree, v: PyTree) -> PyTree:
        return differentiate.derivative(self.mode, self._gradient(piece), variables, v, self.differences)

    def _matrix(self) -> jax.Array:
        self.require_finite()
        matrix, asymmetry = hessian_matrix(self)
        if trees.is_tracer(matrix):
            return matrix
        found = float(asymmetry)
        if len(_groups(self)) > 1:  # what lies beside the diagonal blocks was computed once
            found = max(found, *defects(self, matrix))
        if found <= call("asymmetry_limit", self, found):
            return with_digits(self, matrix)
        return call("matrix", self)  # all columns, if need be one by one or in float64, tell what is wrong


CHUNK = 1024
"""Columns of one compiled call: bounds what is copied into the matrix at a time."""
MAX_GROUPS = 8
"""Block columns at most, each of which is a program to compile."""
WORTH = 2**20
"""Entries that symmetry must save for another program. To compile it takes as long as to differentiate along
so many, with some thousand examples."""
STRUCTURES = ("matrix", "blocks")


@shows_options
@automatic
def dense_hessian(
    loss_fn: Callable[[PyTree, Any], jax.Array],
    params: PyTree,
    batch: Any,
    *,
    structure: str = "matrix",
    memory_limit: int | None = None,
    **options: Unpack[DataOptions],
) -> Any:
    """Compute the full Hessian matrix of a loss, using its symmetry.

    H_ij = ∂²L/∂θ_i∂θ_j, exactly symmetric: the diagonal blocks are averaged with their transposes, the others
    are mirrored.

    Args:
        loss_fn: function (params, batch) -> scalar, as for `HessianOperator`.
        params: pytree of real floating arrays, n numbers in all.
        batch: one batch, or a re-iterable of batches.
        structure: "matrix" for an (n, n) array, parameters ravelled in tree order; "blocks" for nested
            pytrees as `jax.hessian` returns them, so that `blocks["fc1"]["fc2"]` has the shape of
            `params["fc1"]` followed by that of `params["fc2"]`.
        memory_limit: bytes; default half of the free memory of the device.
        **options: see `HessianOperator`.

    Returns:
        A `jax.Array` (n, n), or a pytree of pytrees; float32 at least.

    Raises:
        SpectraError: unknown structure.
        MemoryLimitError: 3 n² numbers exceed the limit; the message names matrix-free alternatives.
        NonFiniteError: an entry is NaN or infinite.

    Cost: n products, up to 64 at a time; 3 n² numbers at the peak. Where it saves a million entries, products
    along leaf j differentiate only leaf j and later ones.

    Examples:
        >>> import jax.numpy as jnp, spectra
        >>> def loss_fn(params, batch):
        ...     return jnp.sum(params["a"] ** 2) * params["b"] + 0 * batch.sum()
        >>> params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(3.0)}
        >>> spectra.dense_hessian(loss_fn, params, jnp.zeros(1))
        Array([[6., 0., 2.],
               [0., 6., 4.],
               [2., 4., 0.]], dtype=float32)
        >>> spectra.dense_hessian(loss_fn, params, jnp.zeros(1), structure="blocks")["b"]["a"]
        Array([2., 4.], dtype=float32)
    """
    if structure not in STRUCTURES:
        raise SpectraError(f"structure={structure!r}: use one of {STRUCTURES}.")
    op = HessianOperator(loss_fn, params, batch, **options)
    matrix = op.as_matrix(memory_limit=memory_limit)
    return matrix if structure == "matrix" else _blocks(matrix, op.structure)


def _blocks(matrix: jax.Array, structure: PyTree) -> PyTree:
    leaves, treedef = jax.tree.flatten(structure)
    rows = _cut(matrix, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
    return treedef.unflatten([treedef.unflatten(row) for row in rows])


@partial(programs.jit, static_argnames="kinds")
def _cut(matrix: jax.Array, kinds: trees.Kinds) -> list[list[jax.Array]]:
    leaves = [jax.ShapeDtypeStruct(*kind) for kind in kinds]
    offsets = _offsets(leaves)

    def block(i: int, j: int) -> jax.Array:
        rows, columns = slice(*offsets[i : i + 2]), slice(*offsets[j : j + 2])
        part = matrix[rows, columns].reshape(leaves[i].shape + leaves[j].shape)
        return part.astype(jnp.promote_types(leaves[i].dtype, leaves[j].dtype))

    count = range(len(leaves))
    return [[block(i, j) for j in count] for i in count]


def hessian_matrix(op: HessianOperator) -> tuple[jax.Array, jax.Array]:
    """The (n, n) Hessian, not yet checked for NaN, and how far from symmetric its diagonal blocks were."""
    upper = _upper(op) if op.stream is None else weighted_sum(_upper, op._pieces())
    return _mirror(upper, _owners(op))


def _offsets(leaves: list[Any]) -> list[int]:
    total = [0]
    for leaf in leaves:
        total.append(total[-1] + leaf.size)
    return total


def _groups(op: HessianOperator) -> list[tuple[int, int, int, int]]:
    """Runs of leaves that share a block column: (first leaf, last + 1, first parameter, last + 1)."""
    offsets = _offsets(jax.tree.leaves(op.structure))
    return [(a, b, offsets[a], offsets[b]) for a, b in itertools.pairwise(_edges(offsets))]


def _edges(offsets: list[int]) -> list[int]:
    """Where block columns begin and end, in leaves: cut where most is saved, as long as that is worth it.

    A cut at i of a block from a to b saves the rows from a to i of the columns from i to b.
    """
    edges = [0, len(offsets) - 1]
    while len(edges) <= MAX_GROUPS:
        cuts = [
            ((offsets[i] - offsets[a]) * (offsets[b] - offsets[i]), i)
            for a, b in itertools.pairwise(edges)
            for i in range(a + 1, b)
        ]
        saved, cut = max(cuts, default=(0, 0))
        if saved < WORTH:
            break
        edges = sorted([*edges, cut])
    return edges


def _owners(op: HessianOperator) -> np.ndarray:
    """The number of the group that each parameter belongs to."""
    sizes = [stop - start for _, _, start, stop in _groups(op)]
    return np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)


def _upper(op: HessianOperator) -> jax.Array:
    """Block rows from the diagonal to the right, zero below: rows j are columns j, by symmetry."""
    matrix, together = jnp.zeros((op.size, op.size), op.dtype), in_flight(op)
    fill = _fill if trees.is_traced(op) else _fill_in_place  # under vmap a buffer of one matrix is of no use
    for first, last, begin, end in _groups(op):
        count = min(CHUNK, end - begin)
        for start in range(begin, end, max(count, 1)):
            start = min(start, end - count)  # the last chunk repeats some columns
            matrix = fill(
                op,
                matrix,
                start,
                leaves=(first, last),
                count=count,
                begin=begin,
                together=min(together, count),
            )
    return matrix


def _filled(
    op: HessianOperator,
    matrix: jax.Array,
    start: int | jax.Array,
    *,
    leaves: tuple[int, int],
    count: int,
    begin: int,
    together: int,
) -> jax.Array:
    columns = start - begin + jnp.arange(count)
    rows = stacks.mapped(partial(_column, op, *leaves), columns, together)
    return jax.lax.dynamic_update_slice(matrix, rows.astype(matrix.dtype), (start, begin))


_STATIC = ("leaves", "count", "begin", "together")
_fill = programs.jit(_filled, static_argnames=_STATIC)
_fill_in_place = programs.jit(_filled, static_argnames=_STATIC, donate_argnames=("matrix",))


def _column(op: HessianOperator, first: int, last: int, index: int | jax.Array) -> jax.Array:
    """The derivative along one parameter of the gradient with respect to the leaves from `first` on."""
    tail = op._principal(tuple(range(first, len(jax.tree.leaves(op.structure)))))
    variables = tail._variables()
    leaves, treedef = jax.tree.flatten(variables)
    group, rest = leaves[: last - first], leaves[last - first :]
    unit = jnp.zeros(trees.tree_size(group), op.dtype).at[index].set(1)
    unit = trees.unravel(unit, group)

    def gradient(group: list[jax.Array], piece: PyTree) -> list[jax.Array]:
        return tail._gradient(piece)(treedef.unflatten([*group, *rest]))

    def product(piece: PyTree) -> PyTree:
        if op.mode == "forward-over-reverse":
            return jax.jvp(lambda x: gradient(x, piece), (group,), (unit,))[1]
        if op.mode == "reverse-over-reverse":  # the same block, as a row
            upper = jax.vjp(lambda x: jax.tree.leaves(tail._gradient(piece)(x))[: len(group)], variables)
            return upper[1](unit)[0]
        length = trees.norm(op._variables())  # of all that the step was measured for
        return differentiate.central_difference(
            lambda x: gradient(x, piece), group, unit, op.differences, length
        )

    return trees.ravel(tail._mean(product))


@programs.jit
def _mirror(upper: jax.Array, owner: arrays.Indices) -> tuple[jax.Array, jax.Array]:
    """The matrix whose upper blocks these are, and max |A - Aᵀ| / max |A| of its diagonal blocks."""
    same, largest = owner[:, None] == owner, jnp.max(jnp.abs(upper))
    asymmetry = jnp.max(jnp.where(same, jnp.abs(upper - upper.T), 0))
    matrix = jnp.where(same, 0.5, 1.0).astype(upper.dtype) * (upper + upper.T)
    return matrix, jnp.where(largest > 0, asymmetry / largest, 0)
