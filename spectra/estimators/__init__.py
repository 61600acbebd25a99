"""Numbers that summarise a spectrum: traces, diagonals, functions, condition numbers, each with its error."""

from spectra.estimators.classes import class_split
from spectra.estimators.compression import pruning_deltas, rounding_deltas
from spectra.estimators.condition import condition_number
from spectra.estimators.counts import count_above, negative_share
from spectra.estimators.diagonal import diagonal
from spectra.estimators.frobenius import frobenius_norm
from spectra.estimators.functions import effective_dimension, logdet, trace_of
from spectra.estimators.landscape import loss_slice
from spectra.estimators.perturbation import perturbation
from spectra.estimators.population import population
from spectra.estimators.trace import model_trace, trace

__all__ = [
    "class_split",
    "condition_number",
    "count_above",
    "diagonal",
    "effective_dimension",
    "frobenius_norm",
    "logdet",
    "loss_slice",
    "model_trace",
    "negative_share",
    "perturbation",
    "population",
    "pruning_deltas",
    "rounding_deltas",
    "trace",
    "trace_of",
]
