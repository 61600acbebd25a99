"""A result as one self-contained page, and a page that follows runs."""

from spectra.page.document import page_path, write_report
from spectra.page.live import LivePage, serve

__all__ = ["LivePage", "page_path", "serve", "write_report"]
