"""Spectral densities: stochastic Lanczos quadrature, Chebyshev moments, smoothing, distances between them."""
