"""Results in print: tables as text and for notebooks, and numbers with as many digits as are known."""

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


def measured(value: float, error: float) -> str:
    """The number and its error, both up to the second digit of the error.

    >>> measured(9.3052, 1.04), measured(14.377, 0.16), measured(2.0, 0.0)
    ('9.3 ± 1', '14.38 ± 0.16', '2 ± 0')
    """
    return f"{rounded(value, error / 10)} ± {error:.2g}"


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


def between(low: float, value: float, high: float) -> str:
    """A value between two bounds, each rounded to its own side.

    >>> between(3.9996, 4.0, 4.0003), between(4.0, 4.0, 4.0)
    ('4.000 [3.999, 4.001]', '4')
    """
    if low == high:
        return f"{value:.6g}"
    ends = f"[{directed(low, up=False, digits=4)}, {directed(high, up=True, digits=4)}]"
    return f"{rounded(value, high - low)} {ends}"
