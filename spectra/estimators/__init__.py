"""Numbers that summarise a spectrum."""
