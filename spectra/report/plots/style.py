"""What all pictures share: the style, new axes of 8 cm width, signed-logarithmic axes."""

import contextlib
import contextvars
import functools
import itertools
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np

from spectra.base.calls import checked
from spectra.base.errors import SpectraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""From the palette of Okabe and Ito, which colour-blind readers can tell apart."""
COLOR, ACCENT = COLORS[:2]
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (8, 2)))
"""Lines that can be told apart in grey."""
MAP = "cividis"  # even in lightness, for colour-blind readers and in grey
DYNAMIC = 50.0  # a spectrum with wider magnitudes than this asks for a logarithmic axis
P = ParamSpec("P")
R = TypeVar("R")
FILE = Path(__file__).with_name("spectra.mplstyle")
_MINOR = 20  # decades beyond which minor ticks would run into each other
_LINE = 58  # characters of a legend across a figure of 8 cm
_styled = contextvars.ContextVar("_styled", default=False)


@contextlib.contextmanager
def plot_style(**changes) -> Iterator[None]:
    """Use the style of `spectra`'s plots for figures created inside a `with` block.

    Text of 6 to 8 points on figures that are 8 cm wide, colours that colour-blind readers can tell apart, no
    frame at the top and right. Plot functions that create their own figure use this style anyway, with the
    changes of an enclosing `with` block.

    Args:
        **changes: matplotlib's rcParams to change, with "_" for ".": `font_size=9`.

    Examples:
        >>> import matplotlib; matplotlib.use("Agg")
        >>> import matplotlib.pyplot as plt, spectra
        >>> with spectra.plot_style(figure_dpi=100):
        ...     figure, axes = plt.subplots(1, 2)
        >>> float(figure.dpi)
        100.0
    """
    import matplotlib
    import matplotlib.pyplot as plt
    from matplotlib import rcParams

    names = {name.replace(".", "_"): name for name in rcParams}
    interactive = plt.isinteractive()
    before = _styled.set(True)
    try:
        with plt.style.context([FILE, {names.get(name, name): value for name, value in changes.items()}]):
            try:
                yield
            finally:
                interactive = plt.isinteractive()
    finally:  # a notebook's backend turns it on with the first figure, which may be drawn in here
        matplotlib.interactive(interactive)
        _styled.reset(before)


def styled(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: draw in the style, unless the caller brings Axes, which have a style already.

    Arguments are checked as by `checked`.
    """
    draw = checked(function)

    @functools.wraps(function)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        given = kwargs.get("ax") if len(args) < 2 else args[1]
        with plot_style() if given is None and not _styled.get() else contextlib.nullcontext():
            return draw(*args, **kwargs)

    return drawn


def new_axes(ax: "Axes | None", *, height: float = 2.4) -> "Axes":
    """`ax`, or the Axes of a new figure of 8 cm width; height in inches."""
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes

    if ax is None:
        return plt.subplots(figsize=(3.15, height), layout="constrained")[1]
    if not isinstance(ax, Axes):
        raise SpectraError(
            f"ax is a {type(ax).__name__}, not an Axes: of a Figure give one of `figure.axes`, of the array "
            "that `plt.subplots` returns one of its elements."
        )
    return ax


def add_colorbar(mappable, ax: "Axes", label: str, **options) -> None:
    """A colour bar as high as the Axes."""
    cax = ax.inset_axes((1.03, 0.0, 0.035, 1.0))
    bar = ax.figure.colorbar(mappable, cax=cax, **options)
    bar.set_label(label)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]


def label_text(name: str) -> str:
    """A name as a legend shows it: matplotlib's mathematics where it is that, and letter by letter elsewhere.

    A dollar in the name of a parameter begins no formula, and a leading underscore, or an empty name, hides
    nothing.
    """
    from matplotlib.mathtext import MathTextParser

    if "$" in name:
        try:
            MathTextParser("path").parse(name)
        except ValueError:
            name = name.replace("$", r"\$")
    return f" {name}" if name.startswith("_") or not name else name


def add_legend(ax: "Axes", own: bool) -> None:
    """A legend above the Axes in a figure of our own, in as many columns as fit; else inside of them."""
    if not own:
        ax.legend()
        return
    handles, labels = ax.get_legend_handles_labels()
    labels = [wrapped(label, 52) for label in labels]
    columns = next(n for n in (3, 2, 1) if n == 1 or _legend_width(labels, n) <= _LINE)
    lines = max(sum(1 + label.count("\n") for label in part) for part in np.array_split(labels, columns))
    figure: Any = ax.figure
    if lines > 2:  # what the first two take is in the height of all figures
        width, height = figure.get_size_inches()
        figure.set_size_inches(width, height + 0.125 * (lines - 2))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns)


def _legend_width(labels: list[str], columns: int) -> int:
    """Characters in a row of a legend, whose columns are filled from above, with room for the lines."""
    parts = np.array_split(labels, columns)
    return sum(
        6 + max((len(line) for label in part for line in label.split("\n")), default=0) for part in parts
    )


NAME = 26  # characters of a layer's name that a row has room for


