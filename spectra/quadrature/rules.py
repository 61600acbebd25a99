"""From Lanczos coefficients to nodes and weights: Gauss rules, where an invariant space ends, and copies.

A run breaks down where its coefficients are rounding. Without reorthogonalisation, nodes come several times;
merged, they are a rule that is exact up to a known degree.

Everything is NumPy float64 on the host; SciPy is imported on first use, which keeps `import spectra` fast.
What is called `traced` runs in JAX, for use inside a caller's jit.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from spectra.quadrature import Measures, Rule

if TYPE_CHECKING:
    import jax

M = TypeVar("M", bound=Measures)

MOST = 64.0
"""Largest residual of a breakdown, in roundings."""
COPIES = 50.0
"""How far, in units of β_d, the rest of a run strays from every single Ritz value of an exhausted space. The
rest of a bulk stays within a few β_d of its node."""
WANDERING = 1e-3
"""Weight of nodes between those of an exhausted space. By perturbation theory it is (β_d / gap)²."""


COARSE = 2.0**-12
"""Precision of products that do not compute in float32, tensorfloat32 included."""


def dense(alpha: Any, beta: Any, xp: Any) -> Any:
    """The tridiagonal matrix (..., m, m) with diagonal `alpha` and off-diagonal `beta`."""
    m = alpha.shape[-1]
    eye = xp.eye(m, dtype=alpha.dtype)
    up = xp.eye(m, k=1, dtype=alpha.dtype)
    padded = xp.concatenate([beta, xp.zeros_like(alpha[..., :1])], axis=-1)
    off = padded[..., :, None] * up
    return alpha[..., :, None] * eye + off + xp.swapaxes(off, -1, -2)


def gauss_rule(alpha: np.ndarray, beta: np.ndarray, length: int, sketch: np.ndarray | None = None) -> Rule:
    """Nodes, weights and residuals of one probe from the first `length` steps; alpha, beta (m,).

    With a `sketch` (m, d) of the basis vectors that of the Ritz vectors, too.

    Nodes are eigenvalues of T, weights the squared first components of its eigenvectors, residuals
    |beta_m| times the modulus of their last components: zero where the space is invariant, beta_m = 0.
    Arrays keep the shape (m,); beyond the number of nodes the last one repeats with weight zero.
    """
    from scipy.linalg import eigh_tridiagonal

    alpha, beta = np.asarray(alpha, np.float64), np.asarray(beta, np.float64)
    theta, vectors = eigh_tridiagonal(alpha[:length], beta[: length - 1])
    pad = (0, len(alpha) - length)
    rule = (
        np.pad(theta, pad, mode="edge"),
        np.pad(vectors[0] ** 2, pad),
        np.pad(np.abs(beta[length - 1] * vectors[-1]), pad),
    )
    return rule if sketch is None else (*rule, np.pad(vectors.T @ sketch[:length], (pad, (0, 0))))


def gauss_rule_traced(
    alpha: "jax.Array", beta: "jax.Array", length: "jax.Array", sketch: "jax.Array"
) -> tuple["jax.Array", ...]:
    """`gauss_rule` inside jit, in the working dtype.

    What lies behind `length` steps decouples. It is put above all eigenvalues, so that the nodes come first.
    """
    import jax
    import jax.numpy as jnp

    from spectra.base.trees import power_of_two

    unit = power_of_two(jnp.max(jnp.abs(jnp.append(alpha, beta))))
    alpha, beta = alpha / unit, beta / unit
    live = jnp.arange(alpha.shape[-1]) < length
    reach = jax.lax.stop_gradient(jnp.max(jnp.abs(alpha)) + 2 * jnp.max(jnp.abs(beta)))  # Gershgorin
    theta, vectors = _eigh_traced(dense(jnp.where(live, alpha, 2 * reach), beta[:-1], jnp))
    theta, weights, residuals = unit * theta, vectors[0] ** 2, unit * jnp.abs(beta[-1] * vectors[-1])
    rule = jnp.where(live, theta, theta[length - 1]), *(jnp.where(live, x, 0) for x in (weights, residuals))
    products = jnp.matmul(vectors.T, sketch, precision="highest")
    return *rule, jnp.where(live[:, None], jax.lax.stop_gradient(products), 0)


def _eigh_traced(matrix):
    """`eigh` whose derivative exists where eigenvalues agree, as those of a dead tail of T do.

    Vectors of the same eigenvalue are left where they are: the tail shares nothing with the rest of T.
    """
    import jax
    import jax.numpy as jnp

    from spectra.base import arrays

    @jax.custom_jvp
    def eigh(matrix):
        return arrays.eigh(matrix)

    @eigh.defjvp
    def derivative(primals, tangents):
        values, vectors = eigh(*primals)
        product = functools.partial(jnp.matmul, precision="highest")  # traced when the caller's code is done
        inner = product(product(jnp.swapaxes(vectors, -1, -2), tangents[0]), vectors)
        gaps = values[..., None, :] - values[..., :, None]
        turn = jnp.where(gaps == 0, 0, inner / jnp.where(gaps == 0, 1, gaps))
        return (values, vectors), (jnp.diagonal(inner, axis1=-2, axis2=-1), product(vectors, turn))

    with jax.default_matmul_precision("highest"):
        return eigh(matrix)


def breakdown_noise(size: int, precision: float) -> float:
    """What rounding leaves of a residual that vanishes, in units of |H|, for products of a given precision.

    A dense product of order n sums n terms of random sign one after another, which costs √n / 2 roundings;
    ten more are those of the recurrence. Beyond n = 1e4 products are no longer dense, and sums are taken in
    blocks: 64 at most, so that a bulk of 1e-5 |H| stays visible in float32.

    Products in bfloat16 or less state what they are off by as a whole, and are summed in float32: the sums
    add nothing to that.
    """
    return (min(10 + np.sqrt(size) / 2, MOST) if precision < COARSE else 4) * precision


def invariant_length(
    alpha: np.ndarray, beta: np.ndarray, length: int, size: int, precision: float, *, orthogonal: bool = True
) -> int | None:
    """Dimension of the invariant space that a run went through; None if it went through none.

    Args:
        alpha, beta: coefficients (m,), in float64; beta[i] is the residual behind step i.
        length: steps done.
        size: n, the order of the operator.
        precision: relative error of one product.
        orthogonal: whether the vectors were kept orthogonal. If not, copies appear of any eigenvalue that has
            converged, and n steps need not have seen the whole space; what is asked for here is that there
            is nothing but copies.
    """
    alpha, beta = np.asarray(alpha[:length], np.float64), np.asarray(beta[:length], np.float64)
    scale = np.max(np.abs(alpha) + np.append(0, beta[:-1]) + beta, initial=0.0)
    if scale == 0:
        return 1
    alpha, beta = alpha / scale, beta / scale
    noise = breakdown_noise(size, precision)
    resolved = noise * np.sqrt(length)  # by Weyl: errors of the products, `length` columns of them
    nodes = None
    for d in (np.flatnonzero(beta[:-1] <= precision ** (1 / 3)) + 1).tolist():
        if _goes_on(alpha, beta, d, resolved):
            continue
        theta = _eigenvalues(alpha[:d], beta[: d - 1])
        if np.min(np.diff(theta), initial=1.0) < 4 * resolved:
            break  # too near each other to tell a copy from a neighbour, and no farther apart later
        nodes = _eigenvalues(alpha, beta[:-1]) if nodes is None else nodes
        beside = np.abs(nodes[:, None] - theta).min(axis=1) > resolved
        copies = not beside.any() or _wanders(alpha, beta, d, theta, beside, resolved)
        if copies and _is_rounding(alpha, beta, theta, noise) and _converged(alpha, beta, d, noise):
            return d
    return length if beta[-1] <= noise or (orthogonal and length == size) else None


def _goes_on(alpha: np.ndarray, beta: np.ndarray, d: int, resolved: float) -> bool:
    """Whether what came behind step d looks like a bulk: the usual case, told without an eigenproblem."""
    spread = max(np.ptp(alpha[d:]), 2 * np.max(beta[d:-1], initial=0.0))
    return bool(len(alpha) > d + 1 and resolved < spread < COPIES * beta[d - 1] / 2)


def _wanders(alpha, beta, d: int, theta: np.ndarray, beside: np.ndarray, resolved: float) -> bool:
    """Whether what came behind step d strays among the Ritz values `theta` of the first d, on no weight."""
    tail = _eigenvalues(alpha[d:], beta[d:-1])
    strays = np.abs(tail[:, None] - theta).max(axis=0).min() > COPIES * beta[d - 1]
    within = theta[0] - 4 * resolved <= tail[0] and tail[-1] <= theta[-1] + 4 * resolved
    return bool(strays and within and _weights(alpha, beta[:-1])[beside].sum() <= WANDERING)


def _is_rounding(alpha: np.ndarray, beta: np.ndarray, theta: np.ndarray, noise: float) -> bool:
    """Whether errors of the products alone can have left a residual behind the step of these Ritz values."""
    d = len(theta)
    if beta[d - 1] <= noise:
        return True
    behind = vector = before = np.zeros((d, d))  # row i: the error that product i brought in
    for step in range(d):
        behind = (theta - alpha[step]) * vector - (beta[step - 1] if step else 0) * before
        behind[step] = 1
        before, vector = vector, np.clip(behind / beta[step], -1e150, 1e150)
    return bool(beta[d - 1] <= noise * np.linalg.norm(behind, axis=0).max())


def _converged(alpha: np.ndarray, beta: np.ndarray, d: int, noise: float) -> bool:
    """Whether the Ritz values of the first d steps are eigenvalues to rounding: by r, or r² over the gap.

    Rounding that was amplified has turned the space, and that may have moved a node of little weight by a
    thousand roundings. The steps that follow put it right, so the run does not end here.
    """
    from scipy.linalg import eigh_tridiagonal

    theta, vectors = eigh_tridiagonal(alpha[:d], beta[: d - 1])
    residuals = beta[d - 1] * np.abs(vectors[-1])
    apart = np.append(np.append(np.inf, np.diff(theta)), np.inf)
    gaps = np.maximum(np.minimum(apart[:-1], apart[1:]) - residuals, np.finfo(float).tiny)
    return bool(np.all(residuals * np.minimum(1, residuals / gaps) <= noise))


def _eigenvalues(alpha: np.ndarray, beta: np.ndarray) -> np.ndarray:
    from scipy.linalg import eigvalsh_tridiagonal

    return np.asarray(eigvalsh_tridiagonal(alpha, beta))


def _weights(alpha: np.ndarray, beta: np.ndarray) -> np.ndarray:
    from scipy.linalg import eigh_tridiagonal

    return eigh_tridiagonal(alpha, beta)[1][0] ** 2


def spread(num_steps: int) -> float:
    """δ in units of the noise floor of a single product."""
    return float(np.sqrt(num_steps))


def rule_of(coefficients: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nodes, weights and signed residuals of T as it is, from its diagonals (2, m) with β_m at the end."""
    return _rule(np.ascontiguousarray(coefficients).tobytes())


