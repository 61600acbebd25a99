"""The search for eigenvalues that a converged run has missed, because they repeat ones it has found.

A Krylov space holds one vector of each eigenspace. All others are orthogonal to it, and to the vector that
waits for its product: so a random vector made orthogonal to all rows of the basis starts a Lanczos run in
which they are ordinary extreme eigenvectors, with all that the basis approximates already removed. When
one shows, both sequences are kept. What the new one holds of further copies is then spread over rows and
waiting vectors, so it must itself run until they would have shown, before another start makes sense.
"""

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
REVISIT = 6
"""Products that show what rounding has brought into the waiting vector of a converged sequence."""


def search(run: "_Run", verify: bool | str, ncv: int) -> bool:
    """Look for a missed eigenvalue; True if there is none, as far as the products allowed can tell."""
    band, theta, vectors, best = _ritz(run)
    limits = wanted.ends(theta[best[: run.k]], run.which)
    if not limits or run.exhausted:
        run.missed = 0.0
        return True
    goal = CERTAIN if verify is True else MISSED
    if not run.allowed:
        run.allowed = run.budget if verify is True else band.num_matvecs + _share(run, band.num_matvecs, ncv)
    if run.copies > run.extended:  # eigenvalues do repeat here: look as long as it took to come this far
        run.extended, run.allowed = run.copies, max(run.allowed, 2 * band.num_matvecs)
    steps = min(run.allowed, run.budget) - band.num_matvecs
    if run.copies and (chain := _unfinished(run, limits, theta, best, goal)) is not None:
        return steps < 1 or not _lengthen(run, chain, vectors, best, min(steps, 2))
    return _from_random(run, limits, min(steps, run.op.size - band.filled), goal)


def _ritz(run: "_Run"):
    theta, vectors, _, _ = run.band.ritz()
    return run.band, theta, vectors, wanted.order(theta, run.which)


def _share(run: "_Run", spent: int, ncv: int) -> int:
    """Products that verify="auto" may spend, after `spent`, while no copy has been found."""
    if run.tol > LOOSE:
        return ncv + 1 - spent
    few, share = int(1.1 * (ncv + 1)), int(spent / min(run.k - 1, 10))
    return share if spent > few else few - spent if run.k >= 5 else max(share, few - spent)


def _unfinished(run: "_Run", limits, theta, best, goal: float) -> int | None:
    """A start vector whose waiting row may still hide a copy.

    The last one must have been multiplied as often as a random vector needs. In the others rounding is
    amplified once their pairs have converged, and a few products show what it has brought in.
    """
    band = run.band
    newest = len(band.lengths) - 1
    for chain in band.chain.values():
        if chain != newest and band.lengths[chain] - run.seen[chain] < REVISIT:
            return chain
    if newest not in band.chain.values() or len(best) <= run.k:
        return None  # its space became invariant
    low, high, rest = float(theta.min()), float(theta.max()), theta[best[run.k :]]
    args = (band.lengths[newest], low, high, run.op.size)
    run.missed = wanted.missed_probability(limits, rest, *args)
    return newest if run.missed > goal else None


def _lengthen(run: "_Run", chain: int, vectors, best, steps: int) -> bool:
    """A few products more from one start vector; False if there is no room for them."""
    band = run.band
    if band.filled + steps > run.capacity:
        run.restart(vectors, best)
        if band.filled + steps > run.capacity:
            return False
    band.extend(next(row for row, own in band.chain.items() if own == chain), steps)
    run.history = []
    return True


def _from_random(run: "_Run", limits, steps: int, goal: float) -> bool:
    """Lanczos from a random vector, orthogonal to all rows, until something shows or `steps` end."""
    band, theta, vectors, best = _ritz(run)
    free = run.capacity - len(band.locked) - len(band.pending) - 1
    if steps < 1 or free - run.k < 1:
        return True
    if band.filled + 1 + steps > run.capacity:
        steps = min(steps, free - run.k)
        run.restart(vectors, best, room=steps + 1)
    row, rows = run.append_random(), []
    low, high = float(theta.min()), float(theta.max())
    while steps > 0:
        before = len(band.processed)
        band.extend(row, min(steps, 2))
        rows += band.processed[before:]
        steps -= len(band.processed) - before
        inner = band.ritz(rows)[0]
        if wanted.beats(limits, inner, run.accepted):
            _, _, vectors, best = _ritz(run)
            run.restart(vectors, best)
            run.history, run.copies, run.seen = [], run.copies + 1, list(band.lengths)
            return False
        low, high = min(low, inner.min()), max(high, inner.max())
        if not band.pending or band.pending[-1] < rows[0]:
            run.missed = 0.0  # a random vector spans, with its products, every eigenspace that is left
            break
        run.missed = wanted.missed_probability(limits, inner, len(rows), low, high, run.op.size)
        row = band.pending[-1]
        if run.missed <= goal:
            break
    # What the search has seen belongs to no wanted pair: keep the pairs, and nothing else.
    first = [row for row in band.processed if row not in rows]
    theta, vectors, _, _ = band.ritz(first)
    best = wanted.order(theta, run.which)
    band.restart(vectors[:, np.sort(best[: run.k])], first)
    return True
