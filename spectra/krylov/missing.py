"""The search for eigenvalues that a converged run has missed, because they repeat ones it has found.

A Krylov space holds one vector of each eigenspace, up to rounding, which brings in the others: it is
amplified from step to step, and what the rows and the vectors that wait for their products hold of a copy
before it shows is not small. A start orthogonal to them would be blind to that part, and no bound would
hold. So the search is orthogonal to the k pairs alone: their complement is an invariant space, in which a
copy is an ordinary extreme eigenvector, and a random vector of it starts a Lanczos run to which the bound
for random starts applies as it is. The waiting vectors are set aside meanwhile; when a copy shows, its run
joins them in one band.

Further Ritz pairs (θ, z) of residual ρ stay out of the search as well: an eigenvector e of μ has
|zᵀe| <= ρ / (μ - θ), so without its part along all z its Rayleigh quotient is, with o = Σ (ρ / (μ - θ))², at
least μ - Σ ρ² / (μ - θ) / (1 - o). The bound is taken for that.
"""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from spectra.krylov import wanted

if TYPE_CHECKING:
    from spectra.krylov.eigsh import _Run

MISSED = 0.05
"""verify="auto" ends when a missed copy is less probable than this, or its products are spent."""
CERTAIN = 1e-6
"""The same for verify=True, without a limit of its own on the products."""
LOOSE = 1e-4
"""Above this tolerance verify="auto" spends no more products than ARPACK's first sweep."""
KNOWN = 0.03
"""Residual in units of the gap, with which a further Ritz vector stays out of the search."""


def search(run: "_Run", verify: bool | str, ncv: int) -> bool:
    """Look for a missed eigenvalue; True if there is none, as far as the products allowed can tell."""
    band = run.band
    theta, vectors, _, errors = band.ritz()
    best = wanted.order(theta, run.which)
    limits = wanted.ends(theta[best[: run.k]], run.which, run.accepted)
    run.missed = 0.0 if not limits or run.exhausted else 1.0
    if not run.missed:
        return True
    if not run.allowed:
        run.allowed = run.budget if verify is True else band.num_matvecs + _share(run, band.num_matvecs, ncv)
    if run.copies > run.extended:  # eigenvalues do repeat here: look as long as it took to come this far
        run.extended, run.allowed = run.copies, max(run.allowed, 2 * band.num_matvecs)
    room = run.capacity - len(band.locked) - len(band.pending) - 1
    steps = min(run.allowed - band.num_matvecs, run.budget - band.num_matvecs, room - run.k)
    steps = min(steps, run.op.size - band.filled - 1)
    if steps < 1:
        return True
    gaps = np.min([end.second - end.sign * theta for end in limits], axis=0)
    known = [i for i in best[run.k :] if errors[i] <= KNOWN * gaps[i]][: room - run.k - steps]
    shift = np.sum(errors[known] ** 2 / gaps[known]) / (1 - np.sum((errors[known] / gaps[known]) ** 2))
    limits = [dataclasses.replace(end, second=end.second - shift) for end in limits]
    low, high = float(theta.min()), float(theta.max())
    band.set_aside(vectors[:, np.sort([*best[: run.k], *known])])
    first = list(band.processed)
    found = _from_random(run, limits, steps, low, high, CERTAIN if verify is True else MISSED)
    if found:
        run.history, run.copies, run.missed = [], run.copies + 1, 1.0
    else:  # what the search has seen belongs to no wanted pair
        band.pending = []
        band.restart(np.eye(len(first)), first)
    band.bring_back()
    return not found


def _share(run: "_Run", spent: int, ncv: int) -> int:
    """Products that verify="auto" may spend, after `spent`, while no copy has been found."""
    if run.tol > LOOSE:
        return ncv + 1 - spent
    few, share = int(1.1 * (ncv + 1)), int(spent / min(run.k - 1, 10))
    # Beyond ncv products ARPACK would begin a second sweep, of more than this share.
    return max(share, few - spent) if spent > ncv or run.k < 5 else few - spent


def _from_random(run: "_Run", limits, steps: int, low: float, high: float, goal: float) -> bool:
    """Lanczos from a random vector, orthogonal to all rows, until something shows or `steps` end."""
    band, row, rows = run.band, run.append_random(), []
    while steps > 0:
        before = len(band.processed)
        band.extend(row, min(steps, 2))
        rows += band.processed[before:]
        steps -= len(band.processed) - before
        inner = band.ritz(rows)[0]
        if wanted.beats(limits, inner, run.accepted):
            return True
        if not band.pending:  # a random vector spans, with its products, every eigenspace that is left
            run.missed = 0.0
            return False
        low, high = min(low, inner.min()), max(high, inner.max())
        run.missed = wanted.missed_probability(limits, inner, len(rows), low, high, run.op.size)
        if run.missed <= goal:
            return False
        row = band.pending[-1]
    return False
