"""Spectral densities: stochastic Lanczos quadrature and smoothing."""

from spectra.density.slq import slq
from spectra.density.smoothing import spectral_density

__all__ = ["slq", "spectral_density"]
