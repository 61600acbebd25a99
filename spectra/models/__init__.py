"""What curvature is taken of: Flax models as pure functions, problems, attention in linear memory."""
