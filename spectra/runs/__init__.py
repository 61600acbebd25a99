"""Runs that survive: what identifies them, and what is kept of them on disk."""
