"""The command line."""

from spectra.cli.commands import app, main

__all__ = ["app", "main"]
