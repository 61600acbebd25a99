"""Whether every stated number holds: intervals, brackets and bounds on spectra that are known."""
