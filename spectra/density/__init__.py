"""Spectral densities: stochastic Lanczos quadrature, smoothing, and distances between them."""

from spectra.density.distance import spectral_distances
from spectra.density.slq import slq
from spectra.density.smoothing import spectral_density

__all__ = ["slq", "spectral_density", "spectral_distances"]
