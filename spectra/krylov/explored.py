"""An orthonormal basis whose products are all known, grown direction by direction from the host.

Each step takes one direction q: a random vector, or what the product of an earlier direction had outside of
the basis. With w = H q it keeps α = qᵀw and the part of w outside of the basis, of norm β, as a direction to
go on with. A single chain of them is Lanczos; several are a block method whose block grows with each random
vector. What is outside of the basis loses, in the square of its Frobenius norm, exactly α² + 2 β² at a step.

All coefficients of w are known beforehand by symmetry: those on a row j are what the waiting part of H q_j
has along q. What deviates from that is asymmetry, or rounding.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from spectra.base import trees
from spectra.base.trees import PyTree
from spectra.krylov import basis as _basis
from spectra.krylov import step
from spectra.krylov.basis import Basis
from spectra.krylov.layout import Layout, Panels
from spectra.krylov.step import orthogonalize
from spectra.operators.base import LinearOperator

WAITING = _basis.SEGMENT
"""Directions that wait to be gone on with, at most."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Explored:
    """Rows of the basis, directions that wait, and what is known of them."""

    basis: Basis
    waiting: Basis  # one segment, orthogonal to the basis, in units of `unit`
    origin: jax.Array  # (WAITING,) row whose product a direction is from
    dropped: jax.Array  # (rows,), whether what a row led to was given up for a random direction
    filled: jax.Array  # (), rows in use
    unit: jax.Array  # (), power of two near |H|; 0 before the first product
    asymmetry: jax.Array  # (), largest coefficient that symmetry does not explain, in units of `unit`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Step:
    """Numbers of one step, in units of `Explored.unit`."""

    form: jax.Array  # α = qᵀ H q
    outside: jax.Array  # β, norm of H q outside of the basis
    square: jax.Array  # |H q|²
    lengths: jax.Array  # (WAITING,) of the directions that wait now


@partial(jax.jit, static_argnames=("layout", "num_rows"))
def empty(layout: Layout, num_rows: int) -> Explored:
    """Nothing explored, and room for `num_rows` directions."""
    dtype = jnp.result_type(*[panel.dtype for panel in layout.panels])
    count, rows = _basis.segments(num_rows)
    return Explored(
        basis=_basis.zeros(layout, num_rows),
        waiting=_basis.zeros(layout, WAITING),
        origin=jnp.full(WAITING, -1),
        dropped=jnp.zeros(count * rows, bool),
        filled=jnp.zeros((), jnp.int32),
        unit=jnp.zeros((), dtype),
        asymmetry=jnp.zeros((), dtype),
    )


def grow(
    op: LinearOperator, layout: Layout, state: Explored, slot: int, key: jax.Array, random: bool
) -> tuple[Explored, Step]:
    """One product: of a direction drawn with the key if it is to be `random`, else of the one in `slot`.

    What the product opens waits in `slot` then, in place of what was there.
    """
    if op.on_host:
        q = _direction(layout, state, slot, key, random)
        return _absorb(layout, state, slot, q, op.mv(_unpack(layout, q)), random)
    return _grow(op, layout, state, slot, key, random)


@partial(jax.jit, static_argnames=("layout",), donate_argnames=("state",))
def _grow(
    op: LinearOperator,
    layout: Layout,
    state: Explored,
    slot: int | jax.Array,
    key: jax.Array,
    random: bool | jax.Array,
) -> tuple[Explored, Step]:
    q = _direction(layout, state, slot, key, random)
    return _absorb(layout, state, slot, q, op.mv(layout.unpack(q)), random)


_unpack = jax.jit(Layout.unpack, static_argnums=0)


@partial(jax.jit, static_argnames=("layout",))
def _direction(
    layout: Layout, state: Explored, slot: int | jax.Array, key: jax.Array, random: bool | jax.Array
) -> Panels:
    """A unit vector orthogonal to the basis."""

    def drawn() -> Panels:
        return layout.place(layout.pack(trees.sphere_sample(key, layout.structure)))

    q = lax.cond(random, drawn, lambda: _basis.take(state.waiting, slot))
    q = trees.scale(1 / _positive(step.norm(q)), q)
    q = orthogonalize(state.basis, q, state.filled)[0]
    return trees.scale(1 / _positive(step.norm(q)), q)


@partial(jax.jit, static_argnames=("layout",), donate_argnames=("state",))
def _absorb(
    layout: Layout,
    state: Explored,
    slot: int | jax.Array,
    q: Panels,
    product: PyTree,
    random: bool | jax.Array,
) -> tuple[Explored, Step]:
    w = layout.place(layout.pack(product))
    unit = jnp.where(state.unit > 0, state.unit, trees.power_of_two(trees.largest(w)))
    w = trees.scale(1 / unit, w)
    row, filled = state.filled, state.filled + 1
    basis = _basis.put(state.basis, row, q)
    form = step.vdot(q, w)
    w = trees.axpy(-form, q, w)
    w, outside, _, column, _ = orthogonalize(basis, w, filled)
    form = form + column[row]
    along = _basis.dots(state.waiting, q, WAITING)[0]
    led, from_slot = state.origin >= 0, state.origin[slot]
    known = jnp.zeros_like(column).at[state.origin].add(jnp.where(led, along, 0))
    unknown = state.dropped | (jnp.arange(len(column)) == row)
    odd = jnp.where(unknown, 0, jnp.abs(column - known))
    waiting = _without(state.waiting, q, along)
    waiting = _basis.put(waiting, slot, w)
    state = Explored(
        basis=basis,
        waiting=waiting,
        origin=state.origin.at[slot].set(row),
        dropped=state.dropped.at[from_slot].max(random & led[slot]),
        filled=filled,
        unit=unit,
        asymmetry=jnp.maximum(state.asymmetry, jnp.max(odd)),
    )
    square = jnp.sum(jnp.square(column.at[row].set(form))) + outside**2
    return state, Step(form, outside, square, _lengths(waiting))


def _without(waiting: Basis, q: Panels, along: jax.Array) -> Basis:
    """Directions that wait, less what they have along q."""

    def one(rows: jax.Array, x: jax.Array) -> jax.Array:
        coefficients = along.reshape(1, -1, *[1] * (rows.ndim - 2))
        return rows - (coefficients * x[:, None]).astype(rows.dtype)

    return tuple([one(rows, x) for rows, x in zip(segment, q, strict=True)] for segment in waiting)


def _lengths(waiting: Basis) -> jax.Array:
    def square(rows: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(rows), axis=(0, *range(2, rows.ndim)))

    return jnp.sqrt(sum(square(rows) for rows in waiting[0]))


def _positive(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, x, 1)
