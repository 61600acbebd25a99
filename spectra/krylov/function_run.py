"""One call of `funm`: blocks of vectors one after another, what is done of them, and where it is saved."""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import host, programs, stacks, trees
from spectra.base.errors import SpectraError, Status
from spectra.base.host import Progress
from spectra.base.trees import PyTree
from spectra.krylov import storage
from spectra.krylov.band import Band
from spectra.krylov.band_block import extend_block
from spectra.krylov.cancelled import size_before
from spectra.krylov.function_bounds import (
    Function,
    Named,
    Range,
    around,
    extended,
    inside,
    rounding,
    truncation,
    undefined,
)
from spectra.krylov.layout import BasisPlace, Layout
from spectra.krylov.linear_block import LOST, WIDEST, orthonormal
from spectra.krylov.recurrence import CHUNK
from spectra.krylov.same_function import digest, on_spectrum
from spectra.operators.base import LinearOperator
from spectra.quadrature.rules import breakdown_noise
from spectra.runs import saver as _saver
from spectra.runs.saver import Saver

ROWS = 1024
"""Of the basis of a block, at most: the eigenproblem of so many takes the host half a second."""
LEAST = -900
"""Exponent of two of the unit of f, at least: elsewhere f may be far larger than at the Ritz values."""
MEMORY = 0.5
"""Share of the free memory that the basis of a block may fill; a single vector's may fill more."""


