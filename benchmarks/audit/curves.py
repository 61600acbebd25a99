"""Bands that hold for whole curves: the distribution of eigenvalues, and their smoothed density."""

from collections.abc import Callable

import jax
import numpy as np
from scipy.stats import norm

import spectra
from benchmarks.audit import left_open
from benchmarks.audit.matrices import Case
from benchmarks.audit.statements import BARE, QUADRATURES, Curves, Statement, from_keys
from spectra.density.hats import smooth
from spectra.density.kernels import RELATIVE_WIDTH

NEGLIGIBLE = 1e-9
"""Of the largest density: the kernel is cut off where its mass is as small."""
NOTHING = 0.01  # of the density: what is open at a point, but does not count as such
LEVEL = 0.95


def cdf(case: Case, quadrature: spectra.Quadrature) -> tuple[bool, float]:
    """Whether the band of the CDF holds at every jump of the truth, which is known to the noise floor."""
    values, floor = case.eigenvalues, quadrature.noise_floor

    def truth(x):
        return np.searchsorted(values, x, side="right") / case.size

    x = np.unique(
        np.concatenate([values, values - 2 * floor, values + 2 * floor, np.ravel(quadrature.nodes)])
    )
    # The ideal is what Bonferroni over the nodes leaves to a normal law, on an even grid of shares.
    inner = np.linspace(*quadrature.range, 400)
    # One call for both: what a curve costs is eigenproblems, not points.
    lower, _, upper = quadrature.cdf(np.concatenate([x, inner]), level=LEVEL)
    (lower, wide_lower), (upper, wide_upper) = (np.split(part, [len(x)]) for part in (lower, upper))
    holds = np.all((lower <= truth(x + floor)) & (truth(x - floor) <= upper))
    share = truth(inner)
    error = np.sqrt(2 * share * (1 - share) / quadrature.num_probes / (case.size + 2))
    quantile = norm.isf((1 - LEVEL) / 2 / int(np.max(quadrature.lengths)))
    ideal = float(np.mean(2 * quantile * error)) or np.nan
    return bool(holds), float(np.mean(wide_upper - wide_lower)) / ideal


def least_cdf(case: Case, quadrature: spectra.Quadrature) -> float:
    """The least width of the band over the ideal one: as of a count, at as many tests.

    Where nothing is open, single eigenvalues may be known, but not without a basis: then it is that of
    sampling, and ends that are whole numbers take one eigenvalue off.
    """
    inner = np.linspace(*quadrature.range, 400)
    share = np.searchsorted(case.eigenvalues, inner, side="right") / case.size
    error = 2 * np.sqrt(2 * share * (1 - share) / quadrature.num_probes / (case.size + 2))
    tail = (1 - LEVEL) / int(np.max(quadrature.lengths))
    open_ = left_open.eigenvalues_at(case, _distinct(quadrature), inner) / case.size
    ideal = norm.isf(tail / 2) * error
    known = np.maximum(ideal - 1 / case.size, 0) if quadrature.sketches is None else 0.0
    least = np.where(open_ > 0, open_ + norm.isf(tail) * error, known)
    return float(least.mean() / ideal.mean()) if error.any() else np.nan


def density(case: Case, quadrature: spectra.Quadrature) -> tuple[bool, float]:
    """Whether the band of the density holds the exact spectrum under the same kernel, on its whole grid."""
    found = spectra.spectral_density(quadrature, level=LEVEL)
    truth, _ = _under_kernel(found, case.eigenvalues, np.full(case.size, 1 / case.size))
    slack = NEGLIGIBLE * truth.max()
    holds = np.all((found.lower <= truth + slack) & (truth <= found.upper + slack))
    width = np.trapezoid(found.upper - found.lower, found.grid)
    ideal = np.trapezoid(_sampled(case, quadrature, found, case.eigenvalues, 2), found.grid)
    return bool(holds), float(width / (ideal or np.nan))


