"""Pictures of results. Functions take a result and optionally an Axes, and return the Axes."""
