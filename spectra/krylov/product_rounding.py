"""What rounding does to products: measured, where an operator says what they depend on.

Products in float64 tell, where there are some (`operators.doubled`); else those of the operator with all that
it depends on moved by one rounding (`LinearOperator.moved`).
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spectra.base import draws, meshes, programs, stacks, trees
from spectra.base.trees import PyTree
from spectra.krylov.matrices import Unrounded
from spectra.krylov.shifts import largest_shift, of_shifts
from spectra.operators.base import LinearOperator, product
from spectra.operators.doubled import doubled
from spectra.results import Eigenpairs

SAMPLES = 4
"""Moved operators: as many degrees of freedom has what they say."""
DRAWN, RARE = 16, 1e-4
"""Matrices that would be rounded to the one that is given, and how often what they say may not hold."""
TRIED, UNSEEN = 8, 1.9
"""Random vectors that a matrix is tried on, and what may be left to be seen by none of them."""
MARGIN = 2.0
"""What another product may differ by from that in float64, where one differs by 1."""
EXPLORED = 3
"""Vectors on which the norm of what rounding does to products is sought. On 21 trained networks twice the
largest of three was 1.45 times what an eigenvalue moves by, or more, but for one start in twenty; twice the
first alone was 0.4 times that."""
KEY = 7

Projection = Callable[[PyTree], PyTree]


def whole(v: PyTree) -> PyTree:
    """The projection that leaves a vector as it is."""
    return v


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


def change_along(
    op: LinearOperator, here: LinearOperator, v: PyTree, image: PyTree, keep: Projection = whole
) -> float:
    """What rounding does to products with unit vectors; `v` is one, and H v given as `image`.

    Where products are known in float64 their differences E are followed as in a power iteration, from v to
    E v and E E v: rounding may do more to other directions than to those in which H is large, and an
    eigenvalue moves by |E|. A random vector joins E v: what rounding takes of the matrix whole, products do
    not have, and E v = 0 where v is made of them. Elsewhere it is `change_of_product`. `here` is `op`,
    prepared. What counts of each product is what the projection `keep` leaves of it: of a block its own
    numbers.
    """
    exact = doubled(op)
    if exact is None:
        return limit([_change(op, i, v, image, keep) for i in range(SAMPLES)])
    largest = 0.0
    for i in range(EXPLORED):
        if i == 1:
            v = _between(keep(draws.unit_vector(jax.random.key(KEY), op)), v)
        if i:
            image = multiply(here, v)
        size, v = exact.change(v, image)
        if keep is not whole:
            share = trees.length(v := keep(v))
            size, v = size * share, unit(v)
        largest = max(largest, size)
        if i and not size:
            break
    return MARGIN * largest


@programs.jit
def unit(v: PyTree) -> PyTree:
    """v / |v|; zero stays zero."""
    size = trees.norm(v)
    return trees.scale(1 / jnp.where(size > 0, size, 1), v)


@programs.jit
def _between(u: PyTree, v: PyTree) -> PyTree:
    """The unit vector halfway from u, of any length, to a unit vector v."""
    return unit(trees.axpy(1.0, unit(u), v))


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


def error_of_matrix(op: LinearOperator, matrix: np.ndarray, unrounded: Unrounded) -> float:
    """A bound on the spectral norm of E, by which a symmetric matrix differs from that in float64.

    |E|² is below UNSEEN sqrt(n) |E E v| for one of `TRIED` vectors v on the unit sphere, with the probability
    1 - (sqrt(2 / π) / UNSEEN)^TRIED = 0.999 (Dixon, doi:10.1137/0720053): each has of the vector that decides
    the share of a normal number, or more. One product more makes n^(1/4) of what would be sqrt(n).
    """
    n, largest = len(matrix), 0.0
    for i in range(TRIED):
        v = np.asarray(trees.ravel(draws.unit_vector(jax.random.key(KEY + i), op)))
        once = matrix @ v - unrounded(v)
        size = float(np.linalg.norm(once))
        v = (once / (size or 1.0)).astype(v.dtype)
        largest = max(largest, size * float(np.linalg.norm(matrix @ v - unrounded(v))))
    return float(np.sqrt(UNSEEN * np.sqrt(n) * largest))


def _change(op: LinearOperator, i: int, v: PyTree, image: PyTree, keep: Projection = whole) -> float:
    other = op.moved(jax.random.fold_in(jax.random.key(KEY), i))
    assert other is not None
    return float(_distance(keep(multiply(other.prepare(), v)), keep(image)))


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
    if shifted := _shift_along(op, pairs.vectors):
        pairs = dataclasses.replace(pairs, noise_floor=max(pairs.noise_floor, 2 * op.precision * shifted))
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
    pairs = dataclasses.replace(pairs, noise_floor=max(pairs.noise_floor, change))
    return _with_what_is_hidden(op, pairs)


def _with_what_is_hidden(op: LinearOperator, pairs: Eigenpairs) -> Eigenpairs:
    """The pairs, NOISY where rounding leaves no digit of |H|, whatever it does to their own vectors.

    It may hide a larger eigenvalue then: 1 - p of an example that a loss is sure of is rounded to zero, and
    what is found is another. The floor is no less than |H' - H|, by which every eigenvalue moves at most
    (Weyl). A random vector tells where that is to be looked at, by sqrt(n) |(H' - H) v|, near the Frobenius
    norm; without products in float64 the floor of the pairs does.
    """
    status, size = pairs.status, float(np.abs(pairs.values).max())
    suspected, norm = pairs.noise_floor, partial(change_of_matrix, op)
    if (found := seen_change(op)) is not None:
        suspected, norm = max(suspected, found[0]), found[1]
    if status.beside(suspected, size) is status:
        return pairs
    floor = max(pairs.noise_floor, norm())
    noisy = status.beside(floor, max(size, seen_norm(op)))
    return pairs if noisy is status else dataclasses.replace(pairs, noise_floor=floor, status=noisy)


def seen_change(
    op: LinearOperator, here: LinearOperator | None = None
) -> tuple[float, Callable[[], float]] | None:
    """√n |(H' - H) v| of a random unit vector v, near the Frobenius norm, and what follows it to |H' - H|.

    None where there are no products in float64. `here` is the operator, if it is prepared already.
    """
    exact = doubled(op)
    if exact is None:
        return None
    here = op.prepare() if here is None else here
    v = draws.unit_vector(jax.random.key(KEY), op)
    image = multiply(here, v)
    return float(np.sqrt(op.size)) * exact.distance(v, image), partial(change_along, op, here, v, image)


def mixtures(k: int) -> np.ndarray:
    """Coefficients of unit vectors, in rows, that each contain all of k orthonormal ones alike."""
    return np.array([np.ones(k), (-1.0) ** np.arange(k)])[: min(k, 2)] / np.sqrt(k)


@programs.jit
def _mixed(vectors: PyTree, mixtures: Any) -> PyTree:
    return stacks.combine(jnp.asarray(mixtures, trees.scalar_dtype(vectors)), vectors)


def _shift_along(op: LinearOperator, vectors: PyTree) -> float:
    """The most that shifts are of a product with one of the unit vectors."""
    if of_shifts(op, stacks.row(vectors, 0)) is None:
        return 0.0
    return max(trees.length(of_shifts(op, v)) for v in stacks.split(vectors))


POWERS = 3


def seen_norm(op: LinearOperator) -> float:
    """|A| from below, by `POWERS` products with a random vector, and no less than its shifts.

    A run whose right-hand side lies in a part of the spectrum sees no other, but what a product with its x
    is rounded by comes from all of A. What the last product gains is |A| but for a factor of n^(-1 / 2
    POWERS) at the very worst, a lone eigenvalue above a bulk that is just as large without it.
    """
    vector, ratio = draws.unit_vector(jax.random.key(KEY), op), 0.0
    for _ in range(POWERS):
        image = multiply(op, vector)
        ratio = max(ratio, trees.length(image) / (trees.length(vector) or 1.0))
        vector = in_unit(image)
    return max(ratio, float(largest_shift(op)))


@programs.jit
def in_unit(vector: PyTree) -> PyTree:
    """The vector over the power of two nearest to its largest number, so that its square is one, too."""
    return trees.scale(1 / trees.power_of_two(trees.largest(vector)), vector)


def seen_norm_traced(op: LinearOperator) -> jax.Array:
    """The same inside jit."""

    def step(_: Any, carry: tuple[PyTree, jax.Array]) -> tuple[PyTree, jax.Array]:
        image = op.mv(carry[0])
        return in_unit(image), jnp.maximum(carry[1], trees.norm(image) / trees.norm(carry[0]))

    start = draws.unit_vector(jax.random.key(KEY), op), jnp.zeros((), op.dtype)
    ratio = lax.fori_loop(0, POWERS, step, start)[1]
    ratio = jnp.where(jnp.isfinite(ratio), ratio, 0)  # 0 / 0 of A = 0
    return jnp.maximum(ratio, largest_shift(op))


def vanished(op: LinearOperator) -> float:
    """A noise floor where all products are zero, in the units of an eigenvalue.

    A saturated loss has second derivatives below what its type resolves: 1 - p of a probability that rounds
    to one, or an exponential that underflows. What rounding changes is then no share of |H|, but the whole of
    it: |H' - H|, as measured, and no less than the smallest number of the type. Products in float64 may
    vanish as well, where all probabilities round to one, and moved ones may, where all underflows; so both
    are asked. 0 for an operator without parameters, such as a matrix of zeros, which has nothing to round.
    """
    if not is_measured(op, moved=True):
        return 0.0
    changes = [change_of_matrix(op, moved) for moved in (False, True)]
    return max(*changes, float(jnp.finfo(op.dtype).tiny))
