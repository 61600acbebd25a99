"""Noise floors in units of the norm: what rounding does to an operator, and to each of its blocks."""

# pyright: reportPrivateUsage=false

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import draws, paths, programs, trees
from spectra.base.trees import PyTree
from spectra.krylov.product_rounding import KEY, change_along, is_measured, multiply
from spectra.operators.base import LinearOperator


def relative_change(op: LinearOperator) -> float:
    """What rounding does to products, in units of |H|: an eigenvalue moves by |H' - H| at most (Weyl).

    That norm is followed from u = H H v, v random, near dominant eigenvectors (see `change_along`).
    Where there are no products in float64, it is what |(H' - H) u| / |H u| of one more moved operator stays
    below at 95 %: Student's t with the root mean square of `SAMPLES` of them. 0 where the operator does not
    say what it depends on.
    """
    return _measured(op, op.prepare(), None) if is_measured(op) else 0.0


def relative_changes(op: LinearOperator, by: str) -> Iterator[tuple[str, float]]:
    """The same of each of `op.blocks(by)`, in units of its own norm, from products of the whole.

    The whole differs from its exact counterpart on a block by what rounding does there. Its program serves
    all blocks, where each would have one of its own in float64. None where nothing is measured.
    """
    if is_measured(op):
        here = op.prepare()
        for name, mask in _masks(op, by):
            yield name, _measured(op, here, partial(_kept, mask))


def _measured(op: LinearOperator, here: LinearOperator, keep: Callable[[PyTree], PyTree] | None) -> float:
    """`relative_change` of what is left of products by `keep`, a projection; `here` is `op`, prepared."""
    vector = _part(draws.unit_vector(jax.random.key(KEY), op), keep)
    for _ in range(2):
        vector = _part(multiply(here, _in_unit(vector)), keep)
    size = trees.length(vector := _in_unit(vector))
    if not size:
        return 0.0
    image = multiply(here, vector := trees.scale(1 / size, vector))
    norm = trees.length(_part(image, keep))
    return change_along(op, here, vector, image, keep) / norm if norm > 0 else 0.0


def _part(v: PyTree, keep: Callable[[PyTree], PyTree] | None) -> PyTree:
    return v if keep is None else keep(v)


def _masks(op: LinearOperator, by: str) -> Iterator[tuple[str, PyTree]]:
    """The name of each block, and which numbers of a vector are its: of a leaf all, none, or one layer's."""
    leaves, treedef = jax.tree.flatten(op.structure)
    for name, indices, stack in paths.stacked_groups(op.like, by, op._stacks()):
        of_all = [np.bool_(i in indices) for i in range(len(leaves))]
        if stack is None:
            yield name, treedef.unflatten(of_all)
            continue
        for layer in range(leaves[indices[0]].shape[0]):
            one = [chosen and _only(layer, x.shape) for chosen, x in zip(of_all, leaves, strict=True)]
            yield paths.numbered(name, stack, layer), treedef.unflatten(one)


def _only(layer: int, shape: tuple[int, ...]) -> np.ndarray:
    """Which numbers of a leaf of stacked layers belong to one of them, ready to broadcast."""
    return (np.arange(shape[0]) == layer).reshape(-1, *[1] * (len(shape) - 1))


@programs.jit
def _kept(mask: PyTree, v: PyTree) -> PyTree:
    return jax.tree.map(lambda m, x: jnp.where(m, x, 0), mask, v)


@programs.jit
def _in_unit(vector: PyTree) -> PyTree:
    return trees.scale(1 / trees.power_of_two(trees.largest(vector)), vector)
