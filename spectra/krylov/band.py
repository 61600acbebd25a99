"""Lanczos with any number of starting vectors: rows, the products of some of them, and all coefficients.

The device's part comes first: rows, their coefficients, and a compiled program for each change.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spectra.base import arrays, programs, trees
from spectra.base.errors import NonFiniteError, NotSymmetricError
from spectra.base.host import one_thread
from spectra.base.trees import PyTree
from spectra.krylov import basis as _basis
from spectra.krylov import step
from spectra.krylov.basis import Basis
from spectra.krylov.cancelled import asymmetry_limit
from spectra.krylov.layout import BasisPlace, Layout
from spectra.krylov.rows import combine, stack, sum_of_rows
from spectra.krylov.step import orthogonalize
from spectra.operators.base import LinearOperator, product


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BandState:
    """Rows, coefficients and scale; what each row is, `Band` knows."""

    basis: Basis
    coefficients: jax.Array  # (rows, rows), G
    filled: jax.Array  # (), rows in use
    scale: jax.Array  # (), largest |H v| so far


_Carry = tuple[jax.Array, jax.Array, jax.Array, BandState]
"""Of `chain`: products done, the row, the one before, the state."""


@partial(programs.jit, static_argnames=("layout", "num_rows"))
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


@partial(programs.jit, static_argnames=("layout",), donate_argnames=("state",))
def append(layout: Layout, state: BandState, vector: PyTree) -> tuple[BandState, jax.Array]:
    """One more row, `vector` made orthogonal to all others, and the coefficients of `vector` on all rows."""
    w = layout.pack(vector)
    w = trees.scale(1 / step.norm(w), w)
    column, rest = jnp.zeros(len(state.coefficients), state.scale.dtype), 1.0
    for _ in range(2):  # a random vector may lie almost in the span of the rows
        w, size, _, part, _ = orthogonalize(state.basis, w, state.filled, layout)
        w = trees.scale(1 / size, w)
        column, rest = column + rest * part, rest * size
    basis = _basis.put(state.basis, state.filled, w, layout)
    column = column.at[state.filled].set(rest)
    return dataclasses.replace(state, basis=basis, filled=state.filled + 1), column


@partial(programs.jit, static_argnames=("layout",))
def row_of(layout: Layout, state: BandState, row: int | jax.Array) -> PyTree:
    """One row as the pytree that it stands for."""
    return layout.unpack(_basis.take(state.basis, row))


def absorb(
    layout: Layout,
    size: int,
    state: BandState,
    row: int | jax.Array,
    previous: int | jax.Array,
    product: PyTree,
) -> BandState:
    """Column `row` of G and a new row, given the product; `previous` is the row that led to this one."""
    q, p = _basis.take(state.basis, row), _basis.take(state.basis, previous)
    w = layout.pack(product)
    unit = step.unit_of_step(state.scale == 0, w, state.scale)
    beta = jnp.where(previous >= 0, state.coefficients[row, previous], 0) / unit
    w, alpha = step.three_terms(w, q, p, beta, unit)
    w, rest, _, total, _ = orthogonalize(state.basis, w, state.filled, layout)
    column = total.at[row].add(alpha).at[previous].add(beta)
    scale = jnp.maximum(state.scale / unit, jnp.sqrt(jnp.sum(column**2) + rest**2))
    new, alive = step.following(w, rest, scale, size, state.filled < size)
    # Where nothing is left no row is appended, and the coefficient below rounding is dropped.
    kept = jnp.where(alive, rest, 0)
    column = jnp.where(
        jnp.arange(len(column)) == state.filled, jnp.where(jnp.isnan(rest), rest, kept), column
    )
    return BandState(
        basis=_basis.put(state.basis, state.filled, new, layout),
        coefficients=state.coefficients.at[:, row].set(unit * column),
        filled=state.filled + alive,
        scale=unit * scale,
    )


@partial(programs.jit, static_argnames=("layout", "size"), donate_argnames=("state",))
def chain(
    op: LinearOperator,
    layout: Layout,
    size: int,
    state: BandState,
    row: int | jax.Array,
    previous: int | jax.Array,
    steps: int | jax.Array,
) -> BandState:
    """Process `row`, then each row that a product has led to, `steps` products in all."""

    def going(carry: _Carry) -> jax.Array:
        done, row, _, state = carry
        return (done < steps) & (row < state.filled)

    def one(carry: _Carry) -> _Carry:
        done, row, previous, state = carry
        new = state.filled
        product = op.mv(layout.unpack(_basis.take(state.basis, row)))
        return done + 1, new, row, absorb(layout, size, state, row, previous, product)

    first = (jnp.int32(0), jnp.asarray(row, jnp.int32), jnp.asarray(previous, jnp.int32), state)
    return lax.while_loop(going, one, first)[-1]


absorb_one = programs.jit(absorb, static_argnames=("layout", "size"), donate_argnames=("state",))


@partial(programs.jit, options=programs.FUSED, static_argnames=("layout",), donate_argnames=("state",))
def replace(
    layout: Layout, state: BandState, weights: jax.Array, coefficients: jax.Array, filled: jax.Array
) -> BandState:
    """Combinations of the rows in their place, Σ_i weights_ij v_i as row j, with the coefficients given."""
    basis = combine(state.basis, weights, layout)
    return BandState(basis, coefficients, filled, state.scale)


def _eigh(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As NumPy's, with vectors that are orthonormal to a few roundings, not twenty, and their quotients.

    Rows that are combined with such vectors keep their length through all restarts: in float64, 16 restarts
    made values wrong by up to 50 roundings.
    """
    _, vectors = np.linalg.eigh(matrix)
    vectors -= vectors @ (vectors.T @ vectors - np.eye(len(vectors))) / 2
    theta = np.einsum("ij,ij->j", vectors, matrix @ vectors)
    order = np.argsort(theta)
    return theta[order], vectors[:, order]


