"""Noise floors in units of the norm: what rounding does to an operator, and to each of its blocks."""

# pyright: reportPrivateUsage=false

from collections.abc import Collection, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import draws, meshes, paths, programs, trees
from spectra.base.trees import PyTree
from spectra.krylov.product_rounding import (
    KEY,
    Projection,
    change_along,
    in_unit,
    is_measured,
    multiply,
    unit,
    whole,
)
from spectra.operators.base import LinearOperator


def relative_change(op: LinearOperator) -> float:
    """What rounding does to products, in units of |H|: an eigenvalue moves by |H' - H| at most (Weyl).

    That norm is followed from u = H H v, v of random signs, near dominant eigenvectors (see `change_along`).
    Where there are no products in float64, it is what |(H' - H) u| / |H u| of one more moved operator stays
    below at 95 %: Student's t with the root mean square of `SAMPLES` of them. 0 where the operator does not
    say what it depends on.
    """
    return _measured(op, op.prepare(), whole) if is_measured(op) else 0.0


def relative_changes(op: LinearOperator, by: str, names: Collection[str]) -> dict[str, float]:
    """The same of named ones of `op.blocks(by)`, in units of their own norms, from products of the whole.

    The whole differs from its exact counterpart on a block by what rounding does there. Its program serves
    all blocks, where each would have one of its own in float64. Empty where nothing is measured.
    """
    if not (names and is_measured(op)):
        return {}
    here, masks = op.prepare(), _masks(op, by)
    return {name: _measured(op, here, partial(_kept, mask)) for name, mask in masks if name in names}


def _measured(op: LinearOperator, here: LinearOperator, keep: Projection) -> float:
    """`relative_change` of what is left of products by `keep`; `here` is `op`, prepared."""
    signs = draws.sample(
        jax.random.key(KEY), op.structure, jax.random.rademacher, where=meshes.places(op.like)
    )
    vector = keep(signs)
    for _ in range(2):
        vector = keep(multiply(here, in_unit(vector)))
    if not trees.length(vector := unit(in_unit(vector))):
        return 0.0
    image = multiply(here, vector)
    norm = trees.length(keep(image))
    return change_along(op, here, vector, image, keep) / norm if norm > 0 else 0.0


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
