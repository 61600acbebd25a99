"""Chebyshev polynomials of an operator, and the filter in H² that finds the eigenpairs nearest zero.

The filter serves definite, indefinite and singular operators alike.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spectra.base import draws, programs
from spectra.base import stacks as _stacks
from spectra.base import trees as _tree
from spectra.base.errors import SpectraError, Status
from spectra.base.host import Progress, one_thread
from spectra.base.trees import PyTree
from spectra.krylov import dense, storage
from spectra.krylov.band import Band
from spectra.krylov.layout import BasisPlace, Layout
from spectra.krylov.wanted import Request
from spectra.operators.base import LinearOperator
from spectra.operators.jaxprs import outside_loops
from spectra.results import Eigenpairs
from spectra.runs import saver as saving
from spectra.runs.saver import Saver
from spectra.runs.watch import Watch


def following(image: PyTree, before: PyTree, first: Any) -> PyTree:
    """T_{j+1} v from the image A T_j v and T_{j-1} v; where `first` the image alone."""
    twice = jnp.where(first, 1, 2)
    return jax.tree.map(lambda x, y: twice.astype(x.dtype) * x - jnp.where(first, 0, y), image, before)


GROWTH = 1e4
"""How much one filter may amplify zero: it leaves the block half the digits of float32."""
MAX_DEGREE = 500
"""Of one filter; what is missing to GROWTH comes from the next round."""
NORM_STEPS = 20


def smallest_eigenpairs(op: LinearOperator, request: Request, watch: Watch) -> Eigenpairs:
    """k eigenpairs of smallest |λ|; see `spectra.eigsh`. Dense up to order 2000, where n products are cheaper
    than a filter at a condition number of 100.

    A pair has converged when its residual is below tol |λ|, or below the noise floor
    precision sqrt(n) |H|, where nothing can be said: null directions are carried down to it.

    Cost: a round multiplies a block of k + max(5, k/2) vectors 2 d times, with d about 5 |H| / a. Where
    eigenvalues lie as dense near zero as elsewhere, that is more than n products.
    """
    k, max_matvecs = request.k, request.max_matvecs
    if dense.allowed(op, max_matvecs):
        return dense.dense_eigenpairs(op, k, "SM", request.tol, request.deflate)[0]
    width = min(k + max(5, k // 2), op.size - len(request.deflated))
    budget = 4000 * width if max_matvecs is None else max_matvecs
    if budget <= width:
        raise SpectraError(
            f"max_matvecs={budget}: the smallest take a block of {width} vectors, {width + 1} products."
        )
    with watch.saver(op, request.key) as saver:
        run = Rounds(watch.bar, saver, request.place.layout)
        return _filtered(outside_loops(op.prepare()), request, budget, width, run)


def _filtered(op: LinearOperator, request: Request, budget: int, width: int, run: "Rounds") -> Eigenpairs:
    """Rounds of Rayleigh-Ritz and filter until the pairs have converged or the products are spent."""
    k, key, known, fresh = request.k, request.key, request.deflated, []
    if not run.restored(op, width):
        run.norm, run.products = _norm_bound(op, request.place, key, min(NORM_STEPS, op.size, budget - width))
        run.cut = 0.9 * run.norm
        keys = [jax.random.fold_in(key, i + 1) for i in range(width)]
        fresh = [draws.unit_vector(each, op) for each in keys]
        run.bar.update(run.products)
    norm, floor = run.norm, op.precision * np.sqrt(op.size) * run.norm
    while True:
        if run.degree:
            run.filter(op)
        band = Band(op, request.place, len(known) + width)
        for i, vector in enumerate([*known, *(fresh or _stacks.split(run.block))]):
            band.append(vector, locked=i < len(known))
        values, sizes, residuals, vectors = _rayleigh_ritz(op, band.vectors(width))
        products = run.products + width
        # A block that lies far below the cut has come loose from all others: the filter fits.
        cut = run.cut if sizes.max() < run.cut / 30 else float(np.clip(sizes.max(), floor, run.cut))
        best = np.argsort(sizes, kind="stable")[:k]
        converged = residuals <= np.maximum(request.tol * np.abs(values), floor)
        run.bar.update(width)
        run.bar.note(f"{int(converged[best].sum())} of {k} pairs, |λ| up to {cut / norm:.1e} |H|")
        degree = np.ceil(np.arccosh(GROWTH) * norm / (2 * max(cut, 1e-300)))
        degree = int(min(degree, MAX_DEGREE, (budget - products - width) // (2 * width)))
        if converged[best].all() or degree < 1:
            run.save()
            break
        run.begin(vectors, cut, degree, products)
        fresh = []
    chosen = best[np.argsort(values[best])]
    null = np.abs(values[chosen]) <= floor
    done = Status.SINGULAR if null.any() else Status.CONVERGED
    return Eigenpairs(
        values=values[chosen],
        vectors=jax.tree.map(lambda x: x[chosen], vectors),
        residuals=residuals[chosen],
        converged=converged[chosen],
        which="SM",
        size=op.size,
        num_matvecs=products,
        num_restarts=run.rounds,
        missed=1.0,
        noise_floor=floor,
        status=done if converged[best].all() else Status.NOT_CONVERGED,
    )


def _norm_bound(op: LinearOperator, place: BasisPlace, key: jax.Array, steps: int) -> tuple[float, int]:
    """An upper bound on |H|: the largest |Ritz value| of a short run plus the norm of its residual."""
    band = Band(op, place, steps + 1)
    band.extend(band.append(draws.unit_vector(key, op)), steps)
    theta, _, coupling, _ = band.ritz()
    tail = float(np.abs(band.coefficients[band.pending][:, band.processed]).sum()) if coupling.size else 0.0
    return float(np.abs(theta).max()) + tail, steps


def _rayleigh_ritz(op: LinearOperator, basis: PyTree) -> tuple[np.ndarray, np.ndarray, np.ndarray, PyTree]:
    """Ritz values in an orthonormal block, |H v|, |H v - θ v|, and the Ritz vectors, still stacked."""
    images = _products(op, basis)
    square = np.asarray(_stacks.inner(basis, images), np.float64)
    with one_thread():
        theta, turn = np.linalg.eigh((square + square.T) / 2)
    vectors, images = (_stacks.combine(jnp.asarray(turn.T, op.dtype), x) for x in (basis, images))
    sizes, residuals = _sizes(vectors, images, jnp.asarray(theta, op.dtype))
    return theta, np.asarray(sizes, np.float64), np.asarray(residuals, np.float64), vectors


def _products(op: LinearOperator, block: PyTree) -> PyTree:
    return op.mv_batch(block) if op.on_host else _products_jit(op, block)


@programs.jit
def _products_jit(op: LinearOperator, block: PyTree) -> PyTree:
    return op.mv_batch(block)


@programs.jit
def _sizes(vectors: PyTree, images: PyTree, theta: jax.Array) -> tuple[jax.Array, jax.Array]:
    def one(v: PyTree, w: PyTree, value: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _tree.norm(w), _tree.norm(_tree.axpy(-value, v, w))

    return jax.vmap(one)(vectors, images, theta)


_following = programs.jit(following)


@programs.jit
def _filter_jit(
    op: LinearOperator,
    before: PyTree,
    now: PyTree,
    bounds: jax.Array,
    start: int | jax.Array,
    stop: int | jax.Array,
) -> tuple[PyTree, PyTree]:
    def step(j: jax.Array, pair: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        before, now = pair
        return now, following(_map_interval(op, now, bounds), before, j == 0)

    return lax.fori_loop(start, stop, step, (before, now))


def _map_interval(op: LinearOperator, block: PyTree, bounds: jax.Array) -> PyTree:
    """In units of the norm, whose square may be no number: `bounds` are the cut in it, and its inverse."""
    low, inverse = bounds[0] ** 2, bounds[1]
    squared = _tree.scale(inverse, op.mv_batch(_tree.scale(inverse, op.mv_batch(block))))
    shifted = _tree.axpy(-2 / (1 + low), squared, block)
    return _tree.scale((1 + low) / (1 - low), shifted)


class Rounds:
    """Where the rounds stand: the block, or its filter with the terms behind it; saved between them."""

    NUMBERS = ("norm", "cut", "products", "rounds", "degree", "done")

    def __init__(self, bar: Progress, saver: Saver | None, layout: Layout):
        self.bar, self.saver, self.layout = bar, saver, layout.anonymous()
        self.treedef = layout.treedef
        self.norm = self.cut = 0.0
        self.products = self.rounds = self.degree = self.done = 0
        self.block: PyTree = None  # T_done of what the round began with
        self.before: PyTree = None  # T_{done - 1}

    def begin(self, vectors: PyTree, cut: float, degree: int, products: int) -> None:
        """The filter of the next round, on these vectors, `products` behind it."""
        self.block = self.before = vectors
        self.cut, self.degree, self.done, self.products = cut, degree, 0, products

    def filter(self, op: LinearOperator) -> None:
        """T_degree of the map that sends [cut², norm²] to [-1, 1], on the block."""
        bounds = jnp.asarray([self.cut / self.norm, 1 / self.norm], op.dtype)
        width = _stacks.length(self.block)
        part, started = 1 if self.saver else self.degree, time.monotonic()
        while self.done < self.degree:
            stop = min(self.done + part, self.degree)
            self.before, self.block = self._steps(op, bounds, stop)
            products = 2 * (stop - self.done) * width
            self.done, self.products = stop, self.products + products
            self.bar.update(products)
            if self.saver is not None:
                jax.block_until_ready(self.block)
                signal, due, seconds = self.saver.due(self.products, time.monotonic() - started)
                part = int(np.clip(saving.PACE * part / max(seconds, 1e-9), 1, self.degree))
                if due:
                    self.save()
                self.saver.end(signal, f"after {self.products} products")
                started = time.monotonic()
        self.degree, self.rounds = 0, self.rounds + 1

    def _steps(self, op: LinearOperator, bounds: jax.Array, stop: int) -> tuple[PyTree, PyTree]:
        before, now = self.before, self.block
        if not op.on_host:
            return _filter_jit(op, before, now, bounds, self.done, stop)
        for j in range(self.done, stop):
            before, now = now, _following(_map_interval(op, now, bounds), before, j == 0)
        return before, now

    def save(self) -> None:
        """Write where the rounds stand; nothing without a place for it, or before the first of them."""
        if self.saver is not None and self.block is not None:
            name = f"item-{self.rounds:05d}-degree-{self.done:05d}"
            stacks = self.before, self.block
            trees = {name: lambda: [jax.tree.leaves(stack) for stack in stacks]}
            known = {name: getattr(self, name) for name in self.NUMBERS}
            self.saver.write(trees, {"rounds": known}, self.products)

    def restored(self, op: LinearOperator, width: int) -> bool:
        """Whether the run goes on with what was saved."""
        for record in self.saver.saved if self.saver else ():
            flight = record["flight"]
            if not flight:
                continue
            assert self.saver is not None
            ((name, digest),) = flight["items"].items()
            like = storage.vectors_of(self.layout, 2, jax.tree.leaves(op.like)[0], (width,))
            stacks = self.saver.item(name, like, digest)
            if stacks is not None:
                self.before, self.block = map(self.treedef.unflatten, stacks)
                for name in self.NUMBERS:
                    setattr(self, name, flight["rounds"][name])
                self.saver.flight, self.saver.saved_step = flight, self.products
                self.bar.update(self.products)
                return True
        return False
