"""Numbers that summarise a spectrum: traces, diagonals, functions, condition numbers, each with its error."""
