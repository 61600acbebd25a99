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
from spectra.base.trees import PyTree
from spectra.density.slq import slq
from spectra.estimators.functions import trace_of
from spectra.estimators.ratios import ratio
from spectra.krylov.cancelled import relative_precision
from spectra.krylov.eigsh import eigsh
from spectra.operators.base import LinearOperator, require_operator
from spectra.operators.kronecker import FactoredOperator
from spectra.results import Eigenpairs, Interval, OperatorComparison, Quadrature

DENSE = 64
"""Order up to which matrices are formed: everything is exact then, and costs about as much."""
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
    are exact.

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
        integral over the distance between the bands of the two CDFs, over the interval of the mean |λ| of B,
        and is wide if there are few probes or steps. The eigenvalues of a Kronecker-factored operator are
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
    frobenius, trace, spent = _norms(a, b, keys[0], num_probes, level)
    layers, more = _layers(a, b, keys[1], num_probes, level, by)
    if b.size <= DENSE:
        rest = _dense_spectra(a, b, k)
        spent += 2 * b.size
    else:
        rest = _spectra(a, b, keys[2:], k, max(2, num_probes // 2), num_steps, level)
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
        found[name], _, cost = _norms(
            first[name], second[name], jax.random.fold_in(key, i), num_probes, level
        )
        spent += cost
    return found, spent


def _never(path: str) -> bool:
    del path
    return False


def _norms(
    a: LinearOperator, b: LinearOperator, key: jax.Array, num_probes: int, level: float
) -> tuple[Interval, Interval, int]:
    """|A - B|_F / |B|_F and tr A / tr B; exact where there are as many probes as columns."""
    exact = b.size <= num_probes
    count = b.size if exact else num_probes
    probes = _probes(key, b, count, exact, meshes.places(b.like))
    images = a.prepare().mv_batch(probes), b.prepare().mv_batch(probes)
    unit = max(float(_size(image)) for image in images)
    if not np.isfinite(unit):
        raise NonFiniteError(f"a product is NaN or infinite. {a.explain_non_finite()}")
    forms = np.asarray(_forms(probes, *images), np.float64)
    rule = _exact_ratio if exact else partial(ratio, level=level, precision=max(a.precision, b.precision))
    root = Interval(*(math.sqrt(x) for x in rule(forms[0], forms[1], positive=True)))
    # The products of A and of B are rounded relative to themselves: of |A| + |B| <= |A - B| + 2 |B|.
    own = max(relative_precision(a), relative_precision(b)) * (root.estimate + 2)
    trace = rule(forms[2], forms[3], positive=False)
    square, total = (float(np.trace(forms[i])) / (1 if exact else count) for i in (1, 3))  # |B|²_F and tr B
    part = math.sqrt(b.size * square) / abs(total) if total else 0.0
    return _wider(root, own, 0.0), _wider(trace, own * part, -math.inf), 2 * count


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
def _forms(probes: PyTree, first: PyTree, second: PyTree) -> jax.Array:
    """z_iᵀ M z_j, (k, k), for M of (A - B)², B², A and B, in units that do not overflow."""
    unit = trees.power_of_two(jnp.maximum(trees.largest(first), trees.largest(second)))
    first, second = (trees.scale(1 / unit, x) for x in (first, second))
    difference = jax.tree.map(jnp.subtract, first, second)
    pairs = ((difference, difference), (second, second), (probes, first), (probes, second))
    return jnp.stack([stacks.inner(x, y) for x, y in pairs])


def _exact_ratio(first: np.ndarray, second: np.ndarray, *, positive: bool) -> Interval:
    """The ratio of two traces where the probes are all columns."""
    del positive
    x, y = float(np.trace(first)), float(np.trace(second))
    value = x / y if y else 0.0 if x == 0 else math.inf
    return Interval(value, value, value)


def _dense_spectra(a: LinearOperator, b: LinearOperator, k: int) -> Any:
    """Everything from the matrices."""
    pairs = [np.linalg.eigh(np.asarray(op.as_matrix(), np.float64)) for op in (a, b)]
    order = [np.argsort(-np.abs(values))[:k] for values, _ in pairs]
    values = np.stack([own[chosen] for (own, _), chosen in zip(pairs, order, strict=True)])
    first, second = (basis[:, chosen] for (_, basis), chosen in zip(pairs, order, strict=True))
    overlap = float(min(np.sum((first.T @ second) ** 2) / k, 1.0))
    scale = np.abs(pairs[1][0]).mean()
    distance = float(np.abs(pairs[0][0] - pairs[1][0]).mean() / scale) if scale else _of_nothing(pairs[0][0])
    same = Interval(overlap, overlap, overlap), Interval(distance, distance, distance)
    return *same, values, np.zeros_like(values), Status.DENSE, 0


def _of_nothing(values: np.ndarray) -> float:
    return math.inf if np.any(values) else 0.0


def _spectra(
    a: LinearOperator,
    b: LinearOperator,
    keys: jax.Array,
    k: int,
    num_probes: int,
    num_steps: int,
    level: float,
) -> Any:
    """The same from eigenpairs and quadratures."""
    pairs = [eigsh(op, min(k + 1, op.size), which="LM", key=keys[0]) for op in (a, b)]
    tops = [_Top(own, k) for own in pairs]
    overlap = float(min(_overlap(tops[0].vectors, tops[1].vectors) / k, 1.0))
    reach = sum(top.angle for top in tops)
    band = Interval(max(overlap - reach, 0.0), overlap, min(overlap + reach, 1.0))
    each = 1 - (1 - level) / 3  # both bands and the mean |λ| of B
    curves = [_Curve(op, keys[1], num_probes, num_steps, each) for op in (a, b)]
    # No eigenvalue lies beyond the largest, where nodes of few steps may be far from it.
    norm = max(top.reach for top in tops)
    floor = 0.0 if a.semidefinite and b.semidefinite else -norm
    distance = _wasserstein(curves[0], curves[1], (floor, norm))
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
        if len(order) == k:
            self.angle = 0.0
            return
        beyond, noise = order[k], float(pairs.noise_floor)
        off = math.hypot(*self.residuals) + math.sqrt(k) * noise
        gap = abs(self.values[-1]) - abs(pairs.values[beyond]) - pairs.residuals[beyond] - noise
        self.angle = min(off / gap, 1.0) if gap > 0 else 1.0


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


def _wasserstein(a: _Curve, b: _Curve, ends: tuple[float, float]) -> Interval:
    """∫ of the least, the estimated and the largest distance between the CDFs, over the mean |λ| of B.

    Its ends are over those of that mean.

    All eigenvalues lie between the ends.
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
    least, scale, most = b.scale
    return Interval(low / most, value / scale, high / least if least > 0 else math.inf)
