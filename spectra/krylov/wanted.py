"""What is asked of eigenpairs, and what may be wrong with them: rounding, repeated ones that were missed."""

import dataclasses
import math
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spectra.base import draws, meshes, programs, stacks, trees
from spectra.base.trees import PyTree
from spectra.operators.arithmetic import ShiftedOperator
from spectra.operators.base import LinearOperator, product
from spectra.operators.doubled import DoubledOperator, doubled
from spectra.quadrature.christoffel import chance
from spectra.results import Eigenpairs

if TYPE_CHECKING:
    from spectra.krylov.eigen_run import EigenRun

WHICH = ("LA", "SA", "LM", "BE", "SM")


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


SAMPLES = 4
"""Moved operators: as many degrees of freedom has what they say."""
DRAWN, RARE = 16, 1e-4
"""Matrices that would be rounded to the one that is given, and how often what they say may not hold."""
TRIED, UNSEEN = 8, 1.9
"""Random vectors that a matrix is tried on, and what may be left to be seen by none of them."""
MARGIN = 2.0
"""What another product may differ by from that in float64, where one differs by 1."""
KEY = 7


def multiply(op: LinearOperator, v: PyTree) -> PyTree:
    """One product outside of any loop; on a mesh it lies as the parameters do, see `blocks.products`."""
    if op.on_host:
        return op.mv(v)
    where = meshes.places(op.like)
    return _placed_product(op, v, where) if any(where) else product(op, v)


@partial(programs.jit, static_argnames="where")
def _placed_product(op: LinearOperator, v: PyTree, where: meshes.Places) -> PyTree:
    return meshes.placed(op.mv(v), where)


def is_measured(op: LinearOperator, moved: bool = False) -> bool:
    """Whether rounding of the products is, and not only stated, as that of a matrix is; with `moved`, without
    those in float64."""
    return (not moved and doubled(op) is not None) or op.moved(jax.random.key(KEY)) is not None


def change_of_product(op: LinearOperator, v: PyTree, image: PyTree) -> float:
    """What rounding does to a product as this one, H v, given as `image`.

    It is `MARGIN` times the difference from the product in float64. Where there is none, it is what
    |(H' - H) v| of one more moved operator H' stays below at 95 %: Student's t with the root mean square of
    `SAMPLES` of them. `op` is not prepared, and `is_measured`.
    """
    exact = doubled(op)
    if exact is not None:
        return MARGIN * exact.distance(v, image)
    return limit([_change(op, i, v, image) for i in range(SAMPLES)])


def change_of_matrix(op: LinearOperator, moved: bool = False) -> float:
    """The same of |H' - H|, the Frobenius norm: from sqrt(n) |(H' - H) v| for `SAMPLES` random v, |v| = 1.

    0 where the operator does not say what it depends on, as a matrix does not. `moved` asks for products that
    are moved also where there are some in float64.
    """
    if not is_measured(op, moved):
        return 0.0
    exact, here, changes = None if moved else doubled(op), op.prepare(), list[float]()
    for i in range(SAMPLES):
        v = draws.unit_vector(jax.random.key(KEY + i), op)
        image = multiply(here, v)
        changes.append(_change(op, i, v, image) if exact is None else exact.distance(v, image))
    return float(np.sqrt(op.size)) * limit(changes)


def error_of_matrix(exact: DoubledOperator, matrix: np.ndarray) -> float:
    """A bound on the spectral norm of E, by which a symmetric matrix differs from that in float64.

    |E|² is below UNSEEN sqrt(n) |E E v| for one of `TRIED` vectors v on the unit sphere, with the probability
    1 - (sqrt(2 / π) / UNSEEN)^TRIED = 0.999 (Dixon, doi:10.1137/0720053): each has of the vector that decides
    the share of a normal number, or more. One product more makes n^(1/4) of what would be sqrt(n).
    """
    n, largest = len(matrix), 0.0
    for i in range(TRIED):
        v = np.asarray(trees.ravel(draws.unit_vector(jax.random.key(KEY + i), exact)))
        once = matrix @ v - exact.unrounded(v)
        size = float(np.linalg.norm(once))
        v = (once / (size or 1.0)).astype(v.dtype)
        largest = max(largest, size * float(np.linalg.norm(matrix @ v - exact.unrounded(v))))
    return float(np.sqrt(UNSEEN * np.sqrt(n) * largest))


def _change(op: LinearOperator, i: int, v: PyTree, image: PyTree) -> float:
    other = op.moved(jax.random.fold_in(jax.random.key(KEY), i))
    assert other is not None
    return float(_distance(multiply(other.prepare(), v), image))


