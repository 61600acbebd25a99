"""From a quadrature to a smooth density with a band, at no further product."""

import dataclasses

import numpy as np
from numpy.typing import ArrayLike

from spectra.base import trees
from spectra.base.calls import automatic
from spectra.base.errors import SpectraError
from spectra.density import bands
from spectra.density.bands import coupling_of_kernels
from spectra.density.hats import NARROW, kernels, moved_kernels, smooth
from spectra.density.kernels import RELATIVE_WIDTH, Width, peak
from spectra.density.moments import moments_density, points_of
from spectra.quadrature.resolved import Parts
from spectra.results import Density, Moments, Quadrature, as_quadrature
from spectra.results.quadrature import require_one, require_scale

NODES_A_WIDTH = 2.0
"""Default kernel width near zero in units of the typical spacing of Ritz values there."""
NOISE_FLOORS_A_WIDTH = 5.0
"""No kernel is narrower than this many noise floors: rounding scatters the nodes of an atom that far."""
_REACH = 6.0  # kernel widths beyond which its mass, 2e-9, is left out
_PER_WIDTH = 4.0  # grid points a kernel width


@automatic
def spectral_density(
    quadrature: Quadrature | Moments,
    *,
    bandwidth: float | None = None,
    grid: ArrayLike | None = None,
    level: float = 0.95,
) -> Density:
    """Smooth a quadrature to a density that integrates to one, with a simultaneous band.

    p(x) = Σ_ij (w_ij / k) N(x; θ_ij, h(θ_ij)²). By default the width h(t) = η sqrt(t² + s²), with η = 0.05,
    is proportional to the distance from zero and constant below s, which is set by the spacing of the Ritz
    values where most of the mass lies. So features at 1e-3 and at 1e4 are equally wide on the signed-log axis
    on which such spectra are drawn, and the width scales with H. The value at a grid point is the mean of p
    under the hat function of that point, so that the trapezoidal rule gives the mass of p to rounding on any
    grid.

    The band encloses, at its level and for all grid points simultaneously, the density of the exact spectrum
    smoothed by the same kernel. Like that of `Quadrature.cdf` it has two parts: what m steps leave open for
    the probes drawn, which is certain and vanishes once the kernel is wider than the spacing of Ritz values
    (see `spectra.density.discs`), and the known distribution of a probe that is uniform on the sphere. It
    says nothing about a density with a narrower kernel.

    Args:
        quadrature: result of `slq`, or a report that contains it, or the `Moments` of `kpm`. Moments are
            damped by Jackson's kernel, whose width depends on their number.
        bandwidth: constant kernel width in units of the eigenvalues, instead of the default.
        grid: increasing points, shape (g,); default: four points per width, reaching 6 widths beyond the
            ends.
        level: confidence of the band.

    Returns:
        `Density` with grid, density, lower, upper.

    Raises:
        SpectraError: bandwidth not positive, grid not increasing, level not between 0 and 1, nodes that are
            no numbers, or eigenvalues beyond 1e±90.

    References:
        Lin, Saad and Yang, doi:10.1137/130934283.

    Examples:
        >>> import jax, jax.numpy as jnp, spectra
        >>> op = spectra.MatrixOperator(jnp.diag(jnp.linspace(0.0, 1.0, 200)))
        >>> quadrature = spectra.slq(op, key=jax.random.key(0), num_steps=30, num_probes=4)
        >>> round(spectra.spectral_density(quadrature).integral(), 6)
        1.0
    """
    if not 0 < level < 1:
        raise SpectraError(f"level={level} is not between 0 and 1.")
    if isinstance(quadrature, Moments):
        if bandwidth is not None:
            raise SpectraError("the number of moments sets the width of a KPM density: leave out bandwidth.")
        require_scale(quadrature.bounds, "density's band")
        return moments_density(quadrature, grid, level)
    quadrature = as_quadrature(quadrature)
    trees.require_values("spectral_density", quadrature.nodes)
    require_one(quadrature.nodes, "quadratures")
    if not np.isfinite(quadrature.nodes).all():
        raise SpectraError(
            "the quadrature's nodes are NaN or infinite, which have no density. A run inside jit gives NaN "
            "where an operator is not symmetric or its products are no numbers: outside of jit, `slq` says "
            "which."
        )
    scale = linear_scale(quadrature)
    if bandwidth is None:
        widths = _relative_width(scale)
    elif bandwidth > 0 and np.isfinite(bandwidth):
        widths = Width(float(bandwidth))
    else:
        raise SpectraError(f"bandwidth={bandwidth}: use a positive number, or None for the default.")
    grid = _default_grid(np.ravel(quadrature.nodes), widths) if grid is None else points_of(grid)
    parts = quadrature.parts
    moved = quadrature.noise_floor + parts.coupling
    # Atoms have no sampling error: they shift the curve and its band.
    curves: list[tuple[float, tuple[np.ndarray, ...]]] = []
    if parts.rest is not None:
        found = _curves(parts.rest, grid, widths, moved, level, parts)
        curves.append((parts.rest.size / quadrature.size, found))
    if len(parts.atoms):
        found = _known(quadrature, parts.atoms, grid, widths, moved)
        curves.append((len(parts.atoms) / quadrature.size, found))
    lower, density, upper = np.sum([share * np.stack(found) for share, found in curves], axis=0)
    if parts.links is not None:
        more = coupling_of_kernels(quadrature, grid, widths)
        lower, upper = np.maximum(lower - more, 0), upper + more
    outliers, single = _apart(quadrature, widths, grid, density)
    return Density(
        grid=grid,
        density=density,
        lower=lower,
        upper=upper,
        bandwidth=widths(grid),
        linear_scale=float(scale),
        outliers=outliers,
        size=quadrature.size,
        level=level,
        status=quadrature.judged,
        single=single,
    )