def width_of(count: int, steps: int) -> int:
    """Vectors in one block, of `count`."""
    return min(count, WIDEST, max(1, ROWS // steps))


@dataclasses.dataclass(frozen=True)
class Found:
    """f(H) v of one vector."""

    value: PyTree
    error: float
    status: Status


class FunctionRun:
    """The blocks of one call; `op` is prepared by the caller.

    Args:
        op: the operator.
        named: the function.
        name: of the function.
        steps: Lanczos steps of a block, at most.
        tol: as in `funm`.
        bar: shows the products.
        saver: where the run is saved, if it is.
        measured: what rounding does to products, in units of |H|, or 0 where that is only stated.
    """

    def __init__(
        self,
        op: LinearOperator,
        named: Named,
        name: str,
        steps: int,
        tol: float,
        bar: Progress,
        saver: Saver | None,
        measured: float = 0.0,
    ):
        self.measured = measured
        self.op, self.named, self.name, self.steps, self.tol = op, named, name, steps, tol
        self.bar, self.saver, self.layout = bar, saver, Layout.of(op.like)
        self.before = size_before(op)
        self.known: Range | None = None
        self.found: list[Found] = []
        self.theta: list[list[float]] = []  # Ritz values that `found` are made of, of each block
        self.width = 0  # of a block
        self.products = 0  # of the blocks that are done
        self.longest = 0  # steps of a block
        self.flight: dict[str, Any] | None = None  # of the block under way, where it was saved
        self.part = CHUNK if saver is None else 1  # steps between two looks at the clock

    def values(self, vectors: PyTree, known: Range) -> None:
        """f(H) v of those vectors of a stack that are not done."""
        count = stacks.length(vectors)
        # As wide as before, since the free memory may have changed.
        self.width = self.width or min(width_of(count, self.steps), self._fitting())
        while len(self.found) < count:
            start = len(self.found)
            block = stacks.rows(vectors, start, min(start + self.width, count))
            self.found += self._block(block, known)
        self.save(None)

    def _fitting(self) -> int:
        free = host.available_bytes(self.op.device)
        bytes_of_one = (self.steps + 1) * self.layout.device_bytes()
        return WIDEST if free is None else max(1, int(MEMORY * free) // bytes_of_one)

    def _block(self, vectors: PyTree, known: Range) -> list[Found]:
        """f(H) v of the vectors of one block, which share a basis."""
        q, sizes, z = split(vectors)
        sizes, z = np.asarray(sizes, np.float64), np.asarray(z, np.float64)
        kept = np.flatnonzero(np.diagonal(z))
        if not len(kept):
            return [Found(v, 0.0, Status.INVARIANT) for v in stacks.split(vectors)]
        band = Band(self.op, BasisPlace(self.layout), min((self.steps + 1) * len(kept), self.op.size))
        done = self._begin(band)
        if not done:
            band.generation = len(self.found)  # the items of each block have names of their own
            for i in kept.tolist():
                band.append(stacks.row(q, i))
        step, done = self._until_reached(band, done, z[kept], sizes, known)
        self.products, self.longest = self.products + band.num_matvecs, max(self.longest, done)
        self.theta.append(step.theta.tolist())
        errors = step.truncation + step.rounding
        if len(kept) < len(sizes):
            # Of a vector that depends on others, so much may have been left out.
            lost = LOST * float(jnp.finfo(self.op.dtype).eps) * step.largest
            errors += np.where((np.diagonal(z) == 0) & (sizes > 0), lost, 0)
        # Of the value and of the parts that it is the sum of, devices take for zero what is below this.
        flushed = np.where(sizes > 0, 2 * np.sqrt(self.op.size) * float(jnp.finfo(self.op.dtype).tiny), 0)
        full = np.zeros((len(band.coefficients), len(sizes)))
        full[band.processed] = sizes * step.coefficients
        ended = [Status.CONVERGED if one else Status.BUDGET_EXHAUSTED for one in step.reached(self.tol)]
        return [
            Found(band.combination(column), float(error), status if band.pending else Status.INVARIANT)
            for column, error, status in zip(full.T, sizes * errors + flushed, ended, strict=True)
        ]

    def _until_reached(
        self, band: Band, done: int, z: np.ndarray, sizes: np.ndarray, known: Range
    ) -> tuple["_Step", int]:
        """The last look, and the steps: until all errors are below the tolerance, or no step is left."""
        while True:
            goal = _look(done, self.steps, len(z))
            # Parts of any length end where the longest do: there alone is it asked whether to stop.
            while done < goal and band.pending:
                done = self._advance(band, done, min(done + self.part, goal), len(z))
            step = self._at(band, z, sizes, known)
            self.bar.note(f"error {np.max(step.truncation / np.where(step.norms > 0, step.norms, 1)):.1e}")
            if step.reached(self.tol).all() or done == self.steps or not band.pending:
                return step, done
            if done == goal:
                done = self._advance(band, done, done + 1, len(z))

    def _at(self, band: Band, z: np.ndarray, sizes: np.ndarray, known: Range) -> "_Step":
        """What the basis as it is gives, for vectors of norm one."""
        theta, vectors, coupling, _ = band.ritz()
        noise = breakdown_noise(self.op.size, self.op.precision)
        rounded = max(noise * max(known.norm, self.before), self.measured * known.norm)
        theta = inside(theta, self.named, self.name, known, rounded, self.op)
        f: Function = self.named.real
        first = vectors[: len(z)].T @ z  # the vectors are in the span of the first rows
        values = self._values(f, theta, rounded, float(sizes.max()))
        rounded = max(rounded, self.named.real.rounding * known.norm)
        unit = 2.0 ** max(int(np.frexp(np.abs(values).max())[1]) - 1, LEAST)
        values, f = values / unit, _divided(f, unit)
        coefficients = vectors @ (values[:, None] * first)
        norms = np.linalg.norm(coefficients, axis=0)
        intervals = extended(known.intervals, theta)
        if len(theta) == self.op.size:
            intervals = around(theta, rounded, intervals[0][0], intervals[-1][1])
        moved, largest = rounding(f, theta, first, intervals, rounded)
        # Neither f(H) v nor the value is longer than |f| allows.
        bounds = np.minimum(
            truncation(f, theta, first, coupling, intervals), largest * np.linalg.norm(first, axis=0) + norms
        )
        moved += (noise + self.named.real.rounding) * norms
        with np.errstate(over="ignore"):
            return _Step(
                theta, coefficients * unit, norms * unit, bounds * unit, moved * unit, largest * unit
            )

    def _values(
        self, f: Callable[[np.ndarray], np.ndarray], theta: np.ndarray, noise: float, size: float
    ) -> np.ndarray:
        """f at the Ritz values, refused where it is not finite or leaves the range of the dtype."""
        values = f(theta)
        if not np.isfinite(values).all():
            raise undefined(self.name, float(theta[~np.isfinite(values)][0]), noise)
        if np.abs(values).max() > float(jnp.finfo(self.op.dtype).max) / size:
            raise SpectraError(
                f"{self.name} reaches {np.abs(values).max():.1e} on the spectrum, beyond {self.op.dtype}."
            )
        return values

    def _advance(self, band: Band, start: int, stop: int, width: int) -> int:
        """Steps start..stop-1; then the run is saved where it is time to, and ended where it was asked to."""
        began, before = time.monotonic(), band.num_matvecs
        done = start + extend_block(band, stop - start, width)
        self.bar.update(band.num_matvecs - before)
        if self.saver is not None:
            products = self.products + band.num_matvecs
            signal, due, seconds = self.saver.due(products, time.monotonic() - began)
            self.part = int(np.clip(_saver.PACE * (stop - start) / max(seconds, 1e-9), 1, CHUNK))
            if due:
                self.save(band, done)
            self.saver.end(signal, f"after {products} products")
        return done

    def _begin(self, band: Band) -> int:
        """The steps of the block under way, and its rows in the band: as saved, or none."""
        flight, self.flight = self.flight, None
        if self.saver is None or flight is None or not flight["done"]:
            return 0
        items = {name: digest for name, digest in flight["items"].items() if not _is_value(name)}
        if not storage.fill(self.saver, band, flight["band"], items):
            return 0
        self.saver.flight = flight
        self.bar.update(band.num_matvecs)
        return flight["done"]

    def save(self, band: Band | None, done: int = 0) -> None:
        """Write what is new: values, and the rows of the block under way if there is one."""
        if self.saver is None or self.known is None:
            return
        items: dict[str, Callable[[], PyTree]] = {}
        for i, one in enumerate(self.found):
            items[_value_name(i)] = partial(jax.tree.leaves, one.value)
        flight: dict[str, Any] = {"known": dataclasses.asdict(self.known), "done": done, "band": None}
        flight |= {name: getattr(self, name) for name in COUNTS}
        flight["found"] = [[one.error, one.status.name] for one in self.found]
        flight["theta"] = self.theta
        flight["f"] = digest(self.named.real, on_spectrum(self.known.intervals, self.theta))
        if band is not None:
            rows, flight["band"] = storage.band_items(band)
            items |= rows
        self.saver.write(items, flight, self.products + (band.num_matvecs if band else 0))

    def restore(self) -> None:
        """Take over what was saved, by the newest record whose values can be read.

        Raises:
            CheckpointError: they are of another function.
        """
        if self.saver is None:
            return
        for record in self.saver.saved:
            flight = record["flight"]
            if not flight or not self._values_read(flight):
                continue
            self.theta = flight.get("theta", [])  # an older version kept none
            points = on_spectrum(flight["known"]["intervals"], self.theta)
            if flight.get("f") not in (None, digest(self.named.real, points)):
                self.saver.refuse(["f"])
            self.flight, self.known = flight, Range(**flight["known"])
            for name in COUNTS:
                setattr(self, name, flight[name])
            # What is damaged of the block under way counts as not written, until it is found to be whole.
            values = {name: digest for name, digest in flight["items"].items() if _is_value(name)}
            self.saver.flight = flight | {"items": values}
            self.saver.saved_step = self.products + (flight["band"] or {"num_matvecs": 0})["num_matvecs"]
            self.bar.update(self.known.products + self.products)
            return

    def _values_read(self, flight: dict[str, Any]) -> bool:
        """Whether the values that a record names could be read."""
        assert self.saver is not None
        found: list[Found] = []
        (like,) = storage.vectors_of(self.layout, 1, jnp.zeros((), device=self.op.device))
        for i, (error, status) in enumerate(flight["found"]):
            name = _value_name(i)
            leaves = self.saver.item(name, like, flight["items"][name])
            if leaves is None:
                return False
            found.append(Found(self.layout.treedef.unflatten(leaves), error, Status[status]))
        self.found = found
        return True


COUNTS = ("width", "products", "longest")
"""Of a run, what a checkpoint holds besides values and rows."""


@dataclasses.dataclass(frozen=True)
class _Step:
    """Values and bounds at a time, for s vectors of norm one and a basis of m rows."""

    theta: np.ndarray  # (m,) Ritz values
    coefficients: np.ndarray  # (m, s) of f(H) v on the rows
    norms: np.ndarray  # (s,) |f(H) v|
    truncation: np.ndarray  # (s,) bounds on the error of the approximation
    rounding: np.ndarray  # (s,)
    largest: float  # |f| on the spectrum

    def reached(self, tol: float) -> np.ndarray:
        """Whether the error of each is below the tolerance."""
        return self.truncation <= tol * self.norms


def _divided(f: Callable[[np.ndarray], np.ndarray], unit: float) -> Callable[[np.ndarray], np.ndarray]:
    """f in a unit, a power of two: no square of its values is then too large or too small for float64."""

    def values(x: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            return f(x) / unit

    return values


def _value_name(i: int) -> str:
    return f"item-{i:05d}-value"


def _is_value(name: str) -> bool:
    return name.endswith("-value")


def _look(done: int, steps: int, width: int) -> int:
    """The first step, `done` at least, after which to look at the error: more of them make a look longer."""
    look = 0
    while look < max(done, 1):
        look = min(look + max(CHUNK // width, look // 8, 2), steps)
    return look


@programs.jit
def split(vectors: PyTree) -> tuple[PyTree, jax.Array, jax.Array]:
    """Orthonormal rows Q, the norms of the vectors, and Z with vectors = norms Zᵀ Q; see `orthonormal`."""
    sizes = jax.vmap(trees.norm)(vectors)
    q, z = orthonormal(jax.vmap(trees.scale)(jnp.where(sizes > 0, 1 / sizes, 0), vectors))
    return q, sizes, z