def short_names(names: list[str]) -> list[str]:
    """Long names cut to what tells the layers apart, which stay distinct: `…layer_11/att…/kernel`.

    The ends are enough for most trees. Where they are alike, as in a transformer whose layers differ by
    their number only, what all names begin with is left out, and what is in the middle.
    """
    pairs = zip(min(names), max(names), strict=False)  # of all names, these two have least in common
    common = "".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    shared = max(common.rfind("/"), common.rfind(".")) + 1

    def end(name: str) -> str:
        return name if len(name) <= NAME else "…" + name[1 - NAME :]

    def around(name: str, width: int) -> str:
        rest = ("…" if shared else "") + name[shared:]
        return rest if len(rest) <= width else rest[: width // 2] + "…" + rest[width // 2 + 1 - width :]

    widths = range(NAME, max(map(len, names)) + 1, 2)  # wider only if need be
    cuts = [[end(name) for name in names], *([around(name, width) for name in names] for width in widths)]
    return next((cut for cut in cuts if len(set(cut)) == len(set(names))), names)


def wrapped(name: str, width: int) -> str:
    """A long name of a parameter in lines that end with a stroke, or a dot where a line is too short."""
    if len(name) <= width:
        return name
    long = rf"[^\s/]{{{width},}}"
    places = re.sub(long, lambda word: re.sub(r"\.(?=[^\W\d])", ".\x00 ", word[0]), name)
    places = places.replace("/", "/\x00 ")
    lines = textwrap.wrap(places, width, break_long_words=len(name) > 2 * width)
    return "\n".join(lines).replace("\x00 ", "").replace("\x00", "")


def shades(count: int) -> list[str]:
    """Colours in an order, from dark to light, short of what dark ground and white paper hide."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(color) for color in colormaps[MAP](np.linspace(0.2, 0.85, count))]


def ink(ax: "Axes") -> str:
    """The colour of text beside the Axes: black, or white on dark ground."""
    return ax.xaxis.label.get_color()  # pyright: ignore[reportReturnType]


def asks_for_logarithm(scale: float, low: float, high: float) -> bool:
    """Whether a spectrum from `low` to `high` with detail at `scale` needs a signed-log axis."""
    smallest = max(scale, low, -high)  # of the magnitudes on the axis, which may lie on one side of zero
    return scale > 0 and max(abs(low), abs(high)) > DYNAMIC * smallest


ROOM = 0.02
"""The share of a logarithmic axis beyond the outermost stem: a few kernels may be less than a pixel there."""


def symlog(axis, scale: float, low: float, high: float, labels: int = 7, room: float = 0.0) -> float:
    """Make an axis signed-logarithmic, with at most `labels` labels; returns up to where it is linear.

    `room` is the share of the axis that is left beyond each end.
    """
    from matplotlib.ticker import FixedLocator, MaxNLocator, ScalarFormatter

    first = np.floor(np.log10(scale))
    linthresh = 10.0**first
    set_scale, set_limits = (
        (axis.axes.set_xscale, axis.axes.set_xlim)
        if axis.axis_name == "x"
        else (axis.axes.set_yscale, axis.axes.set_ylim)
    )
    set_scale("symlog", linthresh=linthresh, linscale=0.6)
    if room:
        along = axis.get_transform()
        ends = along.transform(np.array([low, high]))
        low, high = along.inverted().transform(ends + room * np.ptp(ends) * np.array([-1, 1]))
    set_limits(low, high)
    ticks = [0.0]
    spans = [
        (sign, np.floor(np.log10(abs(end)))) for sign, end in ((-1, low), (1, high)) if sign * end > linthresh
    ]
    decades = sum(last - first + 1 for _, last in spans)
    inner = first if labels > 4 else first + 1  # small panels have no room beside the zero
    stride = max(1, int(np.ceil(decades / (labels - 1))))
    for sign, last in spans:
        ticks += [sign * 10.0**e for e in np.arange(last, inner - 0.5, -stride)]
    least = (0.1 if labels > 4 else 0.2) if axis.axis_name == "x" else 0.05
    shown = [tick for tick in _apart(axis, ticks, low, high, least) if low <= tick <= high]
    if len(shown) < 2:  # all on one side of zero: the stride may have passed over what is on the axis
        every = [sign * 10.0**e for sign, last in spans for e in np.arange(first, last + 1)]
        shown = sorted(tick for tick in every if low <= tick <= high)
    if len(shown) < 2:  # a narrow range that lies between two powers of ten
        shown = list(MaxNLocator(4).tick_values(low, high))
        axis.set_major_formatter(ScalarFormatter())
    axis.set_major_locator(FixedLocator(shown))
    minor = [
        sign * digit * 10.0**e
        for sign, last in spans
        for e in np.arange(first, last + 1)
        for digit in range(2, 10)
    ]
    axis.set_minor_locator(FixedLocator(sorted(minor) if labels > 4 and decades <= _MINOR else []))
    return float(linthresh)


def label_decades(axis) -> None:
    """Labels of a logarithmic axis that do not touch each other, however few decades it shows."""
    from matplotlib.ticker import LogFormatterSciNotation, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    decades = np.log10(high / low)
    if decades < 2.5:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 1.3 else (1.0, 3.0)))
        axis.set_major_formatter(LogFormatterSciNotation(minor_thresholds=(np.inf, np.inf)))
    axis.set_minor_formatter(NullFormatter())


def symlog_grid(scale: float, low: float, high: float, count: int) -> np.ndarray:
    """Points from `low` to `high` that are equally spaced on a signed-logarithmic axis."""
    return scale * np.sinh(np.linspace(np.arcsinh(low / scale), np.arcsinh(high / scale), count))


def _apart(axis, ticks: list[float], low: float, high: float, least: float) -> list[float]:
    """Zero and those of the ticks that are that share of the axis away from it, where labels would touch."""
    place = axis.get_transform().transform
    length = float(np.diff(place(np.array([low, high])))[0])
    away = np.abs(place(np.array(ticks)) - place(np.zeros(1))) / length
    return sorted(tick for tick, share in zip(ticks, away, strict=True) if tick == 0 or share >= least)


def mark_linear(ax: "Axes", linear: float) -> None:
    """Grey ground where a signed-logarithmic axis is linear."""
    ax.axvspan(-linear, linear, color="0.5", alpha=0.1, linewidth=0, zorder=0)
