"""What is audited: one entry a statement of the package, with the settings that it is tried in.

An entry's `measure` takes a case, a setting and random keys, and returns intervals for each key with the
truth beside them. To audit another statement, add an entry to `STATEMENTS`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import t as student

import spectra
from benchmarks.audit.matrices import Case
from spectra.report.spectrum import trace_estimate

BUDGETS = (8, 32, 128)
QUADRATURES = ((12, 2), (30, 8), (100, 8))
BARE = tuple((steps, 8, "none", dtype) for dtype in ("float64", "float32") for steps in (30, 100))
"""Steps and probes without a basis, and what the products compute in."""
ROUNDING = 1e-13
"""Of Σ|λ|: what the truth itself is known to, and what an exact result may miss by."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Intervals for each key; for a diagonal a second axis of entries."""

    lower: np.ndarray
    value: np.ndarray
    upper: np.ndarray
    truth: Any
    least: float = 0.0  # width that the steps of a quadrature leave open, with what sampling adds to it

    def held(self, slack: float) -> np.ndarray:
        return (self.lower - slack <= self.truth) & (self.truth <= self.upper + slack)

    def width_to_ideal(self, slack: float) -> float:
        """Mean half width over 1.96 root mean square errors: 1 for a normal law that is known."""
        return self._to_ideal(float(np.mean(self.upper - self.lower)), slack)

    def least_to_ideal(self, slack: float) -> float:
        """The least half width over the same."""
        return self._to_ideal(self.least, slack)

    def _to_ideal(self, width: float, slack: float) -> float:
        error = float(np.sqrt(np.mean((self.value - self.truth) ** 2)))
        return width / 2 / (1.96 * error) if error > slack else float("nan")


@dataclasses.dataclass(frozen=True)
class Curves:
    """Bands for whole curves: whether each key's holds everywhere, and its mean width over an ideal one."""

    holds: np.ndarray
    widths: np.ndarray
    least: float = 0.0  # the least width, over the same ideal one

    def held(self, slack: float) -> np.ndarray:
        return self.holds

    def width_to_ideal(self, slack: float) -> float:
        return float(np.mean(self.widths))

    def least_to_ideal(self, slack: float) -> float:
        return self.least


@dataclasses.dataclass(frozen=True)
class Statement:
    """Something that the package states with an error or as a bound."""

    part: str  # what `--only` selects
    name: str
    settings: tuple[Any, ...]
    measure: Callable[[Case, Any, jax.Array], "Outcome | Curves"]
    applies: Callable[[Case, Any], bool] = lambda case, setting: True
    bound: bool = False  # what counts is violations, not coverage
    misses: float = 0.0  # of a bound: the probability that it fails
    keys: int | None = None  # at most so many
    note: str = ""  # below the table


def _student(value, stderr, dof: float | None, truth) -> Outcome:
    half = np.asarray(stderr) * (1.96 if dof is None else student.ppf(0.975, dof))
    return Outcome(np.asarray(value) - half, np.asarray(value), np.asarray(value) + half, truth)


def _intervals(found: list[spectra.Interval], truth) -> Outcome:
    lower, value, upper = (np.array(x) for x in zip(*found, strict=True))
    return Outcome(lower, value, upper, truth)


@functools.cache
def _program(estimator: Callable, batch: int, **options: Any):
    """A compiled function of an operator and keys, and a list with the degrees of freedom once it has run."""
    dof: list[float | None] = []

    @jax.jit
    def run(op, keys):
        def one(key):
            estimate = estimator(op, key=key, **options)
            dof[:] = [estimate.dof]
            return estimate.value, estimate.stderr

        return jax.lax.map(one, keys, batch_size=batch)

    return run, dof