def least_density(case: Case, quadrature: spectra.Quadrature) -> float:
    """The least width of the band over the ideal one: how far spectra with the same coefficients differ under
    the kernel, and what sampling of those not resolved adds on both sides, each at the risk of one."""
    found = spectra.spectral_density(quadrature, level=LEVEL)
    curves = [_under_kernel(found, *rule)[0] for rule in left_open.members(case, _distinct(quadrature))]
    open_ = np.ptp(curves, axis=0) if curves else np.zeros(len(found.grid))
    known = [int(np.argmin(np.abs(case.eigenvalues - x))) for x in quadrature.resolved]
    rest = np.delete(case.eigenvalues, known)
    one, both = (_sampled(case, quadrature, found, rest, sides) for sides in (1, 2))
    least = np.where(open_ > NOTHING * found.density, open_ + one, both)
    ideal = np.trapezoid(_sampled(case, quadrature, found, case.eigenvalues, 2), found.grid)
    return float(np.trapezoid(least, found.grid) / (ideal or np.nan))


def _distinct(quadrature: spectra.Quadrature) -> int:
    """The steps of a probe, without those that found copies."""
    return int(np.median(quadrature.lengths))


def _sampled(
    case: Case, quadrature: spectra.Quadrature, found: spectra.Density, values: np.ndarray, sides: int
) -> np.ndarray:
    """Width that sampling of these eigenvalues leaves to a normal law, with so many sides at risk."""
    mean, square = _under_kernel(found, values, np.full(len(values), 1 / case.size))
    tail = (1 - LEVEL) / sides / np.sum(np.diff(found.grid) / found.bandwidth[1:])
    variance = 2 * np.clip(square - mean**2, 0, None) / (case.size + 2) / quadrature.num_probes
    return 2 * norm.isf(tail) * np.sqrt(variance)


def _under_kernel(found: spectra.Density, nodes: np.ndarray, masses: np.ndarray):
    """A measure under the kernel of a density, and the mean of the squared kernel."""
    widths = RELATIVE_WIDTH * np.hypot(nodes, found.linear_scale)
    (curve,), square = smooth(found.grid, nodes, masses[None], widths)
    return curve, square


def measure(
    curve: Callable[[Case, spectra.Quadrature], tuple[bool, float]],
    least: Callable[[Case, spectra.Quadrature], float],
):
    """`measure` of a curve whose setting is (steps, probes); one key tells the least width."""

    def measured(case: Case, setting: tuple[int, int], keys: jax.Array) -> Curves:
        quadratures = from_keys(case, setting, keys)
        holds, widths = zip(*(curve(case, q) for q in quadratures), strict=True)
        return Curves(np.array(holds), np.array(widths), least(case, quadratures[0]))

    return measured


def _few_steps(case: Case, setting: tuple[int, int]) -> bool:
    return case.size < 1000 or setting[0] <= 30


def _dense(case: Case, setting: tuple) -> bool:
    return case.size < 1000


BONFERRONI = (
    "The band holds for a whole curve, by Bonferroni over the nodes, so it covers more than 95 %. Its "
    "ends are whole numbers of eigenvalues, so that it can be narrower than that of a normal law."
)

LEFT = (
    "Where steps leave more open under a narrow kernel than 8 probes do, the band is as wide as that: in "
    "brackets is how much wider than sampling alone spectra make it which these steps cannot tell apart. "
    "After 100 steps the zeros of “bulk and spikes” have nearly converged, and the default kernel is a few "
    "of their residuals wide, within which an atom may be two: there the band is wide, and only there. Those "
    "of “rank 50” have not converged after 30, and the band is 1.2 times as wide as that asks for."
)

STATEMENTS = (
    Statement("cdf", "band of the CDF", QUADRATURES, measure(cdf, least_cdf), note=BONFERRONI),
    Statement(
        "density",
        "band of the density",
        QUADRATURES,
        measure(density, least_density),
        _few_steps,
        keys=100,
        note=LEFT,
    ),
    Statement("bare", "band of the CDF without a basis", BARE, measure(cdf, least_cdf), _dense, keys=100),
    Statement(
        "bare", "band of the density without a basis", BARE, measure(density, least_density), _dense, keys=100
    ),
)
