"""The whole answer: report, summary, pictures, page, files."""

from spectra.report.spectrum import SpectrumReport, trace_estimate

__all__ = ["SpectrumReport", "trace_estimate"]
