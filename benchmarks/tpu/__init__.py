"""Lanczos on TPU pods, by the real compiler and without a chip; see `python -m benchmarks.tpu --help`."""
