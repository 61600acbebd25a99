"""Lanczos on NVIDIA GPUs, by the real compiler and without a card; see `python -m benchmarks.gpu --help`."""
