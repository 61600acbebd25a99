"""Functions of an operator applied to vectors, by Lanczos, with a bound on the error."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import arrays, stacks, trees
from spectra.base.errors import NonFiniteError, SpectraError, Status
from spectra.base.files import tree_digest
from spectra.base.meshes import automatic
from spectra.base.progress import Progress
from spectra.base.trees import PyTree
from spectra.krylov import basis as _basis
from spectra.krylov import storage
from spectra.krylov.function_bounds import (
    Named,
    Range,
    eigh,
    extended,
    given_intervals,
    inside,
    named_function,
    on_reals,
    rounding,
    truncation,
    undefined,
)
from spectra.krylov.lanczos import lanczos
from spectra.krylov.layout import Layout, stacked
from spectra.krylov.recurrence import CHUNK, LanczosState, advance, check_steps, init
from spectra.krylov.rows import sum_of_rows
from spectra.operators.arithmetic import outside_loops
from spectra.operators.base import LinearOperator, require_operator
from spectra.quadrature.copies import breakdown_noise, invariant_length
from spectra.results import FunctionProduct
from spectra.runs import saver as _saver
from spectra.runs.checkpoint import Checkpoint
from spectra.runs.saver import Saver
from spectra.runs.watch import watched

POINTS = np.concatenate([-np.geomspace(1e-6, 1e6, 25), [0.0], np.geomspace(1e-6, 1e6, 25)])
"""Where a function is evaluated to tell whether a checkpoint is of the same one."""
STEPS = 128
"""Lanczos steps at most where num_steps is not given."""
TRACED_STEPS = 64


@automatic
def funm(
    op: LinearOperator,
    f: str | Callable[[np.ndarray], Any],
    v: PyTree,
    *,
    num_steps: int | None = None,
    tol: float = 1e-5,
    bounds: Any = None,
    key: jax.Array | None = None,
    progress: bool = False,
    checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
) -> FunctionProduct:
    """Compute f(H) v by Lanczos, with a bound on the error.

    The value is |v| Q f(T) e_1 after m steps from v, exact for polynomials of degree m - 1. The error is |v|
    β g(H) q with a known function g (`spectra.krylov.function_bounds`), so it is at most |v| β max |g| over
    the spectrum; steps are taken until that is below tol |value|.

    **What the bound rests on.** It needs a set that contains the spectrum. With both ends in `bounds` it is
    certain, up to the variation of g between 1,500 samples. Ends that are not given are found by 40 Lanczos
    steps from a random vector, and hold with probability 1 - 1e-6 each (Kuczynski and Wozniakowski); an
    operator that is positive semi-definite by construction needs none below zero. The lower end matters where
    f has a pole or a branch point there: 1/x, log and 1/sqrt are bounded only if the spectrum is known to
    stay away from zero, so pass `bounds=(shift, None)` for a damped operator. For "sign" and "abs" pass two
    intervals, on both sides of zero: between them f needs no approximation. The effect of rounding in the
    products is added.

    Args:
        op: symmetric operator of order n.
        f: "exp", "log", "sqrt", "inv_sqrt", "inv", "sign", "abs", or a vectorised NumPy function of real
            numbers; inside jit, of JAX.
        v: a vector, a pytree like the parameters or a flat array (n,); or several, as the columns of an (n,
            k) array or with a leading axis.
        num_steps: maximum number of Lanczos steps; default 128, or n.
        tol: accepted error relative to |f(H) v|; 0 takes all steps.
        bounds: (a, b) that contain the spectrum, None for an unknown end; or several such intervals.
        key: JAX random key for the ends of the spectrum; default jax.random.key(0).
        progress: show the number of products, and the error of the current vector.
        checkpoint: a folder, or a `Checkpoint`, to save the run in: finished values, and the basis of the
            current one. The same call resumes from there, with bit-identical results on the same devices.
            The first save comes after the products for the ends of the spectrum.

    Returns:
        `FunctionProduct` with value and error_bound. `status` is CONVERGED, INVARIANT where the Krylov space
        is exhausted and the value exact to rounding, BUDGET_EXHAUSTED, or TRACED inside jit, where the bound
        is infinite.

    Raises:
        SpectraError: f is not finite at a Ritz value, as for the root of an operator with a negative
            eigenvalue, which the message names; a Ritz value lies outside `bounds`.
        NonFiniteError: a product is NaN or infinite.
        CheckpointError: the folder holds the checkpoint of another run.
        PreemptedError: the process was asked to end (SIGTERM or Ctrl-C), and the run is saved.

    Cost: one product per step for each vector, and 40 for the ends of the spectrum; num_steps vectors of
        memory.

    References:
        Saad, doi:10.1137/0729014; Chen, Greenbaum, Musco and Musco, arXiv:2106.09806.

    Examples:
        >>> import jax.numpy as jnp, spectra
        >>> op = spectra.MatrixOperator(jnp.diag(jnp.array([1.0, 4.0, 9.0])))
        >>> result = spectra.funm(op, "sqrt", jnp.ones(3))
        >>> [round(float(x), 4) for x in result.value]
        [1.0, 2.0, 3.0]
    """
    require_operator(op)
    named, name = named_function(f)
    if not 0 <= tol < 1:
        raise SpectraError(f"tol={tol} is relative to |f(H) v|: use a number in [0, 1).")
    traced = trees.is_traced((op, v, bounds, key))
    most = TRACED_STEPS if traced else STEPS
    steps = min(most, op.size) if num_steps is None else num_steps
    check_steps(steps, op.size)
    rows, several, back = stacked(op, v, "v")
    if traced:
        if checkpoint is not None:
            raise SpectraError("checkpoint= needs values, which do not exist inside jit or vmap.")
        value = jax.vmap(lambda row: _traced(op, named.jax, row, steps))(rows)
        return FunctionProduct(back(value), jnp.inf, 0, steps, name, "nothing inside jit", Status.TRACED)
    if not trees.all_finite(rows):
        raise NonFiniteError("v is NaN or infinite somewhere.")
    intervals = given_intervals(bounds)

    def arguments() -> dict[str, Any]:
        own = {"num_steps": steps, "tol": float(tol), "bounds": [list(pair) for pair in intervals]}
        return own | {"f": [name, _digest(named.numpy)], "v": tree_digest(rows)}

    with watched("funm", progress, checkpoint, None, arguments) as watch, watch.saver(op, key) as saver:
        run = _Run(outside_loops(op.prepare()), named, name, steps, tol, watch.bar, saver)
        run.restore()
        if run.known is None:
            run.known = Range.of(run.op, intervals, key)
            watch.bar.update(run.known.products)
        known, vectors = run.known, stacks.split(rows)
        for vector in vectors[len(run.found) :]:
            run.found.append(run.value(vector, known))
        run.save(None)
    found, errors = run.found, np.array([one.error for one in run.found])
    worst = [Status.BUDGET_EXHAUSTED, Status.CONVERGED, Status.INVARIANT]
    return FunctionProduct(
        value=back(stacks.stacked([one.value for one in found])),
        error_bound=errors if several else float(errors[0]),
        num_matvecs=known.products + sum(one.steps for one in found),
        num_steps=max(one.steps for one in found),
        function=name,
        bound=known.reason,
        status=min((one.status for one in found), key=worst.index),
    )


def _digest(f: Callable[[Any], Any]) -> int:
    """Of the values at `POINTS`; a function may refuse those that its operator's spectrum is away from."""
    values = on_reals(f)
    try:
        found = values(POINTS)
    except Exception:  # whatever a user's function raises
        found = np.full(len(POINTS), np.nan)
        for i in range(len(POINTS)):
            with contextlib.suppress(Exception):
                found[i] = values(POINTS[i : i + 1])[0]
    return tree_digest(found.view(np.uint32))  # the bits: float32 does not hold all of them


