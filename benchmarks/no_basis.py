"""Densities without a basis beside the full one: W1 to the spectrum, with and without deflated eigenpairs.

Matrices with known spectra in float32, the same probes in all columns. W1 is that of a single probe's
quadrature, the mean over the probes, over the width of the spectrum. The deflated pairs are those beyond
2 % of the largest, at most 48, as `eigsh` finds them.
"""

from collections.abc import Callable
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np

import spectra
from benchmarks.audit.matrices import planted
from benchmarks.certainty_problems import PROBLEMS
from benchmarks.settings import Goal, Report, Settings, table

DEFLATED, BEYOND = 48, 0.02
KINDS = list(product((False, True), ("inherit", "none")))
"""Whether pairs are deflated, and the basis."""


def outliers() -> np.ndarray:
    """48 large eigenvalues over two decades, and a bulk of squares."""
    bulk = 0.05 * np.random.default_rng(5).standard_normal(1500 - DEFLATED) ** 2
    return planted(np.concatenate([np.geomspace(1, 100, DEFLATED), bulk]))


MATRICES: dict[str, Callable[[], np.ndarray]] = {**PROBLEMS, "48 outliers": outliers}


def distances(matrix: np.ndarray, steps: int, probes: int) -> tuple[int, dict[tuple[bool, str], float]]:
    """Pairs deflated, and the mean W1 of each kind over the width of the spectrum."""
    from scipy.stats import wasserstein_distance

    values = np.linalg.eigvalsh(matrix)
    count = int(np.clip(np.sum(np.abs(values) > BEYOND * np.abs(values).max()), 4, DEFLATED))
    op = spectra.MatrixOperator(jnp.asarray(matrix, jnp.float32))
    pairs = spectra.eigsh(op, count, which="LM", key=jax.random.key(9))
    found = {}
    for deflated, basis in KINDS:
        options = {"num_steps": steps, "num_probes": probes, "deflate": pairs if deflated else None}
        q = spectra.slq(op, key=jax.random.key(0), basis=basis, **options)
        each = [wasserstein_distance(x, values, w) for x, w in zip(q.nodes, q.weights, strict=True)]
        found[deflated, basis] = float(np.mean(each) / (values[-1] - values[0]))
    return count, found


def main(settings: Settings) -> Report:
    steps, probes = settings.choose((100, 8), (20, 2))
    rows, goals = [], []
    with jax.enable_x64(True):
        for name in settings.choose(list(MATRICES), ["48 outliers"]):
            count, found = distances(MATRICES[name](), steps, probes)
            ratios = [found[deflated, "none"] / found[deflated, "inherit"] for deflated in (False, True)]
            digits = [f"{found[kind]:.2e}" for kind in KINDS]
            rows.append([name, *digits[:2], f"{ratios[0]:.3f}", str(count), *digits[2:], f"{ratios[1]:.3f}"])
            goals.append(Goal(f"{name}, {steps} steps, deflated: W1 over the full basis's", ratios[1], 1.2))
    head = [
        "matrix",
        "full basis",
        "none",
        "ratio",
        "deflated",
        "full basis, deflated",
        "none, deflated",
        "ratio",
    ]
    return Report(table(head, rows), goals)
