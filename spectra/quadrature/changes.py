"""What the last Lanczos step changed: an estimate of a quadrature's error where nothing bounds it.

The rule of m - 1 steps follows from that of m. In the eigenvectors of T_m its last coordinate is u, the
direction of the residuals, and T_{m-1} is what T_m does on the rest. For a function with a pole at some
distance from the spectrum both converge geometrically, and the last change is as large as the error, or more,
once a step halves it.
"""

import numpy as np

from spectra.quadrature import Measures, Rule
from spectra.quadrature.brackets import alike, rules
from spectra.quadrature.hinges import Function


def last_change(quadrature: Measures, f: Function) -> float:
    """The mean over probes of |I_m(f) - I_{m-1}(f)|; infinite for one step, or where f is not finite."""
    changes = [(_change(rule, f), count) for rule, count in alike(rules(quadrature))]
    sizes, counts = np.array(changes).T
    return float(np.average(sizes, weights=counts))


def _change(rule: Rule, f: Function) -> float:
    theta, weights, residuals = rule
    size = np.linalg.norm(residuals)
    if not size:
        return 0.0  # the space is exhausted
    if len(theta) == 1:
        return np.inf
    rest = np.linalg.qr((residuals / size)[:, None], mode="complete")[0][:, 1:]
    nodes, vectors = np.linalg.eigh(rest.T @ (theta[:, None] * rest))
    before = (np.sqrt(weights) @ rest @ vectors) ** 2
    change = np.sum(weights * f(theta)) - np.sum(before / before.sum() * f(nodes))
    return abs(float(change)) if np.isfinite(change) else np.inf
