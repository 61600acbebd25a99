"""Lanczos with any number of starting vectors: rows, the products of some of them, and all coefficients.

The basis V has rows of three kinds. *Processed* rows have had their product with H taken; *pending* rows
have not; *locked* rows are given vectors that all others are kept orthogonal to. One step takes the
product of a pending row v_j, records its coefficients on all rows as column j of G, and appends what is
left as a new pending row:

    H v_j = Σ_i G_ij v_i,    exactly, to the rounding of the product

One start gives Lanczos, b starts the band Lanczos method of Ruhe (doi:10.2307/2006344). Nothing in G rests
on a recurrence, so the residual of a Ritz pair is computed from the operator's own products,

    |H y - θ y| = |(G - θ) s|,  y = Vᵀ s,

without multiplying again, and whatever is not symmetric or was restarted shows up in it. A thick restart
(Wu and Simon, doi:10.1137/S0895479898334605; Stewart, doi:10.1137/S0895479800371529) replaces processed
rows by some of their Ritz vectors and keeps pending rows as they are: G stays exact.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectra._blas import one_thread
from spectra._errors import NonFiniteError, NotSymmetricError
from spectra.krylov import band_state
from spectra.krylov import basis as _basis
from spectra.krylov.layout import Layout
from spectra.operators.base import LinearOperator, product

PyTree = Any


class Band:
    """A basis with its coefficients in float64, driven from the host; `op` is prepared by the caller.

    Args:
        op: where products come from.
        layout: of the rows.
        num_rows: room for so many.
        home: the device that the rows live on, if it is not the operator's.
    """

    def __init__(self, op: LinearOperator, layout: Layout, num_rows: int, home: Any = None):
        self.op, self.layout, self.home = op, layout, home
        self.state = self._at_home(band_state.empty(layout, num_rows))
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
        self.state, _ = band_state.append(self.layout, self.state, self._at_home(vector))
        (self.locked if locked else self.pending).append(row)
        return row

    def _at_home(self, tree: PyTree) -> PyTree:
        return tree if self.home is None else jax.device_put(tree, self.home)

    def extend(self, row: int, steps: int) -> int | None:
        """Take up to `steps` products, beginning with the pending `row`; fewer at a breakdown.

        Returns the row that the last product has led to, if there is one.
        """
        before = self.filled
        previous = self.parent.pop(row, -1)
        if self.op.on_host or self.home is not None:
            self._extend_on_host(row, previous, steps)
        else:
            self.state = band_state.chain(
                self.op, self.layout, self.op.size, self.state, row, previous, steps
            )
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

    def _extend_on_host(self, row, previous, steps):
        filled = self.filled
        for _ in range(steps):
            product = self._product(band_state.row_of(self.layout, self.state, row))
            self.state = band_state.absorb_one(self.layout, self.op.size, self.state, row, previous, product)
            row, previous = filled, row
            if int(self.state.filled) == filled:
                return
            filled += 1

    def _product(self, vector: PyTree) -> PyTree:
        if self.home is None:
            return self.op.mv(vector)
        vector = jax.device_put(vector, self.op.device)
        return self._at_home(self.op.mv(vector) if self.op.on_host else product(self.op, vector))

    def _check(self) -> None:
        if not np.isfinite(self.coefficients).all():
            raise NonFiniteError(
                f"one of the first {self.num_matvecs} products is NaN or infinite. "
                f"{self.op.explain_non_finite()}"
            )
        limit, scale = float(np.sqrt(self.op.precision)), self.scale or 1.0
        if self.asymmetry > limit:
            raise NotSymmetricError(
                f"the operator is not symmetric: |uᵀHv - vᵀHu| reaches {self.asymmetry:.1e} |H| "
                f"(|H| at least {scale:.1e}), above {limit:.1e}, the square root of the precision of its "
                f"products. eigsh needs a symmetric real operator. {self.op.explain_asymmetry()}"
            )

    @property
    def asymmetry(self) -> float:
        """Largest |v_iᵀ H v_j - v_jᵀ H v_i| over the processed rows, in units of |H|."""
        known = len(self.aside[0][1]) if self.aside else 0  # rows that lack their part along what is aside
        rows = self.processed[known:]
        g = self.coefficients[np.ix_(rows, rows)]
        return float(np.max(np.abs(g - g.T), initial=0.0)) / (self.scale or 1.0)

    @one_thread()
    def ritz(self, rows: list[int] | None = None):
        """Ritz values of some processed rows, ascending, their vectors and parts of their residuals.

        Returns θ (r,), S (r, r), the coefficients on pending rows (p, r), and residual norms (r,).
        """
        rows = self.processed if rows is None else rows
        columns = self.coefficients[:, rows]
        square = columns[rows]
        theta, vectors = np.linalg.eigh((square + square.T) / 2)
        self._separate(theta, vectors, columns[self.pending])
        residual = columns @ vectors
        residual[rows] -= theta * vectors
        coupling = columns[self.pending] @ vectors
        return theta, vectors, coupling, np.linalg.norm(residual, axis=0)

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
        return np.linalg.norm(columns, axis=0)

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
        self.state = band_state.replace(self.layout.anonymous(), self.state, *arrays)

    def set_aside(self, vectors: np.ndarray) -> None:
        """Restart without the pending rows: new rows need not be orthogonal to these until `bring_back`."""
        columns = self.coefficients[:, self.processed] @ vectors
        self.aside = [(band_state.row_of(self.layout, self.state, row), columns[row]) for row in self.pending]
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
            self.state, column = band_state.append(self.layout, self.state, vector)
            kept = self.processed[: len(coupling)]
            self.coefficients[:, kept] += np.outer(jax.device_get(column), coupling)
            self.pending.append(row)
        self.aside = []

    def vectors(self, count: int) -> PyTree:
        """The first `count` rows after the locked ones as one pytree with leaves (count, *leaf.shape)."""
        first = len(self.locked)
        vectors = _basis.stack(self.state.basis, self.layout, first, first + count)
        return vectors if self.home is None else jax.device_put(vectors, self.op.device)
