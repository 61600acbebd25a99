"""From nodes and weights to the distribution: what is known of it, its bracket, the band of the probes."""

from typing import NamedTuple

import numpy as np

from spectra.base.errors import SpectraError
from spectra.quadrature import Measures
from spectra.quadrature.brackets import bracket

NEAR = 1e-9
"""Relative change of a root by a secant that ends the search: what the next one changes is of its square."""
ROOT_STEPS = 80
"""At most so many evaluations for a root: every fourth halves its bracket."""
INSERTED = 4
"""Times, an even number, that a tail is inserted in the equation for itself: each lands on the other side."""
SKEWED = 1.0
"""Standard deviations of a bracket that count for nothing: without, one eigenvalue in eight probes, whose law
is skewed, is missed up to 1.37 times as often as stated; with them 1.09 times, and twenty as often."""


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


def tails(low: np.ndarray, high: np.ndarray, num_normals: float, tail: float) -> np.ndarray:
    """What each end of an interval may fail with, of 2 `tail`, where probes saw between `low` and `high`.

    A truth near one end of a bracket is far from the other, which then fails only where the share seen is off
    by the bracket's width besides (Imbens and Manski, doi:10.1111/j.1468-0262.2004.00555.x). The angle of
    which a share is the squared sine has nearly a normal law, of variance 1 / (2 num_normals). In its units
    the bracket is d + `SKEWED` wide, and t + Q(Q⁻¹(t) + d) = 2 tail is solved by inserting, from below.
    """
    from scipy.special import ndtr, ndtri

    first, last = (np.arcsin(np.sqrt(np.clip(share, 0, 1))) for share in (low, high))
    width = np.maximum(np.sqrt(2 * num_normals) * (last - first) - SKEWED, 0)
    each = np.full(np.shape(low), tail)
    for _ in range(INSERTED):
        each = 2 * tail - ndtr(ndtri(each) - width)
    return each


def share_limits(
    low: np.ndarray, high: np.ndarray, num_normals: float, tail: float
) -> tuple[np.ndarray, np.ndarray]:
    """Limits of a share of which probes saw between `low` and `high`, failing with 2 `tail` together."""
    each = tails(low, high, num_normals, tail)
    return 1 - share_upper_bound(1 - low, num_normals, each), share_upper_bound(high, num_normals, each)


def share_upper_bound(share: np.ndarray, num_normals: float, tail: float | np.ndarray) -> np.ndarray:
    """Largest F for which an observed share this small has probability at least `tail`.

    A probe uniform on the sphere in n dimensions sees a subspace of dimension nF with the law
    Beta(nF/2, n(1-F)/2); the mean of k probes has, to its first two moments, the law with k n in the
    place of n. The bound inverts the CDF of that law in F. In units of a normal law the CDF is all but
    linear in the angle of which F is the squared sine, so that secants find the root in a handful of
    evaluations; where one leaves the bracket, and every fourth time, it is halved.
    """
    from scipy.special import betainc, ndtri

    def beyond(angle, values, quantiles):
        part = np.sin(angle) ** 2
        a, b = num_normals * part / 2, num_normals * (1 - part) / 2
        return ndtri(betainc(np.maximum(a, 1e-300), np.maximum(b, 1e-300), values)) - quantiles

    pairs = np.stack(np.broadcast_arrays(np.asarray(share, np.float64), tail)).reshape(2, -1)
    (shares, quantiles), index = np.unique(pairs, axis=1, return_inverse=True)
    quantiles = ndtri(quantiles)
    bound = np.clip(shares, 0.0, 1.0)  # what 0 and 1 keep
    if num_normals == 0:  # no direction was sampled, and none is excluded
        return np.ceil(bound)[index].reshape(np.shape(share))
    (open_,) = np.nonzero((shares > 0) & (shares < 1))
    low = np.arcsin(np.sqrt(shares[open_]))
    high, last, found = np.full_like(low, np.pi / 2), low, low - quantiles[open_] / np.sqrt(2 * num_normals)
    with np.errstate(divide="ignore", invalid="ignore"):
        excess = beyond(last, shares[open_], quantiles[open_])
        for turn in range(ROOT_STEPS):
            if not len(open_):
                break
            found = np.clip(found, low, high)
            before, excess = excess, beyond(found, shares[open_], quantiles[open_])
            low, high = np.where(excess >= 0, found, low), np.where(excess >= 0, high, found)
            secant = found - excess * (found - last) / (excess - before)
            good = np.isfinite(before) & (secant >= low) & (secant <= high) & (turn % 4 < 3)
            last, found = found, np.where(good, secant, (low + high) / 2)
            bound[open_] = np.maximum(np.sin(found) ** 2, shares[open_])
            left = np.abs(found - last) > np.where(good, NEAR, 4 * np.finfo(float).eps) * found
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
    below, above = np.clip([(low - least) / span, (high - least) / span], 0.0, 1.0)
    first, last = share_limits(below, above, normals, tail)
    first, last = (first, last) if count is None else whole(first, last, count)
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
    low, high = whole(*share_limits(lower, upper, normals, tail), quadrature.size)
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
    counts = (_counted(size * curve, size) + np.rint(n * atoms) for curve, atoms in pairs)
    return [np.clip(count / n, 0.0, 1.0) for count in counts]


def _counted(count: np.ndarray, size: int) -> np.ndarray:
    """Numbers of eigenvalues, whole ones without the rounding of a share and of its product with `size`."""
    nearest = np.rint(count)
    return np.where(np.abs(count - nearest) <= 2 * np.finfo(float).eps * size, nearest, count)


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
