"""How wrong an approximation is on the network at hand: KFAC against the Gauss-Newton matrix, say."""

# pyright: reportPrivateUsage=false
# Operators have parts that only this package uses.

import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import draws, meshes, programs, stacks, trees
from spectra.base.calls import automatic
from spectra.base.errors import NonFiniteError, SpectraError
from spectra.base.trees import PyTree
from spectra.estimators.compared_spectra import by_krylov, exactly
from spectra.estimators.ratios import ratio
from spectra.krylov.cancelled import relative_precision
from spectra.operators.base import LinearOperator, require_operator
from spectra.results import Interval, OperatorComparison

DENSE = 64
"""Order up to which matrices are formed: everything is exact then, and costs about as much."""
RISKS = 5
"""What the interval of W₁ rests on: both bands, the mean |λ| of B, |A - B|_F and tr (A - B)."""


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
        few probes may leave one end open, and a trace of B within its rounding both. That of the overlap is
        the bound of Davis and Kahan for both eigenspaces from residuals and gaps, and is [0, 1] if a gap is
        not resolved; that of W₁ is the integral over the distance between the bands of the two CDFs, within
        |tr (A - B)| / n and |A - B|_F / sqrt(n), over the interval of the mean |λ| of B, and is wide if there
        are few probes or steps. The eigenvalues of a Kronecker-factored operator are known, and have no band.

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
        spectra = exactly(a, b, k)
    else:
        each = 1 - (1 - level) / RISKS
        means = seen.mean_distance(each)
        spectra = by_krylov(a, b, keys[2:], k, max(2, num_probes // 2), num_steps, each, means)
    return OperatorComparison(
        frobenius,
        trace,
        spectra.overlap,
        spectra.distance,
        spectra.values,
        spectra.residuals,
        layers,
        size=b.size,
        num_matvecs=spent + more + spectra.num_matvecs,
        level=level,
        status=spectra.status,
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
        # The products of A and of B are rounded relative to themselves, and |A| <= |A - B| + |B|.
        apart, self.norm = (
            math.sqrt(np.trace(x) / (1 if self.exact else self.count)) for x in (self.square, self.of_b)
        )
        self.off = relative_precision(a) * (apart + self.norm), relative_precision(b) * self.norm

    def ratios(self, level: float) -> tuple[Interval, Interval]:
        """|A - B|_F / |B|_F and tr A / tr B."""
        root = [math.sqrt(x) for x in self._ratio(self.square, self.of_b, level, positive=True)]
        trace = self._ratio(self.a, self.b, level, positive=False)
        total = abs(float(np.trace(self.b))) / (1 if self.exact else self.count)
        of_a, of_b = (math.sqrt(self.size) * x for x in self.off)
        return _wider(Interval(*root), sum(self.off), self.norm, self.off[1], 0.0), _wider(
            trace, of_a, total, of_b, -math.inf
        )

    def mean_distance(self, level: float) -> tuple[float, float]:
        """Bounds of the mean distance of the n eigenvalues of A from those of B, both in order.

        The mean of what they differ by is tr (A - B) / n, and their root mean square distance is not above
        |A - B|_F / sqrt(n) (Hoffman and Wielandt, doi:10.1215/S0012-7094-53-02004-3).
        """
        square = self._ratio(self.square, self.ones, level, positive=True)
        mean = self._ratio(self.a - self.b, self.ones, level, positive=False)
        least = max(mean.lower, -mean.upper, 0.0)
        lost = sum(self.off) / math.sqrt(self.size)
        return self.unit * max(least - lost, 0.0), self.unit * (math.sqrt(square.upper) + lost)

    def _ratio(self, first: np.ndarray, second: np.ndarray, level: float, *, positive: bool) -> Interval:
        if self.exact:
            return _exact_ratio(first, second)
        return ratio(first, second, level, precision=self.precision, positive=positive)


def _wider(interval: Interval, above: float, below: float, moved: float, least: float) -> Interval:
    """The interval of a ratio, of which rounding moves the numerator by `above`, and `below` by `moved`.

    (x + dx) / (y + dy) - x / y is (dx - r dy) / (y + dy), with r = x / y: a trace within its own rounding
    says nothing of the ratio, not even its sign.
    """
    low, value, high = interval
    if below <= moved:
        return Interval(least, value, math.inf)
    low, high = (
        r + sign * (above + abs(r) * moved) / (below - moved) for r, sign in ((low, -1.0), (high, 1.0))
    )
    return Interval(max(low, least), value, high)


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
