"""Spectra along training: a hook for any training loop, and curvature as an optimizer feels it."""

from spectra.operators.preconditioned import PreconditionedOperator
from spectra.training.noise import gradient_noise_scale
from spectra.training.sharpness import critical_sharpness
from spectra.training.stability import stable_step
from spectra.training.steps import gradient_overlap, step_quality
from spectra.training.tracker import SpectrumTracker

__all__ = [
    "PreconditionedOperator",
    "SpectrumTracker",
    "critical_sharpness",
    "gradient_noise_scale",
    "gradient_overlap",
    "stable_step",
    "step_quality",
]
