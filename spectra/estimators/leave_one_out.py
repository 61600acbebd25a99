"""Leave-one-out traces from small matrices, and the variance of their mean.

Estimate j uses probe j to test what a sketch of all other probes leaves over. The estimates share their
sketches, so they are correlated, and their spread over sqrt(m) alone covers far less than it states (43 %
instead of 95 % for XNysTrace on λ_i = 0.7^i). What is missing is computed, not fitted. Given the other
probes, D_j = t_j - tr A has mean zero over probe j. Let t_j|i be estimate j without probe i in its
sketch, and δ_ij = t_j - t_j|i. Since D_j = (t_j|i - tr A) + δ_ij, and everything but the last product
has mean zero over one of the two probes,

    Cov(t_i, t_j) = E[δ_ij δ_ji]   and   Var(mean t) = E[s² / m + δ_ij δ_ji],

with s² the variance of the t_j between each other. The mean of δ_ij δ_ji over pairs estimates the
covariance without bias, but its own tails are heavy: with it, intervals of XTrace held for 87 to 97 % of
150 keys on six spectra (87 % for λ_i = 0.8^i with 16 probes). So its standard error, of the jackknife over
probes, is added, up to the mean of |δ_ij δ_ji|, which bounds it: 96 to 99 %, and the error stated is 1.1 to
1.4 times the true one from 16 probes on. The bound alone would take 1.1 to 1.9.

In the coordinates of the sketch, leaving probe j out removes one direction u_j; leaving out i as well
removes the part of u_i that is orthogonal to u_j. Everything here is (m, m) algebra, for NumPy in float64
and for JAX inside a caller's jit. A leading axis counts groups of parameters, the whole last.
"""

import contextlib
from collections.abc import Callable, Generator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spectra.base import arrays
from spectra.base.host import one_thread

Array = Any
PAIRS = 64
"""Probes among which pairs are formed for the covariance: 4032 pairs estimate it well enough."""
CHANCE = 10.0
"""How far a variance from two probes may be below its mean by chance. With 1 intervals held for 90 % of 1,500
keys (rank two, two probes), with 4 for 93, with 10 for 95. A form says less than the residual vector: of its
square it is 10, squared.
"""
CLEAR = 64.0
"""Roundings of inner products, relative to the lengths of vectors, below which a difference is nothing."""
TOGETHER = 2**16
"""Numbers in an array of the pair algebra on the host, at most: half a megabyte, which stays in a cache."""


class Sketch(NamedTuple):
    """Inner products of the rows of Q, Z = H Q, the probes Ω and Y = H Ω; G groups, m probes."""

    qq: Array  # (G, m, m)
    qz: Array  # (G, m, m)
    qy: Array  # (G, m, m)
    qo: Array  # (G, m, m)
    zo: Array  # (G, m, m)
    oy: Array  # (G, m)
    yy: Array  # (G, m)
    oo: Array  # (m,)


class Nystrom(NamedTuple):
    """A<Ω> = Bᵀ B with B = H^{-1/2} Y for the core H = Ω Yᵀ; G groups, m probes."""

    bb: Array  # (G, m, m)
    ob: Array  # (G, m, m)
    root: Array  # (m, m), row j is H^{1/2} e_j
    inverse_root: Array  # (m, m), row j is H^{-1/2} e_j
    inverse_gram: Array  # (m, m), (Ω Ωᵀ)^{-1}


Formula = Callable[[list[Array], Any], Array]  # estimates without some directions, of which probe


@contextlib.contextmanager
def careful() -> Generator[None]:
    """For small algebra: BLAS on one thread on the host, full precision inside a caller's jit."""
    with one_thread(), jax.default_matmul_precision("highest"):
        yield


@careful()
def directions(sketch: Array, rounding: float, xp: Any) -> Array:
    """Unit rows u_j orthogonal to all columns of the sketch R = Q Yᵀ but column j.

    They are the normalised columns of R^{-T}. Where R is rank-deficient its singular values are raised
    to the rounding of its entries, m eps |R|: the leave-one-out estimates are those of an operator
    that differs by rounding, and exist always. A row that is not orthogonal to the others leaves a sketch
    that knows the probe it is tested by: with eps of a model in bfloat16, all estimates are off.
    """
    inverse = _inverse(sketch, rounding) if xp is jnp else _raised_inverse(sketch, rounding, xp)
    return unit_rows(inverse, xp)


