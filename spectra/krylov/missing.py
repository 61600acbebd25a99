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
from typing import TYPE_CHECKING, Any

import numpy as np

from spectra.krylov import wanted

if TYPE_CHECKING:
    from spectra.krylov.eigen_run import EigenRun

MISSED = 0.05
"""verify="auto" ends when a missed copy is less probable than this, or its products are spent."""
CERTAIN = 1e-6
"""The same for verify=True, without a limit of its own on the products."""
LOOSE = 1e-4
"""Above this tolerance verify="auto" spends no more products than ARPACK's first sweep."""
KNOWN = 0.03
"""Residual in units of the gap, with which a further Ritz vector stays out of the search."""


@dataclasses.dataclass
class Search:
    """Where a search stands: nothing here is a vector, so that it is saved as it is."""

    limits: list[wanted.End]
    goal: float  # probability of a miss at which it ends
    left: int  # products allowed
    low: float  # Ritz values seen so far lie between
    high: float
    first: list[int]  # rows that it is orthogonal to
    row: int  # waits for its product
    rows: list[int] = dataclasses.field(default_factory=list)  # have had theirs

    @classmethod
    def of(cls, saved: dict[str, Any]) -> "Search":
        """From its fields as JSON has them."""
        fields: dict[str, Any] = saved | {"limits": [wanted.End(**end) for end in saved["limits"]]}
        return cls(**fields)


def search(run: "EigenRun", verify: bool | str, ncv: int) -> bool:
    """Look for a missed eigenvalue; True if there is none, as far as the products allowed can tell."""
    run.search = run.search or _begin(run, verify, ncv)
    if run.search is None:
        return True
    band = run.band
    found = _from_random(run, run.search)
    if found:
        run.history, run.copies, run.missed = [], run.copies + 1, 1.0
    else:  # what the search has seen belongs to no wanted pair
        band.pending = []
        band.restart(np.eye(len(run.search.first)), run.search.first)
    run.search = None
    band.bring_back()
    return not found


def _begin(run: "EigenRun", verify: bool | str, ncv: int) -> Search | None:
    """A random vector beside the pairs; None where nothing can be missing, or no product is left."""
    band = run.band
    theta, vectors, _, errors = band.ritz()
    best = wanted.order(theta, run.which)
    limits = wanted.ends(theta[best[: run.k]], run.which, run.accepted)
    run.missed = 0.0 if not limits or run.exhausted else 1.0
    if not run.missed:
        return None
    if not run.allowed:
        run.allowed = run.budget if verify is True else band.num_matvecs + _share(run, band.num_matvecs, ncv)
    if run.copies > run.extended:  # eigenvalues do repeat here: look as long as it took to come this far
        run.extended, run.allowed = run.copies, max(run.allowed, 2 * band.num_matvecs)
    room = run.capacity - len(band.locked) - len(band.pending) - 1
    steps = min(run.allowed - band.num_matvecs, run.budget - band.num_matvecs, room - run.k)
    steps = min(steps, run.op.size - band.filled - 1)
    if steps < 1:
        return None
    gaps = np.min([end.second - end.sign * theta for end in limits], axis=0)
    known = [i for i in best[run.k :] if errors[i] <= KNOWN * gaps[i]][: room - run.k - steps]
    shift = np.sum(errors[known] ** 2 / gaps[known]) / (1 - np.sum((errors[known] / gaps[known]) ** 2))
    limits = [dataclasses.replace(end, second=float(end.second - shift)) for end in limits]
    band.set_aside(vectors[:, np.sort([*best[: run.k], *known])])
    first, goal = list(band.processed), CERTAIN if verify is True else MISSED
    bottom, top = float(theta.min()), float(theta.max())
    return Search(limits, goal, steps, bottom, top, first, run.append_random())


def _share(run: "EigenRun", spent: int, ncv: int) -> int:
    """Products that verify="auto" may spend, after `spent`, while no copy has been found."""
    if run.tol > LOOSE:
        return ncv + 1 - spent
    few, share = int(1.1 * (ncv + 1)), int(spent / min(run.k - 1, 10))
    # Beyond ncv products ARPACK would begin a second sweep, of more than this share.
    return max(share, few - spent) if spent > ncv or run.k < 5 else few - spent


def _from_random(run: "EigenRun", search: Search) -> bool:
    """Lanczos from a random vector, orthogonal to all rows, until something shows or its products end."""
    band = run.band
    while search.left > 0:
        run.pause()
        before = len(band.processed)
        run.extend(search.row, min(search.left, 2))
        search.rows += band.processed[before:]
        search.left -= len(band.processed) - before
        inner = band.ritz(search.rows)[0]
        if wanted.beats(search.limits, inner, run.accepted):
            return True
        if not band.pending:  # a random vector spans, with its products, every eigenspace that is left
            run.missed = 0.0
            return False
        search.low, search.high = min(search.low, float(inner.min())), max(search.high, float(inner.max()))
        run.missed = wanted.missed_probability(
            search.limits, inner, len(search.rows), search.low, search.high, run.op.size
        )
        if run.missed <= search.goal:
            return False
        search.row = band.pending[-1]
    return False
