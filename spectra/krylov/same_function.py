"""Whether a function of the user's is the one that a checkpoint holds values of.

A function is known by what it makes of numbers. Before a run nobody knows which numbers will count; after it
they are the Ritz values, of which the values saved are sums, and the spectrum's range, on which their error
is bounded: a filter may differ from another between two points of any fixed set.
"""

import contextlib
from collections.abc import Sequence

import numpy as np

from spectra.base.files import tree_digest
from spectra.base.reals import RealFunction

_SIZES = np.ldexp(np.linspace(1.0, 1.75, 4)[:, None], np.arange(-20, 21)).ravel()
POINTS = np.concatenate([-_SIZES, [0.0], _SIZES])
"""Where a function is evaluated before a run: exact numbers, since processors differ in powers of ten."""
BETWEEN = 2001
"""Points of each interval of the spectrum's range, its ends among them, after the run."""
BITS = 30
"""Of a value that are compared: the last of exp and its like depend on the processor's instructions."""


def digest(f: RealFunction, points: np.ndarray = POINTS) -> int:
    """Of the values at points; a function may refuse those that its operator's spectrum is away from."""
    try:
        found = f(points)
    except Exception:  # whatever a user's function raises
        found = np.full(len(points), np.nan)
        for i in range(len(points)):
            with contextlib.suppress(Exception):
                found[i] = f(points[i : i + 1])[0]
    return tree_digest(_rounded(found).view(np.uint32))  # the bits: float32 does not hold all of them


def on_spectrum(intervals: Sequence[Sequence[float]], theta: Sequence[Sequence[float]]) -> np.ndarray:
    """The numbers that finished values and their bounds were made of, near enough."""
    shares = np.arange(BETWEEN) / (BETWEEN - 1)
    ends = [(low, high) for low, high in intervals if np.isfinite([low, high]).all()]
    return np.concatenate([*((1 - shares) * low + shares * high for low, high in ends), *theta])


def _rounded(values: np.ndarray) -> np.ndarray:
    mantissa, exponent = np.frexp(np.where(np.isnan(values), np.nan, values))
    with np.errstate(over="ignore", under="ignore"):
        return np.ldexp(np.round(np.ldexp(mantissa, BITS)), exponent - BITS) + 0.0  # of zeros one sign
