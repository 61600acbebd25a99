"""A result as one self-contained page."""

from spectra.page.document import page_path, write_report

__all__ = ["page_path", "write_report"]
