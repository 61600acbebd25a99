"""The marks of a density: its curve and band, or colours; single eigenvalues, the kernel's width, counts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from spectra.report.plots.style import ACCENT, MAP, label_text
from spectra.results import Density

_WRITTEN = 0.1  # the share of an axis, at its top, where the kernel's width and "linear" are written
_KERNEL = "kernel"  # what marks the bars of kernel widths among the lines of a picture
EDGE = "2 / learning rate"
_SMALL = 5.5  # points
_HIDDEN = 1e-9  # of the lowest density shown: stands for zero on a logarithmic axis


def add_curve(
    ax, density: Density, xscale: str, color: Any, linestyle, label, alpha: float, edge: float = 0.0
) -> None:
    """Band and line; on a log-log axis the negative part as a line of its own.

    Bands that lie over each other are told apart by their edges, which are `edge` points wide.
    """
    hidden = floor(density) * _HIDDEN
    grid = np.asarray(density.grid)
    lower, line, upper = (np.maximum(y, hidden) for y in (density.lower, density.density, density.upper))
    parts = [(grid, slice(None), linestyle, label)]
    if xscale == "loglog":
        positive, negative = grid > 0, (grid < 0) & (density.density > floor(density))
        parts = [(grid, positive, linestyle, label)]
        if negative.any():
            parts.append((-grid, negative, ":", "negative" if label is None else f"{label}, negative"))
    for x, part, dash, name in parts:
        text = None if name is None else label_text(name)
        ax.plot(x[part], line[part], color=color, linewidth=1.0, linestyle=dash, label=text)
        filled = ax.fill_between(x[part], lower[part], upper[part], color=color, alpha=alpha, linewidth=edge)
        if edge:
            filled.set(alpha=None, facecolor=(color, alpha), edgecolor=(color, 0.5))


def add_kernel(ax, density: Density, color: Any) -> None:
    """A bar of one kernel width to each side of its middle, near the right end; others lie below.

    None is drawn twice: on a logarithmic axis, a relative kernel is as wide for all.
    """
    there = [text for text in ax.texts if text.get_gid() == _KERNEL]
    place, back = ax.transData.transform, ax.transData.inverted().transform
    left, right = (place((end, 1.0))[0] for end in ax.get_xlim())
    edges = [float(np.ravel(line.get_xdata())[0]) for line in ax.lines if line.get_label() == EDGE]
    limits = [place((x, 1.0))[0] for x in edges]
    # On a log-log axis the curve that reaches further right may be that of the negative eigenvalues.
    side = -1.0 if ax.get_xscale() == "log" and -density.grid[0] > density.grid[-1] else 1.0
    end = place((float(np.max(side * density.grid)), 1.0))[0]
    last = min([left + 0.97 * (right - left), end, *(x - 0.03 * (right - left) for x in limits)])
    ends = np.full(2, last)
    for _ in range(4):  # the width depends on where the bar is
        middle = back((ends.mean(), 0.0))[0]
        width = float(np.interp(side * middle, density.grid, density.bandwidth))
        ends = np.array([place((middle + step * width, 1.0))[0] for step in (-1, 1)])
        ends += last - ends[1]
    lengths = [place(bar.xy)[0] - place(bar.xyann)[0] for bar in there]
    if any(abs(np.ptp(ends) - length) < 0.2 * length for length in lengths):
        return
    (low, high), height = (back((end, 0.0))[0] for end in ends), 0.94 - 0.04 * len(there)
    where = {"xycoords": ax.get_xaxis_transform(), "in_layout": False}
    style = {"arrowstyle": "|-|,widthA=0.15,widthB=0.15", "color": color, "linewidth": 0.8}
    bar = ax.annotate(
        "", (high, height), (low, height), arrowprops=style | {"shrinkA": 0, "shrinkB": 0}, **where
    )
    bar.set_gid(_KERNEL)
    if not there:
        beside = {"textcoords": "offset points", "ha": "right", "va": "center", "fontsize": _SMALL}
        ax.annotate("kernel ±σ", (low, height), (-4, 0), **beside, **where)


def add_stems(ax, density: Density, xscale: str) -> None:
    """A stem for each eigenvalue that stands alone, to the peak that a single one makes there."""
    values = np.asarray(density.outliers, float)
    widths = np.interp(values, density.grid, density.bandwidth)
    tops = 1 / (density.size * widths * np.sqrt(2 * np.pi))
    places = np.abs(values) if xscale == "loglog" else values
    ax.vlines(places, floor(density) * _HIDDEN, tops, color=ACCENT, linewidth=0.8)


def add_count_axis(ax, density: Density, xscale: str) -> None:
    """The number of eigenvalues beyond each point, from the integral of the density."""
    grid = np.asarray(density.grid)
    steps = np.diff(grid) * (density.density[1:] + density.density[:-1]) / 2
    below = density.size * np.concatenate([[0.0], np.cumsum(steps)])
    beyond = np.where(grid < 0, below, below[-1] - below)
    other = ax.twinx()
    sides = [(grid, np.full(len(grid), True), "-")]
    if xscale == "loglog":
        sides = [(grid, grid > 0, "-"), (-grid, grid < 0, ":")]
    for x, part, dash in sides:
        other.plot(x[part], np.maximum(beyond[part], _HIDDEN), color="0.5", linewidth=0.8, linestyle=dash)
    other.set_yscale("log")
    other.set_ylim(0.5, 2 * density.size)
    other.set_ylabel("number of eigenvalues beyond", color="0.5")
    other.tick_params(axis="y", which="both", colors="0.5")
    other.spines["right"].set(visible=True, color="0.5")
    ax.set_zorder(other.get_zorder() + 1)  # the density in front
    ax.patch.set_visible(False)


def heat(ax, x: np.ndarray, y: np.ndarray, values: np.ndarray, lowest: float):
    """Densities (y, x) as colours, from white, for none, over light, for little, to dark."""
    from matplotlib.colors import LogNorm

    ax.grid(False)  # which some styles draw, over the colours
    shown = np.ma.masked_less(values, lowest)
    norm = LogNorm(lowest, max(float(np.max(values)), 2 * lowest))
    return ax.pcolormesh(x, y, shown, norm=norm, cmap=f"{MAP}_r", shading="nearest", rasterized=True)


def floor(density: Density) -> float:
    """A tenth of the peak that a single eigenvalue makes where the kernel is widest."""
    return floor_of(density.size, density.bandwidth)


def floor_of(size: int, widths: np.ndarray) -> float:
    """`floor` of a density of `size` eigenvalues with kernels of these widths."""
    return 0.1 / (size * float(np.max(widths)) * np.sqrt(2 * np.pi))


def top_of(densities: Sequence[Density], band: bool, bottom: float | None = None) -> float:
    """Where an axis of these densities ends: their curves stay below what is written there, and no band is
    cut off. `bottom` is the lower end of a logarithmic axis; a linear one begins at zero."""
    curve = max(float(np.max(density.density)) for density in densities)
    upper = max(float(np.max(density.upper)) for density in densities) if band else 0.0
    share = _WRITTEN / (1 - _WRITTEN)  # of what is below it
    if bottom is None:
        return max((1 + share) * curve, 1.08 * upper)
    return max(curve * max(4.0, (curve / bottom) ** share), 1.08 * upper)


def visible_range(density: Density) -> tuple[float, float]:
    """Where the density is above the floor, and two kernel widths on: curves end inside of the axes."""
    visible = np.flatnonzero(np.asarray(density.density) > floor(density))
    (first, last), grid, widths = visible[[0, -1]], density.grid, density.bandwidth
    return float(grid[first] - 2 * widths[first]), float(grid[last] + 2 * widths[last])
