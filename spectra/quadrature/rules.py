"""Small dense mathematics of Gauss quadrature: from Lanczos coefficients to nodes, brackets and bands.

Everything is NumPy float64 on the host; SciPy is imported on first use, which keeps `import spectra`
fast. Only `gauss_rule_traced` runs in JAX, for use inside a caller's jit.
"""

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from spectra.base.errors import SpectraError
from spectra.quadrature.brackets import bracket
from spectra.quadrature.copies import Measures, Rule

if TYPE_CHECKING:
    import jax


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

    @jax.custom_jvp
    def eigh(matrix):
        return tuple(jnp.linalg.eigh(matrix))

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


ROOT_STEPS = 80
"""At most so many evaluations for a root: every fourth halves its bracket."""


class Split(NamedTuple):
    """A distribution at points x: what sampling leaves open, and what is known."""

    rest: Measures | None  # the quadrature that is sampled; None where all is known
    share: float  # of the eigenvalues that it stands for
    known: np.ndarray  # (3, ...) least, estimated and largest share of the atoms
    bracket: np.ndarray  # (3, ...) of the rest's distribution, for the probes drawn


def split(quadrature: Measures, x: np.ndarray) -> Split:
    """The distribution at x. Without deflated or resolved eigenvalues the rest is all.

    Atoms are known to the noise floor and the coupling. Of a Krylov space that was taken out whole, either
    one eigenvalue is open, or the rest is taken at points that `Links.moved` tells: whichever leaves less.
    """
    parts = quadrature.parts
    share = parts.rest.size / quadrature.size if parts.rest is not None else 0.0
    shift = quadrature.noise_floor + parts.coupling
    if parts.links is None or parts.rest is None:
        return Split(parts.rest, share, *_at(quadrature, x, shift, 0))
    away = parts.links.moved(x, quadrature.noise_floor)
    one = _at(quadrature, x, shift, 1)
    other = _at(quadrature, x, shift + np.where(np.isfinite(away), away, 0.0), 0)
    widths = [known[2] - known[0] + share * (part[2] - part[0]) for known, part in (one, other)]
    better = np.isfinite(away) & (widths[1] <= widths[0])
    return Split(parts.rest, share, *(np.where(better, y, x) for x, y in zip(one, other, strict=True)))


def doubt(quadrature: Measures, x: np.ndarray) -> np.ndarray:
    """How many eigenvalues, one at most, vectors that were taken out leave on either side of x."""
    links, floor = quadrature.parts.links, quadrature.noise_floor
    if links is None or links.beta == 0:
        return np.zeros(np.shape(x))
    away = links.moved(x, floor)
    known, part = _at(quadrature, x, floor + np.where(np.isfinite(away), away, 0.0), 0)
    rest = quadrature.parts.rest.size
    open_ = quadrature.size * (known[2] - known[0]) + rest * (part[2] - part[0])
    return np.where(np.isfinite(away), np.minimum(open_, 1.0), 1.0)


def _at(quadrature: Measures, x: np.ndarray, shift: float | np.ndarray, open_: int) -> tuple[np.ndarray, ...]:
    """`Split.known` and `Split.bracket`, with eigenvalues that may be `shift` away and so many in doubt."""
    parts = quadrature.parts
    points, doubt = np.stack([x - shift, x, x + shift]), np.array([-open_, 0, open_])
    known = np.searchsorted(parts.sampled, points, side="right")
    if parts.links is not None:
        own = quadrature.noise_floor + parts.coupling
        theta = np.sort(parts.links.theta)
        known = known + np.searchsorted(theta, np.stack([x - own, x, x + own]), side="right")
    known = (known + doubt.reshape(3, *[1] * np.ndim(x))) / quadrature.size
    if parts.rest is None:
        return known, np.zeros((3, *np.shape(x)))
    lower, estimate, upper = bracket(parts.rest, x, shift, parts.origin)
    return known, np.stack([np.maximum(lower - parts.leak, 0), estimate, np.minimum(upper + parts.leak, 1)])