def _raised_inverse(sketch: Array, precision: float, xp: Any) -> Array:
    left, values, right = np.linalg.svd(sketch) if xp is np else arrays.svd(sketch)
    floor = len(values) * precision * values[0]
    values = xp.where(floor > 0, xp.maximum(values, floor), 1)
    return (right.T / values) @ left.T


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _inverse(sketch: jax.Array, precision: float) -> jax.Array:
    """The same with the derivative of an inverse: that of singular values does not exist where two agree."""
    return _raised_inverse(sketch, precision, jnp)


@_inverse.defjvp
@careful()  # itself: it may run when the caller is done
def _inverse_derivative(
    precision: float, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    inverse = _inverse(*primals, precision)
    return inverse, -inverse @ tangents[0] @ inverse


def unit_rows(rows: Array, xp: Any) -> Array:
    """Rows at unit length; those of zeros stay."""
    size = arrays.root(_dots(rows, rows, xp), xp)[..., None]
    return rows / xp.where(size > 0, size, 1)


def _dots(a: Array, b: Array, xp: Any) -> Array:
    """Inner products of rows; on the host without the array of their terms."""
    return np.vecdot(a, b) if xp is np else jnp.sum(a * b, axis=-1)


def _second(u: Array, i: Any, xp: Any) -> Array:
    """Row j is the unit vector of span(u_i, u_j) orthogonal to u_j; row i has no meaning. i: any shape."""
    return unit_rows(_drop([u, u], u[i][..., None, :], xp), xp)  # twice: to rounding


def seconds(u: Array, count: int, xp: Any) -> tuple[Array, Array, Array]:
    """Second directions [i, j] of the first `count` probes (count, count, m), x_ij u_i - y_ij u_j; x and y.

    All are zero for i = j.
    """
    first = u[:count]
    among = _second(first, xp.arange(count), xp)
    left = _drop([first], first[:, None, :], xp)
    more = _dots(first, left, xp)
    size = arrays.root(xp.maximum(_dots(left, left, xp) - more**2, 0), xp)
    apart = ~xp.eye(count, dtype=bool)
    own = xp.where(apart & (size > 0), 1 / xp.where(size > 0, size, 1), 0)
    other = own * (_dots(first[:, None, :], first, xp) + more)
    return xp.where(apart[..., None], among, 0), own, xp.where(apart, other, 0)


def _with_pairs(formula: Formula, u: Array, num_groups: int, xp: Any) -> tuple[Array, Array]:
    """(G, m) estimates t_j, and (d, G, m) estimates t_j|i for the first d probes i.

    On the host many i run together: there a call costs more than the arithmetic.
    """
    m, count, first = len(u), min(len(u), PAIRS), u[None]
    if xp is not np:
        pairs = lax.map(lambda i: formula([first, _second(u, i, xp)[None]], i), jnp.arange(count))
        return formula([first], None), pairs
    together = max(1, TOGETHER // (num_groups * m * m))
    parts = [np.arange(start, min(start + together, count)) for start in range(0, count, together)]
    pairs = [formula([first, _second(u, i, xp)[:, None]], i) for i in parts]
    return formula([first], None), np.concatenate(pairs)


def _drop(removed: list[Array], rows: Array, xp: Any) -> Array:
    for u in removed:
        rows = rows - u * _dots(u, rows, xp)[..., None]
    return rows


class Tails(NamedTuple):
    """What the samples μ_j = (1-P) ω_j of XTrace are, each with the projector of the other probes; rows j."""

    x: Array  # Q P ω
    hx: Array  # Q H P ω
    form: Array  # μᵀHμ
    length: Array  # |μ|²


def _tails(g: Sketch, core: Array, u: Array, xp: Any) -> Tails:
    x, sketch = _drop([u], g.qo[-1].T, xp), g.qy[-1].T
    hx = x @ core
    form = g.oy[-1] - 2 * _dots(sketch, x, xp) + _dots(x, hx, xp)
    return Tails(x, hx, form, g.oo - _dots(x, x, xp))


@careful()
def outside_of(g: Sketch, u: Array, xp: Any) -> tuple[Array, Array]:
    """Coefficients x and c (m, m) of what is outside of each sketch: (1-P) H μ_j = y_j - x_j Z - c_j Q."""
    return _outside_of(g, _tails(g, (g.qz[-1] + g.qz[-1].T) / 2, u, xp), u, xp)


def _outside_of(g: Sketch, tails: Tails, u: Array, xp: Any) -> tuple[Array, Array]:
    return tails.x, _drop([u], g.qy[-1].T - tails.hx, xp)


class Known(NamedTuple):
    """What is known besides of the variance of each estimate, given its sketch; (G, m)."""

    most: Array  # it is on average at most this
    least: Array  # and at least this


def _least_variance(g: Sketch, tails: Tails, u: Array, size: int, precision: float, xp: Any) -> Array:
    """What one direction shows of Var μᵀHμ = 2 E |r|², r = (1-P) Hμ - μ (μᵀHμ) / |μ|²; see `hutchpp`.

    It is that of u_j, the one in the sketch that the others leave, less its part along μ. If H is a multiple
    of the identity but for one eigenvalue, r has no other. What may be rounding is taken off.
    """
    along, sketch = _dots(u, g.qo[-1].T, xp), g.qy[-1].T
    across = _dots(u, sketch - tails.hx, xp) - along * tails.form / tails.length
    square = xp.maximum(across**2 - (CLEAR * precision) ** 2 * _dots(sketch, sketch, xp), 0)
    apart = xp.maximum(1 - along**2 / tails.length, CLEAR * precision)
    return 2 * (size - (len(u) - 1)) / tails.length * square / apart


def _least_of_groups(
    g: Sketch,
    whole: tuple[Sketch, Tails, int],
    outside: Array,
    sampled: Array,
    sizes: Array,
    u: Array,
    precision: float,
    xp: Any,
) -> Array:
    """Least variance (G, 1) of the samples μᵀΠAμ of groups, from `outside`, |ΠAω|²; A = (1-P) H (1-P).

    On the sphere |(1-P)ΠA|² is |(1-P)ΠAμ|², on average, and the variance is that and tr (ΠA)², less what the
    mean takes. tr (ΠA)² is at most |(1-P)ΠA|², and at least (tr ΠA)² over the number of parameters, which of
    a group of one is all; tr ΠA is taken to be off by its standard error. Few samples that are χ² with one
    degree of freedom have too small a spread when their mean is off: by that alone, intervals of one
    parameter held for 85 to 91 % of the keys, of two for 90 to 94 %. What may be rounding is taken off.
    """
    sketch, tails, size = whole
    rest = size - (len(u) - 1)
    x, c = _outside_of(sketch, tails, u, xp)
    inside = xp.swapaxes(g.qy, -1, -2) - x @ xp.swapaxes(g.qz, -1, -2) - c @ g.qq
    inside = _drop([u], inside, xp)
    shown = outside * (1 - CLEAR * precision) - _dots(inside, inside, xp)
    shown = xp.maximum(shown - (CLEAR * precision) ** 2 * g.yy, 0)
    shown = xp.mean(rest / tails.length * shown, axis=-1, keepdims=True)
    mean = xp.abs(xp.mean(sampled, axis=-1, keepdims=True))
    alone = (mean + arrays.root(2 * shown / len(u), xp)) ** 2 / sizes[:, None]
    return shown + xp.minimum(alone, shown) - 2 / rest * mean**2


@careful()
def xtrace_values(
    g: Sketch,
    u: Array,
    size: int,
    precision: float,
    *,
    resphere: bool,
    xp: Any,
    outside: Array | None = None,
    sizes: Any = None,
) -> tuple[Array, Array, Known]:
    """tr over each group of P A + A P - P A P, exactly, plus μᵀ(1-P) A (1-P) μ, μ = (1-P) ω_j.

    P projects on the sketch without probe j. With `resphere`, μ is scaled to the length that a normal
    vector in the complement of P has on average, which removes the variance of its length. The groups
    sum to XTrace, the last row.

    The third result is what is known of the variance. It is at most the square of that last term, on average
    (of a group, whose own may be small by chance, of that or of the whole's), and at least what
    `_least_variance` says. For the part Π of a group, with A for what is outside of the sketch, it is that of
    μᵀΠAμ, |ΠA|² + tr (ΠA)² less its mean: of a single direction q with the share s = |Πq|² it shows
    s (1 + s) / 2 of that of the whole. More is known of a group by itself, see `_least_of_groups`.

    References:
        Epperly, Tropp and Webber, arXiv:2301.07825, sections 2.2 and 2.3.
    """
    core = (g.qz[-1] + g.qz[-1].T) / 2
    tails = _tails(g, core, u, xp)
    found = _with_pairs(_whole(g, tails, core, u, size, resphere, xp), u, 1, xp)
    most = (found[0] - (xp.trace(core) - _dots(u, u @ core, xp))) ** 2
    least = xp.zeros_like(most)
    if resphere:
        least = least + _least_variance(g, tails, u, size, precision, xp)
    if len(g.qz) > 1:
        groups = Sketch(*[part[:-1] for part in g[:-1]], oo=g.oo)
        formula, known = _of_groups(groups, core, g.qy[-1], g.qo[-1], size, resphere, xp)
        parts = _with_pairs(formula, u, len(groups.qz), xp)
        found = [xp.concatenate(pair, axis=-2) for pair in zip(parts, found, strict=True)]
        share, sampled = _dots(u @ groups.qq, u, xp), parts[0] - known([u])
        most = xp.concatenate([xp.maximum(sampled**2, most), most])
        of_parts = share * (1 + share) / 2 * least
        if resphere and outside is not None:
            rows = xp.asarray(sizes)[:-1]
            own = _least_of_groups(groups, (g, tails, size), outside[:-1], sampled, rows, u, precision, xp)
            of_parts = of_parts + xp.maximum(own - xp.mean(of_parts, axis=-1, keepdims=True), 0)
        least = xp.concatenate([of_parts, least])
    return found[0], found[1], Known(most, least)


def _whole(g: Sketch, tails: Tails, core: Array, u: Array, size: int, resphere: bool, xp: Any) -> Formula:
    """XTrace: the directions a that are left out take Σ aᵀHa off tr H; with x the part of Qω in the sketch,
    and v the second direction, x loses v (v·x)."""
    m, trace = len(u), xp.trace(core)
    x, hx, sketch, taken = tails.x, tails.hx, g.qy[-1].T, _dots(u, u @ core, xp)

    def formula(removed: list[Array], _: Any) -> Array:
        less, residual, square = taken[None], tails.form[None], tails.length[None]
        for v in removed[1:]:
            share, own = _dots(v, x, xp), _dots(v @ core, v, xp)
            less = less + own
            residual = residual + share * (2 * _dots(v, sketch - hx, xp) + share * own)
            square = square + share**2
        return trace - less + residual * ((size - (m - len(removed))) / square if resphere else 1)

    return formula


def _of_groups(
    g: Sketch, core: Array, sketch: Array, probes: Array, size: int, resphere: bool, xp: Any
) -> tuple[Formula, Callable[[list[Array]], Array]]:
    """The same restricted to each group, where Q has no orthonormal rows; and the part that is no sample."""
    m, mixed = len(core), core @ g.qq
    fixed = 2 * xp.trace(g.qz, axis1=-2, axis2=-1) - xp.trace(mixed, axis1=-2, axis2=-1)

    def form(a: Array, matrix: Array, b: Array) -> Array:
        return _dots(a @ matrix, b, xp)

    def formula(removed: list[Array], _: Any) -> Array:
        x = _drop(removed, probes.T, xp)
        hx = x @ core
        c = _drop(removed, sketch.T - hx, xp)
        rest = g.oy + form(x, g.qz, x) + form(x, g.qq, c)
        for a, b in ((g.zo, x), (g.qo, c), (g.qy, x)):
            rest = rest - _dots(xp.swapaxes(a, -1, -2), b, xp)
        if resphere:
            rest = rest * (size - (m - len(removed))) / (g.oo - _dots(x, x, xp))
        return rest + known(removed)

    def known(removed: list[Array]) -> Array:
        total = fixed[:, None]
        for a in removed:
            total = total - 2 * form(a, g.qz - mixed, a)
            for b in removed:
                total = total - form(a, core, b) * form(b, g.qq, a)
        return total

    return formula, known


@careful()
def xnystrace_values(
    g: Nystrom, size: int, precision: float, *, resphere: bool, xp: Any
) -> tuple[Array, Array, Array]:
    """tr over each group of the Nyström approximation without probe j, plus ω_jᵀ (A - A<Ω>) ω_j.

    The residual ignores the span of the other probes, so with `resphere` the probe is made orthogonal
    to it and scaled to the average length there.

    The third result is the variance of each estimate given its sketch, (G, m). The residual of probe j is
    a vector, (A - A<Ω>) ω_j = Bᵀu_j (u_jᵀ B ω_j), and `hutchpp` says how it shows the variance of its form.
    Of a difference that rounding swamps, as for a multiple of the identity, the spread takes the place.

    References:
        Epperly, Tropp and Webber, arXiv:2301.07825, section 2.3.
    """
    u, m = unit_rows(g.inverse_root, xp), len(g.root)
    inverse, diagonal = g.inverse_gram, xp.diagonal(g.inverse_gram)
    fixed = xp.trace(g.bb, axis1=-2, axis2=-1)

    def dual(i: Any) -> tuple[Array, Array]:
        """Coefficients of ω_j less its projection on the probes kept, and its squared length."""
        if i is None:
            return inverse / diagonal[:, None], 1 / diagonal
        own = diagonal[i][..., None]
        determinant = xp.where(xp.arange(m) == xp.asarray(i)[..., None], 1, diagonal * own - inverse[i] ** 2)
        rows = own[..., None] * inverse - inverse[i][..., None] * inverse[i][..., None, :]
        rows, square = rows / determinant[..., None], own / determinant
        return (rows[:, None], square[:, None]) if xp is np else (rows, square)

    def formula(removed: list[Array], i: Any) -> Array:
        z = sum(a * xp.sum(a * g.root, axis=-1, keepdims=True) for a in removed)
        if resphere:
            v, square = dual(i)
            rest = xp.sum((v @ g.ob) * z, axis=-1) * (size - (m - len(removed))) / square
        else:
            rest = xp.sum(g.ob * z, axis=-1)
        total = rest + fixed[:, None]
        for a in removed:
            total = total - xp.sum((a @ g.bb) * a, axis=-1)
        return total

    values, pairs = _with_pairs(formula, u, len(g.bb), xp)
    z = u * xp.sum(u * g.root, axis=-1, keepdims=True)
    own = 2 * xp.sum((z @ g.bb) * z, axis=-1)
    if resphere:
        probes, square = dual(None)
        scale = (size - (m - 1)) / square
        form = xp.sum((probes @ g.ob[-1]) * z, axis=-1)
        less = own[-1] * scale - 2 * scale * form**2 / square
        swamped = xp.mean(less) < 10 * m * precision * xp.mean(own[-1] * scale)
        less = xp.where(swamped, xp.var(values[-1], ddof=1), xp.maximum(less, 0))
        own = xp.concatenate([own[:-1] * scale, less[None]])
    return values, pairs, own


def mean_and_variance(
    values: Array, pairs: Array, xp: Any, own: Array | None = None, known: Known | None = None
) -> tuple[Array, Array]:
    """Mean over probes and its variance, for estimates (G, m) and pairs (d, G, m); see above.

    `own` has the variance of each estimate given its sketch, where it is known: on average that is the
    spread and the covariance together. It bounds the covariance (Cauchy-Schwarz), up to `CHANCE`: where the
    probes left span the range, δ_ij is the error of a smaller sketch, and says nothing of this one.

    `known` is what such a variance is at most and at least, where no more is known of it. The latter is for
    one eigenvalue beside many equal ones: the estimates are χ²_1 then, and by the spread of a few of these
    intervals held for 75 to 86 % of the keys with 4 probes, 90 to 93 with 32.
    """
    m, d = values.shape[-1], len(pairs)
    delta = values[:, None, :d] - xp.moveaxis(pairs, 0, 1)[..., :d]
    delta = xp.where(xp.eye(d, dtype=bool), 0, delta)
    covariance = _covariance(delta * xp.swapaxes(delta, -1, -2), xp)
    if own is not None:
        one = xp.mean(own, axis=-1)
        return xp.mean(values, axis=-1), one / m + xp.minimum(covariance, CHANCE * one) * (1 - 1 / m)
    spread = xp.var(values, axis=-1, ddof=1)
    if known is not None:
        covariance = xp.minimum(covariance, CHANCE**2 * xp.mean(known.most, axis=-1))
        spread = xp.maximum(spread, xp.mean(known.least, axis=-1))
    return xp.mean(values, axis=-1), spread / m + covariance


def _covariance(products: Array, xp: Any) -> Array:
    """Mean of δ_ij δ_ji (G, d, d) over pairs and its standard error, at most the mean of |δ_ij δ_ji|."""
    d = products.shape[-1]
    bound = xp.sum(xp.abs(products), axis=(-2, -1)) / (d * (d - 1))
    if d < 4:
        return bound
    total, rows = xp.sum(products, axis=(-2, -1)), xp.sum(products, axis=-1)
    without = (total[:, None] - 2 * rows) / ((d - 1) * (d - 2))
    error = arrays.root((d - 1) * xp.var(without, axis=-1), xp)
    return xp.minimum(xp.maximum(total, 0) / (d * (d - 1)) + error, bound)