class Band:
    """A basis with its coefficients in float64, driven from the host; `op` is prepared by the caller.

    Args:
        op: where products come from.
        place: where the rows lie.
        num_rows: room for so many.
    """

    def __init__(self, op: LinearOperator, place: BasisPlace, num_rows: int):
        self.op, self.place, self.layout = op, place, place.layout
        self.state = place.to_basis(empty(place.layout, num_rows))
        self.coefficients = np.zeros(self.state.coefficients.shape)
        self.locked: list[int] = []
        self.processed: list[int] = []
        self.pending: list[int] = []
        self.parent: dict[int, int] = {}  # the row whose product led to a pending row
        self.aside: list[tuple[PyTree, np.ndarray]] = []  # waiting vectors, coefficients of products on each
        self.num_matvecs = 0
        self.generation = 0  # of rows: those of a generation never change once they are there

    @property
    def filled(self) -> int:
        """Rows in use."""
        return len(self.locked) + len(self.processed) + len(self.pending)

    @property
    def scale(self) -> float:
        """Largest |H v| of a unit vector so far, an estimate of |H| from below."""
        return float(self.state.scale)

    def append(self, vector: PyTree, *, locked: bool = False) -> int:
        """A new pending (or locked) row from a vector that need not be orthogonal to the others."""
        row = self.filled
        self.state, _ = append(self.layout, self.state, self.place.to_basis(vector))
        (self.locked if locked else self.pending).append(row)
        return row

    def extend(self, row: int, steps: int) -> int | None:
        """Take up to `steps` products, beginning with the pending `row`; fewer at a breakdown.

        Returns the row that the last product has led to, if there is one.
        """
        before = self.filled
        previous = self.parent.pop(row, -1)
        if self.op.on_host or self.place.device is not None:
            self._extend_on_host(row, previous, steps)
        else:
            self.state = chain(self.op, self.layout, self.op.size, self.state, row, previous, steps)
        columns, after = jax.device_get((self.state.coefficients, self.state.filled))
        new = list(range(before, int(after)))
        done = [row, *new][:steps]
        self.coefficients[:, done] = columns[:, done]
        self.num_matvecs += len(done)
        self.pending.remove(row)
        self.processed += done
        if len(new) == steps:  # no breakdown: the last row waits for its product
            self.pending.append(new[-1])
            self.parent[new[-1]] = done[-1]
        self._check()
        return new[-1] if len(new) == steps else None

    def grown(self, start: int, first: int) -> None:
        """Take note of products of the rows start..first-1, behind which all rows are pending."""
        columns, filled = jax.device_get((self.state.coefficients, self.state.filled))
        self.processed, self.pending = list(range(first)), list(range(first, int(filled)))
        self.coefficients[:, start:first] = columns[:, start:first]
        self.num_matvecs += first - start
        self._check()

    def _extend_on_host(self, row: int, previous: int, steps: int) -> None:
        filled = self.filled
        for _ in range(steps):
            product = self._product(row_of(self.layout, self.state, row))
            self.state = absorb_one(self.layout, self.op.size, self.state, row, previous, product)
            row, previous = filled, row
            if int(self.state.filled) == filled:
                return
            filled += 1

    def _product(self, vector: PyTree) -> PyTree:
        if self.place.device is None:
            return self.op.mv(vector)
        vector = self.place.to_operator(self.op, vector)
        return self.place.to_basis(self.op.mv(vector) if self.op.on_host else product(self.op, vector))

    def _check(self) -> None:
        if not np.isfinite(self.coefficients).all():
            raise NonFiniteError(
                f"one of the first {self.num_matvecs} products is NaN or infinite. "
                f"{self.op.explain_non_finite()}"
            )
        # Rounded rows look like asymmetry.
        limit = asymmetry_limit(self.op, self.asymmetry, self.layout.row_precision)
        scale = self.scale or 1.0
        if self.asymmetry > limit:
            raise NotSymmetricError(
                f"the operator is not symmetric: |uᵀHv - vᵀHu| reaches {self.asymmetry:.1e} |H| "
                f"(|H| at least {scale:.1e}), above {limit:.1e}, the square root of the precision of its "
                f"products. A symmetric real operator is needed. {self.op.explain_asymmetry()}"
            )

    @property
    def asymmetry(self) -> float:
        """Largest |v_iᵀ H v_j - v_jᵀ H v_i| over the processed rows, in units of |H|."""
        known = len(self.aside[0][1]) if self.aside else 0  # rows that lack their part along what is aside
        rows = self.processed[known:]
        g = self.coefficients[np.ix_(rows, rows)]
        return float(np.max(np.abs(g - g.T), initial=0.0)) / (self.scale or 1.0)

    @one_thread()
    def ritz(self, rows: list[int] | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Ritz values of some processed rows, ascending, their vectors and parts of their residuals.

        Returns θ (r,), S (r, r), the coefficients on pending rows (p, r), and residual norms (r,).
        """
        rows = self.processed if rows is None else rows
        columns = self.coefficients[:, rows]
        square = columns[rows]
        theta, vectors = _eigh((square + square.T) / 2)
        self._separate(theta, vectors, columns[self.pending])
        residual = columns @ vectors
        residual[rows] -= theta * vectors
        coupling = columns[self.pending] @ vectors
        return theta, vectors, coupling, arrays.norms(residual, axis=0)

    def _separate(self, theta: np.ndarray, vectors: np.ndarray, pending: np.ndarray) -> None:
        """Within each group of equal Ritz values, turn the vectors so that the converged ones come first.

        Copies of an eigenvalue converge one after another, and LAPACK returns any basis of their space.
        """
        width = 10 * float(jnp.finfo(self.op.dtype).eps) * self.scale
        for group in np.split(np.arange(len(theta)), np.flatnonzero(np.diff(theta) > width) + 1):
            if len(group) > 1 and len(pending):
                turn = np.linalg.svd(pending @ vectors[:, group])[2][::-1].T
                vectors[:, group] = vectors[:, group] @ turn
                theta[group] = theta[group].mean()

    def residuals(self, values: np.ndarray) -> np.ndarray:
        """|H v - λ v| of the processed rows as they are, with these values."""
        columns = self.coefficients[:, self.processed].copy()
        columns[self.processed, range(len(values))] -= values
        return arrays.norms(columns, axis=0)

    @one_thread()
    def restart(self, vectors: np.ndarray, rows: list[int] | None = None) -> None:
        """Replace all processed rows by the combinations `vectors` (len(rows), p) of `rows`."""
        rows = self.processed if rows is None else rows
        pending = self.pending
        size, first = len(self.coefficients), len(self.locked)
        middle, last = first + vectors.shape[1], first + vectors.shape[1] + len(pending)
        weights = np.zeros((size, size))
        weights[self.locked, self.locked] = 1
        weights[rows, first:middle] = vectors
        weights[pending, range(middle, last)] = 1
        columns = weights.T @ self.coefficients[:, rows] @ vectors
        self.coefficients = np.zeros_like(self.coefficients)
        self.coefficients[:, first:middle] = columns
        self.processed, self.pending = list(range(first, middle)), list(range(middle, last))
        self.parent = {}
        self.generation += 1
        dtype = self.state.coefficients.dtype
        arrays = jnp.asarray(weights, dtype), jnp.asarray(self.coefficients, dtype), jnp.int32(last)
        self.state = replace(self.layout.anonymous(), self.state, *arrays)

    def set_aside(self, vectors: np.ndarray) -> None:
        """Restart without the pending rows: new rows need not be orthogonal to these until `bring_back`."""
        columns = self.coefficients[:, self.processed] @ vectors
        self.aside = [(row_of(self.layout, self.state, row), columns[row]) for row in self.pending]
        self.pending = []
        self.restart(vectors)

    def bring_back(self) -> None:
        """Pending again what was set aside, made orthogonal to the rows made since: G is exact again.

        The first processed rows must be those that `set_aside` left.
        """
        for vector, coupling in self.aside:
            if self.filled >= self.op.size:  # the rows span everything, this vector too
                break
            row = self.filled
            self.state, column = append(self.layout, self.state, vector)
            kept = self.processed[: len(coupling)]
            self.coefficients[:, kept] += np.outer(jax.device_get(column), coupling)
            self.pending.append(row)
        self.aside = []

    def combination(self, coefficients: np.ndarray) -> PyTree:
        """Σ c_i v_i over all rows, in the operator's precision and where it computes."""
        weights = jnp.asarray(coefficients, self.op.dtype)
        vector = sum_of_rows(self.state.basis, weights, self.filled, self.layout)
        return self.place.to_operator(self.op, vector)

    def images(self, mixtures: np.ndarray) -> list[PyTree]:
        """H times combinations of the processed rows, whose coefficients are in rows, by their products."""
        return [self.combination(self.coefficients[:, self.processed] @ mixture) for mixture in mixtures]

    def vectors(self, count: int) -> PyTree:
        """The first `count` rows after the locked ones as one pytree with leaves (count, *leaf.shape)."""
        first = len(self.locked)
        vectors = stack(self.state.basis, self.layout, first, first + count)
        return self.place.to_operator(self.op, vectors)