def limit(changes: list[float] | np.ndarray, outside: float = 0.05) -> float:
    """What one more of a few normal numbers stays below but for a share `outside`: Student's t; 0 of none."""
    from scipy.special import stdtrit

    count = len(changes)
    return float(stdtrit(count, 1 - outside / 2) * np.sqrt(np.mean(np.square(changes)))) if count else 0.0


@programs.jit
def _distance(a: PyTree, b: PyTree) -> jax.Array:
    return trees.norm(jax.tree.map(jnp.subtract, a, b))


def with_measured_floor(op: LinearOperator, pairs: Eigenpairs, images: list[PyTree] | None) -> Eigenpairs:
    """The pairs with a noise floor that holds what rounding does to their eigenvalues.

    Mixtures u of the vectors stand for all: with random signs the square of sqrt(k) |(H' - H) u| is
    Σ |(H' - H) v_i|² on average, and the mean over both mixtures of two vectors is just that. `images` are
    those by the products of the run; further products, where there are none, may be rounded otherwise.
    Nothing is measured where an operator does not say what it depends on, as a matrix does not. What a shift
    cancels was as large as the shift, and has been rounded.
    """
    if isinstance(op, ShiftedOperator):
        shifted = 2 * op.precision * abs(float(op.delta))
        pairs = dataclasses.replace(pairs, noise_floor=max(pairs.noise_floor, shifted))
    if not is_measured(op):
        return pairs
    k, exact = len(pairs.values), doubled(op)
    vectors = stacks.split(pairs.vectors if k == 1 else _mixed(pairs.vectors, mixtures(k)))
    if exact is None:
        change = float(np.sqrt(k)) * change_of_product(op, vectors[0], multiply(op.prepare(), vectors[0]))
    else:
        margin = MARGIN if images is None or k > len(vectors) else 1.0
        if images is None:
            here = op.prepare()
            images = [multiply(here, v) for v in vectors]
        changes = [exact.distance(v, x) for v, x in zip(vectors, images, strict=True)]
        of_norms = float(jnp.finfo(op.dtype).eps * np.abs(pairs.values).max())  # |v| and |H v - λ v|
        change = margin * float(np.sqrt(k * np.mean(np.square(changes)))) + of_norms
    return dataclasses.replace(pairs, noise_floor=max(pairs.noise_floor, change))


def mixtures(k: int) -> np.ndarray:
    """Coefficients of unit vectors, in rows, that each contain all of k orthonormal ones alike."""
    return np.array([np.ones(k), (-1.0) ** np.arange(k)])[: min(k, 2)] / np.sqrt(k)


@programs.jit
def _mixed(vectors: PyTree, mixtures: Any) -> PyTree:
    return stacks.combine(jnp.asarray(mixtures, trees.scalar_dtype(vectors)), vectors)


POWERS = 3


def seen_norm(op: LinearOperator) -> float:
    """|A| from below, by `POWERS` products with a random vector, and no less than its shift.

    A run whose right-hand side lies in a part of the spectrum sees no other, but what a product with its x
    is rounded by comes from all of A. What the last product gains is |A| but for a factor of n^(-1 / 2
    POWERS) at the very worst, a lone eigenvalue above a bulk that is just as large without it.
    """
    vector, ratio = draws.unit_vector(jax.random.key(KEY), op), 0.0
    for _ in range(POWERS):
        image = multiply(op, vector)
        ratio = max(ratio, trees.length(image) / (trees.length(vector) or 1.0))
        vector = _in_unit(image)
    return max(ratio, abs(float(op.delta)) if isinstance(op, ShiftedOperator) else 0.0)


@programs.jit
def _in_unit(vector: PyTree) -> PyTree:
    return trees.scale(1 / trees.power_of_two(trees.largest(vector)), vector)


def seen_norm_traced(op: LinearOperator) -> jax.Array:
    """The same inside jit."""

    def step(_: Any, carry: tuple[PyTree, jax.Array]) -> tuple[PyTree, jax.Array]:
        image = op.mv(carry[0])
        return _in_unit(image), jnp.maximum(carry[1], trees.norm(image) / trees.norm(carry[0]))

    start = draws.unit_vector(jax.random.key(KEY), op), jnp.zeros((), op.dtype)
    ratio = lax.fori_loop(0, POWERS, step, start)[1]
    ratio = jnp.where(jnp.isfinite(ratio), ratio, 0)  # 0 / 0 of A = 0
    return jnp.maximum(ratio, jnp.abs(op.delta)) if isinstance(op, ShiftedOperator) else ratio


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
