"""Numbers in print: as many digits as their error leaves."""

import math

from spectra.results._base import Interval

DIGITS = 7
"""At most, however small the error."""


def rounded(value: float, error: float) -> str:
    """The number up to the first digit of its error.

    >>> rounded(-0.080013, 3e-4), rounded(1234.5, 200.0), rounded(2.0, 0.0), rounded(1.3e-26, 9e-26)
    ('-0.0800', '1.2e+03', '2', '1e-26')
    """
    if not (math.isfinite(value) and math.isfinite(error)) or value == 0 or error <= 0:
        return f"{value:.{DIGITS}g}"
    digits = math.floor(math.log10(abs(value))) - math.floor(math.log10(error)) + 1
    return f"{value:#.{min(max(digits, 1), DIGITS)}g}".rstrip(".").replace(".e", "e")


def directed(value: float, up: bool, digits: int = 2) -> str:
    """A bound in few digits, rounded to the side on which it stays one.

    >>> directed(-0.00616, up=True), directed(-0.00616, up=False), directed(9.99, up=True)
    ('-0.0061', '-0.0062', '10')
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    unit = 10.0 ** (math.floor(math.log10(abs(value))) - digits + 1)
    steps = math.ceil(value / unit) if up else math.floor(value / unit)
    return f"{steps * unit:.{digits}g}"


def is_converged(value: Interval, end: int) -> bool:
    """Whether the outer end of an extreme eigenvalue is as near as rounding, or within a tenth of it."""
    low, estimate, high = map(float, value)
    inner, outer = (high - estimate, estimate - low) if end == 0 else (estimate - low, high - estimate)
    return outer <= max(10 * inner, 0.1 * abs(estimate))


def extreme_text(value: Interval, end: int, level: float | None) -> str:
    """The smallest (end=0) or largest (end=-1) eigenvalue in words; level None: a residual ball."""
    low, estimate, high = map(float, value)
    error = max(high - estimate, estimate - low)
    if level is None:
        return f"an eigenvalue within {error:.1g} of {rounded(estimate, error)}"
    chance, converged = f"({100 * level:g} %)", is_converged(value, end)
    if converged and error <= max(0.01 * abs(estimate), 10 * min(high - estimate, estimate - low)):
        return f"{rounded(estimate, error)} ± {error:.1g} {chance}"
    bound, other = (high, low) if end == 0 else (low, high)
    words = ("at most", "at least") if end == 0 else ("at least", "at most")
    text = f"{words[0]} {directed(bound, up=end == 0, digits=4 if converged else 3)}"
    if math.isfinite(other):
        text += f", {words[1]} {directed(other, up=end != 0)} {chance}"
    return text if converged else text + "; not converged"


def extreme_cell(value: Interval, end: int, level: float | None) -> str:
    """The same for a table: a number, with ≤ or ≥ in front where it is only a bound."""
    low, estimate, high = map(float, value)
    error = max(high - estimate, estimate - low)
    if level is None or is_converged(value, end):
        return rounded(estimate, error)
    bound = high if end == 0 else low
    return ("≤ " if end == 0 else "≥ ") + directed(bound, up=end == 0, digits=3)