def default_points(quadrature: Quadrature) -> tuple[float, np.ndarray, np.ndarray]:
    """What `spectral_density` takes by default: the linear scale, the grid and the kernel's width on it."""
    scale = linear_scale(quadrature)
    widths = _relative_width(scale)
    grid = _default_grid(np.ravel(quadrature.nodes), widths)
    return scale, grid, widths(grid)


def smoothed(quadrature: Quadrature, grid: np.ndarray) -> np.ndarray:
    """The density alone, as `spectral_density` has it on this grid: its band takes nearly all of the time."""
    widths = _relative_width(linear_scale(quadrature))
    rest, atoms = quadrature.parts.rest, quadrature.parts.atoms
    samples = [] if rest is None else [rest]
    if len(atoms):
        samples.append(_of_atoms(quadrature, atoms))
    total = np.zeros(len(grid))
    for part in samples:
        total += part.size / quadrature.size * _curve(part, grid, widths)
    return total


def _curve(quadrature: Quadrature, grid: np.ndarray, widths: Width) -> np.ndarray:
    nodes = np.asarray(quadrature.nodes, np.float64).ravel()
    return smooth(grid, nodes, _masses(quadrature)[None], widths(nodes))[0][0]


def _masses(quadrature: Quadrature) -> np.ndarray:
    """Weights of all nodes, as those of the mean over probes."""
    weights = np.asarray(quadrature.weights, np.float64)
    return (weights / weights.sum(axis=1, keepdims=True) / len(weights)).ravel()


def _of_atoms(quadrature: Quadrature, atoms: np.ndarray) -> Quadrature:
    """Known eigenvalues as a quadrature of their own."""
    atoms = atoms[None]
    return dataclasses.replace(
        quadrature,
        nodes=atoms,
        weights=np.ones_like(atoms),
        residuals=np.zeros_like(atoms),
        lengths=np.array([atoms.size]),
        size=atoms.size,
        asymmetry=np.zeros(1),
        bulk=None,
        atoms=None,
        sketches=None,
    )


def _known(
    quadrature: Quadrature, atoms: np.ndarray, grid: np.ndarray, widths: Width, moved: float
) -> tuple[np.ndarray, ...]:
    """(lower, density, upper) of eigenvalues that are known to within `moved`."""
    if NARROW * moved <= np.min(widths(atoms)):
        return moved_kernels(grid, atoms, widths, moved)
    return _curves(_of_atoms(quadrature, atoms), grid, widths, moved, None)


