"""Complete problems on real data that need no download."""
