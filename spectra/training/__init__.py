"""Spectra along training: a hook for any training loop."""

from spectra.training.tracker import SpectrumTracker

__all__ = ["SpectrumTracker"]