def _curves(
    quadrature: Quadrature,
    grid: np.ndarray,
    widths: Width,
    moved: float,
    level: float | None,
    parts: Parts | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(lower, density, upper) for what the quadratures leave open, and with a level for what probes do.

    `parts` says what the quadrature is the rest of, if it is.
    """
    nodes = np.asarray(quadrature.nodes, np.float64).ravel()
    h, masses = widths(nodes), _masses(quadrature)
    density = _curve(quadrature, grid, widths)

    def sums(centers: np.ndarray, masses: np.ndarray, h: np.ndarray) -> np.ndarray:
        return smooth(grid, centers, masses, h)[0]

    leak, origin = (parts.leak, parts.origin) if parts else (0.0, None)
    lower, upper = bands.limits(quadrature, grid, widths, density, moved, sums, origin)
    highest = peak(grid, widths)
    lower, upper = np.maximum(lower - leak * highest, 0), np.minimum(upper + leak * highest, highest)
    upper = np.maximum(upper, density)
    if level is not None:
        num_tests = float(np.sum(np.diff(grid) / widths(grid[1:])))  # kernel widths on the grid
        tail = bands.bonferroni(level, num_tests)
        limit = bands.ShareLimit(quadrature.size, quadrature.num_probes, tail)
        unseen, found = (upper - density) / highest, np.zeros((3, len(grid)))
        for target, near, kernel in kernels(grid, nodes, h):
            seen = kernel, masses[near], unseen[target], highest[target]
            found[:, target] = bands.typical_kernels(*seen, limit)
        below, above = upper, found[2]
        lower, upper = bands.sampling_band(lower, upper, found[:2], limit)
        upper = np.maximum(np.minimum(upper, above), below)
    return lower, density, upper


def linear_scale(quadrature: Quadrature) -> float:
    """|eigenvalue| below which the default width is constant: NODES_A_WIDTH * spacing / η.

    The spacing is the median, by weight, of the distance between neighbouring nodes, or of a node's
    residual where that is smaller: an isolated node that has converged is as sharp as it looks.
    """
    spacings: list[np.ndarray] = []
    shares: list[np.ndarray] = []
    for nodes, weights, residuals, length in zip(
        np.asarray(quadrature.nodes, np.float64),
        np.asarray(quadrature.weights, np.float64),
        np.asarray(quadrature.residuals, np.float64),
        np.asarray(quadrature.lengths, int).tolist(),
        strict=True,
    ):
        gaps = np.gradient(nodes[:length]) if length > 1 else np.zeros(length)
        spacings.append(np.minimum(gaps, residuals[:length]))
        shares.append(weights[:length])
    spacing, weight = np.concatenate(spacings), np.concatenate(shares)
    order = np.argsort(spacing)
    middle = int(np.searchsorted(np.cumsum(weight[order]), float(weight.sum()) / 2))
    typical = spacing[order][min(middle, len(order) - 1)]
    noise = NOISE_FLOORS_A_WIDTH * quadrature.noise_floor / RELATIVE_WIDTH
    if typical > 0:
        return max(NODES_A_WIDTH * typical / RELATIVE_WIDTH, noise)
    # Most of the mass sits on exact atoms: stay well below the smallest that is not zero.
    sizes = np.abs(np.asarray(quadrature.nodes))
    sizes = sizes[sizes > noise]
    return max(1e-3 * sizes.min(), noise) if sizes.size else 1.0  # {0} has no scale of its own


def _relative_width(scale: float) -> Width:
    return Width(RELATIVE_WIDTH * scale, RELATIVE_WIDTH)


def _default_grid(centers: np.ndarray, widths: Width) -> np.ndarray:
    """Points a quarter of a width apart within reach of some node, found by walking from node to node."""
    pieces: list[float] = []
    end = -np.inf
    for center in np.unique(centers):
        h = float(widths(center))
        start, stop = max(center - _REACH * h, end), center + _REACH * h
        if stop <= end:
            continue
        x = start
        while x < stop:
            pieces.append(x)
            x += float(widths(np.clip(x, center - _REACH * h, stop))) / _PER_WIDTH
        end = x
    pieces.append(end)
    grid = np.unique(np.array(pieces))
    return grid[np.concatenate([[True], np.diff(grid) > 0])]


_BULK = 5.0  # eigenvalues within a kernel's width: where that many are, none of them is an outlier


def _apart(
    quadrature: Quadrature, widths: Width, grid: np.ndarray, density: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues that stand alone, where the curve is no bulk of many, and which are known one by one.

    A node of every probe may be a repeated eigenvalue as well: that it is none, only `resolved` tells.
    """
    known, found = np.asarray(quadrature.resolved), resolved_outliers(quadrature)
    if len(known):
        found = found[np.abs(found[:, None] - known).min(axis=1) > 0.1 * widths(found)]
    outliers = np.append(known, found)
    order = np.argsort(outliers, kind="stable")
    outliers, single = outliers[order], (np.arange(len(outliers)) < len(known))[order]
    one = 1 / (quadrature.size * widths(outliers) * np.sqrt(2 * np.pi))
    shown = np.interp(outliers, grid, density) <= _BULK * one
    return outliers[shown], single[shown]


def resolved_outliers(quadrature: Quadrature, *, share: float = 0.01) -> np.ndarray:
    """Eigenvalues that every probe resolves one by one, from both ends of the spectrum inwards.

    A node counts while its residual is below 1 % of the distance to its neighbour further in and its
    weight below `share`; the value is the mean over probes.
    """
    nodes, weights = np.asarray(quadrature.nodes), np.asarray(quadrature.weights)
    residuals, lengths = np.asarray(quadrature.residuals), np.asarray(quadrature.lengths, int).tolist()
    found: list[float] = []
    for from_top in (True, False):
        counts: list[int] = []
        columns: list[np.ndarray] = []
        for theta, w, r, length in zip(nodes, weights, residuals, lengths, strict=True):
            order = np.arange(int(length))[:: -1 if from_top else 1]
            theta, w, r = theta[order], w[order], r[order]
            gap = np.abs(np.diff(theta))
            good = (r[:-1] <= 0.01 * gap) & (w[:-1] <= share)
            counts.append(int(np.argmin(np.append(good, False))))
            columns.append(theta)
        for j in range(min(min(counts), min(lengths) - len(found))):  # none from both ends
            values = np.array([column[j] for column in columns])
            if np.ptp(values) > 0.01 * abs(np.mean(values)):
                break  # probes disagree on which eigenvalue is next
            found.append(values.mean())
    return np.sort(np.array(found, np.float64))
