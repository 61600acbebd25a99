"""Which eigenpairs are wanted, and the search for repeated ones that were missed."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from spectra.base import stacks, trees
from spectra.base.files import tree_digest
from spectra.base.trees import PyTree
from spectra.krylov.layout import BasisPlace
from spectra.quadrature.christoffel import chance
from spectra.results import Eigenpairs

if TYPE_CHECKING:
    from spectra.krylov.eigen_run import EigenRun

WHICH = ("LA", "SA", "LM", "BE", "SM")


@dataclasses.dataclass(frozen=True)
class Request:
    """The pairs that a call of `eigsh` asks for, and the means that it allows, by its arguments."""

    k: int
    which: str
    key: jax.Array
    tol: float
    num_basis: int | None
    block_size: int
    max_matvecs: int | None
    verify: bool | str
    v0: PyTree
    deflate: Eigenpairs | None
    place: BasisPlace  # where the rows lie

    @property
    def deflated(self) -> list[PyTree]:
        """The vectors that the pairs are orthogonal to."""
        return [] if self.deflate is None else stacks.split(self.deflate.vectors)

    def described(self) -> dict[str, Any]:
        """What a checkpoint knows its run by, beside the operator and `max_matvecs`; of vectors a digest."""
        deflate = self.deflate and (self.deflate.values, self.deflate.vectors)
        vectors = {"v0": self.v0, "deflate": deflate}
        layout = self.place.layout
        dtype = layout.row_dtype or trees.scalar_dtype(layout.structure)
        plain: dict[str, Any] = {"k": int(self.k), "which": self.which, "tol": float(self.tol)}
        plain |= {"verify": self.verify, "basis_dtype": str(dtype)}
        plain |= {"num_basis": self.num_basis, "block_size": int(self.block_size)}
        return plain | {name: None if x is None else tree_digest(x) for name, x in vectors.items()}


def order(values: np.ndarray, which: str) -> np.ndarray:
    """Indices of ascending `values`, most wanted first."""
    if which == "LA":
        return np.argsort(-values, kind="stable")
    if which == "SA":
        return np.argsort(values, kind="stable")
    if which == "LM":
        return np.argsort(-np.abs(values), kind="stable")
    if which == "SM":
        return np.argsort(np.abs(values), kind="stable")
    up, down = np.argsort(-values, kind="stable"), np.argsort(values, kind="stable")
    mixed = np.stack([up, down], axis=1).ravel()  # the top first: it has the odd one, as in ARPACK
    return mixed[np.sort(np.unique(mixed, return_index=True)[1])]


@dataclasses.dataclass(frozen=True)
class End:
    """One end of the spectrum: eigenvalues with sign * λ > worst are wanted.

    A missed eigenvalue is a copy of a found one, where these have converged well. A copy of the worst would
    change nothing, so it is the next better value, `second`, that must be excluded from the rest of the
    space. Where they have not, another one may have been passed over, anywhere `beyond` the worst.
    """

    sign: float
    worst: float
    second: float  # infinite where there is none
    beyond: float  # the worst and the tolerance


def ends(values: np.ndarray, which: str, margin: float) -> list[End]:
    """The ends of k wanted eigenvalues; where all are equal within `margin`, no copy can hide there."""
    k = len(values)
    if which == "BE":
        parts = [(1.0, np.sort(values)[::-1][: math.ceil(k / 2)]), (-1.0, np.sort(-values)[::-1][: k // 2])]
    elif which == "LM":
        size = np.sort(np.abs(values))[::-1]
        parts = [(1.0, size), (-1.0, size)]
    else:
        sign = 1.0 if which == "LA" else -1.0
        parts = [(sign, np.sort(sign * values)[::-1])]
    return [_end(sign, part, margin) for sign, part in parts if len(part)]


def _end(sign: float, part: np.ndarray, margin: float) -> End:
    beyond = part[-1] + margin
    return End(sign, float(part[-1]), float(part[part > beyond].min(initial=np.inf)), float(beyond))


def chance_of_a_miss(
    points: list[float], alpha: np.ndarray, beta: np.ndarray, size: int, moved: float
) -> float:
    """At most α with probability α, if Lanczos from a random vector has overlooked a wanted eigenvalue.

    The vector has of a unit eigenvector u the share |uᵀv|², of a known law, and the coefficients of the run
    bound the share of all that is beyond a point: see `christoffel`. That holds after whatever number of
    steps one looks, so a search may end as soon as this is at most its goal, and has overlooked one with no
    more than that probability. It says nothing where the goal is not reached. Arguments as of
    `christoffel.chance`, for each of the points.
    """
    return max((chance(point, alpha, beta, size, moved) for point in points), default=0.0)


def beats(limits: list[End], theta: np.ndarray, margin: float) -> bool:
    """Whether one of `theta` is better than the worst eigenvalue found at its end."""
    return any(bool(np.any(end.sign * theta > end.worst + margin)) for end in limits)


MISSED = 0.01
"""verify="auto" ends when a missed copy is less probable than this, or its products are spent."""
CERTAIN = 1e-6
"""The same for verify=True, without a limit of its own on the products."""
ALL = 2**31 - 1
"""Products of a search that ends with those of the run."""
LOOSE = 1e-4
"""Above this tolerance verify="auto" spends no more products than ARPACK's first sweep, but these also on
eigenvalues that a run of so few steps passed over: at 1e-2, 58 of 300 took 7.2 for 7.4."""
KNOWN = 0.03
"""Residual in units of the gap, with which a further Ritz vector stays out of the search."""


@dataclasses.dataclass
class Search:
    """Where a search stands: nothing here is a vector, so that it is saved as it is."""

    limits: list[End]
    goal: float  # probability of a miss at which it ends
    left: int  # products that it may take
    first: list[int]  # rows that it is orthogonal to
    row: int  # waits for its product
    rows: list[int] = dataclasses.field(default_factory=list[int])  # have had theirs

    @classmethod
    def of(cls, saved: dict[str, Any]) -> "Search":
        """From its fields as JSON has them."""
        limits = [End(**({"beyond": end["second"]} | end)) for end in saved["limits"]]
        fields: dict[str, Any] = saved | {"limits": limits}
        return cls(**fields)


def search(run: "EigenRun", verify: bool | str, ncv: int) -> bool:
    """Look for a missed eigenvalue; True if the run goes on with one. It is done if there is none, as far as
    the products that a search may take can tell; where those of the run end first, neither, and more of them
    go on with this search."""
    run.search = run.search or (None if verify is False else _begin(run, verify, ncv))
    if run.search is None:
        run.done = verify is False or not run.missed or run.band.num_matvecs < run.budget
        return False
    found = _from_random(run, run.search)
    if not found and _unfinished(run, run.search):
        return False
    if found:
        run.history, run.copies, run.missed = [], run.copies + 1, 1.0
        run.search = None
        run.band.bring_back()
    else:
        leave(run)
        run.done = True
    return found


def leave(run: "EigenRun") -> None:
    """Without the vectors of a search, which belong to no wanted pair."""
    if run.search is not None:
        run.band.pending = []
        run.band.restart(np.eye(len(run.search.first)), run.search.first)
        run.search = None
        run.band.bring_back()


def _unfinished(run: "EigenRun", search: Search) -> bool:
    """Whether the products of the run ended before those of the search."""
    return bool(run.missed) and run.missed > search.goal and search.left > 0


def _begin(run: "EigenRun", verify: bool | str, ncv: int) -> Search | None:
    """A random vector beside the pairs; None where nothing can be missing, or no product is left for it."""
    band = run.band
    theta, vectors, _, errors = band.ritz()
    best = order(theta, run.which)
    all_ends = ends(theta[best[: run.k]], run.which, run.accepted)
    hiding = [end for end in all_ends if np.isfinite(end.second)]
    run.missed = 0.0 if not hiding or run.exhausted else 1.0
    limits = all_ends if run.tol > LOOSE else [dataclasses.replace(end, beyond=end.second) for end in hiding]
    if run.exhausted or not limits:
        return None
    if not run.allowed:
        run.allowed = band.num_matvecs + (ALL if verify is True else _share(run, band.num_matvecs, ncv))
    if run.copies > run.extended:  # eigenvalues do repeat here: look as long as it took to come this far
        run.extended, run.allowed = run.copies, max(run.allowed, 2 * band.num_matvecs)
    room = run.capacity - len(band.locked) - len(band.pending) - 1
    steps = min(run.allowed - band.num_matvecs, room - run.k, run.op.size - band.filled - 1)
    if steps < 1 or band.num_matvecs >= run.budget:
        return None
    gaps = np.min([end.beyond - end.sign * theta for end in limits], axis=0)
    known = [i for i in best[run.k :] if errors[i] <= KNOWN * gaps[i]][: room - run.k - steps]
    shift = np.sum(errors[known] ** 2 / gaps[known]) / (1 - np.sum((errors[known] / gaps[known]) ** 2))
    limits = [
        dataclasses.replace(end, second=float(end.second - shift), beyond=float(end.beyond - shift))
        for end in limits
    ]
    band.set_aside(vectors[:, np.sort([*best[: run.k], *known])])
    first, goal = list(band.processed), CERTAIN if verify is True else MISSED
    return Search(limits, goal, steps, first, run.append_random())


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
    while search.left > 0 and band.num_matvecs < run.budget:
        run.pause()
        run.extend(search.row, 1)
        search.rows.append(search.row)
        search.left -= 1
        inner = band.ritz(search.rows)[0]
        if beats(search.limits, inner, run.accepted):
            return True
        if not band.pending:  # a random vector spans, with its products, every eigenspace that is left
            run.missed = 0.0
            return False
        search.row = band.pending[-1]
        alpha = band.coefficients[search.rows, search.rows]
        beta = band.coefficients[[*search.rows[1:], search.row], search.rows]
        size = run.op.size - len(band.locked) - len(search.first)
        moved = band.scale * max(band.asymmetry, 4 * run.op.precision)
        copies = [end.sign * end.second for end in search.limits if np.isfinite(end.second)]
        others = [end.sign * end.beyond for end in search.limits]
        if chance_of_a_miss(copies, alpha, beta, size, moved) <= search.goal:
            run.missed = min(run.missed, search.goal)
            if chance_of_a_miss(others, alpha, beta, size, moved) <= search.goal:
                return False
    return False
