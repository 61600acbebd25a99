"""Spectra of the curvature of neural networks, with an error bar on every number.

An operator multiplies a vector by a curvature matrix without forming it; Lanczos and quadrature turn a
few hundred such products into the full eigenvalue density. With n parameters θ, the Hessian is
H = ∇²L(θ), a vector is a pytree like θ, and eigenvalues are in units of the loss over units of θ squared.
"""

from spectra import bridge
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
from spectra.bridge import TorchModel, from_torch
from spectra.density import slq, spectral_density, spectral_distances
from spectra.io import load, save
from spectra.krylov.lanczos import lanczos
from spectra.krylov.plan import plan
from spectra.models import linen_model, nnx_model
from spectra.operators.base import LinearOperator
from spectra.operators.covariance import GradientCovarianceOperator
from spectra.operators.fisher import FisherOperator
from spectra.operators.function import FunctionOperator, MatrixOperator
from spectra.operators.ggn import GGNOperator
from spectra.operators.hessian import HessianOperator
from spectra.plotting import plot_blocks, plot_density, plot_eigenvalues
from spectra.problem import Problem
from spectra.report import SpectrumReport, spectrum
from spectra.results import Density, Estimate, Interval, Plan, Quadrature, Tridiagonal
from spectra.variability import DataVariability, data_variability

__all__ = [
    "DataError",
    "DataVariability",
    "Density",
    "DifferentiationError",
    "Estimate",
    "FisherOperator",
    "FunctionOperator",
    "GGNOperator",
    "GradientCovarianceOperator",
    "HessianOperator",
    "Interval",
    "LinearOperator",
    "MatrixOperator",
    "MemoryLimitError",
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
    "TorchModel",
    "Tridiagonal",
    "bridge",
    "data_variability",
    "from_torch",
    "lanczos",
    "linen_model",
    "load",
    "nnx_model",
    "plan",
    "plot_blocks",
    "plot_density",
    "plot_eigenvalues",
    "save",
    "slq",
    "spectral_density",
    "spectral_distances",
    "spectrum",
]
