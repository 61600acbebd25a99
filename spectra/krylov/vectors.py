"""Callers' vectors, one or several in any of the forms that users have them in, as a stack; and back."""

from collections.abc import Callable

import jax

from spectra.base import stacks, trees
from spectra.base.trees import PyTree
from spectra.operators.base import LinearOperator


def as_stack(op: LinearOperator, b: PyTree, what: str) -> tuple[PyTree, bool, Callable[[PyTree], PyTree]]:
    """`b` as leaves (k, *leaf.shape), whether it is more than one vector, and the way back to its form.

    One vector is a pytree or a flat array (n,). Several are the columns of an (n, k) array, as for `op @ V`,
    or have a leading axis: a pytree with leaves (k, *leaf.shape), or an array (k, n).
    """
    structure = op.structure
    shape, own = getattr(b, "shape", None), getattr(op.like, "shape", None)
    if op.is_matrix(b):
        rows = jax.vmap(lambda row: trees.unravel(row, structure))(trees.as_real(b, what, op.dtype).T)
        return rows, True, lambda x: jax.vmap(trees.ravel)(x).T
    if own is None and shape is not None and len(shape) == 2 and shape[0] and shape[1] == op.size:
        rows = jax.vmap(lambda row: trees.unravel(row, structure))(trees.as_real(b, what, op.dtype))
        return rows, True, jax.vmap(trees.ravel)
    if (count := _common_axis(b, structure)) is not None:
        like = jax.tree.map(lambda s: jax.ShapeDtypeStruct((count, *s.shape), s.dtype), structure)
        trees.check_structure(b, like, what)
        return trees.cast_like(b, like), True, lambda x: x
    vector = jax.tree.map(lambda x: x[None], op.as_vector(b, what))
    flat = op.is_flat(b)

    def back(x: jax.Array) -> jax.Array:
        one = stacks.row(x, 0)
        return trees.ravel(one) if flat else one

    return vector, False, back


def _common_axis(b: PyTree, structure: PyTree) -> int | None:
    """k, if every leaf of b has the shape of its vector's behind an axis of k."""
    if jax.tree.structure(b) != jax.tree.structure(structure):
        return None
    shapes: list[tuple[int, ...]] = [tuple(getattr(leaf, "shape", ())) for leaf in jax.tree.leaves(b)]
    wanted = [leaf.shape for leaf in jax.tree.leaves(structure)]
    if any(
        shape[1:] != want or len(shape) != len(want) + 1 for shape, want in zip(shapes, wanted, strict=True)
    ):
        return None
    counts = {shape[0] for shape in shapes}
    return counts.pop() if len(counts) == 1 and 0 not in counts else None
