"""The linear map of a block, given that of the whole."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from spectra.base import trees
from spectra.base.trees import PyTree


@dataclasses.dataclass(frozen=True)
class Restricted:
    """v -> P H Pᵀ v for the projection P on some leaves, given v -> H v.

    As the derivative of a linear map, which is the map itself: JAX then leaves out all that the other leaves
    contribute, as if these alone had been differentiated. With zeros in their place, a product would cost as
    much as that of the whole.
    """

    places: tuple[int, ...]  # among the leaves of the whole
    leaves: tuple[jax.ShapeDtypeStruct, ...]
    treedef: Any

    @classmethod
    def to(cls, places: tuple[int, ...], structure: PyTree) -> "Restricted":
        """To the leaves at these places of vectors of the whole."""
        leaves, treedef = jax.tree.flatten(structure)
        return cls(places, tuple(leaves), treedef)

    def __call__(self, linear: Callable[[PyTree], PyTree], v: PyTree) -> PyTree:
        """The product, a pytree like `v`, which has None in place of all other leaves."""
        rest = self.treedef.unflatten([jnp.zeros(x.shape, x.dtype) for x in self.leaves])

        def within(x: PyTree) -> PyTree:
            return trees.keep_leaves(linear(trees.replace_leaves(rest, self.places, x)), self.places)

        return jax.jvp(within, (jax.tree.map(jnp.zeros_like, v),), (v,))[1]
