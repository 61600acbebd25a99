"""Distances of distributions."""

from typing import Any

from numpy.typing import ArrayLike

def wasserstein_distance(
    u_values: ArrayLike,
    v_values: ArrayLike,
    u_weights: ArrayLike | None = ...,
    v_weights: ArrayLike | None = ...,
) -> float: ...
def __getattr__(name: str) -> Any: ...