def sampled(truth: Callable[[Case], Any], estimator: Callable, **options: Any):
    """`measure` of an estimator whose setting is a number of products."""

    def measure(case: Case, num_matvecs: int, keys: jax.Array) -> Outcome:
        batch = max(1, min(len(keys), 2_000_000 // (case.size * num_matvecs)))
        # All probes at a time: XLA would unroll the loop over up to 64 of them, and compile for minutes.
        run, dof = _program(estimator, batch, num_matvecs=num_matvecs, probe_batch=num_matvecs, **options)
        value, stderr = map(np.asarray, run(case.operator, keys))
        return _student(value, stderr, dof[0], truth(case))

    return measure


def one_by_one(truth: Callable[[Case], Any], estimator: Callable, **options: Any):
    """`measure` of an estimator that decides by values, key by key."""

    def measure(case: Case, num_matvecs: int, keys: jax.Array) -> Outcome:
        found = [estimator(case.operator, key=key, num_matvecs=num_matvecs, **options) for key in keys]
        return _intervals([estimate.interval() for estimate in found], truth(case))

    return measure


def adaptive(tol: float, **options: Any):
    """The trace stopped at a tolerance: key by key, as values decide on the number of products."""

    def measure(case: Case, num_matvecs: int, keys: jax.Array) -> Outcome:
        found = [
            spectra.trace(case.operator, key=key, num_matvecs=num_matvecs, tol=tol, **options).interval()
            for key in keys
        ]
        return _intervals(found, case.trace)

    return measure


@functools.lru_cache(maxsize=64)
def quadratures(case: Case, setting: tuple, seed: int, count: int) -> list[spectra.Quadrature]:
    """Quadratures of a setting for each key, from one program; kept for the next statement."""
    keys = jax.random.split(jax.random.key(seed), count)
    steps, probes, basis, dtype = setting if len(setting) == 4 else (*setting, "inherit", "float64")
    op = case.operator
    if dtype != "float64":
        assert isinstance(op, spectra.MatrixOperator)
        op = spectra.MatrixOperator(jnp.asarray(op.matrix, dtype))
    many = _slq(op, keys, min(steps, case.size), probes, basis)
    rows = [jax.tree.map(lambda x, i=i: np.asarray(x)[i], many) for i in range(count)]
    return [dataclasses.replace(row, status=spectra.Status.COMPLETE) for row in rows]


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _slq(op, keys, steps: int, probes: int, basis: str):
    def one(key):
        return spectra.slq(op, key=key, num_steps=steps, num_probes=probes, basis=basis)

    return jax.lax.map(one, keys, batch_size=8)


def from_keys(case: Case, setting: tuple[int, int], keys: jax.Array) -> list[spectra.Quadrature]:
    """The same, of the keys that `audit` hands out."""
    return quadratures(case, setting, int(jax.random.key_data(keys)[0, -1]) % 2**31, len(keys))


def of_quadratures(estimate: Callable[[spectra.Quadrature], Any], truth: Callable[[Case], Any]):
    """`measure` of what follows from a quadrature and has an `interval`; its setting is (steps, probes)."""

    def measure(case: Case, setting: tuple[int, int], keys: jax.Array) -> Outcome:
        found = [estimate(q).interval() for q in from_keys(case, setting, keys)]
        return _intervals(found, truth(case))

    return measure


def _trace(case: Case) -> float:
    return case.trace


def _sketched(case: Case, num_matvecs: int) -> bool:
    return num_matvecs < case.size


def _semidefinite(case: Case, num_matvecs: int) -> bool:
    return case.semidefinite and _sketched(case, num_matvecs)


def _few_steps(case: Case, setting: tuple[int, int]) -> bool:
    return case.size < 1000 or setting[0] <= 30


_some = ("bulk and spikes", "flat and a spike", "decaying, i^-1.5", "network, relu")

STATEMENTS = (
    Statement(
        "trace", "trace, Hutchinson, signs", BUDGETS, sampled(_trace, spectra.trace, method="hutchinson")
    ),
    Statement(
        "trace",
        "trace, Hutchinson, normal probes",
        BUDGETS,
        sampled(_trace, spectra.trace, method="hutchinson", probes="normal"),
    ),
    Statement(
        "trace", "trace, Hutch++", BUDGETS, sampled(_trace, spectra.trace, method="hutch++"), _sketched
    ),
    Statement(
        "trace",
        "trace, Krylov",
        BUDGETS,
        one_by_one(_trace, spectra.trace, method="krylov"),
        _sketched,
        keys=100,
    ),
    Statement("trace", "trace, XTrace", BUDGETS, sampled(_trace, spectra.trace, method="xtrace"), _sketched),
    Statement(
        "trace",
        "trace, XNysTrace",
        BUDGETS,
        sampled(_trace, spectra.trace, method="xnystrace"),
        _semidefinite,
    ),
    Statement("trace", "trace in a report", QUADRATURES, of_quadratures(trace_estimate, _trace), _few_steps),
    *(
        Statement(
            "stopping",
            f"trace, {method}, tol=0.05",
            (400,),
            adaptive(0.05, method=method),
            lambda case, _: case.name in _some,
            keys=100,
        )
        for method in ("hutchinson", "xtrace", "krylov")
    ),
    Statement(
        "norm", "Frobenius norm", BUDGETS, sampled(lambda c: c.norm, spectra.frobenius_norm), _sketched
    ),
    *(
        Statement(
            "diagonal",
            f"diagonal, {method}",
            BUDGETS,
            sampled(lambda c: c.diagonal, spectra.diagonal, method=method),
            lambda case, num: _sketched(case, num) and case.size < 1000,
        )
        for method in ("hutchinson", "xdiag")
    ),
)
