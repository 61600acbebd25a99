"""Probes done so far, and how to add more: the engine of `slq`, driven from the host."""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from spectra.base import arrays, draws, programs
from spectra.base.errors import Status
from spectra.base.host import Progress
from spectra.base.trees import PyTree
from spectra.density import deflation
from spectra.density.recorder import Recorder
from spectra.krylov import recurrence
from spectra.krylov.basis import sketches
from spectra.krylov.layout import Layout
from spectra.krylov.recurrence import LanczosState, Setup
from spectra.operators.accumulate import Passes
from spectra.quadrature.rules import gauss_rule, invariant_length, merged
from spectra.results import Quadrature
from spectra.runs import saver


@dataclasses.dataclass(frozen=True)
class Coefficients:
    """What the recurrence from one probe found, in float64."""

    alpha: np.ndarray  # (steps,); zeros behind the end of a run that ended by itself
    beta: np.ndarray  # (steps,)
    length: int  # steps that were run
    asymmetry: float  # as a share of the size of the products
    sketch: np.ndarray | None = None  # (steps, s) of the basis, where there is one

    @classmethod
    def of(cls, state: LanczosState, done: int, batched: bool, sketch: Any = None) -> "list[Coefficients]":
        """Those of each probe of a state, cut to the steps that were done."""
        found = {name: getattr(state, name) for name in ("alpha", "beta", "length", "asymmetry", "scale")}
        found = jax.device_get(found | ({} if sketch is None else {"sketch": sketch}))
        found = {name: np.asarray(x) if batched else np.asarray(x)[None] for name, x in found.items()}
        scale = found.pop("scale")
        lengths, shares = found.pop("length"), found.pop("asymmetry") / np.where(scale > 0, scale, 1)
        columns = {name: x[:, :done].astype(np.float64) for name, x in found.items()}
        return [
            cls(length=int(length), asymmetry=float(share), **{name: x[i] for name, x in columns.items()})
            for i, (length, share) in enumerate(zip(lengths, shares, strict=True))
        ]

    def resized(self, steps: int) -> "Coefficients":
        """The first steps; zeros follow those of a run that ended by itself."""

        def cut(column: np.ndarray) -> np.ndarray:
            return np.concatenate([column, np.zeros((steps, *column.shape[1:]))])[:steps]

        sketch = None if self.sketch is None else cut(self.sketch)
        length = min(self.length, steps)
        return Coefficients(cut(self.alpha), cut(self.beta), length, self.asymmetry, sketch)

    def of_length(self, length: int) -> "Coefficients":
        """Those of the invariant space that the first steps span; the others are zeros."""
        steps = np.arange(len(self.alpha))
        alpha, beta = np.where(steps < length, self.alpha, 0), np.where(steps < length - 1, self.beta, 0)
        return dataclasses.replace(self, alpha=alpha, beta=beta, length=length)

    def record(self) -> dict[str, Any]:
        """As a checkpoint holds it."""
        return {name: value for name, value in vars(self).items() if value is not None}


