"""A result as one self-contained page."""

from spectra.page.document import write_report

__all__ = ["write_report"]
