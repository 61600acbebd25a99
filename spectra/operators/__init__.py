"""Curvature matrices as symmetric linear operators on pytrees."""
