"""Faults planted in a copy of the package, to see which tests notice: `python -m tests.mutants`."""
