"""Kernels of densities: Gaussians whose width grows with the distance from zero, here and on contours."""

import dataclasses
from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

RELATIVE_WIDTH = 0.05
"""Default kernel width as a share of the distance from zero: an outlier is drawn 5 % wide."""
REACH = 8.0  # kernel widths beyond which its mass, 1e-15, is not seen
_POINT = 1e-3
"""Of a width: under a hat as narrow the mean of a kernel is its value, but for the square of that."""


@dataclasses.dataclass(frozen=True)
class Width:
    """The width of the kernel for mass at t: sqrt(narrowest² + (share t)²), analytic near the real axis."""

    narrowest: float
    share: float = 0.0

    def __call__(self, t: ArrayLike) -> np.ndarray:
        """Width at real positions."""
        return np.hypot(self.narrowest, self.share * np.asarray(t))

    def squared(self, z: NDArray[np.complex128]) -> NDArray[np.complex128]:
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


def chunks(grid: np.ndarray, size: int = 64) -> Iterator[tuple[slice, np.ndarray, slice]]:
    """Slices of the grid with a neighbour on each side, so that hats are whole."""
    for start in range(0, len(grid), size):
        stop = min(start + size, len(grid))
        low, high = max(start - 1, 0), min(stop + 1, len(grid))
        yield slice(start, stop), grid[low:high], slice(start - low, stop - low)


def complex_hat_means(
    grid: np.ndarray, z: NDArray[np.complex128], squares: NDArray[np.complex128]
) -> NDArray[np.complex128]:
    """(g, c) means under the hat functions of the grid of N(x; z, σ²), for complex z and widths σ².

    The closed form of the integral of a Gaussian times a line, with the error function of complex numbers.
    """
    from scipy.special import erf

    sigma = np.sqrt(squares)
    away = (grid[:, None] - z) / sigma
    phi = np.exp(-(away**2) / 2) / np.sqrt(2 * np.pi)
    cell = np.diff(grid)[:, None]
    mass = np.diff(erf(away / np.sqrt(2)), axis=0) / 2
    rising = ((z - grid[:-1, None]) * mass - sigma * np.diff(phi, axis=0)) / cell
    total = np.zeros_like(away)
    total[1:] += rising
    total[:-1] += mass - rising
    area = (np.append(0.0, cell) + np.append(cell, 0.0))[:, None] / 2
    return np.where(area < _POINT * np.abs(sigma), phi / sigma, total / area)
