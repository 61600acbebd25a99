"""What a finite number of probes leaves open in a mean over quadratures."""

import numpy as np


def sampling_error(weights: np.ndarray, values: np.ndarray, size: int) -> tuple[float, float | None]:
    """Standard error of n times the mean of Σ_j w_j f(θ_j) over rows, and its degrees of freedom.

    For v uniform on the sphere Var vᵀf(H)v = 2 (mean g²) / (n + 2) with g = f - mean f, the means over all
    eigenvalues, which the quadrature estimates. The estimate of mean g² is Σ g_i² χ²_1 / (n k) nearly, whose
    degrees of freedom are k (Σ g²)² / Σ g⁴ (Satterthwaite): at least k, whatever the spectrum, which an
    estimate of them from few probes need not be. None where f is constant.

    Args:
        weights: (k, m), rows sum to one.
        values: (k, m), f at the nodes.
        size: n.
    """
    k = len(weights)
    mean = np.sum(weights * values) / k
    largest = np.max(np.abs(values - mean), initial=0.0, where=weights > 0)
    if largest == 0:
        return 0.0, None
    g = (
        values - mean
    ) / largest  # squares of the smallest and of the largest numbers do not under- or overflow
    square, fourth = (float(np.sum(weights * g**p) / k) for p in (2, 4))
    stderr = size * largest * np.sqrt(2 * square / (size + 2) / k)
    return float(stderr), float(max(k, k * size * square**2 / fourth)) if fourth > 0 else float(k)