@functools.lru_cache(maxsize=256)
def _rule(stored: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    from scipy.linalg import eigh_tridiagonal

    alpha, beta = _live(np.frombuffer(stored).reshape(2, -1))
    theta, vectors = eigh_tridiagonal(alpha, beta[:-1])
    weights = vectors[0] ** 2
    # Vectors of copies are any of their common space: the products s_1j s_mj sum to the same.
    return theta, weights / weights.sum(), beta[-1] * vectors[-1] * np.where(vectors[0] < 0, -1.0, 1.0)


def _live(coefficients: np.ndarray) -> np.ndarray:
    """Up to where the run ended: β is zero there, and positive before."""
    ends = np.flatnonzero(coefficients[1] == 0)
    return coefficients[:, : ends[0] + 1] if len(ends) else coefficients


def log_betas(coefficients: np.ndarray, last: float) -> float:
    """log of β_1 ... β_m; `last` is what a breakdown took for zero."""
    beta = _live(np.asarray(coefficients, np.float64))[1]
    return float(np.sum(np.log(np.append(beta[:-1], max(beta[-1], last)))))


def merge(
    theta: np.ndarray, weights: np.ndarray, residuals: np.ndarray, width: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One node for all within `width`: shorter arrays. Ascending `theta` of one probe, in NumPy."""
    starts = [0]
    while (following := int(np.searchsorted(theta, theta[starts[-1]] + width, side="right"))) < len(theta):
        starts.append(following)
    group = np.repeat(np.arange(len(starts)), np.diff([*starts, len(theta)]))
    nodes, weights, residuals = _merged(
        group[None] == np.arange(len(starts))[:, None], theta, weights, residuals, np
    )
    return nodes, weights, residuals


def merge_traced(
    theta: "jax.Array", weights: "jax.Array", residuals: "jax.Array", length: "jax.Array", width: "jax.Array"
) -> tuple["jax.Array", ...]:
    """The same inside jit, with the new length: arrays keep the shape (m,), the last node repeats behind."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    def step(carry, point):
        start, group = carry
        new = point - start > width
        carry = jnp.where(new, point, start), group + new
        return carry, carry[1]

    steps = jnp.arange(len(theta))
    _, group = lax.scan(step, (theta[0], jnp.zeros((), jnp.int32)), theta)
    members = (group[None] == steps[:, None]) & (steps < length)
    with jax.default_matmul_precision("highest"):
        nodes, weights, residuals = _merged(members, theta, weights, residuals, jnp)
    length = group[length - 1] + 1
    live = steps < length
    return (
        jnp.where(live, nodes, nodes[length - 1]),
        *(jnp.where(live, x, 0) for x in (weights, residuals)),
        length,
    )


def merged(quadrature: M, coefficients: np.ndarray) -> M:
    """The quadrature of a run without reorthogonalisation, from the same with all its copies and from T."""
    found = dataclasses.replace(quadrature, coefficients=coefficients)
    width = 2 * found.noise_floor
    rules = [merge(theta, w, np.abs(r), width) for theta, w, r in map(rule_of, coefficients)]
    steps = coefficients.shape[-1]
    nodes, weights, residuals = (
        np.stack([np.pad(rule[i], (0, steps - len(rule[i])), mode=mode) for rule in rules])
        for i, mode in enumerate(("edge", "constant", "constant"))
    )
    lengths = np.array([len(rule[0]) for rule in rules])
    return dataclasses.replace(found, nodes=nodes, weights=weights, residuals=residuals, lengths=lengths)


def _merged(members, theta, weights, residuals, xp):
    """Nodes, weights and residuals of groups, `members` (g, m).

    Of the combinations of two copies one has no component on the next vector of the basis, so that an
    eigenvalue is as near as the copies are to each other, whatever their residuals.
    """
    total = members @ weights
    shares = xp.where(members, weights, 0) / xp.where(total > 0, total, 1)[:, None]
    even = members / xp.maximum(members.sum(axis=1), 1)[:, None]
    nodes = xp.where(total[:, None] > 0, shares, even) @ theta
    away = xp.abs(theta - nodes[:, None])
    alone = xp.min(xp.where(members, residuals + away, xp.inf), axis=1)
    together = xp.max(xp.where(members, away, 0), axis=1)
    return nodes, total, xp.where(members.sum(axis=1) > 1, xp.minimum(alone, together), alone)
