"""Spectra of the curvature of neural networks, with an error bar on every number.

An operator multiplies a vector by a curvature matrix without forming it; Lanczos and quadrature turn a
few hundred such products into the full eigenvalue density. With n parameters θ, the Hessian is
H = ∇²L(θ), a vector is a pytree like θ, and eigenvalues are in units of the loss over units of θ squared.
"""

from spectra._errors import (
    DataError,
    DifferentiationError,
    MemoryLimitError,
    NonFiniteError,
    NotSymmetricError,
    ResultFileError,
    SpectraError,
    StructureError,
)
from spectra._status import Status
from spectra.density import kpm, slq, spectral_density
from spectra.estimators import (
    count_above,
    diagonal,
    effective_dimension,
    frobenius_norm,
    logdet,
    model_trace,
    negative_share,
    trace,
    trace_of,
)
from spectra.io import load, save
from spectra.krylov.lanczos import lanczos
from spectra.krylov.plan import plan
from spectra.operators.base import LinearOperator
from spectra.operators.function import FunctionOperator, MatrixOperator
from spectra.operators.hessian import HessianOperator
from spectra.plotting import plot_density, plot_eigenvalues
from spectra.problem import Problem
from spectra.report import SpectrumReport, spectrum
from spectra.results import Density, Estimate, Interval, Moments, Plan, Quadrature, Tridiagonal

__all__ = [
    "DataError",
    "Density",
    "DifferentiationError",
    "Estimate",
    "FunctionOperator",
    "HessianOperator",
    "Interval",
    "LinearOperator",
    "MatrixOperator",
    "MemoryLimitError",
    "Moments",
    "NonFiniteError",
    "NotSymmetricError",
    "Plan",
    "Problem",
    "Quadrature",
    "ResultFileError",
    "SpectraError",
    "SpectrumReport",
    "Status",
    "StructureError",
    "Tridiagonal",
    "count_above",
    "diagonal",
    "effective_dimension",
    "frobenius_norm",
    "kpm",
    "lanczos",
    "load",
    "logdet",
    "model_trace",
    "negative_share",
    "plan",
    "plot_density",
    "plot_eigenvalues",
    "save",
    "slq",
    "spectral_density",
    "spectrum",
    "trace",
    "trace_of",
]
