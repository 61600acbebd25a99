"""What the last Lanczos steps changed: an estimate of a quadrature's error where nothing bounds it.

The rule of m - 1 steps follows from that of m. In the eigenvectors of T_m its last coordinate is u, the
direction of the residuals: T_{m-1} is what T_m does on the rest, and what couples both are its residuals.

The error of a Gauss rule falls geometrically where f has a pole off the spectrum, by a factor ρ per step.
Where the pole lies beyond the spectrum, every step moves the value the same way, and the error is ρ / (1 - ρ)
times the last change, which may be many times that. Where the pole lies among the eigenvalues, changes have
any sign, and the last one is as large as the error or more.
"""

from collections.abc import Iterator

import numpy as np

from spectra.quadrature import Measures, Rule
from spectra.quadrature.brackets import alike, rules
from spectra.quadrature.hinges import Function

LATEST = 3
"""Changes of one sign that tell a pole on one side: by chance they agree for one in four."""
SLOWEST = 0.98
"""The slowest convergence that is looked for: an error of 49 last changes. Where changes do not fall at all
nothing is known of it."""


def estimated_error(quadrature: Measures, f: Function) -> float:
    """The mean over probes of the error of I_m(f); infinite for one step, or where f is not finite."""
    errors = [(_error(rule, f), count) for rule, count in alike(rules(quadrature))]
    sizes, counts = np.array(errors).T
    return float(np.average(sizes, weights=counts))


def _error(rule: Rule, f: Function) -> float:
    if not np.any(rule[2]):
        return 0.0  # the space is exhausted
    values = [float(np.sum(weights * f(theta))) for theta, weights, _ in _latest(rule)]
    changes = -np.diff(values)
    if not len(changes) or not np.isfinite(changes).all():
        return np.inf
    last = abs(float(changes[0]))
    if not last or len(changes) == 1 or np.any(np.sign(changes) != np.sign(changes[0])):
        return last
    rates = (changes[0] / changes[1:]) ** (1 / np.arange(1, len(changes)))
    rate = min(SLOWEST, float(rates.max()))
    return last * max(1.0, rate / (1 - rate))


def _latest(rule: Rule) -> Iterator[Rule]:
    """The rule itself, then those of one and more steps less."""
    yield rule
    for _ in range(LATEST):
        if len(rule[0]) == 1 or not np.any(rule[2]):
            return
        yield (rule := _before(rule))


def _before(rule: Rule) -> Rule:
    """The rule of one step less."""
    theta, weights, residuals = rule
    last = residuals / np.abs(residuals).max()  # squares of the smallest numbers are zero
    last /= np.linalg.norm(last)
    rest = np.linalg.qr(last[:, None], mode="complete")[0][:, 1:]
    nodes, vectors = np.linalg.eigh(rest.T @ (theta[:, None] * rest))
    first = np.sqrt(weights) @ rest @ vectors
    coupling = (theta * last) @ rest @ vectors
    return nodes, first**2 / np.sum(first**2), coupling * np.where(first < 0, -1.0, 1.0)
