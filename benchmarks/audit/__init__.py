"""Whether every stated number holds: coverage and width of intervals, violations of bounds, on known spectra."""
