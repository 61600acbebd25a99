"""Pictures of results. Functions take a result and optionally an Axes, and return the Axes."""

from spectra.plotting.density import plot_comparison, plot_density
from spectra.plotting.distribution import plot_cdf, plot_eigenvalues
from spectra.plotting.gallery import plot
from spectra.plotting.history import plot_density_over_time
from spectra.plotting.landscape import plot_landscape
from spectra.plotting.panels import plot_blocks
from spectra.plotting.style import plot_style
from spectra.plotting.vectors import plot_eigenvector_mass

__all__ = [
    "plot",
    "plot_blocks",
    "plot_cdf",
    "plot_comparison",
    "plot_density",
    "plot_density_over_time",
    "plot_eigenvalues",
    "plot_eigenvector_mass",
    "plot_landscape",
    "plot_style",
]
