"""Classical Gram-Schmidt against a segmented basis, and sketches that tell vectors apart.

A second pass is made only where it is needed.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spectra.base import arrays, trees
from spectra.krylov import basis as _basis
from spectra.krylov import panels as _panels
from spectra.krylov.basis import Basis
from spectra.krylov.layout import Layout, Panels

REPEAT = 0.1


def orthogonalize(
    basis: Basis, vector: Panels, filled: jax.Array | int
) -> tuple[Panels, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Make `vector` orthogonal to the first `filled` rows of `basis` to working precision.

    `vector` is in a unit in which its square is a number, see `panels.unit_of_step`.

    Returns the new vector, its norm, the coefficients of the first pass, the sum of the coefficients
    of all passes, and whether a second one ran. Costs one pass, or two where the first removed a
    relevant part; a pass, w' = w - QᵀQw, is two reads of the rows.

    |w'|² = |w|² - |Qw|², both from one reduction; it loses no digits where the pass removes little, and
    where it removes much a second pass follows.
    """
    blocks = _basis.block_dots(basis, vector, filled)
    first, square = _basis.summed(blocks)
    norm = _root(jnp.maximum(square - _square(first), 0))
    vector = _basis.subtract(basis, first, vector, filled)
    repeat = _square(first) > (REPEAT * norm) ** 2
    vector, second, square = _second_pass(basis, vector, filled, repeat, blocks)
    norm = jnp.where(repeat, jnp.sqrt(jnp.where(repeat, square, 1)), norm)
    return vector, norm, first, first + second, repeat


def _second_pass(
    basis: Basis, vector: Panels, filled: jax.Array | int, wanted: jax.Array, blocks: list[jax.Array]
) -> tuple[Panels, jax.Array, jax.Array]:
    """A pass where it is `wanted`: w', the coefficients, else zero, and |w'|², else without a meaning.

    Sums over devices are taken behind the conditionals, in every step: one that contains a reduction between
    GPUs is decided on the host, which waits for the cards. The compiler does not look into branches for how
    a result is split; that it may be one of the `blocks`, the sums of the first pass, tells it.
    """

    def measured(vector: Panels) -> Any:
        return _basis.block_dots(basis, vector, filled)

    def subtracted(vector: Panels) -> Any:
        return _basis.subtract(basis, second, vector, filled)

    def squared(vector: Panels) -> Any:
        # At a breakdown nothing but rounding is left, and no difference of squares tells how much.
        return _panels.block_vdot(vector, vector)

    def nothing(like: Any) -> Any:
        return [jnp.zeros_like(x) for x in like]

    def split(found: Any, like: Any) -> Any:
        return [jnp.where(wanted, x, y) for x, y in zip(found, like, strict=True)]

    found = lax.cond(wanted, measured, lambda _: nothing(blocks), vector)
    second = jnp.where(wanted, _basis.summed(split(found, blocks))[0], 0)
    squares = [x[:, -1] for x in blocks]
    vector = lax.cond(wanted, subtracted, lambda x: x, vector)
    found = lax.cond(wanted, squared, lambda _: nothing(squares), vector)
    # XLA makes no graph of fewer than five kernels between two reductions, and leaves their conditionals to
    # the host: so there are two conditionals, and the choice is apart from the sum.
    return vector, second, _panels.total(arrays.barrier(split(found, squares)))


def _square(coefficients: jax.Array) -> jax.Array:
    return jnp.vdot(coefficients, coefficients, precision=lax.Precision.HIGHEST)


def _root(x: jax.Array) -> jax.Array:
    """sqrt, with the derivative 0 at 0: where a space ends, the norm of what is left says nothing."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)


SIZE = 8
"""Random vectors: a right angle between two unit vectors looks like one below 0.05 once in 10^7 times."""
_NUMBER = 2**31 - 1  # of their key; no probe reaches it


def sketch(layout: Layout, basis: Basis, key: jax.Array, *, batched: bool = False) -> jax.Array:
    """Products of all rows with the same SIZE random vectors for every probe, shape (rows, SIZE).

    One vector after another, so that no memory beside one of them is needed. Entries are uniform on
    (-1, 1): signs would see two coordinates as two lines only.
    """
    key = jax.random.fold_in(key, _NUMBER)
    count = len(basis) * basis[0][0].shape[2 if batched else 1]

    def products(vector: Panels, basis: Basis) -> jax.Array:
        return _basis.dots(basis, vector, count)[0]

    def one(number: jax.Array) -> jax.Array:
        v = trees.sample(jax.random.fold_in(key, number), layout.structure, _uniform)
        vector = layout.place(layout.pack(v))
        return (jax.vmap(products, in_axes=(None, 0)) if batched else products)(vector, basis)

    return jnp.moveaxis(lax.map(one, jnp.arange(SIZE)), 0, -1)


def _uniform(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, -1, 1)


_compiled = partial(jax.jit, static_argnames=("layout", "batched"))(sketch)


def sketches(layout: Layout, basis: Basis, key: jax.Array, *, batched: bool) -> list[np.ndarray]:
    """The sketch of each probe in flight, in float64 on the host."""
    found = np.asarray(jax.device_get(_compiled(layout.anonymous(), basis, key, batched=batched)), np.float64)
    return list(found) if batched else [found]
