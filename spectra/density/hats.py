"""Sums of kernels on a grid, as means under its hat functions: the trapezoidal rule gives their mass."""

from collections.abc import Iterator

import numpy as np

from spectra.density.kernels import Width, chunks, peak

_SEEN = 10.0
"""Kernel widths beyond which a point counts as the edge: 1e-23 of the mass is further out."""
_NEAR = 8.0
"""Of a center that counts at a grid point."""
NARROW = 5.0
"""A kernel at least this many times as wide as what moves its center is followed by `moved_kernels`."""
_CURVED, _WIDER = 4.0, 1.3
"""|∂²K/∂c²| is below 3.2 N(x; c, (1.3 h)²) / h², if c is up to h/5 off and h changes by 5 % of its distance
from zero, as sampled for all of these."""


def hat_means(grid: np.ndarray, centers: np.ndarray, h: np.ndarray) -> np.ndarray:
    """(g, c) means of Gaussians under the hat functions of the grid: ∫ hat_i N_c / ∫ hat_i.

    With Φ, φ the normal distribution and density at z = (x - c) / h, the integral over a cell [a, b] of
    the rising hat is ((c - a) ΔΦ - h Δφ) / (b - a), and of the falling one ΔΦ minus that.
    """
    from scipy.special import ndtr

    z = np.clip((grid[:, None] - centers) / h, -_SEEN, _SEEN)
    x = centers + h * z  # beyond the reach a point counts as its edge: no cancellation far away
    phi = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    tail = ndtr(-np.abs(z))  # differences of the smaller tails, unless the center lies in the cell
    inside = (z[:-1] <= 0) & (z[1:] > 0)
    mass = np.where(inside, 1 - tail[1:] - tail[:-1], np.abs(np.diff(tail, axis=0)))
    cell = np.diff(grid)[:, None]
    rising = (x[:-1] - grid[:-1, None]) * mass + (centers - x[:-1]) * mass - h * np.diff(phi, axis=0)
    rising = np.clip(rising / cell, 0, mass)
    total = np.zeros_like(z)
    total[1:] += rising
    total[:-1] += mass - rising
    hat = np.zeros(len(grid))
    hat[1:] += np.diff(grid) / 2
    hat[:-1] += np.diff(grid) / 2
    return total / hat[:, None]


def _parts(
    grid: np.ndarray, centers: np.ndarray, h: np.ndarray
) -> Iterator[tuple[slice, np.ndarray, slice, np.ndarray]]:
    """(slice of the grid, its points with neighbours, those that count, the centers they see)."""
    for target, points, inner in chunks(grid):
        yield target, points, inner, (centers + _NEAR * h >= points[0]) & (centers - _NEAR * h <= points[-1])


def kernels(
    grid: np.ndarray, centers: np.ndarray, h: np.ndarray
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """(slice of the grid, centers that it sees, kernel between these) until the grid is through."""
    for target, points, inner, near in _parts(grid, centers, h):
        yield target, near, hat_means(points, centers[near], h[near])[inner]


def smooth(
    grid: np.ndarray, centers: np.ndarray, masses: np.ndarray, h: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Smoothed density of each row (k, g) from masses (k, c), and the mean of the squared kernel (g,)."""
    density = np.zeros((len(masses), len(grid)))
    square = np.zeros(len(grid))
    for target, near, kernel in kernels(grid, centers, h):
        density[:, target] = masses[:, near] @ kernel.T
        square[target] = kernel**2 @ masses[:, near].mean(axis=0)
    return density, square


def moved_kernels(
    grid: np.ndarray, centers: np.ndarray, widths: Width, moved: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(lower, mean, upper) of the kernels of eigenvalues, each of which lies within `moved` of its center.

    As a function of its center, a kernel is between its values at three places, but for its curvature
    between them: δ² / 8 times the largest second derivative.
    """
    lower, mean, upper = (np.zeros(len(grid)) for _ in range(3))
    h = widths(centers)
    for target, points, inner, near in _parts(grid, centers, h):
        c, own = centers[near], h[near]
        three = np.stack(
            [hat_means(points, c + shift, widths(c + shift))[inner] for shift in (-moved, 0.0, moved)]
        )
        curved = _CURVED * (moved / own) ** 2 / 8 * hat_means(points, c, _WIDER * own)[inner]
        lower[target] = np.sum(np.maximum(three.min(axis=0) - curved, 0), axis=1)
        mean[target] = np.sum(three[1], axis=1)
        upper[target] = np.sum(three.max(axis=0) + curved, axis=1)
    count = len(centers)
    return lower / count, mean / count, np.minimum(upper / count, peak(grid, widths))
