"""The law of probes alone, thousands of keys at a time: what is left where nothing else is in doubt.

After n steps a quadrature has every eigenvalue for a node, and in the basis of eigenvectors a probe on the
sphere is a vector on the sphere, so that its weights are drawn without a product. Nothing is resolved, and no
bracket is added: where `functions` and `trace` see a share below 95 % among 400 keys, this decides whether
that is chance.
"""

from collections.abc import Callable, Iterator

import numpy as np
from scipy.special import stdtrit

from benchmarks.audit import functions
from benchmarks.audit.cells import Cell
from benchmarks.audit.matrices import MATRICES, Case, case
from spectra.density.extremes import error_of_powers
from spectra.quadrature.distribution import share_upper_bound, whole

DRAWS = 20
"""Times as many keys as elsewhere: of 8,000 a true rate of 95 % is seen as 95 ± 0.25 %."""
TOGETHER = 400
PROBES = (2, 8)
LEVEL = 0.95
SECTION = "law of the probes alone"
NOTE = (
    "All is sampled, nothing is resolved. Counts are whole numbers, so their intervals are narrower than the "
    "normal law's. What is below 93 % elsewhere at 8 probes, with no bracket to speak of, is chance by this."
)


def curves(case: Case) -> dict[str, np.ndarray]:
    """The functions of the audit at the eigenvalues."""
    values, shift = case.eigenvalues, functions.shift(case)
    return {
        "x": values,
        **{name: build(case)(values) for name, build in functions.FUNCTIONS.items()},
        "log(x + δ)": np.log(values + shift),
        "x / (x + δ)": values / (values + shift),
    }


def thresholds(case: Case) -> dict[str, float]:
    """Beyond which eigenvalues are counted: as in `functions`, and zero."""
    top = float(case.eigenvalues[-1])
    return {**{f"above {share}": share * top for share in functions.COUNTED}, "above 0": 0.0}


def drawn(case: Case, num_probes: int, draws: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Weights of the eigenvalues, averaged over probes, `TOGETHER` draws at a time."""
    for _ in range(draws // TOGETHER):
        weights = rng.standard_normal((TOGETHER, num_probes, case.size)) ** 2
        yield np.mean(weights / weights.sum(axis=-1, keepdims=True), axis=1)


def of_functions(case: Case, num_probes: int, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Errors (draws, functions) of traces of functions in units of their range, and half widths."""
    f = np.array(list(curves(case).values()))
    f = f - f.mean(axis=1, keepdims=True)  # the truth is zero
    scale = np.abs(f).max(axis=1, keepdims=True)
    f = f / np.where(scale > 0, scale, 1)
    one, two, three, four = (weights @ (f.T**k) for k in range(1, 5))
    square, fourth = two - one**2, four - 4 * one * three + 6 * one**2 * two - 3 * one**4
    half = half_width(square, fourth, case.size, num_probes)
    return case.size * one, half + 1e-12 * case.size * (scale.T > 0)


def of_counts(case: Case, num_probes: int, weights: np.ndarray) -> tuple[np.ndarray, ...]:
    """Shares (draws, thresholds) above thresholds and the ends of their intervals, less the truth."""
    above = np.array([case.eigenvalues > x for x in thresholds(case).values()])
    seen, truth = np.clip(weights @ above.T, 0, 1), above.mean(axis=1)
    tail, normals = (1 - LEVEL) / 2, float(num_probes * case.size)
    low, high = 1 - share_upper_bound(1 - seen, normals, tail), share_upper_bound(seen, normals, tail)
    low, high = whole(low, high, case.size)
    return seen - truth, np.minimum(low, seen) - truth, np.maximum(high, seen) - truth


def measure(
    case: Case, num_probes: int, draws: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """For each statement the share of draws whose interval holds, and the mean width over the ideal one."""
    held, halves, squares = [], [], []
    for weights in drawn(case, num_probes, draws, rng):
        error, half = of_functions(case, num_probes, weights)
        away, low, high = of_counts(case, num_probes, weights)
        rounding = 1e-9 / case.size  # of a share
        holds = np.abs(error) <= half, (low <= rounding) & (high >= -rounding)
        held.append(np.concatenate(holds, axis=1))
        halves.append(np.concatenate([half, (high - low) / 2], axis=1))
        squares.append(np.concatenate([error, away], axis=1) ** 2)
    mean, half, square = (np.concatenate(parts).mean(axis=0) for parts in (held, halves, squares))
    error = np.sqrt(square)
    # Shares of none or of all have no error but rounding.
    return mean, half / np.where(error > 1e-12, 1.96 * error, np.nan)


@np.vectorize
def half_width(square: float, fourth: float, size: int, num_probes: int) -> float:
    stderr, dof = error_of_powers(1.0, max(square, 0.0), fourth, size, num_probes)
    return 0.0 if dof is None else float(stdtrit(dof, (1 + LEVEL) / 2)) * stderr


def audit(count: int, chosen: Callable[[str], bool]) -> Iterator[Cell]:
    """The cells of the section."""
    for number, name in enumerate(MATRICES):
        for num_probes in PROBES if chosen(name) else ():
            spectrum = case(name)
            shares, widths = measure(spectrum, num_probes, DRAWS * count, np.random.default_rng(number))
            columns = [*curves(spectrum), *thresholds(spectrum)]
            for column, share, width in zip(columns, shares, widths, strict=True):
                known = float(width) if np.isfinite(width) else None
                yield Cell(SECTION, f"{name}, {num_probes}", column, DRAWS * count, float(share), known)


def layout() -> tuple[str, list[str], list[str], str]:
    """Name, rows and columns of the section, and what is said below it."""
    rows = [f"{name}, {num_probes}" for name in MATRICES for num_probes in PROBES]
    counts = [f"above {share}" for share in (*functions.COUNTED, 0)]
    columns = ["x", *functions.FUNCTIONS, "log(x + δ)", "x / (x + δ)", *counts]
    return SECTION, rows, columns, NOTE
