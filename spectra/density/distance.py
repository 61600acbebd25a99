"""How far apart spectra are, as distributions of eigenvalues."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spectra.base import trees
from spectra.base.calls import checked
from spectra.base.errors import SpectraError
from spectra.density.smoothing import linear_scale
from spectra.results import Quadrature, as_quadrature, by_name

METRICS = ("jensen-shannon", "wasserstein")
WIDTH = 0.1
"""Kernel width on the signed-log axis: spectra that differ by 10 % in scale count as nearly equal."""
_REACH = 6.0
_PER_WIDTH = 4.0


@checked
def spectral_distances(
    quadratures: Mapping[str, Any] | Sequence[Any], *, metric: str = "jensen-shannon", normalize: bool = False
) -> np.ndarray:
    """Compute distances between the eigenvalue distributions of several operators, on a signed-log axis.

    "jensen-shannon": d(p, q) = sqrt(KL(p | m)/2 + KL(q | m)/2) with m = (p + q)/2 and logarithms to base
    2: 0 for equal distributions, 1 for distributions that do not overlap. The distributions are those of
    asinh(λ / s), smoothed by a Gaussian of width 0.1; s is the median over operators of the scale below
    which their spectra are not resolved, so differences between narrower bulks are not visible: use more
    Lanczos steps, or deflate the outliers.

    "wasserstein": the mean distance on that axis by which one distribution must be moved to become the other.
    It needs no smoothing, and s is the median root mean square eigenvalue. Far from zero, the unit is a
    factor of e: the distance is 1 if one spectrum is e times the other.

    Args:
        quadratures: results of `slq` by name, such as one per block, or a list; or reports that contain them.
        metric: "jensen-shannon" or "wasserstein".
        normalize: compare shapes only: divide every spectrum by its largest |eigenvalue| first.

    Returns:
        (b, b) symmetric array with zero diagonal, in the order of the mapping.

    Raises:
        SpectraError: fewer than two spectra, or an unknown metric.

    References:
        Zhang et al., Why Transformers Need Adam: A Hessian Perspective, arXiv:2402.16788, section 3.

    Examples:
        >>> import jax, jax.numpy as jnp, spectra
        >>> ops = {name: spectra.MatrixOperator(jnp.diag(scale * jnp.linspace(1.0, 2.0, 50)))
        ...        for name, scale in (("a", 1.0), ("b", 1.0), ("c", 100.0))}
        >>> distances = spectra.spectral_distances(spectra.slq(ops, key=jax.random.key(0)))
        >>> bool(distances[0, 1] < 0.1), bool(distances[0, 2] > 0.99)
        (True, True)
    """
    spectra = [as_quadrature(held) for held in by_name(quadratures).values()]
    if len(spectra) < 2:
        raise SpectraError("distances need at least two spectra: pass a mapping or a list of them.")
    trees.require_values("spectral_distances", spectra)
    if metric not in METRICS:
        raise SpectraError(f"metric={metric!r}: use one of {METRICS}.")
    units = [max(map(abs, q.range)) or 1.0 if normalize else 1.0 for q in spectra]
    typical = linear_scale if metric == "jensen-shannon" else _root_mean_square
    scale = float(np.median([typical(q) / unit for q, unit in zip(spectra, units, strict=True)])) or 1.0
    found = [q.parts.measure() for q in spectra]  # eigenvalues that are known have their share for certain
    places = [np.arcsinh(x / u / scale) for (x, _), u in zip(found, units, strict=True)]
    pairs = list(zip(places, (w for _, w in found), strict=True))
    if metric == "wasserstein":
        return np.array([[_wasserstein(*p, *q) for q in pairs] for p in pairs])
    low = min(x.min() for x in places) - _REACH * WIDTH
    high = max(x.max() for x in places) + _REACH * WIDTH
    edges = np.arange(low, high + WIDTH / _PER_WIDTH, WIDTH / _PER_WIDTH)
    masses = [_masses(edges, *pair) for pair in pairs]
    return np.array([[_jensen_shannon(p, q) for q in masses] for p in masses])


def _root_mean_square(quadrature: Quadrature) -> float:
    return float(np.sqrt(quadrature.mean(np.square)))


def _wasserstein(x: np.ndarray, p: np.ndarray, y: np.ndarray, q: np.ndarray) -> float:
    from scipy.stats import wasserstein_distance

    return float(wasserstein_distance(x, y, p, q))


def _masses(edges: np.ndarray, centers: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share of the smoothed distribution in each cell between edges."""
    from scipy.special import ndtr

    cdf = ndtr((edges[:, None] - centers) / WIDTH) @ weights
    mass = np.clip(np.diff(cdf), 0, None)
    return mass / mass.sum()


def _jensen_shannon(p: np.ndarray, q: np.ndarray) -> float:
    from scipy.special import rel_entr

    middle = (p + q) / 2
    divergence = (rel_entr(p, middle).sum() + rel_entr(q, middle).sum()) / 2 / np.log(2)
    return float(np.sqrt(max(divergence, 0.0)))
