"""One call of `eigsh`: a band of rows, what has been learnt of the wanted pairs, and how it goes on.

All that steers the run is in fields that can be saved, and it stops to be saved between products only: a run
that goes on takes the same decisions from the same numbers.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import arrays, draws, programs, stacks, trees
from spectra.base.errors import Status
from spectra.base.host import Progress
from spectra.base.trees import PyTree
from spectra.krylov import storage, wanted
from spectra.krylov.band import Band
from spectra.krylov.product_rounding import mixtures
from spectra.operators.base import LinearOperator
from spectra.results import Eigenpairs
from spectra.runs import saver as _saver
from spectra.runs.saver import Saver

FIELDS = (
    *("starts", "restarts", "missed", "converged", "copies", "extended", "allowed", "history"),
    *("goal", "row", "done"),
)
"""Of a run, what a checkpoint holds besides its rows and the search under way."""
EPS = float(np.finfo(float).eps)
CHUNK = 16
"""Products between two looks at the clock, at most."""


class EigenRun:
    """The state of one call, and its driver from the host.

    Args:
        op: the operator, prepared.
        request: what the call asks for.
        limit: rows of the basis.
        bar: shows the products.
        saver: where the run is saved, if it is.
    """

    def __init__(
        self,
        op: LinearOperator,
        request: wanted.Request,
        limit: int,
        bar: Progress,
        saver: Saver | None,
    ):
        self.op, self.key = op, request.key
        self.k, self.which, self.tol = request.k, request.which, request.tol
        self.bar, self.saver = bar, saver
        self.starts, self.restarts, self.missed = 0, 0, 1.0
        self.converged, self.budget, self.done = False, 0, False
        self.copies = self.extended = 0  # missed copies found so far
        self.allowed = 0  # products that a search may go up to
        self.search: wanted.Search | None = None  # the one under way
        self.goal = 0  # products at which to look at the residuals
        self.row: int | None = None  # on the way there
        self.part = 1  # products between two looks at the clock
        self.seconds = time.monotonic()  # of the last one
        self.capacity = limit + request.block_size + len(request.deflated)
        self.band = Band(op, request.place, self.capacity)
        self.history: list[tuple[int, float]] = []
        if saver is not None and self._restored():
            return
        for vector in request.deflated:
            self.band.append(vector, locked=True)
        if request.v0 is not None:
            self.band.append(request.v0)
        while len(self.band.pending) < request.block_size:
            self.append_random()

    @property
    def accepted(self) -> float:
        """Largest residual of a converged pair."""
        return max(self.tol, 10 * self.op.precision) * self.band.scale

    @property
    def target_residual(self) -> float:
        """Where the iteration stops: turning copies of an eigenpair mixes their residuals."""
        share = 0.5 if self.copies else 0.95
        return max(share * self.tol, float(jnp.finfo(self.op.dtype).eps)) * self.band.scale

    @property
    def exhausted(self) -> bool:
        """Whether no direction of the whole space is left."""
        return self.band.filled >= self.op.size

    def append_random(self) -> int:
        """A new row from the next random vector of this run."""
        self.starts += 1
        key = jax.random.fold_in(self.key, self.starts)
        return self.band.append(draws.unit_vector(key, self.op))

    def extend(self, row: int, steps: int) -> int | None:
        """As the band does, and count the products."""
        before = self.band.num_matvecs
        following = self.band.extend(row, steps)
        self.bar.update(self.band.num_matvecs - before)
        return following

    def until_converged(self) -> None:
        """Steps and restarts until the k best Ritz pairs have converged, or the budget is spent."""
        band = self.band
        vectors, coupling, open_ = np.zeros((0, 0)), np.zeros((0, 0)), np.zeros(0, bool)  # none processed
        while True:
            self.pause()
            if self.row is not None and band.num_matvecs < self.goal:
                steps = self.goal - band.num_matvecs
                self.row = self.extend(self.row, steps if self.saver is None else min(steps, self.part))
                continue
            best = np.arange(0)
            if len(band.processed):
                theta, vectors, coupling, _ = band.ritz()
                best = wanted.order(theta, self.which)
                error = arrays.norms(coupling[:, best[: self.k]], axis=0)
                open_ = error > self.target_residual
                self.converged = bool(len(best) >= self.k and not open_.any())
                self._note(error)
                if self.converged:
                    return
                self.history.append((band.num_matvecs, float(error.max())))
            if band.num_matvecs >= self.budget or (not band.pending and self.exhausted):
                return
            room = self.capacity - band.filled
            if room < 1:
                self.restart(vectors, best)
                continue
            if not band.pending:  # the space is invariant, and too small
                self.append_random()
                continue
            self.row = band.pending[-1]
            if len(best):
                weight = arrays.norms(coupling[:, best[: self.k]][:, open_], axis=1)
                self.row = band.pending[int(np.argmax(weight))] if open_.any() else self.row
            chunk = min(room, self._chunk(len(best)), self.budget - band.num_matvecs)
            self.goal = band.num_matvecs + chunk

    def _note(self, error: np.ndarray) -> None:
        """Say how many pairs have converged, and the largest residual."""
        worst = float(error.max()) / (self.band.scale or 1.0)
        self.bar.note(
            f"{int((error <= self.target_residual).sum())} of {self.k} pairs, residual {worst:.1e} |H|"
        )

    def pause(self) -> None:
        """Between products: save the run where it is time to, and end it where it was asked to."""
        if self.saver is None:
            return
        done, now = self.band.num_matvecs, time.monotonic()
        stop, due, seconds = self.saver.due(done, now - self.seconds)
        self.part = int(np.clip(_saver.PACE * self.part / max(seconds, 1e-9), 1, CHUNK))
        if due:
            self.save()
        self.saver.end(stop, f"after {done} products")
        self.seconds = time.monotonic()

    def save(self) -> None:
        """Write what is new since the last time; nothing without a place for it."""
        if self.saver is not None:
            search = self.search and dataclasses.asdict(self.search)
            fields = {name: getattr(self, name) for name in FIELDS}
            storage.save(self.saver, self.band, fields | {"search": search})

    def _restored(self) -> bool:
        """Whether the run goes on with what was saved."""
        assert self.saver is not None
        fields = storage.restore(self.saver, self.band)
        if fields is None:
            return False
        for name in FIELDS:
            setattr(self, name, fields[name])
        self.search = fields["search"] and wanted.Search.of(fields["search"])
        self.history = [(count, error) for count, error in self.history]
        self.bar.update(self.band.num_matvecs)
        return True

    def _chunk(self, done: int) -> int:
        """Products until the next test: few where convergence is near, by the rate of the last two."""
        if done < self.k:
            return max(self.k - done, 1)
        if len(self.history) < 2:
            return 2
        (a, before), (b, now) = self.history[-2:]
        rate = np.log(before / now) / (b - a) if 0 < now < before and b > a else 0.0
        left = np.log(now / self.target_residual) / rate if rate > 0 else np.inf
        return int(np.clip(left / 2, 1, max(1, min(self.band.num_matvecs // 12, 8))))

    def restart(self, vectors: np.ndarray, best: np.ndarray) -> None:
        """Keep the best Ritz vectors: all that are wanted, and enough to fill half of what is free."""
        free = self.capacity - len(self.band.locked) - len(self.band.pending)
        keep = self.k + (free - self.k) // 2
        chosen = np.sort(best[: int(np.clip(keep, self.k, free - 1))])
        self.band.restart(vectors[:, chosen])
        self.restarts += 1

    def result(self, images_too: bool) -> tuple[Eigenpairs, list[PyTree] | None]:
        """The best pairs, in ascending order, and the images of their mixtures by the products of the run."""
        band, op = self.band, self.op
        (theta, vectors, _, _), images = band.ritz(), None
        chosen = np.sort(wanted.order(theta, self.which)[: self.k])
        values, scale = theta[chosen], band.scale
        if band.layout.row_dtype is None:
            band.restart(vectors[:, chosen])
            if images_too:
                images = band.images(mixtures(len(chosen)))
            residuals, found, asymmetry = band.residuals(values), band.vectors(len(values)), band.asymmetry
        else:
            values, residuals, found, asymmetry = self._measured(vectors[:, chosen])
            # Rounding adds to what the iteration has seen of a residual, and |H| is known better now.
            scale = max(scale, float(np.abs(values).max()))
        converged = residuals <= self.accepted * (scale / (band.scale or 1.0))
        done = converged.all() and len(values) == self.k
        rounding = max(100 * op.precision, band.layout.row_precision)
        noisy = asymmetry > 100 * op.precision or band.asymmetry > rounding
        pairs = Eigenpairs(
            values=values,
            vectors=found,
            residuals=residuals,
            converged=converged,
            which=self.which,
            size=op.size,
            num_matvecs=band.num_matvecs,
            num_restarts=self.restarts,
            missed=self.missed,
            # As `Quadrature.noise_floor`, and what LAPACK and each restart on the host add: about EPS / 2, of
            # either sign, so that this is four standard deviations.
            noise_floor=scale * (max(asymmetry, 4 * op.precision) + 2 * EPS * (1 + self.restarts) ** 0.5),
            status=Status.NOT_CONVERGED if not done else Status.NOISY if noisy else Status.CONVERGED,
        )
        return pairs, images

    def _measured(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, PyTree, float]:
        """Values, residuals, vectors and asymmetry, by a product with each vector in full precision.

        Coefficients hold for rows as they were before they were rounded to the basis' dtype: what they say of
        a residual is too small by as much. Combinations of rounded rows are vectors like any others.
        """
        band, op = self.band, self.op
        full = np.zeros((len(band.coefficients), weights.shape[1]))
        full[band.processed] = weights
        stack = stacks.stacked([band.combination(column) for column in full.T])
        images = op.mv_batch(stack)
        band.num_matvecs += weights.shape[1]
        self.bar.update(weights.shape[1])
        inner, products = (np.asarray(stacks.inner(stack, x), np.float64) for x in (stack, images))
        inverse = np.linalg.inv(np.linalg.cholesky((inner + inner.T) / 2))  # rows are orthogonal to rounding
        products = inverse @ products @ inverse.T
        values, turn = np.linalg.eigh((products + products.T) / 2)
        vectors, residuals = _turned(stack, images, jnp.asarray(turn.T @ inverse), jnp.asarray(values))
        asymmetry = float(np.abs(products - products.T).max()) / (band.scale or 1.0)
        return values, np.asarray(residuals, np.float64), vectors, asymmetry


@programs.jit
def _turned(stack: PyTree, images: PyTree, turn: jax.Array, values: jax.Array) -> tuple[PyTree, jax.Array]:
    """Combinations of vectors, and |H v - λ v| of each from the same of their images."""
    vectors, images = stacks.combine(turn, stack), stacks.combine(turn, images)

    def one(image: PyTree, value: jax.Array, vector: PyTree) -> jax.Array:
        return trees.norm(trees.axpy(-value, vector, image))

    return vectors, jax.vmap(one)(images, values, vectors)
