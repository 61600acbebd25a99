"""The device's part of band Lanczos: rows, their coefficients, and a compiled program for each change.

`spectra.krylov.band` has the method and calls these. A program that changes a state is given its buffers.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from spectra import _tree
from spectra.krylov import basis as _basis
from spectra.krylov import step
from spectra.krylov.basis import Basis
from spectra.krylov.layout import Layout
from spectra.krylov.orthogonalize import orthogonalize

PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BandState:
    """Rows, coefficients and scale; what each row is, `Band` knows."""

    basis: Basis
    coefficients: jax.Array  # (rows, rows), G
    filled: jax.Array  # (), rows in use
    scale: jax.Array  # (), largest |H v| so far


@partial(jax.jit, static_argnames=("layout", "num_rows"))
def empty(layout: Layout, num_rows: int) -> BandState:
    """No rows, and room for `num_rows`."""
    dtype = jnp.result_type(*[panel.dtype for panel in layout.panels])
    count, rows = _basis.segments(num_rows)
    return BandState(
        basis=_basis.zeros(layout, num_rows),
        coefficients=jnp.zeros((count * rows, count * rows), dtype),
        filled=jnp.zeros((), jnp.int32),
        scale=jnp.zeros((), dtype),
    )


@partial(jax.jit, static_argnames=("layout",), donate_argnames=("state",))
def append(layout: Layout, state: BandState, vector: PyTree) -> tuple[BandState, jax.Array]:
    """One more row, `vector` made orthogonal to all others, and the coefficients of `vector` on all rows."""
    w = layout.pack(vector)
    w = _tree.scale(1 / _basis.norm(w), w)
    column, rest = jnp.zeros(len(state.coefficients), state.scale.dtype), 1.0
    for _ in range(2):  # a random vector may lie almost in the span of the rows
        w, size, _, part, _ = orthogonalize(state.basis, w, state.filled)
        w = _tree.scale(1 / size, w)
        column, rest = column + rest * part, rest * size
    basis = _basis.put(state.basis, state.filled, w)
    column = column.at[state.filled].set(rest)
    return dataclasses.replace(state, basis=basis, filled=state.filled + 1), column


@partial(jax.jit, static_argnames=("layout",))
def row_of(layout: Layout, state: BandState, row) -> PyTree:
    """One row as the pytree that it stands for."""
    return layout.unpack(_basis.take(state.basis, row))


def absorb(layout: Layout, size: int, state: BandState, row, previous, product: PyTree) -> BandState:
    """Column `row` of G and a new row, given the product; `previous` is the row that led to this one."""
    q, p = _basis.take(state.basis, row), _basis.take(state.basis, previous)
    w = layout.pack(product)
    unit = _basis.unit_of_step(state.scale == 0, w, state.scale)
    beta = jnp.where(previous >= 0, state.coefficients[row, previous], 0) / unit
    left = step.remainder(w, q, p, beta, unit, state.basis, state.filled)
    rest = left.norm
    column = left.total.at[row].add(left.alpha).at[previous].add(beta)
    scale = jnp.maximum(state.scale / unit, jnp.sqrt(jnp.vdot(column, column) + rest**2))
    new, alive = step.following(left, scale, size, state.filled < size)
    # Where nothing is left no row is appended, and the coefficient below rounding is dropped.
    kept = jnp.where(alive, rest, 0)
    column = jnp.where(
        jnp.arange(len(column)) == state.filled, jnp.where(jnp.isnan(rest), rest, kept), column
    )
    return BandState(
        basis=_basis.put(state.basis, state.filled, new),
        coefficients=state.coefficients.at[:, row].set(unit * column),
        filled=state.filled + alive,
        scale=unit * scale,
    )


@partial(jax.jit, static_argnames=("layout", "size"), donate_argnames=("state",))
def chain(op, layout, size, state, row, previous, steps):
    """Process `row`, then each row that a product has led to, `steps` products in all."""

    def going(carry):
        done, row, _, state = carry
        return (done < steps) & (row < state.filled)

    def one(carry):
        done, row, previous, state = carry
        new = state.filled
        product = op.mv(layout.unpack(_basis.take(state.basis, row)))
        return done + 1, new, row, absorb(layout, size, state, row, previous, product)

    first = (jnp.int32(0), jnp.asarray(row, jnp.int32), jnp.asarray(previous, jnp.int32), state)
    return lax.while_loop(going, one, first)[-1]


absorb_one = jax.jit(absorb, static_argnames=("layout", "size"), donate_argnames=("state",))


@partial(jax.jit, static_argnames=("layout",), donate_argnames=("state",))
def replace(layout: Layout, state: BandState, weights, coefficients, filled) -> BandState:
    """Combinations of the rows in their place, Σ_i weights_ij v_i as row j, with the coefficients given."""
    basis = _basis.combine(state.basis, weights, layout)
    return BandState(basis, coefficients, filled, state.scale)
