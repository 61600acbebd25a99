"""Results in print: tables as text and for notebooks, and numbers with as many digits as are known."""

import decimal
import math


def text_table(title: str, rows: list[tuple[str, str]]) -> str:
    """Labels and values in two columns under a title."""
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)])


def text_grid(rows: list[list[str]]) -> str:
    """Rows of cells in columns as wide as they need, the head first."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{x:<{width}}" for x, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def html_table(title: str, rows: list[tuple[str, str]]) -> str:
    """Labels and values for notebooks."""
    import html

    left = " style='text-align:left'"
    cells = "".join(
        f"<tr><th{left}>{html.escape(name)}</th><td{left}>{html.escape(value)}</td></tr>"
        for name, value in rows
    )
    return f"<table><caption>{html.escape(title)}</caption>{cells}</table>"


def html_grid(rows: list[list[str]]) -> str:
    """Rows of cells for notebooks, the head first."""
    import html

    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def format_bytes(count: int) -> str:
    """`1536` as `1.5 KiB`."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError


DIGITS = 7
"""Of a number that stands by itself, at most, however small the error."""
_ALL = 17
"""Digits that tell all numbers of float64 apart."""
_ROUNDING = 2.0**-52
"""Of a number: the half width of an interval around it is not known better."""


def rounded(value: float, error: float) -> str:
    """The number up to the first digit of its error.

    >>> rounded(-0.080013, 3e-4), rounded(1234.5, 200.0), rounded(2.0, 0.0), rounded(1.3e-26, 9e-26)
    ('-0.0800', '1.2e+03', '2', '1e-26')
    """
    if not (math.isfinite(value) and math.isfinite(error)) or value == 0 or error <= 0:
        return f"{value:.{DIGITS}g}"
    return _significant(value, min(_digits(value, error), DIGITS))


def told(value: float, error: float) -> str:
    """The number up to the first digit of its error, and with the error where it cannot be told from zero.

    >>> told(-0.080013, 3e-4), told(1.3e-26, 9e-26)
    ('-0.0800', '0 ± 2e-25')
    """
    if 0 < abs(value) < error < math.inf:
        return f"0 ± {directed(abs(value) + error, up=True, digits=1)}"
    return rounded(value, error)


def measured(value: float, error: float) -> str:
    """The number and its error, both up to the second digit of the error.

    Numbers have as many digits as that takes: seven beside an error of 1e-12 would be off by more.

    >>> measured(9.3052, 1.04), measured(14.377, 0.16), measured(2.0, 0.0), measured(2 / 3, 1e-9)
    ('9.3 ± 1.0', '14.38 ± 0.16', '2 ± 0', '0.6666666667 ± 1.0e-09')
    """
    shown = _significant(error, 2) if math.isfinite(error) and error > 0 else f"{error:g}"
    return f"{_beside(value, error)} ± {shown}"


def within(value: float, error: float) -> str:
    """An interval in the form of `measured`: what is printed contains value ± error.

    >>> within(2.4449, 0.1449), within(7.0, 4.9e-13), within(-0.3, 0.0)
    ('2.44 ± 0.15', '7.00000000000000 ± 4.9e-13', '-0.3 ± 0')
    """
    return " ± ".join(contained(value, error))


def contained(value: float, error: float) -> tuple[str, str]:
    """A number and an error in print, which together contain value ± error."""
    text = _beside(value, error)
    error += abs(value - float(text))
    nearest = f"{error:.2g}"  # where it is less by no more than rounding of the two ends, it is right
    enough = float(nearest) >= error - _ROUNDING * abs(value)
    return text, nearest if enough else directed(error, up=True)


def _beside(value: float, error: float) -> str:
    """The number up to the second digit of an error that stands next to it."""
    if not (math.isfinite(value) and math.isfinite(error)):
        return f"{value:.{DIGITS}g}"
    if value == 0 or error <= 0:
        return repr(float(value)).removesuffix(".0")
    return _significant(value, min(_digits(value, error) + 1, _ALL))


def _digits(value: float, error: float) -> int:
    """Digits of the number up to the first one of its error, one at least."""
    return max(math.floor(math.log10(abs(value))) - math.floor(math.log10(error)) + 1, 1)


def _significant(value: float, digits: int) -> str:
    return f"{value:#.{digits}g}".rstrip(".").replace(".e", "e")


def directed(value: float, up: bool, digits: int = 2) -> str:
    """A bound in few digits, rounded to the side on which it stays one.

    >>> directed(-0.00616, up=True), directed(-0.00616, up=False), directed(9.99, up=True)
    ('-0.0061', '-0.0062', '10')
    >>> directed(70.1, False, 3)
    '70.1'
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    text = f"{value:.{digits}g}"
    if (float(text) < value) if up else (float(text) > value):
        side = decimal.ROUND_CEILING if up else decimal.ROUND_FLOOR
        text = f"{float(decimal.Context(digits, side).create_decimal_from_float(value)):.{digits}g}"
    return text


def span(low: float, high: float, digits: int = 3) -> str:
    """An interval in few digits that contains it: `[11.9, 18]`."""
    return f"[{directed(low, False, digits)}, {directed(high, True, digits)}]"


def agree(low: float, high: float, digits: int = 3) -> bool:
    """Whether all numbers of an interval are one in so many digits: it needs no ends, then."""
    return f"{low:.{digits}g}" == f"{high:.{digits}g}"


def enclosed(value: float, low: float, high: float, digits: int = 3) -> str:
    """A number with its interval, or by itself where the digits shown are certain.

    >>> enclosed(14.5, 11.96, 17.31), enclosed(1 / 3, 1 / 3, 1 / 3)
    ('14.5 [11.9, 17.4]', '0.333')
    """
    number = f"{value:.{digits}g}"
    return number if agree(low, high, digits) else f"{number} {span(low, high, digits)}"


def between(low: float, value: float, high: float) -> str:
    """A value between two bounds, each rounded to its own side.

    >>> between(3.9996, 4.0, 4.0003), between(4.0, 4.0, 4.0)
    ('4.0000 [3.999, 4.001]', '4')
    """
    if low == high:
        return f"{value:.6g}"
    return f"{rounded(value, high - low)} {span(low, high, 4)}"
