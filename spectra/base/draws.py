"""Random vectors by programs that compile quickly: probes, and parameters moved by one rounding each."""

import functools
import math
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax

from spectra.base import arrays, programs, trees
from spectra.base.meshes import Places, placed, places
from spectra.base.trees import Kinds, PyTree

Distribution = Callable[..., jax.Array]

LEAST, MOST = 2**10, 2**16
"""Leaves of up to MOST numbers share an array up to the same power of two, LEAST or more."""


class Shaped(Protocol):
    """An operator, as far as its vectors go."""

    @property
    def structure(self) -> PyTree:
        """Shapes and working dtypes of a vector."""
        ...

    @property
    def like(self) -> PyTree:
        """A pytree of the same structure that says where vectors lie."""
        ...


def unit_vector(key: jax.Array, op: Shaped) -> PyTree:
    """A vector for an operator, uniform on the unit sphere. On a mesh it lies as the parameters do; where the
    operator is traced, nothing says how they lie."""
    return sphere_sample(key, op.structure, where=places(op.like))


def sample(
    key: jax.Array, structure: PyTree, distribution: Distribution, *, unit: bool = False, where: Places = ()
) -> PyTree:
    """A vector whose leaf i is distribution(fold_in(key, i), shape, dtype); with `unit` of length one.

    JAX's generator does not depend on the sharding, so the same key gives the same vector on any number
    of devices. On a mesh `where` says where it lies (see `places`): else one device draws all of it.
    """
    leaves, treedef = jax.tree.flatten(structure)
    kinds = tuple((tuple(leaf.shape), jnp.dtype(leaf.dtype)) for leaf in leaves)
    return treedef.unflatten(_samples(key, kinds, distribution, unit, where or (None,) * len(kinds)))


sphere_sample = functools.partial(sample, distribution=jax.random.normal, unit=True)
"""A vector drawn uniformly from the unit sphere."""


@functools.partial(programs.jit, static_argnames=("kinds", "distribution", "unit", "where"))
def _samples(
    key: jax.Array, kinds: Kinds, distribution: Distribution, unit: bool, where: Places
) -> list[jax.Array]:
    """One array for each shape and dtype.

    XLA takes 0.3 s to compile a draw on a CPU, and as long again for its part of the norm, of each leaf anew
    (and 3 s for a draw in the shape of a convolution's kernel): so leaves are rows of the same arrays. Of
    several devices each would draw all of these; there a leaf is drawn as it is.
    """
    if jax.device_count() > 1:
        drawn = [distribution(jax.random.fold_in(key, i), *kind) for i, kind in enumerate(kinds)]
        drawn = placed(drawn, where)
        return trees.scale(1 / trees.norm(drawn), drawn) if unit else drawn
    parts, rows = _parts(key, kinds), list[jax.Array]()
    for (_, dtype), part in parts.items():
        sizes = [math.prod(kinds[i][0]) for i in part]
        draw = functools.partial(distribution, shape=(max(sizes),), dtype=dtype)
        rows.append(lax.map(functools.partial(_row, key, draw), (jnp.array(part), jnp.array(sizes))))
    if unit:
        rows = trees.scale(1 / trees.norm(rows), rows)
    leaf_of: dict[int, jax.Array] = {}
    for part, drawn in zip(parts.values(), rows, strict=True):
        leaf_of |= zip(part, drawn, strict=True)
    return [leaf_of[i][: math.prod(shape)].reshape(shape) for i, (shape, _) in enumerate(kinds)]


def _parts(key: jax.Array, kinds: Kinds) -> dict[tuple[int, jnp.dtype], list[int]]:
    """The leaves that are rows of one array: of one dtype, and of one size if they are large.

    The numbers of a small leaf begin a longer row where the generator counts entries one by one, as JAX's own
    does by default.
    """
    counted = jax.random.key_impl(key) == "threefry2x32" and jax.threefry_partitionable.value
    parts: dict[tuple[int, jnp.dtype], list[int]] = {}
    for i, (shape, dtype) in enumerate(kinds):
        size = math.prod(shape)
        together = counted and 0 < size <= MOST
        group = max(LEAST, 1 << (size - 1).bit_length()) if together else size
        parts.setdefault((group, dtype), []).append(i)
    return parts


def _row(key: jax.Array, draw: Distribution, leaf: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The numbers of a leaf, by its place and size, and then zeros."""
    place, size = leaf
    drawn = draw(jax.random.fold_in(key, place))
    return jnp.where(jnp.arange(len(drawn)) < size, drawn, 0)


@programs.jit
def moved_parameters(params: PyTree, key: jax.Array, coarse: float) -> PyTree:
    """Each times 1 ± the roundoff of its type, or `coarse` where that is more, with random signs."""
    leaves, treedef = jax.tree.flatten(params)
    places = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    lifted = [trees.lift(leaves[i]) for i in places]
    for i, x, signs in zip(places, lifted, cheap_signs(key, lifted), strict=True):
        leaves[i] = (x + jnp.maximum(jnp.finfo(x.dtype).eps, coarse) * signs * x).astype(leaves[i].dtype)
    return treedef.unflatten(leaves)


def cheap_signs(key: jax.Array, like: list[jax.Array]) -> list[jax.Array]:
    """Random signs of the shapes and dtypes of these arrays, for perturbations rather than for statistics.

    One number of JAX's generator for each array, mixed with the mixed index of each entry. For five arrays
    that compiles in a sixth of the time that a `jax.random.rademacher` of each takes (0.26 s, 1.5 s).
    """
    seeds = jax.random.bits(key, (len(like),), jnp.uint32)
    bits = (_mixed(_mixed(_indices(x.shape)) ^ seed) for x, seed in zip(like, seeds, strict=True))
    return [jnp.where(b >> 31, -1, 1).astype(x.dtype) for b, x in zip(bits, like, strict=True)]


def _indices(shape: tuple[int, ...]) -> jax.Array:
    """The place of each entry in the order of memory, modulo 2^32."""
    place = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = jnp.uint32(math.prod(shape[axis + 1 :]) % 2**32)
        place += stride * arrays.positions(jnp.uint32, shape, axis)
    return place


def _mixed(x: jax.Array) -> jax.Array:
    """A bijection of 32 bits in which each bit of the argument turns each of the result half of the time.

    Wellons, "lowbias32", https://nullprogram.com/blog/2018/07/31/.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
