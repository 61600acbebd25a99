"""Spectra along training: a hook for any training loop, and curvature as an optimizer feels it."""
