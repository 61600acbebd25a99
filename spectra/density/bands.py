"""Bands of smoothed densities: what a quadrature leaves open, and then what a finite number of probes does.

A kernel K is smooth, and a Gauss rule of m nodes is exact up to degree 2m - 1, so that its error for K
falls exponentially as soon as the kernel is wider than the spacing of the nodes. How much it is at most
follows from what is known for certain of the measure μ of a probe. For z in the upper half plane all
measures with the same recurrence coefficients α_1, β_1, ..., α_m, β_m have Stieltjes transforms in one disc
(Weyl's circle), with the Gauss rule on its edge, whose diameter is

    d(z) = |Σ_j (-1)^j sqrt(w_j) r_j / (θ_j - z)|² / (Im z (1 + Σ_j r_j² / |θ_j - z|²)).

K is analytic, so by Cauchy's formula on a contour at the height y above the axis and its mirror image

    |∫ K dμ - Σ_j w_j K(θ_j)| <= (1/π) ∫ |K(z)| d(z) |dz|.

On the contour |K| is again a Gaussian in x: the bound is a smoothed density too, of "error masses" on the
contour.

References:
    Akhiezer, The Classical Moment Problem, 1965, ch. 1 and 2 (the discs).
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from spectra.quadrature import distribution
from spectra.quadrature.brackets import Origin, bracket, dropped, rules
from spectra.results import Quadrature

RELATIVE_WIDTH = 0.05
"""Default kernel width as a share of the distance from zero: an outlier is drawn 5 % wide."""
HEIGHTS = (0.5, 1.0, 2.0, 3.0)
"""Of the contours, in kernel widths: |K| grows as exp(y² / 2), and d falls as exp(-2 π y / spacing)."""
REACH = 8.0  # kernel widths beyond which its mass, 1e-15, is not seen
_PER_WIDTH = 4.0
"""Points of a contour in a width of the kernel: features there are half a width wide, or more."""
_BLOCK = 2_000_000  # numbers of a contour and the nodes side by side
COARSE = 8.0
"""Cells of a grid wider than this many kernels are bracketed by the CDF in place of the kernel ..."""
MANY = 8192
"""... if the grid spans more kernel widths than this."""


@dataclasses.dataclass(frozen=True)
class Width:
    """The width of the kernel for mass at t: sqrt(narrowest² + (share t)²), analytic near the real axis."""

    narrowest: float
    share: float = 0.0

    def __call__(self, t: ArrayLike) -> np.ndarray:
        """Width at real positions."""
        return np.hypot(self.narrowest, self.share * np.asarray(t))

    def squared(self, z: np.ndarray) -> np.ndarray:
        """Its square at complex ones."""
        return self.narrowest**2 + (self.share * z) ** 2

    def count(self, t: ArrayLike) -> np.ndarray:
        """Widths from zero to t: ∫ dt / h."""
        if not self.share:
            return np.asarray(t) / self.narrowest
        return np.arcsinh(self.share * np.asarray(t) / self.narrowest) / self.share

    def place(self, count: np.ndarray) -> np.ndarray:
        """Where so many widths from zero end."""
        if not self.share:
            return count * self.narrowest
        return np.sinh(self.share * count) * self.narrowest / self.share


def peak(grid: np.ndarray, widths: Width) -> np.ndarray:
    """No less than the largest kernel under the hat function of each grid point.

    As a function of t the kernel N(x; t, h(t)²) is largest near t = x, where h changes by the share η in a
    width: (1 + η²) / (sqrt(2π) h(x)) bounds it. The mean under a hat is below the inverse of its area, too.
    """
    cells = np.diff(grid)
    near = np.stack([np.append(grid[0], grid[:-1]), grid, np.append(grid[1:], grid[-1])])
    smallest = np.where((near[0] < 0) & (near[2] > 0), 0.0, np.abs(near).min(axis=0))
    area = (np.append(0.0, cells) + np.append(cells, 0.0)) / 2
    return np.minimum((1 + widths.share**2) / (np.sqrt(2 * np.pi) * widths(smallest)), 1 / area)


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
        smooth: (centers, masses, widths) to the density at the grid.
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
        places = _places(counts, ~coarse)
        errors = [smooth(*_error_masses(quadrature, widths, places, y, moved, origin)) for y in HEIGHTS]
        error = np.where(coarse, np.inf, np.min(errors, axis=0))
        lower, upper = np.maximum(lower, density - error), np.minimum(upper, density + error)
    return np.minimum(lower, density), np.maximum(np.minimum(upper, peak(grid, widths)), density)


def _places(counts: np.ndarray, fine: np.ndarray) -> np.ndarray:
    """Points of a contour, as widths from zero, that the hats of the fine grid points can see."""
    left = np.append(counts[0], counts[:-1])[fine] - REACH - 1
    right = np.append(counts[1:], counts[-1])[fine] + REACH + 1
    first, last = np.floor(left * _PER_WIDTH).astype(int), np.ceil(right * _PER_WIDTH).astype(int)
    first = np.maximum(first, np.append(first[0], last[:-1] + 1))  # both grow with the grid
    pieces: list[np.ndarray] = [np.arange(a, b + 1) for a, b in zip(first, last, strict=True)]
    return np.concatenate(pieces) / _PER_WIDTH


def _error_masses(
    quadrature: Quadrature,
    widths: Width,
    places: np.ndarray,
    height: float,
    moved: float,
    origin: Origin | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centers, masses and widths of Gaussians whose sum bounds the error, as a mean over probes.

    With 1 / h(z)² = a + i b and z = t + i y, |K_x(z)| = N(x; t - y b / a, 1 / a) times
    exp(a y² (1 + b² / a²) / 2) / sqrt(a |h(z)²|). Where H is known to within `moved` = δ, the transform
    vᵀ(H - z)⁻¹v changes by δ |(H - z)⁻¹v| |(H + E - z)⁻¹v| at most, and |(H - z)⁻¹v|² is its imaginary part
    over y.
    """
    t = widths.place(places)
    h = widths(t)
    y = height * h
    z = t + 1j * y
    square = widths.squared(z)
    a, b = (1 / square).real, (1 / square).imag
    growth = np.exp(a * y**2 * (1 + (b / a) ** 2) / 2) / np.sqrt(a * np.abs(square))
    length = h / _PER_WIDTH * np.hypot(1, height * widths.share**2 * t / h)
    total, behind = np.zeros(len(t)), dropped(origin.whole if origin else quadrature)
    blocks = np.array_split(np.arange(len(t)), 1 + len(t) * quadrature.num_steps // _BLOCK)
    # Of the rest of a measure as much is open as of the measure, in units of the mass that is left.
    none = np.zeros(0, int)
    shares = origin.rules() if origin else ((rule, none) for rule in rules(quadrature))
    for ((theta, w, r), taken), part in itertools.product(shares, blocks):
        mass = 1 - w[taken].sum()
        away, above, left = theta[:, None] - t[part], y[part], np.zeros(len(part))
        seen = 1 / (away**2 + above**2)  # |θ - z|⁻²; the inverse itself is (θ - t + i y) times that
        far = (moved if r.any() else moved + behind) / above
        if r.any():
            rows = np.sqrt(w) * r
            square = (rows @ (away * seen)) ** 2 + (above * (rows @ seen)) ** 2
            left = square / (above * (1 + r**2 @ seen))
        total[part] += (left + far * (1 + far) * (above * (w @ seen) + left)) / mass
    return t - y * b / a, growth * length * total / (np.pi * quadrature.num_probes), 1 / np.sqrt(a)


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

    def exact(self, share: np.ndarray) -> np.ndarray:
        """The limit itself."""
        return distribution.share_upper_bound(share, self.normals, self.tail)

    def __call__(self, share: np.ndarray) -> np.ndarray:
        """From the table; the share itself where there is not room for one eigenvalue."""
        found = np.interp(share, SHARES, _limits(self.normals, self.tail))
        return np.where(found * self.size >= 1, np.maximum(found, share), share)


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
    return np.minimum(low * (1 - limit.exact(1 - lower / low)), lower), high * limit.exact(upper / high)


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
