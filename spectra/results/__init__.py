"""What computations return: frozen dataclasses that are pytrees, with the shape of each field beside it.

Arrays are JAX arrays inside `jit` and NumPy float64 arrays outside, where the small eigenproblems are
solved on the host.
"""

from spectra.results._base import (
    Array,
    Interval,
    Named,
    Result,
    format_bytes,
    html_grid,
    html_table,
    notebook_view,
    provides,
    result,
    text_grid,
    text_table,
    worst,
)
from spectra.results._held import as_quadrature, as_spectrum, by_name
from spectra.results._plain import plain
from spectra.results.classes import ClassSplit
from spectra.results.comparison import OperatorComparison
from spectra.results.conditions import ConditionNumber, LayerConditions
from spectra.results.density import Density
from spectra.results.estimates import Estimate
from spectra.results.history import Snapshot, SpectrumHistory
from spectra.results.krylov import Eigenpairs, Tridiagonal
from spectra.results.landscape import LossSlice
from spectra.results.noise import NoiseScale
from spectra.results.perturbation import Perturbation
from spectra.results.plans import Plan
from spectra.results.population import Population
from spectra.results.quadrature import Moments, Quadrature
from spectra.results.sharpness import Sharpness
from spectra.results.solutions import FunctionProduct, Solution
from spectra.results.steps import GradientOverlap, StableStep, StepQuality

__all__ = [
    "Array",
    "ClassSplit",
    "ConditionNumber",
    "Density",
    "Eigenpairs",
    "Estimate",
    "FunctionProduct",
    "GradientOverlap",
    "Interval",
    "LayerConditions",
    "LossSlice",
    "Moments",
    "Named",
    "NoiseScale",
    "OperatorComparison",
    "Perturbation",
    "Plan",
    "Population",
    "Quadrature",
    "Result",
    "Sharpness",
    "Snapshot",
    "Solution",
    "SpectrumHistory",
    "StableStep",
    "StepQuality",
    "Tridiagonal",
    "as_quadrature",
    "as_spectrum",
    "by_name",
    "format_bytes",
    "html_grid",
    "html_table",
    "notebook_view",
    "plain",
    "provides",
    "result",
    "text_grid",
    "text_table",
    "worst",
]