class ProbeRun:
    """Probes done so far, as rows of coefficients, and how to add more."""

    def __init__(
        self,
        setup: Setup,
        key: jax.Array,
        bar: Progress,
        *,
        size: int,
        recorder: Recorder | None = None,
        keep_basis: bool = True,
        keep_last: bool = False,
    ):
        self.keep_last, self.last = keep_last, None  # the state of the last probe, for its vectors
        self.setup, self.place, self.key, self.bar = setup, setup.place, key, bar
        device = setup.place.device
        self.at_basis = partial(jax.default_device, device) if device else contextlib.nullcontext
        self.recorder, self.keep_basis = recorder, keep_basis
        self.size, self.precision = size, setup.op.precision
        self.rows: list[Coefficients] = []
        self.chunk = recurrence.CHUNK if recorder is None else 1

    @property
    def steps_done(self) -> int:
        """Steps of the longest run so far."""
        return max((len(row.alpha) for row in self.rows), default=0)

    @property
    def num_matvecs(self) -> int:
        """Products done so far."""
        return sum(row.length for row in self.rows)

    @property
    def num_probes(self) -> int:
        """Probes done so far."""
        return len(self.rows)

    def forget(self) -> None:
        """Drop the vectors of the last probe."""
        self.keep_last, self.last = False, None

    def add(
        self,
        probes: range,
        num_steps: int,
        stop_when: Callable[[Quadrature], bool] | None = None,
        early: int = recurrence.CHUNK,
    ) -> None:
        """Run probes together, at most `CHUNK` steps a call; `stop_when` sees the quadrature so far.

        Those that a checkpoint holds with as many steps are taken from it. Without one, the first chunk may
        be looked at every `early` steps.
        """
        if self.recorder is not None:
            while probes and (row := self._recorded(probes[0], num_steps, stop_when)) is not None:
                self.rows.append(row)
                self.bar.update(row.length)
                probes = probes[1:]
            if not probes:
                return
            self.recorder.between()
        batched = len(probes) > 1
        if num_steps == 1 < self.size and not self.rows:
            self._require_symmetric()
        state, done = self._fresh(probes, num_steps, batched), 0
        if self.recorder is not None:
            state, done = self.recorder.restore(probes, state)
            self.bar.update(done * len(probes))
        while done < num_steps:
            # Chunks of any length end where the longest do: there alone is it asked whether to stop.
            every = early if done < recurrence.CHUNK else recurrence.CHUNK
            goal = min((done // every + 1) * every, num_steps)
            stop = min(done + self.chunk, goal)
            started = time.monotonic()
            state = recurrence.advance(
                self.setup,
                state,
                done,
                stop,
                batched=batched,
                passes=self._passes(probes, state, done) if stop == done + 1 else None,
            )
            self.bar.update((stop - done) * len(probes))
            steps, done = stop - done, stop
            rows = Coefficients.of(state, done, batched)
            if all(self._invariant_part(row) is not None for row in rows):
                break
            if stop_when is not None and done == goal and stop_when(self.result(rows=rows)):
                break
            if self.recorder is not None and done < num_steps:
                seconds = self.recorder.after(probes, state, done, time.monotonic() - started)
                self.chunk = int(np.clip(saver.PACE * steps / max(seconds, 1e-9), 1, recurrence.CHUNK))
        if stop_when is None:
            done = num_steps  # steps that a breakdown left out are zeros
        if self.keep_last:
            self.last = state
        sketch = None
        if state.basis:
            with self.at_basis():
                sketch = sketches(self.place.layout.anonymous(), state.basis, self.key, batched=batched)
        rows = Coefficients.of(state, done, batched, sketch)
        self.rows += rows
        if self.recorder is not None:
            self.recorder.finished(probes, [row.record() for row in rows])

    def _recorded(
        self, probe: int, num_steps: int, stop_when: Callable[[Quadrature], bool] | None
    ) -> Coefficients | None:
        """What `add` would make of a probe, if the checkpoint holds enough of it."""
        record = None if self.recorder is None else self.recorder.rows.get(probe)
        if record is None:
            return None
        row = Coefficients(**record)
        whole = self._invariant_part(row) is not None
        for goal in range(recurrence.CHUNK, num_steps, recurrence.CHUNK) if stop_when else ():
            if not whole and len(row.alpha) < goal:
                return None
            part = row.resized(goal)
            if self._invariant_part(part) is not None or (stop_when and stop_when(self.result(rows=[part]))):
                return part
        return row.resized(num_steps) if whole or len(row.alpha) >= num_steps else None

    def _passes(self, probes: range, state: LanczosState, done: int) -> Passes | None:
        """What looks at the clock inside a product that takes longer than the pace: it reads a stream."""
        recorder = self.recorder
        if recorder is None:
            return None

        def look(sums: Any, seconds: float) -> float:
            return recorder.after(probes, state, done, seconds, sums)

        sums = recorder.sums(probes, state, done)  # they are read to where the basis lies
        sums = [(count, self.place.to_operator(self.setup.op, total)) for count, total in sums]
        return Passes(sums, look, saver.PACE)

    def _require_symmetric(self) -> None:
        """Two steps of the first probe: a single one has no coefficient that symmetry makes zero."""
        state = self._fresh(range(1), 2, False)
        recurrence.advance(self.setup, state, 0, 2, batched=False)

    def _fresh(self, probes: range, num_steps: int, batched: bool) -> LanczosState:
        """The state before the first step.

        On one device the draw is a program of its own, which serves all numbers of steps: that of models with
        a hundred leaves takes XLA ten seconds. On a mesh the vectors would lie whole on one device between
        the two.
        """
        indices = np.asarray(probes if batched else probes[0], np.int32)
        options: dict[str, Any] = {"num_steps": num_steps, "batched": batched, "keep_basis": self.keep_basis}
        with self.at_basis():
            layout = self.place.layout.anonymous()
            if layout.mesh is not None:
                state = _drawn_states(layout, self.key, indices, **options)
            else:
                draw = _draw_several if batched else _draw
                state = _states(layout, draw(layout, self.key, indices), **options)
        if self.setup.deflated is None:
            return state
        return deflation.project_start(self.place.layout, self.setup.deflated, state, batched)

    def result(self, status: Status | None = None, rows: list[Coefficients] | None = None) -> Quadrature:
        """The quadratures of all probes done, or of these rows."""
        rows = self.rows if rows is None else rows
        steps, num_matvecs = max(len(row.alpha) for row in rows), sum(row.length for row in rows)
        rows = [self._invariant_part(row) or row for row in rows]
        rules = [gauss_rule(row.alpha, row.beta, row.length, row.sketch) for row in rows]
        nodes, weights, residuals = (
            np.stack([np.pad(r[i], (0, steps - r[0].size), mode=mode) for r in rules])
            for i, mode in enumerate(("edge", "constant", "constant"))
        )
        sketched = [np.pad(r[3], ((0, steps - len(r[3])), (0, 0))) for r in rules if len(r) > 3]
        asymmetry = np.array([row.asymmetry for row in rows])
        if status is None:
            exact = (residuals == 0).all()
            status = Status.INVARIANT if exact else Status.COMPLETE
        # Coefficients that symmetry makes zero are rounding: beyond ten times their natural size
        # something in the loss is rougher than its precision.
        rounding = max(100 * self.precision, self.place.layout.row_precision)
        size = float(np.abs(nodes).max())
        share = size / max(size, self.setup.norm) if size > 0 else 1.0
        if asymmetry.max() * share > rounding * np.sqrt(steps):
            status = Status.NOISY
        found = Quadrature(
            nodes=nodes,
            weights=weights,
            residuals=residuals,
            lengths=np.array([row.length for row in rows]),
            asymmetry=asymmetry,
            size=self.size,
            num_matvecs=num_matvecs,
            precision=self.precision,
            status=status,
            sketches=np.stack(sketched).astype(np.float32) if len(sketched) == len(rules) else None,
        )
        if self.keep_basis:
            return found
        resized = (row.resized(steps) for row in rows)
        return merged(found, np.stack([np.stack([row.alpha, row.beta]) for row in resized]))

    def coefficients(self, probe: int) -> tuple[np.ndarray, np.ndarray]:
        """α and β of the steps of a probe; those behind an invariant space are zeros."""
        row = self._invariant_part(self.rows[probe]) or self.rows[probe]
        return row.alpha, row.beta

    def _invariant_part(self, row: Coefficients) -> Coefficients | None:
        """What a run did within the invariant space that it went through; None if it went through none."""
        numbers = row.alpha, row.beta, row.length
        length = invariant_length(*numbers, self.size, self.precision, orthogonal=self.keep_basis)
        return None if length is None else row.of_length(length)


def _draw(layout: Layout, key: jax.Array, index: Any) -> PyTree:
    return draws.sphere_sample(jax.random.fold_in(key, index), layout.structure)


@partial(programs.jit, static_argnames="layout")
def _draw_several(layout: Layout, key: jax.Array, indices: arrays.Indices) -> PyTree:
    return jax.vmap(partial(_draw, layout, key))(indices)


@partial(programs.jit, static_argnames=("layout", "num_steps", "batched", "keep_basis"))
def _states(layout: Layout, draws: Any, num_steps: int, batched: bool, keep_basis: bool) -> LanczosState:
    one = partial(recurrence.init, layout, num_steps=num_steps, keep_basis=keep_basis)
    return (jax.vmap(one) if batched else one)(draws)


@partial(programs.jit, static_argnames=("layout", "num_steps", "batched", "keep_basis"))
def _drawn_states(
    layout: Layout, key: jax.Array, indices: arrays.Indices, num_steps: int, batched: bool, keep_basis: bool
) -> LanczosState:
    def one(index: arrays.Indices) -> LanczosState:
        return recurrence.init(layout, _draw(layout, key, index), num_steps, keep_basis=keep_basis)

    return (jax.vmap(one) if batched else one)(indices)
