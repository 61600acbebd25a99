"""Limits for means and for ratios of means, where what is averaged may be skewed."""

import math

import numpy as np


def skewed_t(t: float, skewness: float, count: float, up: bool) -> float:
    """Student's t with what skewness adds to one side (Johnson, doi:10.1080/01621459.1978.10480051).

    The mean of numbers skewed upwards lies too low more often than Student's law says, and its error is then
    estimated too small: the upper limit needs more. What the other one needs less is not taken off.
    """
    longer = max(skewness if up else -skewness, 0.0)
    return t + longer * (1 + 2 * t**2) / (6 * math.sqrt(count))


def skewness(values: np.ndarray) -> float:
    """Of values with mean zero; 0 where there is no spread."""
    spread = float(np.sqrt(np.mean(values**2)))
    return float(np.mean((values / spread) ** 3)) if spread > 0 else 0.0


def fieller(top: float, bottom: float, covariance: np.ndarray, t: float, *, up: bool) -> float:
    """The smaller or the larger r >= 0 with (top - r bottom)² = t² Var(top - r bottom).

    Infinite above where `bottom` is within its error, 0 below where `top` is (Fieller,
    doi:10.1111/j.2517-6161.1954.tb00159.x).
    """
    (tt, tb), (_, bb) = np.asarray(covariance, float) * t**2
    a, b, c = bottom**2 - bb, top * bottom - tb, top**2 - tt
    root = math.sqrt(max(b * b - a * c, 0.0))
    if up:
        return (b + root) / a if a > 0 and bottom > 0 else math.inf
    if c <= 0 or b * b < a * c or top <= 0:
        return 0.0
    return c / (b + root) if b + root > 0 else 0.0
