"""How narrow an interval can be at least: what a number of steps leaves open of a spectrum that is known.

However many probes there are, m steps know the distribution of eigenvalues by its coefficients α_1, β_1,
..., α_m, β_m, and no further. Others have the same: the Gauss-Radau rules of m + 1 nodes, one with a node
wherever that is wanted. Where the mass of that node is some eigenvalues, a spectrum like that exists, but for
the rounding of masses to whole numbers, and it has all of this mass on either side of the point. An interval
that holds for both, with 95 % each, is as wide as this mass and 1.645 standard deviations of sampling on each
side. Few probes know slightly more, since each has coefficients of its own, of which the mean of the bracket
is a concave function.
"""

import functools
from collections.abc import Iterator

import numpy as np

from benchmarks.audit.matrices import Case

PER_NODE = 5
"""Eigenvalues of a node, or on average for each step, at least: with fewer, rounding changes too much."""
EXHAUSTED = 1e-10
"""Of |H|: a coefficient β as small ends the space, and eigenvalues as close are one."""
MEMBERS = 12
"""Rules with a node in each gap between those of the Gauss rule."""


@functools.cache
def coefficients(case: Case, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """α and β of Lanczos with equal shares of all eigenvalues; β ends with zero where they are exhausted."""
    scale = np.abs(case.eigenvalues).max()
    first = np.flatnonzero(np.append(True, np.diff(case.eigenvalues) > EXHAUSTED * scale))
    values, counts = case.eigenvalues[first], np.diff(np.append(first, case.size))
    rows, alpha, beta = [np.sqrt(counts / case.size)], [], []
    for _ in range(steps):
        product = values * rows[-1]
        alpha.append(product @ rows[-1])
        for _ in range(2):
            product = product - np.array(rows).T @ (np.array(rows) @ product)
        size = np.linalg.norm(product)
        beta.append(size if size > EXHAUSTED * scale else 0.0)
        if not beta[-1]:
            break
        rows.append(product / size)
    return np.array(alpha), np.array(beta)


def mass_at(case: Case, steps: int, x: np.ndarray) -> np.ndarray:
    """Of the rule with a node at each x: 1 / Σ p_j(x)², by the recurrence of orthonormal polynomials."""
    alpha, beta = coefficients(case, steps)
    x = np.asarray(x, np.float64)
    if not beta[-1]:
        return np.zeros(x.shape)
    before, last = np.zeros(x.shape), np.ones(x.shape)
    total = np.ones(x.shape)
    with np.errstate(over="ignore", invalid="ignore"):
        for j, (a, b) in enumerate(zip(alpha, beta, strict=True)):
            before, last = last, ((x - a) * last - (beta[j - 1] * before if j else 0)) / b
            total += last**2
    return np.where(np.isfinite(total), 1 / total, 0.0)


def eigenvalues_at(case: Case, steps: int, x: np.ndarray) -> np.ndarray:
    """The same in whole eigenvalues, where these are some; else none."""
    found = np.floor(case.size * mass_at(case, steps, x))
    return np.where(found >= PER_NODE, found, 0.0)


def members(case: Case, steps: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Nodes and masses of rules with the same coefficients, with nodes all over every gap; none if exhausted.

    The rule with a node at x has x + Σ r² / (θ - x) for its last entry on the diagonal.
    """
    alpha, beta = coefficients(case, steps)
    if not beta[-1] or case.size < PER_NODE * steps:
        return
    theta, vectors = np.linalg.eigh(np.diag(alpha) + np.diag(beta[:-1], 1) + np.diag(beta[:-1], -1))
    square = (beta[-1] * vectors[-1]) ** 2
    inside = theta[:-1] + (np.arange(MEMBERS)[:, None] + 0.5) / MEMBERS * np.diff(theta)
    for x in inside.ravel():
        matrix = np.diag(np.append(alpha, x + np.sum(square / (theta - x))))
        nodes, vectors = np.linalg.eigh(matrix + np.diag(beta, 1) + np.diag(beta, -1))
        yield nodes, vectors[0] ** 2
