"""Spectral densities: stochastic Lanczos quadrature, Chebyshev moments, smoothing, distances between them."""

from spectra.density.distance import spectral_distances
from spectra.density.kpm import kpm
from spectra.density.slq import slq
from spectra.density.smoothing import spectral_density

__all__ = ["kpm", "slq", "spectral_density", "spectral_distances"]
