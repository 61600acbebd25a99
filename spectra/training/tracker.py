"""Record how the spectrum moves while a network trains."""

import dataclasses
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import draws, host, programs, trees
from spectra.base.calls import automatic, checked, require_key
from spectra.base.errors import SpectraError, warn_user
from spectra.base.meshes import on_automatic_axes
from spectra.base.trees import PyTree
from spectra.density.extremes import LEVEL, extreme
from spectra.density.slq import slq
from spectra.krylov.eigsh import eigsh
from spectra.krylov.floors import relative_change
from spectra.krylov.product_rounding import is_measured, seen_change
from spectra.operators.base import LinearOperator, require_operator
from spectra.quadrature.christoffel import shift
from spectra.report.growing import HistoryFile
from spectra.report.histories import read
from spectra.report.provenance import environment
from spectra.report.spectrum import trace_estimate
from spectra.results import Eigenpairs, Interval, Quadrature, Snapshot, SpectrumHistory
from spectra.training.console import Console, Measure, number, steps_of

FRESH = 0.5
"""Random vector in the start of the next search, in units of `tol`: too little to cost a product, and what
lets the search leave an invariant space. An eigenvalue that has overtaken is found by the probes."""
ROUGH = 4.0
"""Asymmetry, in units of the stated precision of products, from which their rounding is measured: a loss that
subtracts what is nearly equal, as that of a classifier which is sure of its examples, loses far more than
its asymmetry in a few steps shows."""
ASSUMED = 256.0
"""Rounding of a loss's products that is not measured, in the same units, of which bounds allow four times as
much. Of 3,400 snapshots of small classifiers (tanh, ReLU and GELU networks of 1 to 9 hidden layers, a CNN, a
transformer block; untrained to a loss of 1e-4) whose products are as symmetric as stated, an eigenvalue was
up to 454 of these off, deep networks being rounded most: by more than 64 in 10 % of those of the transformer
block."""
COARSE = 1e-3
"""Share of |H| above which rounding is measured, too, and not assumed: as of a network in bfloat16."""
SAME_RUN = 0.01
"""By which numbers of one step differ at most where a run goes on: sums in another order change a loss by
less, also after some hundred steps."""
OUTSIDE = "the tracker works on the host: call it in the training loop, outside jit, grad and scan."


