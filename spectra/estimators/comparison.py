"""How wrong an approximation is on the network at hand: KFAC against the Gauss-Newton matrix, say."""

# pyright: reportPrivateUsage=false
# Operators have parts that only this package uses.

import math
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import draws, meshes, programs, stacks, trees
from spectra.base.calls import automatic
from spectra.base.errors import NonFiniteError, SpectraError, Status
from spectra.base.host import one_thread
from spectra.base.trees import PyTree
from spectra.density.slq import slq
from spectra.estimators.functions import trace_of
from spectra.estimators.ratios import ratio
from spectra.krylov.cancelled import relative_precision
from spectra.krylov.dense import matrix_error
from spectra.krylov.eigsh import eigsh
from spectra.krylov.matrices import matrix_of
from spectra.operators.base import LinearOperator, require_operator
from spectra.operators.kronecker import FactoredOperator
from spectra.results import Eigenpairs, Interval, OperatorComparison, Quadrature

DENSE = 64
"""Order up to which matrices are formed: everything is exact then, and costs about as much."""
RISKS = 5
"""What the interval of W₁ rests on: both bands, the mean |λ| of B, |A - B|_F and tr (A - B)."""
EQUAL_CELLS = 4096
"""Points of the integral over the distance between two CDFs, beside the nodes."""


