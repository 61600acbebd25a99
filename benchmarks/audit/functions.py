"""Counts and traces of functions: their intervals, and brackets."""

import dataclasses

import jax
import numpy as np

import spectra
from benchmarks.audit import left_open
from benchmarks.audit.matrices import Case
from benchmarks.audit.statements import QUADRATURES, Outcome, Statement, from_keys, of_quadratures

SHIFT = 1e-3
"""Of logarithm and inverse, in units of the largest |eigenvalue|, added to twice the most negative one."""
ONE_SIDED = 1.645  # standard deviations with 95 % on one side
COUNTED = 0.15, 0.5, 0.999999
"""Thresholds of counts, in units of the largest eigenvalue."""


SAMPLING = "The law of the probes alone has all spectra, in its own section."


def _scale(case: Case) -> float:
    return float(np.abs(case.eigenvalues).max())


def shift(case: Case) -> float:
    """δ of the logarithm and the effective dimension: makes the operator positive."""
    return SHIFT * _scale(case) + max(0.0, -2 * float(case.eigenvalues[0]))


FUNCTIONS = {
    "|x|": lambda case: np.abs,
    "max(x - c, 0)": lambda case: lambda x: np.maximum(x - 0.1 * _scale(case), 0),
    "Huber": lambda case: lambda x: _huber(x / _scale(case), 0.1),
    "exp(x / |H|)": lambda case: lambda x: np.exp(x / _scale(case)),
}


def _huber(x, c):
    return np.where(np.abs(x) < c, x * x / 2, c * np.abs(x) - c * c / 2)


def intervals(estimate, truth):
    """`measure` of an estimate that depends on the case; its setting is (steps, probes)."""

    def measure(case: Case, setting: tuple[int, int], keys: jax.Array) -> Outcome:
        return of_quadratures(lambda q: estimate(case, q), truth)(case, setting, keys)

    return measure


def counted(estimate, truth, threshold, unit):
    """The same of a count beyond a threshold of the case, in this unit of one eigenvalue."""
    found = intervals(estimate, truth)

    def measure(case: Case, setting: tuple[int, int], keys: jax.Array) -> Outcome:
        outcome = found(case, setting, keys)
        x, (steps, probes) = threshold(case), setting
        open_ = float(left_open.eigenvalues_at(case, min(steps, case.size), x))
        share = np.mean(case.eigenvalues > x)
        error = case.size * np.sqrt(2 * share * (1 - share) / probes / (case.size + 2))
        least = unit(case) * (open_ + 2 * ONE_SIDED * error) if open_ else 0.0
        return dataclasses.replace(outcome, least=least)

    return measure


def function(build):
    """`measure` of the interval of tr f(H)."""
    return intervals(
        lambda case, q: spectra.trace_of(q, build(case)),
        lambda case: float(build(case)(case.eigenvalues).sum()),
    )


def brackets(build):
    """`measure` of the bracket of tr f(H) against the exact value of the same probes, from n steps."""

    def measure(case: Case, setting: tuple[int, int], keys: jax.Array) -> Outcome:
        f, found, truth = build(case), [], []
        exact = from_keys(case, (case.size, setting[1]), keys)
        for few, all_ in zip(from_keys(case, setting, keys), exact, strict=True):
            few = dataclasses.replace(few, sketches=None)  # else resolved eigenvalues are none of the probes'
            estimate = spectra.trace_of(few, f)
            found.append((estimate.lower, estimate.value, estimate.upper))
            truth.append(case.size * all_.mean(f))
        lower, value, upper = np.array(found).T
        rounding = 1e-10 * case.size * np.abs(f(case.eigenvalues)).max()
        return Outcome(lower - rounding, value, upper + rounding, np.array(truth))

    return measure


def _count(share: float):
    return (
        lambda case, q: spectra.count_above(q, share * case.eigenvalues[-1]),
        lambda case: float(np.sum(case.eigenvalues > share * case.eigenvalues[-1])),
        lambda case: share * case.eigenvalues[-1],
        lambda case: 1.0,
    )


def _small(case: Case, setting) -> bool:
    return case.size < 1000


STATEMENTS = (
    *(
        Statement("counts", f"eigenvalues above {share} of the largest", QUADRATURES, counted(*_count(share)))
        for share in COUNTED
    ),
    Statement(
        "counts",
        "share of negative eigenvalues",
        QUADRATURES,
        counted(
            lambda case, q: spectra.negative_share(q),
            lambda case: float(np.mean(case.eigenvalues < -1e-12 * _scale(case))),
            lambda case: 0.0,
            lambda case: 1 / case.size,
        ),
        note=(
            "Where the spectrum is dense at zero, steps leave more open than probes do: in brackets is the "
            "width that this alone asks for. Of eigenvalues that are zero to rounding, as most of “repeated” "
            "are, no sign is certain: the interval reaches from none to all, about a value that is right."
        ),
    ),
    *(
        Statement("functions", f"trace of {name}", QUADRATURES, function(build), note=SAMPLING)
        for name, build in FUNCTIONS.items()
    ),
    Statement(
        "functions",
        "log-determinant, shifted",
        QUADRATURES,
        intervals(
            lambda case, q: spectra.logdet(q, shift(case)),
            lambda case: float(np.log(case.eigenvalues + shift(case)).sum()),
        ),
    ),
    Statement(
        "functions",
        "effective dimension",
        QUADRATURES,
        intervals(
            lambda case, q: spectra.effective_dimension(q, shift(case)),
            lambda case: float((case.eigenvalues / (case.eigenvalues + shift(case))).sum()),
        ),
    ),
    *(
        Statement("brackets", f"bracket of the trace of {name}", ((12, 2),), brackets(build), _small, True, 8)
        for name, build in FUNCTIONS.items()
    ),
)
