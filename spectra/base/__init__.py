"""What everything stands on: errors, vectors as pytrees, meshes, the host, files.

The words below are those that an argument is one of, which the command line shows without importing JAX.
"""

GROUPINGS = ("leaf", "layer")
"""What diagonal blocks are made of."""
OPERATORS = ("hessian", "ggn", "fisher", "mc-fisher", "empirical-fisher", "covariance")
"""Curvature matrices of a `Problem`."""
PLACES = ("inherit", "sharded", "host", "none")
"""Where basis vectors lie."""
