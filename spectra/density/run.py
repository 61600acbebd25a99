"""Probes done so far, and how to add more: the engine of `slq`, driven from the host."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectra import _quadrature, _tree
from spectra._status import Status
from spectra.density import deflation
from spectra.krylov import lanczos as _lanczos
from spectra.krylov.basis import Layout
from spectra.results import Quadrature


class Progress:
    """A tqdm bar, or nothing."""

    def __init__(self, show: bool, total: int):
        self.bar = None
        if show:
            from tqdm.auto import tqdm

            self.bar = tqdm(total=total, unit="product", desc="Lanczos")

    def update(self, count: int) -> None:
        """Count products."""
        if self.bar is not None:
            self.bar.update(count)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()


class ProbeRun:
    """Probes done so far, as rows of coefficients, and how to add more."""

    def __init__(self, op, layout: Layout, key, size: int, precision: float, bar: "Progress", apart, known):
        self.known = known  # vectors that the probes are made orthogonal to
        self.op, self.layout, self.key, self.bar, self.apart = op, layout, key, bar, apart
        self.size, self.precision = size, precision
        self.rows: list[dict[str, Any]] = []
        self.steps_done = 0
        self.num_matvecs = 0

    @property
    def num_probes(self) -> int:
        """Probes done so far."""
        return len(self.rows)

    def add(self, probes: range, num_steps: int, stop_when=None) -> None:
        """Run probes together, `CHUNK` steps a call; `stop_when` sees the quadrature so far."""
        batched = len(probes) > 1
        keys = jnp.stack([jax.random.fold_in(self.key, i) for i in probes])
        state = _start(self.layout.anonymous(), keys if batched else keys[0], num_steps, batched)
        if self.known is not None:
            state = deflation.project_start(self.layout, self.known, state, batched)
        done = 0
        while done < num_steps:
            stop = min(done + _lanczos.CHUNK, num_steps)
            state = _lanczos.advance(
                self.op, self.layout, state, done, stop, batched=batched, apart=self.apart
            )
            self.bar.update((stop - done) * len(probes))
            done = stop
            if not np.any(state.alive):
                break
            if stop_when is not None and stop_when(self._quadrature(_rows(state, done, batched))):
                break
        if stop_when is None:
            done = num_steps  # steps that a breakdown left out are zeros
        self.rows += _rows(state, done, batched)
        self.steps_done = max(self.steps_done, done)
        self.num_matvecs += sum(row["length"] for row in self.rows[-len(probes) :])

    def result(self, status: Status | None = None) -> Quadrature:
        """The quadratures of all probes done."""
        return self._quadrature(self.rows, status)

    def _quadrature(self, rows, status: Status | None = None) -> Quadrature:
        steps = max(len(row["alpha"]) for row in rows)
        eps = float(jnp.finfo(self.op.dtype).eps)
        rules: list[Any] = [
            _quadrature.gauss_rule(row["alpha"], row["beta"], row["length"], eps) for row in rows
        ]
        nodes, weights, residuals = (
            np.stack([np.pad(r[i], (0, steps - r[0].size), mode=mode) for r in rules])
            for i, mode in enumerate(("edge", "constant", "constant"))
        )
        asymmetry = np.array([row["asymmetry"] for row in rows])
        lengths = np.array([rule[3] for rule in rules])
        if status is None:
            exact = (residuals == 0).all()
            status = Status.INVARIANT if exact else Status.COMPLETE
        # Coefficients that symmetry makes zero are rounding: beyond ten times their natural size
        # something in the loss is rougher than its precision.
        if asymmetry.max() > 100 * self.precision * np.sqrt(steps):
            status = Status.NOISY
        return Quadrature(
            nodes=nodes,
            weights=weights,
            residuals=residuals,
            lengths=lengths,
            asymmetry=asymmetry,
            size=self.size,
            num_matvecs=self.num_matvecs or sum(row["length"] for row in rows),
            precision=self.precision,
            status=status,
        )


@partial(jax.jit, static_argnames=("layout", "num_steps", "batched"))
def _start(layout: Layout, keys: jax.Array, num_steps: int, batched: bool):
    def one(key):
        return _lanczos.init(layout, _tree.sphere_sample(key, layout.structure), num_steps)

    return (jax.vmap(one) if batched else one)(keys)


def _rows(state, done: int, batched: bool) -> list[dict[str, Any]]:
    """Coefficients of each probe in float64, cut to the steps that were run."""
    scale = jnp.where(state.scale > 0, state.scale, 1)
    arrays = (state.alpha, state.beta, state.length, state.asymmetry / scale)
    columns = [np.asarray(x) for x in jax.device_get(arrays)]
    if not batched:
        columns = [x[None] for x in columns]
    return [
        {
            "alpha": alpha[:done].astype(np.float64),
            "beta": beta[:done].astype(np.float64),
            "length": int(length),
            "asymmetry": float(asymmetry),
        }
        for alpha, beta, length, asymmetry in zip(*columns, strict=True)
    ]