class SpectrumTracker:
    """A hook for a training loop that records sharpness, density and trace during training.

    Three lines in a loop of Flax, optax or anything else:

        tracker = spectra.SpectrumTracker(lambda params: spectra.HessianOperator(loss_fn, params, batch),
                                          every=100, path="run/spectrum.jsonl")
        for step, data in enumerate(loader):
            params, state, loss = train_step(params, state, data)
            tracker(step, params, loss=loss)

    The operator is rebuilt from the parameters each time, but its functions stay the same, so nothing is
    compiled after the first snapshot. A snapshot computes the k largest eigenvalues by Lanczos from the last
    eigenvectors (one to three products if they change slowly) and one short quadrature with the same probes
    each time, so that changes come from the spectrum and not from the sample. Calls between snapshots only
    compare two integers.

    Args:
        op_factory: function that returns an operator, given the arguments of the tracker's call (parameters,
            an nnx state, parameters and optimizer state, ...). Its `loss_fn` and data should be the same
            objects each time.
        every: steps between snapshots; one is taken if `step % every == 0`.
        path: a `.jsonl` file to which every snapshot is appended, on disk before the call returns, and which
            `spectra.load` can read during the run. An existing file is continued: steps that it contains are
            not recorded again, with a warning where a number passed along (`loss=`, `learning_rate=`) differs
            from the one there by more than 1 %, as in another run. If the disk is full, there is a warning,
            training continues, and the snapshots are written when there is space again. None: keep the
            history in memory only.
        key: JAX random key of the probes; default key(0).
        num_eigenvalues: k.
        tol: residual of the eigenvalues in units of |H|. They are accurate to tol² |H|² / gap.
        num_steps: Lanczos steps of the quadrature. 8 give the trace, the shape of the density and a bound on
            the smallest eigenvalue, marked as a bound until it has converged; use 40 or more for details of
            the density and for the smallest eigenvalue.
        num_probes: probes of the quadrature.
        budget: largest share of training time that snapshots may take, for example 0.1. A snapshot that would
            exceed it, judged by the cost of the last one, is skipped; the first, which compiles, is not
            counted. None: take every snapshot.
        callbacks: functions called with each `Snapshot`.
        name: name of the operator in the history.
        measures: further quantities at their own intervals, {name: (every, function)}: the function takes the
            arguments of the tracker's call and returns something that `float()` accepts, such as
            `critical_sharpness`, `gradient_noise_scale` or `stable_step`. They share the budget;
            `tracker.console` holds all readings, and each snapshot the latest of each among its scalars.
        warn_below: {name: limit}: warn when a reading falls below its limit, such as 1 for `stable_step`.
        warn_ahead: also warn if the trend of the latest readings falls below the limit within this many
            steps. Sudden events (a jump in the learning rate, one bad batch) have no trend.

    Raises:
        SpectraError: every, budget, k, tol or a measure out of range, or no file can be written at `path`.
        NonFiniteError: the loss or a product is NaN or infinite: training has diverged.

    Cost: num_steps num_probes + about 2 k products per snapshot, each 1 to 2 gradients of the loss over
    the data of the operator, so use a fixed subset of a large data set. Seven or eight more measure
    rounding where products contradict symmetry by more than their precision explains, as in float32 for a
    classifier that is sure of its examples, and where the network computes in less than float32. What
    rounding hides from all products is sought by two, at first and wherever |H| has halved.
    `tracker.history.cost` is the measured share of training time.

    References:
        Cohen, Kaur, Li, Kolter and Talwalkar, arXiv:2103.00065.

    Examples:
        >>> import jax, jax.numpy as jnp, optax, spectra
        >>> def loss_fn(params, batch):
        ...     x, y = batch
        ...     return jnp.mean((jnp.tanh(x @ params["w1"]) @ params["w2"] - y) ** 2)
        >>> x = jax.random.normal(jax.random.key(0), (50, 4))
        >>> batch = (x, x[:, 0])
        >>> params = {"w1": jax.random.normal(jax.random.key(1), (4, 16)), "w2": jnp.ones(16) / 4}
        >>> optimizer = optax.sgd(0.05)
        >>> state = optimizer.init(params)
        >>> tracker = spectra.SpectrumTracker(
        ...     lambda params: spectra.HessianOperator(loss_fn, params, batch), every=10)
        >>> for step in range(31):
        ...     snapshot = tracker(step, params)
        ...     updates, state = optimizer.update(jax.grad(loss_fn)(params, batch), state)
        ...     params = optax.apply_updates(params, updates)
        >>> tracker.history.steps
        array([ 0, 10, 20, 30])

        TensorBoard (`writer` of `tensorboardX` or `torch.utils.tensorboard`) and Weights & Biases:

            SpectrumTracker(..., callbacks=[lambda s: writer.add_scalar("sharpness", s.sharpness, s.step)])
            SpectrumTracker(..., callbacks=[lambda s: wandb.log({"sharpness": s.sharpness}, step=s.step)])
    """

    @checked
    def __init__(
        self,
        op_factory: Callable[..., LinearOperator],
        every: int = 100,
        *,
        path: str | os.PathLike | None = None,
        key: jax.Array | None = None,
        num_eigenvalues: int = 1,
        tol: float = 1e-2,
        num_steps: int = 8,
        num_probes: int = 1,
        budget: float | None = None,
        callbacks: Iterable[Callable[[Snapshot], Any]] = (),
        name: str = "H",
        measures: Mapping[str, tuple[int, Measure]] | None = None,
        warn_below: Mapping[str, float] | None = None,
        warn_ahead: int = 0,
    ):
        if not callable(op_factory):
            raise SpectraError(f"op_factory is a {type(op_factory).__name__}; pass a function of the params.")
        if budget is not None and not budget > 0:
            raise SpectraError(f"budget={budget} is a share of training time: use a positive number.")
        callbacks = tuple(callbacks) if isinstance(callbacks, Iterable) else (callbacks,)
        if not all(map(callable, callbacks)):
            raise SpectraError(f"callbacks={callbacks!r:.80}: pass a list of functions of a Snapshot.")
        for what, count in {
            "num_eigenvalues": num_eigenvalues,
            "num_steps": num_steps,
            "num_probes": num_probes,
        }.items():
            if count < 1:
                raise SpectraError(f"{what}={count}: use a positive number.")
        if not 0 <= tol < 1:
            raise SpectraError(f"tol={tol} is a residual in units of |H|: use a number in [0, 1).")
        self.op_factory, self.every = op_factory, steps_of("every", every)
        self.budget, self.name = budget, name
        self.key = on_automatic_axes(jax.random.key(0) if key is None else require_key(key))
        self.num_eigenvalues, self.tol = num_eigenvalues, tol
        self._hidden, self._looked = False, math.inf  # |H| where that was looked at, see `_hides`
        self.num_steps, self.num_probes = num_steps, num_probes
        self.callbacks = callbacks
        self.console = Console(measures, warn_below, warn_ahead)
        self._history, self._file = _continued(path, name)
        self._doubted = False  # whether there was a warning that the history is of another run
        self._lock = threading.RLock()  # one file, and each snapshot starts from the last one
        self._vectors: PyTree = None  # the leading eigenvectors of the last snapshot
        self._start: float | None = None  # when training began, moved on by the time of each snapshot
        self._before = max((s.trained for s in self._history), default=0.0)  # in the run continued
        self._seconds = self._cost = 0.0  # of all snapshots but the first; of the last

    @property
    def history(self) -> SpectrumHistory:
        """All snapshots so far, including those of a file that was continued."""
        return self._history

    @automatic
    def __call__(self, step: int | jax.Array, *state: PyTree, **scalars: Any) -> Snapshot | None:
        """Take a snapshot if one is due at this step.

        Args:
            step: number of the training step.
            *state: arguments of `op_factory`.
            **scalars: numbers to record with it, such as `loss=` or `learning_rate=`; None is none.

        Returns:
            The snapshot, or None.
        """
        step = _step(step)
        with self._lock:
            if self._start is None:
                self._start = time.perf_counter()
            self._measure(step, state)
            if step % self.every:
                return None
            if (known := next((s for s in self._history if s.step == step), None)) is not None:
                self._compare(known, scalars)
                return None
            if trees.is_traced(state):
                raise SpectraError(OUTSIDE)
            jax.block_until_ready(state)  # what is still being trained is not the snapshot's time
            now = time.perf_counter()
            trained = now - self._start
            if self._vectors is not None and self._exceeds_budget(trained, self._cost):
                self._skip(step)
                return None
            first = self._vectors is None
            told = {name: number(f"{name}=", x) for name, x in scalars.items() if x is not None}
            snapshot = self._take(step, state, self.console.latest() | told, trained + self._before, now)
            self._record(snapshot)
            cost = time.perf_counter() - now
            self._start += cost
            if not first:
                self._seconds, self._cost = self._seconds + cost, cost
            return snapshot

    def _compare(self, known: Snapshot, scalars: Mapping[str, Any]) -> None:
        """Warn where a step that is in the history already was of another run, as its numbers tell."""
        for name, x in scalars.items():
            if self._doubted or x is None or name not in known.scalars:
                continue
            now, then = number(f"{name}=", x), known.scalars[name]
            if math.isclose(now, then, rel_tol=SAME_RUN) or (math.isnan(now) and math.isnan(then)):
                continue
            self._doubted = True
            where = "the history" if self._file is None else f"'{self._file.path}'"
            warn_user(
                f"step {known.step} is in {where} already and is not recorded again, but {name} was "
                f"{then:.5g} there and is {now:.5g} now. A history continues one run: give another run a "
                "tracker and a path of its own.",
            )

    def _measure(self, step: int, state: tuple) -> None:
        """The measures that are due, as far as the budget goes."""
        assert self._start is not None
        for name in self.console.due(step):
            jax.block_until_ready(state)
            began, cost = time.perf_counter(), self.console.cost(name)
            if cost is not None and self._exceeds_budget(began - self._start, cost):
                self.console.left_out[name] += 1
                continue
            self.console.take(name, step, state, time.perf_counter)
            self._start += time.perf_counter() - began

    def _take(
        self, step: int, state: tuple, scalars: dict[str, float], trained: float, began: float
    ) -> Snapshot:
        op = self.op_factory(*state)
        require_operator(op)
        whole, op = op, op.prepare()  # once for both runs
        quadrature = slq(op, key=self.key, num_steps=min(self.num_steps, op.size), num_probes=self.num_probes)
        if is_measured(whole) and any(quadrature.range):
            assumed = ASSUMED * quadrature.precision
            rough = float(np.max(quadrature.asymmetry)) > ROUGH * quadrature.precision
            rough = self._hides(whole, op, quadrature, assumed) or rough
            least = max(quadrature.rounding, assumed if assumed <= COARSE else 0.0)
            rounding = relative_change(whole) if rough or assumed > COARSE else 0.0
            quadrature = dataclasses.replace(quadrature, rounding=max(least, rounding))
        pairs, products = self._leading(op, step, quadrature)
        largest, value = extreme(quadrature, -1), float(pairs.values[-1])
        if value > largest.estimate:  # a Rayleigh quotient too: it raises the bound, not the limit
            moved = shift(quadrature)
            largest = Interval(value - moved, value, max(largest.upper, value + moved))
        return Snapshot(
            step=step,
            eigenvalues=np.asarray(pairs.values, float)[::-1],
            residuals=np.asarray(pairs.residuals, float)[::-1],
            largest=largest,
            smallest=extreme(quadrature, 0),
            trace=trace_estimate(quadrature),
            quadrature=quadrature,
            scalars=scalars,
            num_matvecs=quadrature.num_matvecs + products,
            seconds=time.perf_counter() - began,
            trained=trained,
            level=LEVEL,
        )

    def _hides(self, op: LinearOperator, here: LinearOperator, seen: Quadrature, assumed: float) -> bool:
        """Whether rounding may hide an eigenvalue from all products, as 1 - p of an example that is sure.

        That is looked at by one product, and one in float64, at first, where |H| has halved since, and for as
        long as it is so.
        """
        size = max(map(abs, seen.range))
        if not self._hidden and size > self._looked / 2:
            return False
        found, self._looked = seen_change(op, here), size
        self._hidden = found is not None and found[0] > assumed * size
        return self._hidden

    def _leading(self, op: LinearOperator, step: int, seen: Quadrature) -> tuple[Eigenpairs, int]:
        """The largest eigenpairs and what they cost, from the last vectors or else from a random one.

        A Ritz value of the probes above what was found is a direction that the last vectors did not reach.
        """
        key = jax.random.fold_in(self.key, step % 2**32)  # of a count of tokens, which may be longer
        k = min(self.num_eigenvalues, op.size)
        options = {"which": "LA", "tol": self.tol, "num_basis": min(2 * k + 10, op.size), "verify": False}
        fresh = draws.unit_vector(key, op)
        first = not _are_like(self._vectors, fresh)  # also of a network that has grown since
        if first:
            self._vectors = jax.tree.map(lambda x: jnp.broadcast_to(0 * x, (k, *x.shape)), fresh)
        start = _start(self._vectors, fresh, 1.0 if first else FRESH * self.tol)
        pairs = eigsh(op, k, key=key, v0=start, **options)
        products = pairs.num_matvecs
        if not first and seen.range[1] > pairs.values[-1] + pairs.residuals[-1]:
            pairs = eigsh(op, k, key=key, v0=fresh, **options)
            products += pairs.num_matvecs
        self._vectors = pairs.vectors
        return pairs, products

    def _exceeds_budget(self, trained: float, cost: float) -> bool:
        """Whether what costs so many seconds would exceed the share of training time."""
        if self.budget is None:
            return False
        spent = self._seconds + self.console.seconds
        spent, cost, trained = host.largest(spent, cost, trained)  # one clock for all
        return spent + cost > self.budget * trained

    def _skip(self, step: int) -> None:
        if not self._history.skipped:
            spent = self._seconds + self.console.seconds
            one = f"a snapshot costs {self._cost:.3g} s, " if self._cost else ""  # unknown after the first
            warn_user(
                f"the snapshot of step {step} is left out: snapshots and measures have taken {spent:.3g} s, "
                f"{one}and budget={self.budget} allows that share of training time. The "
                "next ones are taken as soon as it allows them; history.skipped lists those left out. A "
                "smaller part of the data, fewer num_steps or a larger `every` make room.",
            )
        known, repeated = self._history, step in self._history.skipped
        self._history = known.of(known.snapshots, known.provenance, (*known.skipped, step))
        if self._file is not None and not repeated:
            self._file.skip(step)

    def _record(self, snapshot: Snapshot) -> None:
        known = self._history
        self._history = known.of((*known.snapshots, snapshot), known.provenance, known.skipped)
        if self._file is not None:
            self._file.add(snapshot)
        for callback in self.callbacks:
            callback(snapshot)