@automatic
def compare_operators(
    a: LinearOperator,
    b: LinearOperator,
    *,
    key: jax.Array,
    num_pairs: int = 5,
    num_probes: int = 16,
    num_steps: int = 50,
    by: Literal["layer", "leaf"] | None = "layer",
    level: float = 0.95,
) -> OperatorComparison:
    """Measure how wrong an operator A is in place of B, for example KFAC for the Gauss-Newton matrix.

    Four figures are computed: the relative Frobenius error |A - B|_F / |B|_F, of the whole matrix and of the
    diagonal block of each layer, from E|(A - B)z|² = |A - B|²_F over Rademacher probes z; the ratio tr A / tr
    B; the overlap |U_Aᵀ U_B|²_F / k of the k leading eigenvectors; and the distance W₁ = ∫|F_A - F_B| between
    the distributions of eigenvalues, divided by the mean modulus of those of B. Up to order 64 all of these
    are exact, and intervals hold the rounding of the matrices.

    Args:
        a: the approximation.
        b: the operator that it approximates, on vectors of the same structure.
        key: JAX random key of the probes, the same for A and B.
        num_pairs: k, the number of eigenvalues of largest modulus to compare.
        num_probes: probes for the Frobenius errors of the whole and of each layer; densities use half as
            many.
        num_steps: Lanczos steps per probe for the densities; not used up to order 64.
        by: blocks to compare, "layer" or "leaf"; None to compare no blocks.
        level: probability with which each interval contains its number.

    Returns:
        `OperatorComparison`. The intervals of Frobenius norms and traces hold the ratios that the probes do
        not exclude, with errors from the products of all pairs of probes (see `spectra.estimators.ratios`);
        few probes may leave one end open. That of the overlap is the bound of Davis and Kahan for both
        eigenspaces from residuals and gaps, and is [0, 1] if a gap is not resolved; that of W₁ is the
        integral over the distance between the bands of the two CDFs, within |tr (A - B)| / n and
        |A - B|_F / sqrt(n), over the interval of the mean |λ| of B, and is wide if there are few probes or
        steps. The eigenvalues of a Kronecker-factored operator are
        known, and have no band.

    Raises:
        StructureError: the operators act on different vectors.
        SpectraError: too few pairs or probes, or an invalid level.

    Cost: 2 num_probes products with A and B; as many products with its block for each layer; num_probes / 2
    runs of num_steps for each density; and one `eigsh` for each operator.

    References:
        Better Hessians matter: studying the impact of curvature approximations in influence functions,
        arXiv:2509.23437.

    Examples:
        >>> import jax, jax.numpy as jnp, spectra
        >>> exact = spectra.MatrixOperator(jnp.diag(jnp.arange(1.0, 11.0)))
        >>> comparison = spectra.compare_operators(0.9 * exact, exact, key=jax.random.key(0))
        >>> round(float(comparison.frobenius.estimate), 4), round(float(comparison.overlap.estimate), 4)
        (0.1, 1.0)
    """
    for op in (a, b):
        require_operator(op)
    trees.require_values("compare_operators", (a, b, key))
    trees.check_structure(a.structure, b.structure, "the first operator")
    if num_pairs < 1 or num_probes < 4 or num_steps < 1 or not 0 < level < 1:
        raise SpectraError(
            f"num_pairs={num_pairs}, num_probes={num_probes}, num_steps={num_steps}, level={level}: use at "
            "least 1 pair, 4 probes and 1 step, and a level between 0 and 1."
        )
    keys = jax.random.split(key, 4)
    k = min(num_pairs, b.size)
    seen = _Seen(a, b, keys[0], num_probes)
    frobenius, trace = seen.ratios(level)
    spent = 2 * seen.count
    layers, more = _layers(a, b, keys[1], num_probes, level, by)
    if b.size <= DENSE:
        rest = _dense_spectra(a, b, k)
        spent += 2 * b.size
    else:
        each = 1 - (1 - level) / RISKS
        rest = _spectra(a, b, keys[2:], k, max(2, num_probes // 2), num_steps, each, seen.apart(each))
    overlap, distance, values, residuals, status, own = rest
    return OperatorComparison(
        frobenius,
        trace,
        overlap,
        distance,
        values,
        residuals,
        layers,
        size=b.size,
        num_matvecs=spent + more + own,
        level=level,
        status=status,
    )


def _layers(
    a: LinearOperator, b: LinearOperator, key: jax.Array, num_probes: int, level: float, by: str | None
) -> tuple[dict[str, Interval], int]:
    if by is None:
        return {}, 0
    first, second = a.blocks(by), b.blocks(by)
    if set(first) != set(second):  # one of them does not know which leaves are stacks of layers
        first, second = (op.blocks(by, scanned=_never) if op._stacks() else op.blocks(by) for op in (a, b))
    found: dict[str, Interval] = {}
    spent = 0
    for i, name in enumerate(second):
        seen = _Seen(first[name], second[name], jax.random.fold_in(key, i), num_probes)
        found[name], _ = seen.ratios(level)
        spent += 2 * seen.count
    return found, spent


def _never(path: str) -> bool:
    del path
    return False


class _Seen:
    """Products of both operators with the same probes: all columns, where there are no more of these."""

    def __init__(self, a: LinearOperator, b: LinearOperator, key: jax.Array, num_probes: int):
        self.size, self.exact = b.size, b.size <= num_probes
        self.count = b.size if self.exact else num_probes
        probes = _probes(key, b, self.count, self.exact, meshes.places(b.like))
        images = a.prepare().mv_batch(probes), b.prepare().mv_batch(probes)
        largest = max(float(_size(image)) for image in images)
        if not np.isfinite(largest):
            raise NonFiniteError(f"a product is NaN or infinite. {a.explain_non_finite()}")
        forms, unit = _forms(probes, *images)
        self.unit = float(unit)
        self.square, self.of_b, self.a, self.b, self.ones = np.asarray(forms, np.float64)
        self.precision = max(a.precision, b.precision)
        # The products of A and of B are rounded relative to themselves: of |A| + |B| <= |A - B| + 2 |B|.
        norms = [math.sqrt(np.trace(x) / (1 if self.exact else self.count)) for x in (self.square, self.of_b)]
        self.rounding = float(max(relative_precision(a), relative_precision(b))) * (norms[0] + 2 * norms[1])

    def ratios(self, level: float) -> tuple[Interval, Interval]:
        """|A - B|_F / |B|_F and tr A / tr B."""
        root = [math.sqrt(x) for x in self._ratio(self.square, self.of_b, level, positive=True)]
        trace = self._ratio(self.a, self.b, level, positive=False)
        times = 1 if self.exact else self.count
        norm, total = math.sqrt(np.trace(self.of_b) / times), abs(float(np.trace(self.b))) / times
        of_norm = self.rounding / norm if norm else 0.0
        of_trace = math.sqrt(self.size) * self.rounding / total if total else 0.0
        return _wider(Interval(*root), of_norm, 0.0), _wider(trace, of_trace, -math.inf)

    def apart(self, level: float) -> tuple[float, float]:
        """Bounds of the mean distance of the n eigenvalues of A from those of B, both in order.

        The mean of what they differ by is tr (A - B) / n, and their root mean square distance is not above
        |A - B|_F / sqrt(n) (Hoffman and Wielandt, doi:10.1215/S0012-7094-53-02004-3).
        """
        square = self._ratio(self.square, self.ones, level, positive=True)
        mean = self._ratio(self.a - self.b, self.ones, level, positive=False)
        least = max(mean.lower, -mean.upper, 0.0)
        lost = self.rounding / math.sqrt(self.size)
        return self.unit * max(least - lost, 0.0), self.unit * (math.sqrt(square.upper) + lost)

    def _ratio(self, first: np.ndarray, second: np.ndarray, level: float, *, positive: bool) -> Interval:
        if self.exact:
            return _exact_ratio(first, second)
        return ratio(first, second, level, precision=self.precision, positive=positive)


def _wider(interval: Interval, error: float, least: float) -> Interval:
    """The interval with an error of rounding added to it."""
    if not math.isfinite(error):
        return interval
    return Interval(max(interval.lower - error, least), interval.estimate, interval.upper + error)


@partial(programs.jit, static_argnames=("count", "exact", "where"))
def _probes(key: jax.Array, op: LinearOperator, count: int, exact: bool, where: meshes.Places) -> PyTree:
    structure = op.structure
    if exact:
        return jax.vmap(lambda row: trees.unravel(row, structure))(jnp.eye(count, dtype=op.dtype))
    keys = jax.random.split(key, count)
    return jax.vmap(lambda own: draws.sample(own, structure, jax.random.rademacher, where=where))(keys)


@programs.jit
def _size(stack: PyTree) -> jax.Array:
    return trees.largest(stack)


@programs.jit
def _forms(probes: PyTree, first: PyTree, second: PyTree) -> tuple[jax.Array, jax.Array]:
    """z_iᵀ M z_j, (k, k), for M of (A - B)², B², A, B and the identity, in units in which squares do not
    overflow, and the unit of products."""
    unit = trees.power_of_two(jnp.maximum(trees.largest(first), trees.largest(second)))
    first, second = (trees.scale(1 / unit, x) for x in (first, second))
    difference = jax.tree.map(jnp.subtract, first, second)
    pairs = (difference, difference), (second, second), (probes, first), (probes, second), (probes, probes)
    return jnp.stack([stacks.inner(x, y) for x, y in pairs]), unit


def _exact_ratio(first: np.ndarray, second: np.ndarray) -> Interval:
    """The ratio of two traces where the probes are all columns."""
    x, y = float(np.trace(first)), float(np.trace(second))
    value = x / y if y else 0.0 if x == 0 else math.inf
    return Interval(value, value, value)


def _dense_spectra(a: LinearOperator, b: LinearOperator, k: int) -> Any:
    """Everything from the matrices, with their rounding, by which no eigenvalue moves further (Weyl)."""
    found = [matrix_of(op) for op in (a, b)]
    with one_thread():
        pairs = [np.linalg.eigh(each.entries) for each in found]
    errors = [matrix_error(op, each, own[0]) for op, each, own in zip((a, b), found, pairs, strict=True)]
    order = [np.argsort(-np.abs(values)) for values, _ in pairs]
    ranked = [values[own] for (values, _), own in zip(pairs, order, strict=True)]
    first, second = (basis[:, own[:k]] for (_, basis), own in zip(pairs, order, strict=True))
    overlap = float(min(np.sum((first.T @ second) ** 2) / k, 1.0))
    reach = sum(_angle(own, k, math.sqrt(k) * e, e) for own, e in zip(ranked, errors, strict=True))
    distance, scale = float(np.abs(pairs[0][0] - pairs[1][0]).mean()), float(np.abs(ranked[1]).mean())
    lost, least = sum(errors), scale - errors[1]
    between = Interval(
        max(distance - lost, 0.0) / (scale + errors[1]) if scale else 0.0,
        distance / scale if scale else _of_nothing(ranked[0]),
        (distance + lost) / least if least > 0 else math.inf,
    )
    values = np.stack([own[:k] for own in ranked])
    return _around(overlap, reach), between, values, np.zeros_like(values), Status.DENSE, 0


def _angle(values: np.ndarray, k: int, off: float, error: float) -> float:
    """The sine of the angle that the space of the first k may be off, where vectors are by `off` in all; the
    eigenvalues are known to `error`. All of them span everything."""
    if len(values) <= k:
        return 0.0
    gap = abs(values[k - 1]) - abs(values[k]) - error
    return min(off / gap, 1.0) if gap > 0 else 1.0


def _around(overlap: float, reach: float) -> Interval:
    return Interval(max(overlap - reach, 0.0), overlap, min(overlap + reach, 1.0))


def _of_nothing(values: np.ndarray) -> float:
    return math.inf if np.any(values) else 0.0


def _spectra(
    a: LinearOperator,
    b: LinearOperator,
    keys: jax.Array,
    k: int,
    num_probes: int,
    num_steps: int,
    each: float,
    apart: tuple[float, float],
) -> Any:
    """The same from eigenpairs and quadratures."""
    pairs = [eigsh(op, min(k + 1, op.size), which="LM", key=keys[0]) for op in (a, b)]
    tops = [_Top(own, k) for own in pairs]
    overlap = float(min(_overlap(tops[0].vectors, tops[1].vectors) / k, 1.0))
    band = _around(overlap, sum(top.angle for top in tops))
    curves = [_Curve(op, keys[1], num_probes, num_steps, each) for op in (a, b)]
    # No eigenvalue lies beyond the largest, where nodes of few steps may be far from it.
    norm = max(top.reach for top in tops)
    floor = 0.0 if a.semidefinite and b.semidefinite else -norm
    distance = _wasserstein(curves[0], curves[1], (floor, norm), apart)
    spent = sum(own.num_matvecs for own in pairs) + sum(curve.num_matvecs for curve in curves)
    values, residuals = (np.stack([getattr(top, name) for top in tops]) for name in ("values", "residuals"))
    statuses = [own.status for own in pairs]
    status = next((own for own in statuses if not own.ok), Status.COMPLETE)
    return band, distance, values, residuals, status, spent


class _Top:
    """The k eigenpairs of largest modulus of k + 1, and the sine of the angle that their space may be off.

    All n of them have none beyond, and span everything.
    """

    def __init__(self, pairs: Eigenpairs, k: int):
        order = np.argsort(-np.abs(pairs.values))
        chosen = order[:k]
        self.values = np.asarray(pairs.values)[chosen]
        self.residuals = np.asarray(pairs.residuals)[chosen]
        self.vectors = jax.tree.map(lambda x: x[np.asarray(chosen)], pairs.vectors)
        self.reach = float(np.max(np.abs(self.values) + self.residuals) + pairs.noise_floor)
        noise = float(pairs.noise_floor)
        off = math.hypot(*self.residuals) + math.sqrt(k) * noise
        beyond = float(np.asarray(pairs.residuals)[order[k]]) if len(order) > k else 0.0
        self.angle = _angle(np.asarray(pairs.values)[order], k, off, beyond + noise)


@programs.jit
def _overlap(first: PyTree, second: PyTree) -> jax.Array:
    """|U_Aᵀ U_B|²_F of two stacks of vectors."""
    products = jax.vmap(lambda u: jax.vmap(lambda v: trees.vdot(u, v))(second))(first)
    return jnp.sum(products**2)


class _Curve:
    """The distribution of an operator's eigenvalues with its band: none where they are known."""

    def __init__(self, op: LinearOperator, key: jax.Array, num_probes: int, num_steps: int, level: float):
        self.quadrature: Quadrature | None = None
        self.num_matvecs = 0
        if isinstance(op, FactoredOperator):
            self.places = np.asarray(op.eigenvalues(), np.float64)
            self.scale = Interval(*[float(np.abs(self.places).mean())] * 3)
            return
        self._level, self.quadrature = level, slq(op, key=key, num_probes=num_probes, num_steps=num_steps)
        self.num_matvecs = int(self.quadrature.num_matvecs)
        self.places = np.sort(np.asarray(self.quadrature.nodes, np.float64).ravel())
        self.scale = Interval(*(x / op.size for x in trace_of(self.quadrature, np.abs).interval(level)))

    def cdf(self, x: np.ndarray) -> Interval:
        """Share of eigenvalues up to x."""
        if self.quadrature is not None:
            return self.quadrature.cdf(x, level=self._level)
        share = np.searchsorted(self.places, x, side="right") / len(self.places)
        return Interval(share, share, share)


def _wasserstein(a: _Curve, b: _Curve, ends: tuple[float, float], limits: tuple[float, float]) -> Interval:
    """∫ of the least, the estimated and the largest distance between the CDFs, over the mean |λ| of B.

    Its ends are over those of that mean. All eigenvalues lie between the `ends`, and the integral between
    the `limits`, see `_Seen.apart`.
    """
    places = np.unique(np.concatenate([a.places, b.places, ends]))
    line = np.linspace(float(places[0]), float(places[-1]), EQUAL_CELLS)
    edges = np.unique(np.concatenate([line, places[:: max(1, len(places) // EQUAL_CELLS)]]))
    middle, width = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    first, second = a.cdf(middle), b.cdf(middle)
    apart = np.maximum(first.lower - second.upper, second.lower - first.upper)
    far = np.maximum(first.upper - second.lower, second.upper - first.lower)
    parts = np.maximum(apart, 0), np.abs(first.estimate - second.estimate), far
    if b.scale.estimate == 0:
        return Interval(0.0, _of_nothing(a.places), math.inf)
    low, value, high = (float(np.sum(part * width)) for part in parts)
    low, high = max(low, limits[0]), min(high, limits[1])
    value = min(max(value, low), high)
    least, scale, most = b.scale
    return Interval(low / most, value / scale, high / least if least > 0 else math.inf)
