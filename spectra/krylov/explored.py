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
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from spectra.base import draws, meshes, programs, trees
from spectra.base.trees import PyTree
from spectra.krylov import basis as _basis
from spectra.krylov import step
from spectra.krylov.basis import Basis
from spectra.krylov.layout import Layout, Panels
from spectra.krylov.packed import like_those_of
from spectra.krylov.product_rounding import multiply
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


@partial(programs.jit, static_argnames=("layout", "num_rows"))
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
    op: LinearOperator, layout: Layout, state: Explored, slot: int, drawn: PyTree | None
) -> tuple[Explored, Step]:
    """One product: of the direction in `slot`, or of what is outside of the basis of a vector `drawn`.

    What the product opens waits in `slot` then, in place of what was there.

    Several programs, one after another: the sweeps over the rows, which take longest to compile, are one for
    the direction and for its product.
    """
    direction = _waiting(state.waiting, slot) if drawn is None else _packed(layout, drawn)
    q = _unit(_orthogonal(layout, state.basis, direction, state.filled))
    state, outside, form = _take_in(layout, state, q, multiply(op, _unpack(layout, q)))
    rest = _orthogonal(layout, state.basis, outside, state.filled)
    return _open(layout, state, slot, q, rest, form, drawn is not None)


def draw(key: jax.Array, number: int, op: LinearOperator) -> PyTree:
    """A normal vector; vectors of other numbers are independent of it."""

    def drawn(op: LinearOperator) -> PyTree:
        where = meshes.places(op.like)
        return draws.sample(jax.random.fold_in(key, number), op.structure, jax.random.normal, where=where)

    return like_those_of(op, drawn)


class _Rest(NamedTuple):
    """A vector without its parts along the rows."""

    vector: Panels
    norm: jax.Array
    column: jax.Array  # (rows,) its coefficients on them


_unpack = programs.jit(Layout.unpack, static_argnums=0)


@partial(programs.jit, static_argnames=("layout",))
def _packed(layout: Layout, vector: PyTree) -> Panels:
    return _scaled(layout.place(layout.pack(vector)))


@programs.jit
def _waiting(waiting: Basis, slot: int | jax.Array) -> Panels:
    return _scaled(_basis.take(waiting, slot))


def _scaled(q: Panels) -> Panels:
    return trees.scale(1 / _positive(step.norm(q)), q)


@programs.jit
def _unit(rest: _Rest) -> Panels:
    return trees.scale(1 / _positive(rest.norm), rest.vector)


@partial(programs.jit, static_argnames=("layout",))
def _orthogonal(layout: Layout, basis: Basis, vector: Panels, filled: jax.Array) -> _Rest:
    """`step.orthogonalize` with its second pass, where there is one, as another turn of a loop.

    The host looks at every product, so that a loop which it has to decide on costs nothing here, and the
    sweeps are compiled once.
    """

    def going(carry: tuple[jax.Array, jax.Array, _Rest]) -> jax.Array:
        return carry[1]

    def one(carry: tuple[jax.Array, jax.Array, _Rest]) -> tuple[jax.Array, jax.Array, _Rest]:
        first, _, rest = carry
        column = _basis.dots(basis, rest.vector, filled, layout)
        vector = _basis.subtract(basis, column, rest.vector, filled, layout)
        norm = jnp.sqrt(step.vdot(vector, vector))
        removed = jnp.vdot(column, column, precision=lax.Precision.HIGHEST)
        again = first & (removed > (step.REPEAT * norm) ** 2)
        return jnp.zeros((), bool), again, _Rest(vector, norm, rest.column + column)

    rows = len(basis) * basis[0][0].shape[1]
    dtype = jnp.result_type(*vector)
    start = _Rest(vector, jnp.zeros((), dtype), jnp.zeros(rows, dtype))
    return lax.while_loop(going, one, (jnp.ones((), bool), jnp.ones((), bool), start))[-1]


@partial(programs.jit, static_argnames=("layout",), donate_argnames=("state",))
def _take_in(
    layout: Layout, state: Explored, q: Panels, product: PyTree
) -> tuple[Explored, Panels, jax.Array]:
    """The state with the row q, its product in the unit without the part along q, and that part."""
    w = layout.place(layout.pack(product))
    unit = jnp.where(state.unit > 0, state.unit, trees.power_of_two(trees.largest(w)))
    w = trees.scale(1 / unit, w)
    form = step.vdot(q, w)
    basis = _basis.put(state.basis, state.filled, q, layout)
    state = dataclasses.replace(state, basis=basis, filled=state.filled + 1, unit=unit)
    return state, trees.axpy(-form, q, w), form


@partial(programs.jit, static_argnames=("layout",), donate_argnames=("state",))
def _open(
    layout: Layout,
    state: Explored,
    slot: int | jax.Array,
    q: Panels,
    rest: _Rest,
    form: jax.Array,
    random: bool | jax.Array,
) -> tuple[Explored, Step]:
    """The state in which what the product of q, the last row, opens waits in `slot`."""
    row, column = state.filled - 1, rest.column
    form = form + column[row]
    along = _basis.dots(state.waiting, q, WAITING, layout)
    led, from_slot = state.origin >= 0, state.origin[slot]
    known = jnp.zeros_like(column).at[state.origin].add(jnp.where(led, along, 0))
    unknown = state.dropped | (jnp.arange(len(column)) == row)
    odd = jnp.where(unknown, 0, jnp.abs(column - known))
    waiting = _basis.put(_without(state.waiting, q, along), slot, rest.vector, layout)
    state = dataclasses.replace(
        state,
        waiting=waiting,
        origin=state.origin.at[slot].set(row),
        dropped=state.dropped.at[from_slot].max(random & led[slot]),
        asymmetry=jnp.maximum(state.asymmetry, jnp.max(odd)),
    )
    square = jnp.sum(jnp.square(column.at[row].set(form))) + rest.norm**2
    return state, Step(form, rest.norm, square, _lengths(waiting))


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
