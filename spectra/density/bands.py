"""Bands of smoothed densities: what a quadrature leaves open, and then what few probes do."""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from spectra.density.discs import open_errors
from spectra.density.kernels import REACH, Width, peak
from spectra.quadrature import distribution
from spectra.quadrature.brackets import Origin, bracket
from spectra.results import Quadrature

COARSE = 8.0
"""Cells of a grid wider than this many kernels are bracketed by the CDF in place of the kernel ..."""
MANY = 8192
"""... if the grid spans more kernel widths than this."""


def limits(
    quadrature: Quadrature,
    grid: np.ndarray,
    widths: Width,
    density: np.ndarray,
    moved: float,
    smooth: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
    origin: Origin | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(lower, upper) of the smoothed density that the probes have, for what their quadratures left open.

    Args:
        quadrature: without deflated pairs.
        grid: increasing points.
        widths: of the kernel.
        density: mean over probes of the smoothed quadratures, at the grid.
        moved: how far rounding can have moved an eigenvalue.
        smooth: (centers, rows of masses, widths) to the densities at the grid.
        origin: what the quadrature was made from, if resolved nodes were taken out.
    """
    counts = widths.count(grid)
    wide = (np.diff(counts) > COARSE) & (counts[-1] - counts[0] > MANY)
    coarse = np.append(False, wide) | np.append(wide, False)
    lower, upper = np.zeros(len(grid)), np.full(len(grid), np.inf)
    if coarse.any():
        lower, upper = _cells(quadrature, grid, widths, moved, origin)
        lower, upper = np.where(coarse, lower, 0.0), np.where(coarse, upper, np.inf)
    if not coarse.all():
        missed, error = open_errors(quadrature, grid, ~coarse, widths, moved, density, smooth, origin)
        middle, error = density + missed, np.where(coarse, np.inf, error)
        lower, upper = np.maximum(lower, middle - error), np.minimum(upper, middle + error)
    return np.minimum(lower, density), np.maximum(np.minimum(upper, peak(grid, widths)), density)


def _cells(
    quadrature: Quadrature,
    grid: np.ndarray,
    widths: Width,
    moved: float,
    origin: Origin | None = None,
    parts: int = 8,
) -> tuple[np.ndarray, np.ndarray]:
    """Limits from the CDF for hats that are wider than the kernel: the mass under a hat is a difference
    of the CDF's means over two cells, and the kernel carries mass no further than its reach."""
    points = grid[:-1, None] + np.diff(grid)[:, None] * np.linspace(0, 1, parts + 1)
    points[:, -1] = grid[1:]
    # Mass at t is carried to x = t + REACH h(t), and h changes by the share at most: solved for x - t.
    reach = REACH * widths(points) / (1 - REACH * widths.share)
    below, _, above = bracket(quadrature, points, reach + moved, origin)
    below, above = below[:, :-1].mean(axis=1), above[:, 1:].mean(axis=1)  # a CDF does not fall
    ends = grid[[0, -1]]
    reach = REACH * widths(ends) / (1 - REACH * widths.share)
    end_below, _, end_above = bracket(quadrature, ends, reach + moved, origin)
    left = np.append(end_below[0], below), np.append(end_above[0], above)
    right = np.append(below, end_below[1]), np.append(above, end_above[1])
    cells = np.diff(grid)
    area = (np.append(0.0, cells) + np.append(cells, 0.0)) / 2
    return np.maximum(right[0] - left[1], 0) / area, (right[1] - left[0]) / area


SHARES = np.concatenate([np.geomspace(1e-30, 1e-3, 400), np.linspace(1e-3, 1, 801)[1:]])


@functools.lru_cache(maxsize=64)
def _limits(normals: int, tail: float) -> np.ndarray:
    """Of `SHARES`: a history has the same table at every step, and its inversion takes most of a band."""
    return distribution.share_upper_bound(SHARES, normals, tail)


class ShareLimit:
    """The largest share that the one seen by the probes leaves possible; see `share_upper_bound`."""

    def __init__(self, size: int, num_probes: int, tail: float):
        self.size, self.normals, self.tail = size, num_probes * size, tail

    def __call__(self, share: np.ndarray) -> np.ndarray:
        """From the table; the share itself where there is not room for one eigenvalue."""
        found = np.interp(share, SHARES, _limits(self.normals, self.tail))
        return np.where(found * self.size >= 1, np.maximum(found, share), share)

    def of(self, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Both limits of shares that were seen between `low` and `high`, not from the table."""
        return distribution.share_limits(low, high, self.normals, self.tail)


def typical_kernels(
    kernel: np.ndarray, masses: np.ndarray, unseen: np.ndarray, highest: np.ndarray, limit: ShareLimit
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """κ for the limits below and above, mean K³ / mean K² as seen and mean K² / mean K, and that mean K.

    For the second, an eigenvalue that the probes happen to see hardly at all counts as much as any other. So
    the share of eigenvalues where K exceeds a level is taken at its limit, for every level:
    mean K = ∫ share(K > s) ds, which is a limit by itself, and mean K² = ∫ share(K > s) 2 s ds.

    Args:
        kernel: (g, c), at the nodes.
        masses: (c,) of the nodes.
        unseen: (g,) mass that the quadratures left open, as if at the peak of the kernel.
        highest: (g,) the peak.
        limit: of shares.
    """
    order = np.argsort(-kernel, axis=1)
    levels = np.take_along_axis(kernel, order, axis=1)
    levels = np.concatenate([np.maximum(highest, levels.max(axis=1, initial=0))[:, None], levels], axis=1)
    seen = np.concatenate([np.zeros((len(levels), 1)), np.cumsum(masses[order], axis=1)], axis=1)
    shares = limit(np.minimum(seen + unseen[:, None], 1.0))
    below = np.concatenate([levels[:, 1:], np.zeros((len(levels), 1))], axis=1)
    first, second = (np.sum((levels**p - below**p) * shares, axis=1) for p in (1, 2))
    square, cube = kernel**2 @ masses, kernel**3 @ masses
    return cube / np.where(square > 0, square, 1.0), second / np.where(first > 0, first, 1.0), first


def sampling_band(
    lower: np.ndarray, upper: np.ndarray, kappa: Sequence[np.ndarray] | np.ndarray, limit: ShareLimit
) -> tuple[np.ndarray, np.ndarray]:
    """What a finite number of probes leaves open besides.

    The value that one probe gives at x is vᵀ K(x, H) v, with the mean p = mean K and the variance
    2 (mean K² - p²) / (n + 2) over the sphere. With κ = mean K² / p the share p / κ has the law of a CDF's:
    Beta(nF/2, n(1-F)/2) with F = p / κ has just these two moments, and is the law where K takes the values
    0 and κ alone. For k probes n becomes k n, as there. That is for values below their mean, which limit p
    from above; those far above it come from the largest K, as the third moment has it:
    κ = mean K³ / mean K².

    Args:
        lower, upper: between which the mean over probes lies, at the grid.
        kappa: κ there, for the limit below and for that above.
        limit: of shares, at a tail for as many tests as the grid holds kernel widths (Bonferroni).
    """
    low, high = (np.maximum(part, mean) for part, mean in zip(kappa, (lower, upper), strict=True))
    low, high = (np.where(part > 0, part, 1.0) for part in (low, high))
    first, last = limit.of(lower / low, upper / high)
    return np.minimum(low * first, lower), high * last


def bonferroni(level: float, num_tests: float) -> float:
    """The probability that each side of each test may have to fail."""
    return (1 - level) / (2 * max(num_tests, 1.0))


def coupling_of_kernels(quadrature: Quadrature, grid: np.ndarray, widths: Width) -> np.ndarray:
    """How far the coupling to the rest can move the density at the grid.

    By parts, 1/n ∫ |K'| |N_H - N_{T ⊕ B}|: the variation of the kernel, twice its peak, times what is in
    doubt within its reach; or the slope of the kernel, below (0.61 + 2 η) peak / h, times 2 β.
    """
    links = quadrature.parts.links
    assert links is not None
    places = np.sort(np.append(grid, np.ravel(quadrature.nodes)))
    open_ = distribution.doubt(quadrature, places)
    reach = REACH * widths(np.abs(grid) + REACH * widths(grid))
    first = np.maximum(np.searchsorted(places, grid - reach) - 1, 0)
    last = np.minimum(np.searchsorted(places, grid + reach) + 1, len(places))
    largest = np.array([np.max(open_[a:b]) for a, b in zip(first, last, strict=True)])
    near = np.maximum(np.abs(grid) - np.gradient(grid), 0.0)
    slope = (0.61 + 2 * widths.share) * 2 * links.beta / widths(near)
    return peak(grid, widths) * np.minimum(2 * largest, slope) / quadrature.size
