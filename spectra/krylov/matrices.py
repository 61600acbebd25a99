"""Dense matrices in float64 on the host, of one operator or of several small blocks at once.

Each block of a loss is a program of its own, which takes seconds to compile and milliseconds to run where the
block is a bias. Small blocks are therefore cut from the matrix of all their parameters, whose n columns are
as many products as they would take one by one: blocks of the whole network or, where its products are dear,
of one module.
"""

# pyright: reportPrivateUsage=false
# Operators have parts that only this package uses.

import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np

from spectra.base import draws, trees
from spectra.operators.base import LinearOperator
from spectra.operators.data import DataOperator
from spectra.operators.dense import matrix_one_by_one
from spectra.operators.doubled import doubled

LARGEST = 2000
"""Up to this order n products and LAPACK, some seconds, are what an iteration may give way to, and blocks are
cut from one matrix."""
WORTH = 4e9
"""Bytes of saved values that all columns together may read for each program that is not compiled: two cores
read so many in about the three seconds that one takes to compile. A column of the whole goes back to the
first of its parameters, one of a block only to its own; all that the whole reads is counted."""

Unrounded = Callable[[np.ndarray], np.ndarray]  # a product with a flat vector, in float64


class Matrix(NamedTuple):
    """The entries (n, n) as products gave them, and the products in float64 that tell their rounding."""

    entries: np.ndarray
    unrounded: Unrounded | None


def matrix_of(op: LinearOperator) -> Matrix:
    """The matrix of an operator, from n products.

    Where columns that were multiplied together are off by more than what may be asymmetric, and single ones
    are not, it is made of these.
    """
    exact, entries = doubled(op), np.asarray(op.as_matrix(), np.float64)
    if exact is None:
        return Matrix(entries, None)
    v = np.asarray(trees.ravel(draws.unit_vector(jax.random.key(0), op)))
    image = exact.unrounded(v)

    def error(matrix: np.ndarray) -> float:
        return float(np.linalg.norm(matrix @ v - image))

    if not op.on_host and error(entries) > op.precision**0.5 * float(np.linalg.norm(image)):
        entries = min(entries, np.asarray(matrix_one_by_one(op), np.float64), key=error)
    return Matrix(entries, exact.unrounded)


def matrices_of(blocks: Mapping[str, LinearOperator]) -> Iterator[tuple[str, Matrix]]:
    """The matrices of blocks of one operator by name, small ones together where it saves time.

    In an order of its own: the next is computed when it is asked for, so that few are held at a time.
    """
    alone = dict(blocks)
    for group in _groups(blocks):
        for name, matrix in _together(group).items():
            del alone[name]
            yield name, matrix
    for name, block in alone.items():
        yield name, matrix_of(block)


def _groups(blocks: Mapping[str, LinearOperator]) -> Iterator[dict[str, DataOperator]]:
    """Blocks that are computed together: small ones of all modules, or of one where that takes longer."""
    small = {
        name: block
        for name, block in blocks.items()
        if isinstance(block, DataOperator) and block.selected is not None and not block.on_host
    }
    for group in _gathered(small):
        if _pays(group):
            yield group
            continue
        modules: dict[str, dict[str, DataOperator]] = {}
        for name, block in group.items():
            modules.setdefault(re.sub(r"[/.]?[^/.]*$", "", name), {})[name] = block
        yield from filter(_pays, modules.values())


def _gathered(blocks: Mapping[str, DataOperator]) -> list[dict[str, DataOperator]]:
    """In their order, each in the first group that has room for it within `LARGEST` numbers."""
    groups: list[dict[str, DataOperator]] = []
    for name, block in blocks.items():
        sizes = ((group, sum(other.size for other in group.values())) for group in groups)
        group = next((group for group, size in sizes if size + block.size <= LARGEST), None)
        if group is None:
            groups.append(group := {})
        group[name] = block
    return groups


def _pays(blocks: Mapping[str, DataOperator]) -> bool:
    """Whether products with all their leaves take less time than compiling a program for each block."""
    if len(blocks) < 2:
        return False
    whole = _whole(blocks)
    return whole.evaluated_bytes() * whole.size <= WORTH * (len(blocks) - 1)


def _whole(blocks: Mapping[str, DataOperator]) -> DataOperator:
    """The operator of all leaves of several blocks."""
    first = next((block for block in blocks.values() if block.rounding), next(iter(blocks.values())))
    return first._of_leaves(tuple(sorted({i for block in blocks.values() for i in block.selected or ()})))


def _together(blocks: Mapping[str, DataOperator]) -> dict[str, Matrix]:
    """The blocks cut from the matrix of all their leaves."""
    whole = _whole(blocks)
    entries, unrounded = matrix_of(whole)
    ends = np.cumsum([leaf.size for leaf in jax.tree.leaves(whole.structure)])
    places = dict(zip(whole.selected or (), np.split(np.arange(whole.size), ends[:-1]), strict=True))
    found: dict[str, Matrix] = {}
    for name, block in blocks.items():
        rows = np.concatenate([places[i] for i in block.selected or ()])
        found[name] = Matrix(entries[np.ix_(rows, rows)], _restricted(unrounded, rows, whole.size))
    return found


def _restricted(product: Unrounded | None, rows: np.ndarray, size: int) -> Unrounded | None:
    """The product of the block that lies in these rows."""
    if product is None:
        return None

    def of_block(v: np.ndarray) -> np.ndarray:
        vector = np.zeros(size, v.dtype)
        vector[rows] = v
        return product(vector)[rows]

    return of_block