@dataclasses.dataclass(frozen=True)
class _Found:
    value: PyTree
    error: float
    steps: int
    status: Status


class _Run:
    """The vectors of one call, one after another: what is done, what is under way, and where it is saved."""

    def __init__(
        self,
        op: LinearOperator,
        named: Named,
        name: str,
        steps: int,
        tol: float,
        bar: Progress,
        saver: Saver | None,
    ):
        self.op, self.named, self.name, self.steps, self.tol = op, named, name, steps, tol
        self.bar, self.saver, self.layout = bar, saver, Layout.of(op.like)
        self.known: Range | None = None
        self.found: list[_Found] = []
        self.flight: dict[str, Any] | None = None  # of the vector under way, where it was saved
        self.part = CHUNK if saver is None else 1  # products between two looks at the clock

    def value(self, v: PyTree, known: Range) -> _Found:
        """f(H) v of one vector."""
        size = trees.length(v)
        if size == 0:
            return _Found(v, 0.0, 0, Status.INVARIANT)
        state, done = self._begin(_start(self.layout, v, self.steps))
        noise = breakdown_noise(self.op.size, self.op.precision)
        while True:
            # Parts of any length end where the longest do: there alone is it asked whether to stop.
            goal = min((done // CHUNK + 1) * CHUNK, self.steps)
            while done < goal:
                state, done = self._advance(state, done, min(done + self.part, goal))
            alpha, beta, length = jax.device_get((state.alpha, state.beta, state.length))
            ended = invariant_length(alpha, beta, int(length), self.op.size, self.op.precision)
            length = int(length) if ended is None else ended
            theta, vectors = eigh(alpha, beta, length)
            theta = inside(theta, self.named, self.name, known, noise * known.norm, self.op)
            f = on_reals(self.named.numpy)
            values = self._values(f, theta, noise * known.norm, size)
            coefficients = vectors @ (values * vectors[0])
            norm = float(np.linalg.norm(coefficients))
            last = 0.0 if ended is not None else float(beta[length - 1])
            intervals = extended(known.intervals, theta)
            error = truncation(f, theta, vectors, last, intervals)
            self.bar.note(f"error {error / (norm or 1.0):.1e}")
            if ended is not None or error <= self.tol * norm or done == self.steps:
                break
        moved = rounding(f, intervals, noise * known.norm) + noise * norm
        status = Status.INVARIANT if ended is not None else Status.CONVERGED
        if ended is None and error > self.tol * norm:
            status = Status.BUDGET_EXHAUSTED
        padded = np.zeros(_rows(state.basis))
        padded[:length] = size * coefficients
        rows = sum_of_rows(state.basis, jnp.asarray(padded, self.op.dtype), length)
        return _Found(self.layout.unpack(rows), size * (error + moved), done, status)

    def _values(
        self, f: Callable[[np.ndarray], np.ndarray], theta: np.ndarray, noise: float, size: float
    ) -> np.ndarray:
        """f at the Ritz values, refused where it is not finite or leaves the range of the dtype."""
        values = f(theta)
        if not np.isfinite(values).all():
            raise undefined(self.name, float(theta[~np.isfinite(values)][0]), noise)
        if size * np.abs(values).max() > float(jnp.finfo(self.op.dtype).max):
            raise SpectraError(
                f"{self.name} reaches {np.abs(values).max():.1e} on the spectrum, beyond {self.op.dtype}."
            )
        return values

    def _advance(self, state: LanczosState, start: int, stop: int) -> tuple[LanczosState, int]:
        """Steps start..stop-1; then the run is saved where it is time to, and ended where it was asked to."""
        began = time.monotonic()
        state = advance(self.op, self.layout, state, start, stop, batched=False)
        self.bar.update(stop - start)
        if self.saver is not None:
            products = stop + sum(one.steps for one in self.found)
            signal, due, seconds = self.saver.due(products, time.monotonic() - began)
            self.part = int(np.clip(_saver.PACE * (stop - start) / max(seconds, 1e-9), 1, CHUNK))
            if due:
                self.save(state, stop)
            self.saver.end(signal, f"after {products} products")
        return state, stop

    def _begin(self, fresh: LanczosState) -> tuple[LanczosState, int]:
        """The state of the next vector and its steps done: as saved, or before the first."""
        flight, self.flight = self.flight, None
        if self.saver is None or flight is None or not flight["done"]:
            return fresh, 0
        items = dict(list(flight["items"].items())[len(self.found) :])
        state = storage.lanczos_state(self.saver, self.layout.anonymous(), fresh, items)
        if state is None:
            return fresh, 0
        self.saver.flight = flight
        self.bar.update(flight["done"])
        return state, flight["done"]

    def save(self, state: LanczosState | None, done: int = 0) -> None:
        """Write what is new: values, and the state of the vector under way if there is one."""
        if self.saver is None or self.known is None:
            return
        items: dict[str, Callable[[], PyTree]] = {}
        for i, one in enumerate(self.found):
            items[f"item-{i:05d}-value"] = partial(_leaves, one.value)
        if state is not None:
            stem = f"item-{len(self.found):05d}"
            items |= storage.lanczos_items(self.layout.anonymous(), state, done, stem)
        found = [[one.error, one.steps, one.status.name] for one in self.found]
        flight = {"known": dataclasses.asdict(self.known), "found": found, "done": done}
        self.saver.write(items, flight, done + sum(one.steps for one in self.found))

    def restore(self) -> None:
        """Take over what was saved, by the newest record whose values can be read."""
        if self.saver is None:
            return
        for record in self.saver.saved:
            flight = record["flight"]
            if not flight or not self._values_read(flight):
                continue
            self.flight, self.known = flight, Range(**flight["known"])
            # What is damaged of the vector under way counts as not written, until it is found to be whole.
            values = dict(list(flight["items"].items())[: len(self.found)])
            self.saver.flight = flight | {"items": values}
            self.saver.saved_step = flight["done"] + sum(one.steps for one in self.found)
            self.bar.update(self.known.products + sum(one.steps for one in self.found))
            return

    def _values_read(self, flight: dict[str, Any]) -> bool:
        """Whether the values that a record names could be read."""
        assert self.saver is not None
        found: list[_Found] = []
        (like,) = storage.vectors_of(self.layout, 1, jnp.zeros((), device=self.op.device))
        for (name, digest), (error, steps, status) in zip(
            flight["items"].items(), flight["found"], strict=False
        ):
            leaves = self.saver.item(name, like, digest)
            if leaves is None:
                return False
            value = self.layout.treedef.unflatten(leaves)
            found.append(_Found(value, error, steps, Status[status]))
        self.found = found
        return True


def _leaves(value: PyTree) -> list[jax.Array]:
    return jax.tree.leaves(value)


def _rows(basis: _basis.Basis) -> int:
    return sum(segment[0].shape[1] for segment in basis)


_start = jax.jit(init, static_argnames=("layout", "num_steps"))


def _traced(op: LinearOperator, f: Callable[[Any], Any], v: PyTree, steps: int) -> PyTree:
    found = lanczos(op, v, steps)
    theta, vectors = arrays.eigh(found.matrix())
    # Steps behind an exhausted space have zero rows: f there counts for nothing.
    values = jnp.where(vectors[0] != 0, f(theta), 0)
    coefficients = trees.norm(v) * jnp.matmul(vectors, values * vectors[0], precision="highest")
    return stacks.combine(coefficients, found.basis)
