"""Bands that hold for whole curves: the distribution of eigenvalues, and their smoothed density."""

from collections.abc import Callable

import jax
import numpy as np
from scipy.stats import norm

import spectra
from benchmarks.audit.matrices import Case
from benchmarks.audit.statements import BARE, QUADRATURES, Curves, Statement, from_keys
from spectra.density import smoothing

NEGLIGIBLE = 1e-9
"""Of the largest density: the kernel is cut off where its mass is as small."""
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
    ideal = float(np.mean(2 * quantile * error))
    return bool(holds), float(np.mean(wide_upper - wide_lower)) / ideal if ideal else np.nan


def density(case: Case, quadrature: spectra.Quadrature) -> tuple[bool, float]:
    """Whether the band of the density holds the exact spectrum under the same kernel, on its whole grid."""
    found = spectra.spectral_density(quadrature, level=LEVEL)
    widths = smoothing.RELATIVE_WIDTH * np.hypot(case.eigenvalues, found.linear_scale)
    masses = np.full((1, case.size), 1 / case.size)
    (truth,), square = smoothing._smooth(found.grid, case.eigenvalues, masses, widths)
    slack = NEGLIGIBLE * truth.max()
    holds = np.all((found.lower <= truth + slack) & (truth <= found.upper + slack))
    tests = np.sum(np.diff(found.grid) / found.bandwidth[1:])
    variance = 2 * np.clip(square - truth**2, 0, None) / (case.size + 2) / quadrature.num_probes
    ideal = np.trapezoid(2 * norm.isf((1 - LEVEL) / 2 / tests) * np.sqrt(variance), found.grid)
    width = np.trapezoid(found.upper - found.lower, found.grid)
    return bool(holds), float(width / ideal) if ideal else np.nan


def measure(curve: Callable[[Case, spectra.Quadrature], tuple[bool, float]]):
    """`measure` of a curve whose setting is (steps, probes)."""

    def measured(case: Case, setting: tuple[int, int], keys: jax.Array) -> Curves:
        found = [curve(case, q) for q in from_keys(case, setting, keys)]
        return Curves(*(np.array(part) for part in zip(*found, strict=True)))

    return measured


def _few_steps(case: Case, setting: tuple[int, int]) -> bool:
    return case.size < 1000 or setting[0] <= 30


def _dense(case: Case, setting: tuple) -> bool:
    return case.size < 1000


BONFERRONI = (
    "The band holds for a whole curve, by Bonferroni over the nodes, so it covers more than 95 %. Its "
    "ends are whole numbers of eigenvalues, so that it can be narrower than that of a normal law."
)

LEFT = "Where 30 steps leave more open under a narrow kernel than 8 probes do, the band is as wide as that."

STATEMENTS = (
    Statement("cdf", "band of the CDF", QUADRATURES, measure(cdf), _few_steps, note=BONFERRONI),
    Statement(
        "density", "band of the density", QUADRATURES, measure(density), _few_steps, keys=100, note=LEFT
    ),
    Statement("bare", "band of the CDF without a basis", BARE, measure(cdf), _dense, keys=100),
    Statement("bare", "band of the density without a basis", BARE, measure(density), _dense, keys=100),
)
