"""A band that grows by blocks: the products of all rows that wait are taken side by side."""

from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax

from spectra.base import programs
from spectra.base.trees import PyTree
from spectra.krylov import basis as _basis
from spectra.krylov.band import Band, BandState, absorb
from spectra.krylov.layout import Layout
from spectra.krylov.plan import choose_together
from spectra.operators.base import LinearOperator, in_batches

_Carry = tuple[jax.Array, jax.Array, BandState]
"""Of `chain_block`: steps done, the first row without a product, the state."""


@partial(programs.jit, static_argnames=("layout", "size", "width", "together"), donate_argnames=("state",))
def chain_block(
    op: LinearOperator,
    layout: Layout,
    size: int,
    state: BandState,
    first: int | jax.Array,
    steps: int | jax.Array,
    width: int,
    together: int,
) -> _Carry:
    """Process the rows from `first` on, at most `width`, then those that they led to: `steps` times in all.

    So many products are taken `together`.

    Returns the steps done, fewer where nothing is left, the first row without a product, and the state.
    """

    def going(carry: _Carry) -> jax.Array:
        done, first, state = carry
        return (done < steps) & (first < state.filled)

    def one(carry: _Carry) -> _Carry:
        done, first, state = carry
        products = in_batches(op, rows_from(layout, state, first, width), together)
        return done + 1, state.filled, absorb_rows(layout, size, state, first, products)

    return lax.while_loop(going, one, (jnp.int32(0), jnp.asarray(first, jnp.int32), state))


@partial(programs.jit, static_argnames=("layout", "width"))
def rows_from(layout: Layout, state: BandState, first: int | jax.Array, width: int) -> PyTree:
    """The stack of `width` rows; zero where there are fewer."""
    return lax.map(lambda i: layout.unpack(_basis.take(state.basis, first + i)), jnp.arange(width))


@partial(programs.jit, static_argnames=("layout", "size"), donate_argnames=("state",))
def absorb_rows(
    layout: Layout, size: int, state: BandState, first: int | jax.Array, products: PyTree
) -> BandState:
    """`absorb` for each row from `first` on, given their products."""
    last = state.filled
    return lax.fori_loop(
        jnp.asarray(first, last.dtype), last, partial(_absorb_one, layout, size, products, first, last), state
    )


def _absorb_one(
    layout: Layout,
    size: int,
    products: PyTree,
    first: int | jax.Array,
    last: jax.Array,
    row: jax.Array,
    state: BandState,
) -> BandState:
    product = jax.tree.map(partial(_taken, i=row - first), products)
    # Of one row the row before led to it. In a block any row with a product serves as well.
    previous = jnp.maximum(row - (last - first), -1)
    return absorb(layout, size, state, row, previous, product)


def run_block(
    op: LinearOperator, layout: Layout, state: BandState, steps: int, width: int
) -> tuple[jax.Array, BandState]:
    """All of `chain_block` from the first row, by control flow that can be differentiated both ways."""

    together = choose_together(op, width)

    def one(_: jax.Array, carry: tuple[jax.Array, BandState]) -> tuple[jax.Array, BandState]:
        first, state = carry
        last = state.filled
        products = in_batches(op, rows_from(layout, state, first, width), together)

        def absorbed(i: jax.Array, state: BandState) -> BandState:
            act = partial(_absorb_one, layout, op.size, products, first, last, first + i)
            return lax.cond(first + i < last, act, lambda state: state, state)

        return last, lax.fori_loop(0, width, absorbed, state)

    return lax.fori_loop(0, steps, one, (jnp.zeros_like(state.filled), state))


def _taken(x: jax.Array, i: jax.Array) -> jax.Array:
    return cast("Any", lax.dynamic_index_in_dim)(x, i, 0, keepdims=False)


def extend_block(band: Band, steps: int, width: int) -> int:
    """Take products of all pending rows, at most `width`, then of those that they led to, and so on.

    The band has no locked rows, and lives where the operator does. Returns the steps done: `steps`, or fewer
    where no row is left.
    """
    op, layout = band.op, band.layout
    start = first = len(band.processed)
    if op.on_host:
        done = 0
        while done < steps and first < (last := int(band.state.filled)):
            products = op.mv_batch(rows_from(layout, band.state, first, last - first))
            band.state = absorb_rows(layout, op.size, band.state, first, products)
            done, first = done + 1, last
    else:
        numbers = first, steps, width, choose_together(op, width)
        taken, processed, band.state = chain_block(op, layout, op.size, band.state, *numbers)
        done, first = int(taken), int(processed)
    band.grown(start, first)
    return done
