"""Spectra along training: a hook for any training loop, and curvature as an adaptive optimizer feels it."""

from spectra.operators.preconditioned import PreconditionedOperator
from spectra.training.tracker import SpectrumTracker

__all__ = ["PreconditionedOperator", "SpectrumTracker"]