def share_upper_bound(share: np.ndarray, num_normals: float, tail: float) -> np.ndarray:
    """Largest F for which an observed share this small has probability at least `tail`.

    A probe uniform on the sphere in n dimensions sees a subspace of dimension nF with the law
    Beta(nF/2, n(1-F)/2); the mean of k probes has, to its first two moments, the law with k n in the
    place of n. The bound inverts the CDF of that law in F. In units of a normal law the CDF is all but
    linear in the angle of which F is the squared sine, so that secants find the root in a handful of
    evaluations; where one leaves the bracket, and every fourth time, it is halved.
    """
    from scipy.special import betainc, ndtri

    def beyond(angle, values):
        part = np.sin(angle) ** 2
        a, b = num_normals * part / 2, num_normals * (1 - part) / 2
        return ndtri(betainc(np.maximum(a, 1e-300), np.maximum(b, 1e-300), values)) - ndtri(tail)

    shares, index = np.unique(np.asarray(share, np.float64).ravel(), return_inverse=True)
    bound = np.clip(shares, 0.0, 1.0)  # what 0 and 1 keep
    if num_normals == 0:  # no direction was sampled, and none is excluded
        return np.ceil(bound)[index].reshape(np.shape(share))
    (open_,) = np.nonzero((shares > 0) & (shares < 1))
    low = np.arcsin(np.sqrt(shares[open_]))
    high, last, found = np.full_like(low, np.pi / 2), low, low - ndtri(tail) / np.sqrt(2 * num_normals)
    with np.errstate(divide="ignore", invalid="ignore"):
        excess = beyond(last, shares[open_])
        for turn in range(ROOT_STEPS):
            if not len(open_):
                break
            found = np.clip(found, low, high)
            before, excess = excess, beyond(found, shares[open_])
            low, high = np.where(excess >= 0, found, low), np.where(excess >= 0, high, found)
            secant = found - excess * (found - last) / (excess - before)
            good = np.isfinite(before) & (secant >= low) & (secant <= high) & (turn % 4 < 3)
            last, found = found, np.where(good, secant, (low + high) / 2)
            bound[open_] = np.maximum(np.sin(found) ** 2, shares[open_])
            left = np.abs(found - last) > 4 * np.finfo(float).eps * found
            open_, low, high, last, found, excess = (
                part[left] for part in (open_, low, high, last, found, excess)
            )
    return bound[index].reshape(np.shape(share))


def share_interval(
    low: float, high: float, reach: tuple[float, float], normals: float, tail: float, count: float | None
) -> tuple[float, float]:
    """Ends of a share in `reach` of which probes saw `low` to `high`; whole numbers of `count`, if given."""
    least, most = reach
    span = most - least
    if span <= 0:
        return least, most
    seen = np.clip([(most - low) / span, (high - least) / span], 0.0, 1.0)
    beyond, within = share_upper_bound(seen, normals, tail)
    first, last = (1 - beyond, within) if count is None else whole(1 - beyond, within, count)
    return float(least + span * first), float(least + span * last)


def sampling_band(
    quadrature: Measures, lower: np.ndarray, upper: np.ndarray, level: float
) -> tuple[np.ndarray, np.ndarray]:
    """Widen averaged brackets by what a finite number of probes leaves open, for the whole curve.

    A share is a whole number of eigenvalues: both ends move inwards to the next one, or to the bracket.
    """
    num_nodes = int(np.max(quadrature.lengths))
    tail = (1 - level) / (2 * num_nodes)
    normals = quadrature.num_probes * quadrature.size
    low, high = 1 - share_upper_bound(1 - lower, normals, tail), share_upper_bound(upper, normals, tail)
    low, high = whole(low, high, quadrature.size)
    return np.minimum(low, lower), np.maximum(high, upper)


def whole(
    lower: float | np.ndarray, upper: float | np.ndarray, count: float
) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last multiple of 1 / count between shares, which are known to rounding."""
    slack = 1e-12 * count + 1e-9
    return np.ceil(lower * count - slack) / count, np.floor(upper * count + slack) / count


def cdf_band(quadrature: Measures, x: np.ndarray, level: float) -> tuple[np.ndarray, ...]:
    """(lower, estimate, upper) of the CDF at `x`; see `Quadrature.cdf`."""
    if not 0 < level < 1:
        raise SpectraError(f"level={level} is not between 0 and 1.")
    _, estimate, _, lower, upper = curves(quadrature, x, level)
    curve = lower, np.clip(estimate, lower, upper), upper
    return tuple(np.where(np.isnan(x), np.nan, part)[()] for part in curve)


def curves(quadrature: Measures, x: np.ndarray, level: float) -> list[np.ndarray]:
    """CDF at x: bracket below, estimate, bracket above, and the band that sampling widens them to."""
    rest, share, known, (lower, estimate, upper) = split(quadrature, x)
    band = sampling_band(rest, lower, upper, level) if rest is not None else (lower, upper)
    # In counts, not in shares: where all is known the curve is j / n to the bit, and no sum of rounded parts.
    n, size = quadrature.size, round(share * quadrature.size)
    pairs = zip((lower, estimate, upper, *band), (*known, known[0], known[2]), strict=True)
    return [np.clip((size * curve + np.rint(n * atoms)) / n, 0.0, 1.0) for curve, atoms in pairs]


def band_width_parts(quadrature: Measures, level: float) -> tuple[float, float]:
    """Mean width of the band over the spectral range: (bracket part, sampling part)."""
    low, high = quadrature.range
    edges = np.unique(np.asarray(quadrature.nodes))
    gaps = np.diff(edges)
    if high <= low or not len(gaps):
        return 0.0, 0.0
    middle = (edges[1:] + edges[:-1]) / 2
    lower, _, upper, wide_lower, wide_upper = curves(quadrature, middle, level)
    inner = float(np.sum(gaps * (upper - lower)) / (high - low))
    outer = float(np.sum(gaps * (wide_upper - wide_lower)) / (high - low))
    return inner, outer - inner
