"""Programs of the package compiled ahead of time for hardware that is not there, and what they move.

`benchmarks.tpu` and `benchmarks.gpu` name the hardware, the cases and the page.
"""