def _step(step: Any) -> int:
    """The number of a training step."""
    if isinstance(step, int):
        return int(step)
    if trees.is_tracer(step):
        raise SpectraError(OUTSIDE)
    found = number("step", step)
    if not found.is_integer():
        raise SpectraError(f"step={step!r} is not the number of a training step.")
    return int(found)


def _continued(path: str | os.PathLike | None, name: str) -> tuple[SpectrumHistory, HistoryFile | None]:
    """The history in a file, if there is one, and the file, if this process writes it."""
    empty = SpectrumHistory((), {"name": name, **environment()})
    if path is None:
        return empty, None
    if host.is_first():
        file = HistoryFile(path, empty.provenance)
        return file.history, file
    return (read(Path(path)) if os.path.exists(path) else empty), None


def _are_like(vectors: PyTree, one: PyTree) -> bool:
    """Whether vectors, leading axis first, are of the space of one."""
    leaves, others = jax.tree.leaves(vectors), jax.tree.leaves(one)
    if jax.tree.structure(vectors) != jax.tree.structure(one):
        return False
    return all(x.shape[1:] == y.shape for x, y in zip(leaves, others, strict=True))


@programs.jit
def _start(vectors: PyTree, fresh: PyTree, share) -> PyTree:
    """The sum of the last vectors, over the root of their number, and a share of a random one."""
    unit = 1 / len(jax.tree.leaves(vectors)[0]) ** 0.5
    return jax.tree.map(lambda x, f: (unit * x.sum(axis=0) + share * f).astype(x.dtype), vectors, fresh)
