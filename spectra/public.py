"""All public names: what `spectra.NAME` finds, declared here and nowhere else."""

from spectra import bridge, distributed
from spectra.base.errors import (
    CheckpointError,
    DataError,
    DifferentiationError,
    MemoryLimitError,
    NonFiniteError,
    NotSymmetricError,
    PreemptedError,
    ResultFileError,
    SpectraError,
    Status,
    StructureError,
)
from spectra.bridge import TorchModel, from_torch
from spectra.density.distance import spectral_distances
from spectra.density.kpm import kpm
from spectra.density.slq import slq
from spectra.density.smoothing import spectral_density
from spectra.estimators.classes import class_split
from spectra.estimators.comparison import compare_operators
from spectra.estimators.condition import condition_number
from spectra.estimators.counts import count_above, negative_share
from spectra.estimators.diagonal import diagonal
from spectra.estimators.frobenius import frobenius_norm
from spectra.estimators.functions import trace_of
from spectra.estimators.landscape import loss_slice
from spectra.estimators.perturbation import perturbation, pruning_deltas, rounding_deltas
from spectra.estimators.population import population
from spectra.estimators.spectral_sums import effective_dimension, logdet
from spectra.estimators.trace import model_trace, trace
from spectra.krylov.eigsh import eigsh
from spectra.krylov.funm import funm
from spectra.krylov.lanczos import LanczosIteration, lanczos
from spectra.krylov.plan import plan
from spectra.krylov.solve import solve
from spectra.krylov.svds import svds
from spectra.models.attention import attention
from spectra.models.flax import linen_model, nnx_model
from spectra.models.problem import Problem
from spectra.operators.base import LinearOperator
from spectra.operators.classes import class_operators
from spectra.operators.covariance import GradientCovarianceOperator
from spectra.operators.dense import DiagonalOperator, FunctionOperator, LowRankOperator, MatrixOperator
from spectra.operators.fisher import FisherOperator
from spectra.operators.ggn import GGNOperator
from spectra.operators.hessian import HessianOperator, dense_hessian
from spectra.operators.jacobian import JacobianOperator
from spectra.operators.kfac import EKFACOperator, KFACOperator
from spectra.operators.kronecker_product import KroneckerOperator
from spectra.operators.preconditioned import PreconditionedOperator
from spectra.operators.tangent_kernel import TangentKernelOperator
from spectra.operators.vocabulary import VocabularyLoss
from spectra.report.files import load, save
from spectra.report.page import write_report
from spectra.report.plots.blocks import plot_blocks
from spectra.report.plots.density import plot_comparison, plot_density
from spectra.report.plots.eigenvalues import plot_cdf, plot_eigenvalues, plot_eigenvector_mass
from spectra.report.plots.history import plot_density_over_time
from spectra.report.plots.landscape import plot_landscape
from spectra.report.plots.style import plot_style
from spectra.report.spectrum import SpectrumReport, spectrum
from spectra.report.summary import Summary, summary
from spectra.report.variability import DataVariability, data_variability
from spectra.results import (
    ClassSplit,
    ConditionNumber,
    Density,
    Eigenpairs,
    Estimate,
    FunctionProduct,
    GradientOverlap,
    Interval,
    LayerConditions,
    LossSlice,
    Moments,
    NoiseScale,
    OperatorComparison,
    Perturbation,
    Plan,
    Population,
    Quadrature,
    Sharpness,
    SingularTriplets,
    Snapshot,
    Solution,
    SpectrumHistory,
    StableStep,
    StepQuality,
    Tridiagonal,
)
from spectra.runs.checkpoint import Checkpoint
from spectra.training.noise import gradient_noise_scale
from spectra.training.sharpness import critical_sharpness
from spectra.training.stability import stable_step
from spectra.training.steps import gradient_overlap, step_quality
from spectra.training.tracker import SpectrumTracker

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "ClassSplit",
    "ConditionNumber",
    "DataError",
    "DataVariability",
    "Density",
    "DiagonalOperator",
    "DifferentiationError",
    "EKFACOperator",
    "Eigenpairs",
    "Estimate",
    "FisherOperator",
    "FunctionOperator",
    "FunctionProduct",
    "GGNOperator",
    "GradientCovarianceOperator",
    "GradientOverlap",
    "HessianOperator",
    "Interval",
    "JacobianOperator",
    "KFACOperator",
    "KroneckerOperator",
    "LanczosIteration",
    "LayerConditions",
    "LinearOperator",
    "LossSlice",
    "LowRankOperator",
    "MatrixOperator",
    "MemoryLimitError",
    "Moments",
    "NoiseScale",
    "NonFiniteError",
    "NotSymmetricError",
    "OperatorComparison",
    "Perturbation",
    "Plan",
    "Population",
    "PreconditionedOperator",
    "PreemptedError",
    "Problem",
    "Quadrature",
    "ResultFileError",
    "Sharpness",
    "SingularTriplets",
    "Snapshot",
    "Solution",
    "SpectraError",
    "SpectrumHistory",
    "SpectrumReport",
    "SpectrumTracker",
    "StableStep",
    "Status",
    "StepQuality",
    "StructureError",
    "Summary",
    "TangentKernelOperator",
    "TorchModel",
    "Tridiagonal",
    "VocabularyLoss",
    "attention",
    "bridge",
    "class_operators",
    "class_split",
    "compare_operators",
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
    "gradient_noise_scale",
    "gradient_overlap",
    "kpm",
    "lanczos",
    "linen_model",
    "load",
    "logdet",
    "loss_slice",
    "model_trace",
    "negative_share",
    "nnx_model",
    "perturbation",
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
    "population",
    "pruning_deltas",
    "rounding_deltas",
    "save",
    "slq",
    "solve",
    "spectral_density",
    "spectral_distances",
    "spectrum",
    "stable_step",
    "step_quality",
    "summary",
    "svds",
    "trace",
    "trace_of",
    "write_report",
]
