"""Spectra of the curvature of neural networks, with an error bar on every number.

An operator multiplies a vector by a curvature matrix without forming it; Lanczos and quadrature turn a
few hundred such products into the full eigenvalue density. With n parameters θ, the Hessian is
H = ∇²L(θ), a vector is a pytree like θ, and eigenvalues are in units of the loss over units of θ squared.
"""

from spectra import bridge, distributed
from spectra._attention import attention
from spectra._errors import (
    CheckpointError,
    DataError,
    DifferentiationError,
    MemoryLimitError,
    NonFiniteError,
    NotSymmetricError,
    PreemptedError,
    ResultFileError,
    SpectraError,
    StructureError,
)
from spectra._status import Status
from spectra._summary import Summary, summary
from spectra.bridge import TorchModel, from_torch
from spectra.checkpoint import Checkpoint
from spectra.density import kpm, slq, spectral_density, spectral_distances
from spectra.estimators import (
    condition_number,
    count_above,
    diagonal,
    effective_dimension,
    frobenius_norm,
    logdet,
    loss_slice,
    model_trace,
    negative_share,
    trace,
    trace_of,
)
from spectra.io import load, save
from spectra.krylov.eigsh import eigsh
from spectra.krylov.funm import funm
from spectra.krylov.lanczos import lanczos
from spectra.krylov.plan import plan
from spectra.krylov.solve import solve
from spectra.models import linen_model, nnx_model
from spectra.operators.base import LinearOperator
from spectra.operators.covariance import GradientCovarianceOperator
from spectra.operators.dense import dense_hessian
from spectra.operators.fisher import FisherOperator
from spectra.operators.function import FunctionOperator, MatrixOperator
from spectra.operators.ggn import GGNOperator
from spectra.operators.hessian import HessianOperator
from spectra.operators.preconditioned import PreconditionedOperator
from spectra.page import write_report
from spectra.plotting import (
    plot_blocks,
    plot_cdf,
    plot_comparison,
    plot_density,
    plot_density_over_time,
    plot_eigenvalues,
    plot_eigenvector_mass,
    plot_landscape,
    plot_style,
)
from spectra.problem import Problem
from spectra.report import SpectrumReport, spectrum
from spectra.results import (
    ConditionNumber,
    Density,
    Eigenpairs,
    Estimate,
    FunctionProduct,
    Interval,
    LayerConditions,
    LossSlice,
    Moments,
    Plan,
    Quadrature,
    Sharpness,
    Snapshot,
    Solution,
    SpectrumHistory,
    Tridiagonal,
)
from spectra.training import SpectrumTracker, critical_sharpness
from spectra.variability import DataVariability, data_variability

__version__ = "0.1.0"

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "ConditionNumber",
    "DataError",
    "DataVariability",
    "Density",
    "DifferentiationError",
    "Eigenpairs",
    "Estimate",
    "FisherOperator",
    "FunctionOperator",
    "FunctionProduct",
    "GGNOperator",
    "GradientCovarianceOperator",
    "HessianOperator",
    "Interval",
    "LayerConditions",
    "LinearOperator",
    "LossSlice",
    "MatrixOperator",
    "MemoryLimitError",
    "Moments",
    "NonFiniteError",
    "NotSymmetricError",
    "Plan",
    "PreconditionedOperator",
    "PreemptedError",
    "Problem",
    "Quadrature",
    "ResultFileError",
    "Sharpness",
    "Snapshot",
    "Solution",
    "SpectraError",
    "SpectrumHistory",
    "SpectrumReport",
    "SpectrumTracker",
    "Status",
    "StructureError",
    "Summary",
    "TorchModel",
    "Tridiagonal",
    "attention",
    "bridge",
    "condition_number",
    "count_above",
    "critical_sharpness",
    "data_variability",
    "dense_hessian",
    "diagonal",
    "distributed",
    "effective_dimension",
    "eigsh",
    "frobenius_norm",
    "from_torch",
    "funm",
    "kpm",
    "lanczos",
    "linen_model",
    "load",
    "logdet",
    "loss_slice",
    "model_trace",
    "negative_share",
    "nnx_model",
    "plan",
    "plot_blocks",
    "plot_cdf",
    "plot_comparison",
    "plot_density",
    "plot_density_over_time",
    "plot_eigenvalues",
    "plot_eigenvector_mass",
    "plot_landscape",
    "plot_style",
    "save",
    "slq",
    "solve",
    "spectral_density",
    "spectral_distances",
    "spectrum",
    "summary",
    "trace",
    "trace_of",
    "write_report",
]
