"""What computations return: frozen dataclasses that are pytrees, with the shape of each field beside it.

Arrays are JAX arrays inside `jit` and NumPy float64 arrays outside, where the small eigenproblems are
solved on the host.
"""

from spectra.results.base import Array, Interval, Named, Result, notebook_view, plain, provides, result, worst
from spectra.results.conditions import ClassSplit, ConditionNumber, LayerConditions, OperatorComparison
from spectra.results.estimates import Estimate, NoiseScale, Population
from spectra.results.history import Snapshot, SpectrumHistory
from spectra.results.krylov import Eigenpairs, FunctionProduct, SingularTriplets, Solution, Tridiagonal
from spectra.results.landscape import LossSlice, Perturbation
from spectra.results.plan import Plan
from spectra.results.quadrature import (
    Density,
    Moments,
    Quadrature,
    as_quadrature,
    as_spectrum,
    by_name,
    called,
)
from spectra.results.steps import GradientOverlap, Sharpness, StableStep, StepQuality
from spectra.results.text import format_bytes, html_grid, html_table, text_grid, text_table

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
    "SingularTriplets",
    "Snapshot",
    "Solution",
    "SpectrumHistory",
    "StableStep",
    "StepQuality",
    "Tridiagonal",
    "as_quadrature",
    "as_spectrum",
    "by_name",
    "called",
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
