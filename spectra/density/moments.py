"""The density that Chebyshev moments give, with the band of a finite number of probes."""

import numpy as np
from numpy.typing import ArrayLike

from spectra.base.errors import SpectraError
from spectra.density.bands import ShareLimit, bonferroni, sampling_band
from spectra.density.kernels import RELATIVE_WIDTH
from spectra.results import Density, Moments


def jackson(count: int) -> np.ndarray:
    """Damping factors that make the truncated Chebyshev series positive; shape (count,)."""
    n, q = np.arange(count), np.pi / (count + 1)
    return ((count - n + 1) * np.cos(q * n) + np.sin(q * n) / np.tan(q)) / (count + 1)


def points_of(grid: ArrayLike) -> np.ndarray:
    """A grid that was passed, in float64.

    Raises:
        SpectraError: it is not 1-D, or not of at least two finite, increasing numbers.
    """
    try:
        points = np.asarray(grid, np.float64)
    except (TypeError, ValueError):
        points = np.zeros(())
    finite = points.ndim == 1 and len(points) > 1 and bool(np.isfinite(points).all())
    if not finite or not (np.diff(points) > 0).all():
        raise SpectraError("grid must be a 1-D array of at least two finite, increasing numbers.")
    return points


def moments_density(moments: Moments, grid: ArrayLike | None = None, level: float = 0.95) -> Density:
    """The Jackson-damped density, as its mean over the cell of each grid point; see `spectral_density`.

    With x = cos θ the density integrates to (g_0 μ_0 θ + 2 Σ g_j μ_j sin(jθ) / j) / π, so cells are
    integrated exactly, and the trapezoidal rule on the grid gives the mass on it to rounding.
    """
    a, b = map(float, moments.bounds)
    count, half = moments.num_moments, (b - a) / 2
    if grid is None:
        angles = np.pi * (np.arange(4 * count + 1) / (4 * count))
        grid = (a + b) / 2 - half * np.cos(angles)
    grid = points_of(grid)
    edges = np.concatenate([grid[:1], (grid[1:] + grid[:-1]) / 2, grid[-1:]])
    theta = np.arccos(np.clip((edges - (a + b) / 2) / half, -1, 1))
    order = np.arange(1, count)
    above = np.concatenate([theta[:, None], 2 * np.sin(theta[:, None] * order) / order], axis=1) / np.pi
    cells = -np.diff(above, axis=0) / np.diff(edges)[:, None] * jackson(count)  # (g, num_moments)
    mu = np.asarray(moments.moments, np.float64)
    mean = np.maximum(mu.mean(axis=0) @ cells.T, 0)
    t = np.clip((grid - (a + b) / 2) / half, -1, 1)
    width = half * np.pi / count * np.sqrt(np.maximum(1 - t**2 + (4 * t**2 - 3) / count, 1 / count**2))
    square, highest = _squared_kernel(cells, mu.mean(axis=0))
    num_tests = float(np.sum(np.diff(grid) / width[1:]))
    limit = ShareLimit(moments.size, moments.num_probes, bonferroni(level, num_tests))
    # The damped kernel is a polynomial of degree num_moments - 1, which the moments integrate exactly.
    kappa = np.minimum(square / np.where(mean > 0, mean, 1.0), highest)
    # mean K² = Σ K_i² / n is at most n (mean K)²: fewer than one eigenvalue there are none, and the law of a
    # share of so little would exclude what lies just below it.
    lower, upper = sampling_band(mean, mean, (np.minimum(kappa, moments.size * mean), kappa), limit)
    rounding = np.abs(cells) @ _rounding(moments)
    return Density(
        grid=grid,
        density=mean,
        lower=np.maximum(lower - rounding, 0.0),
        upper=upper + rounding,
        bandwidth=width,
        linear_scale=float(half * np.pi / count / RELATIVE_WIDTH),
        outliers=np.zeros(0),
        size=moments.size,
        level=level,
        status=moments.status,
    )


def _squared_kernel(cells: np.ndarray, mu: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of the squared kernel at each grid point, from above, and no less than the largest kernel there.

    The exact mean needs twice as many moments. Under the damped density in place of the spectrum it
    is, for a kernel of Gaussian shape, at least 1 / sqrt(3) of it, the value at an isolated eigenvalue.

    A polynomial of degree m is nowhere more than 1 / cos(π m / 2 N) times what it is at N Chebyshev points
    (Ehlich and Zeller, doi:10.1007/BF01111276). With few moments a kernel is largest far from its grid point,
    and a cell may have most of the mass beside its middle: the value there is no bound.
    """
    from scipy.fft import dct

    count = len(mu)
    points = 4 * count

    def at_points(coefficients: np.ndarray) -> np.ndarray:
        halves = np.concatenate([coefficients[:, :1], coefficients[:, 1:] / 2], axis=1)
        return dct(halves, type=3, n=points, axis=1)

    order = np.arange(count)
    damped = np.where(order > 0, 2, 1) * jackson(count) * mu
    mass = np.maximum(at_points(damped[None])[0], 0) / points
    square, highest = np.empty((2, len(cells)))
    for part in np.array_split(np.arange(len(cells)), len(cells) // 256 + 1):
        kernel = at_points(cells[part])
        square[part], highest[part] = kernel**2 @ mass, kernel.max(axis=1)
    highest = np.maximum(highest, 0) / np.cos(np.pi * (count - 1) / (2 * points))
    return np.minimum(3**0.5 * square, highest * np.maximum(cells @ mu, 0)), highest


def _rounding(moments: Moments) -> np.ndarray:
    """What rounding may do to each moment, (num_moments,).

    A step rounds by the precision of a product, relative to |H|, which is `size` in units of A. T_j has the
    slope j where angles are even, so that what is rounded in every step alike grows like j.
    """
    a, b = map(float, moments.bounds)
    size = max(max(abs(a), abs(b)) * 2 / (b - a), 1.0)
    return moments.precision * size * np.arange(moments.num_moments)
