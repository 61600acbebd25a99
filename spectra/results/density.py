"""Smoothed spectral densities."""

import numpy as np

from spectra._status import Status
from spectra.results._base import Array, Result, notebook_view, result


@result("linear_scale", "size", "level", "status")
class Density(Result):
    """A spectral density smoothed by a kernel of location-dependent width.

    ∫ density = 1 by the trapezoidal rule on `grid`, without renormalising, as far as the grid covers
    the spectrum. `lower` and `upper` hold the exact spectrum smoothed by the same kernel, on the whole grid
    at once, at the confidence `level`: the quadrature's error and that of the probes are both in it.

    The [glossary](glossary.md#density) says what is meant by density, band, outlier and bulk.
    """

    grid: Array  # (g,) eigenvalues
    density: Array  # (g,) per unit of eigenvalue
    lower: Array  # (g,)
    upper: Array  # (g,)
    bandwidth: Array  # (g,) width of the kernel for mass at each grid point
    linear_scale: float  # |eigenvalue| below which a signed-log axis should be linear
    outliers: Array  # (r,) mean positions of eigenvalues resolved one by one
    size: int  # n
    level: float
    status: Status = Status.COMPLETE  # of the quadrature or the moments that it shows

    def integral(self) -> float:
        """Mass on the grid by the trapezoidal rule; below one where the grid cuts the spectrum off."""
        return float(np.trapezoid(self.density, self.grid))

    def __repr__(self) -> str:
        return (
            f"Density(points={len(self.grid)}, range=({self.grid[0]:.4g}, {self.grid[-1]:.4g}), "
            f"integral={self.integral():.6f}, outliers={len(self.outliers)})"
        )

    def _repr_html_(self) -> str:
        rows = [
            ("parameters", f"{self.size:,}"),
            ("range", f"{self.grid[0]:.4g} to {self.grid[-1]:.4g}"),
            ("integral", f"{self.integral():.6f}"),
            ("eigenvalues resolved one by one", f"{len(self.outliers)}"),
            ("band", f"{100 * self.level:g} % on the whole grid"),
        ]
        return notebook_view(self, "Spectral density", rows)
