"""Traces, diagonals and functions of an operator, each with its error."""

from spectra.estimators.diagonal import diagonal
from spectra.estimators.trace import frobenius_norm, model_trace, trace

__all__ = ["diagonal", "frobenius_norm", "model_trace", "trace"]
