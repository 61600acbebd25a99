"""Pictures of densities whose points can be read, by pointer, finger or keyboard."""

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spectra.report.plots.density import as_density, plot_density, set_axes
from spectra.report.plots.gallery import svg
from spectra.report.plots.style import new_axes
from spectra.results import Density, Interval, Quadrature
from spectra.results.text import span

SCRIPT = Path(__file__).with_name("page.js")
_DRAWN = 600  # points of a curve that a page draws: narrower peaks than three of them there are none
_POINTS = 200  # that can be read, beside the eigenvalues known one by one: two a pixel of a phone
_INCH = 72  # units of length in matplotlib's SVG


def readable(density: Density, quadrature: Quadrature | None, caption: str) -> str:
    """The picture of a density, with a slider and a line of text that say what the curve is at a point."""
    axes = []

    def make():
        axes.append(plot_density(density))
        return axes[0]

    picture = svg(make, caption[:200])
    return _figure(picture, _curve(axes[0], density, quadrature), caption)


def choosable(blocks: Mapping[str, Quadrature | Density], caption: str) -> str:
    """A picture with the axes of all blocks, into which a page draws the curve of the row that is chosen.

    It belongs into one section with the table that has a row for each block.
    """
    densities = {name: as_density(block) for name, block in blocks.items()}
    axes = []

    def make():
        axes.append(new_axes(None))
        set_axes(axes[0], list(densities.values()))
        return axes[0]

    picture = svg(make, caption[:200])
    curves = []
    for (name, density), block in zip(densities.items(), blocks.values(), strict=True):
        curve = _curve(axes[0], density, block if isinstance(block, Quadrature) else None)
        curves.append(curve | {"name": name, "paths": _paths(axes[0], density)})
    return _figure(picture, curves, caption)


def _figure(picture: str, curves: Any, caption: str) -> str:
    data = html.escape(json.dumps(curves, ensure_ascii=False), quote=True)
    return (
        f'<figure data-curve="{data}">{picture}<div class="read" hidden><output></output>'
        '<input type="range" min="0" value="0" aria-label="Point of the curve"></div>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _paths(ax, density: Density) -> dict[str, str]:
    """Band, line and stems in the units of the picture, cut off at its edges."""
    x = _across(ax, density, _DRAWN)
    lower, line, upper = (
        np.column_stack(_places(ax, x, np.interp(x, density.grid, y)))
        for y in (density.lower, density.density, density.upper)
    )
    shown = np.interp(x, density.grid, density.density) > ax.get_ylim()[0]
    starts = np.flatnonzero(np.diff(shown, prepend=False, append=False)).reshape(-1, 2)
    outliers = np.asarray(density.outliers, float)
    outliers = outliers[(outliers > ax.get_xlim()[0]) & (outliers < ax.get_xlim()[1])]
    widths = np.interp(outliers, density.grid, density.bandwidth)
    tops = np.column_stack(_places(ax, outliers, 1 / (density.size * widths * np.sqrt(2 * np.pi))))
    bottoms = np.column_stack(_places(ax, outliers, np.full(len(outliers), ax.get_ylim()[0])))
    return {
        "band": _path(np.concatenate([upper, lower[::-1]])) if len(x) else "",
        "line": "".join(_path(line[first:last]) for first, last in starts),
        "stems": "".join(_path(np.stack(ends)) for ends in zip(bottoms, tops, strict=True)),
    }


def _across(ax, density: Density, count: int) -> np.ndarray:
    """Points of the curve in equal steps of the picture, which those of the grid are not.

    They end where the curve does: on axes shared with others there is nothing to say about it beyond.
    """
    ends = np.clip(np.asarray(density.grid)[[0, -1]], *ax.get_xlim())
    (left, bottom), (right, _) = ax.transData.transform([(end, ax.get_ylim()[0]) for end in ends])
    across = np.linspace(left, right, count)
    x = ax.transData.inverted().transform(np.column_stack([across, np.full(count, bottom)]))[:, 0]
    return np.clip(x, *ends)


def _path(points: np.ndarray) -> str:
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _curve(ax, density: Density, quadrature: Quadrature | None) -> dict[str, list]:
    """Positions in the picture, and what there is to say at each: points of the curve, and outliers."""
    box, grid = ax.bbox, _across(ax, density, _POINTS)
    curves = [np.interp(grid, density.grid, y) for y in (density.density, density.lower, density.upper)]
    beyond = _beyond(density, quadrature, grid)
    points = [
        (x, y, _at_point(density.size, value, [curve[i] for curve in curves], [end[i] for end in beyond]))
        for i, (x, y, value) in enumerate(zip(*_places(ax, grid, curves[0]), grid, strict=True))
    ]
    outliers = np.asarray(density.outliers, float)  # ascending
    seen = outliers[(outliers >= grid[0]) & (outliers <= grid[-1])]
    places = _places(ax, seen, np.full(len(seen), ax.get_ylim()[0]))
    one = np.zeros(len(outliers), bool) if density.single is None else np.asarray(density.single)
    single = one[np.isin(outliers, seen)]
    points += [
        (x, y, _at_outlier(value, outliers, known))
        for x, y, value, known in zip(*places, seen, single, strict=True)
    ]
    x, y, text = zip(*sorted(points, key=lambda point: point[0]), strict=True)
    height = ax.figure.bbox.height
    ends = [_INCH * (height - end) / ax.figure.dpi for end in (box.y1, box.y0)]
    return {"x": np.round(x, 2).tolist(), "y": np.round(y, 2).tolist(), "ends": ends, "text": list(text)}


def _places(ax, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where numbers lie in the SVG, whose y points down; what is below the picture is at its lower edge."""
    pixels = ax.transData.transform(np.column_stack([x, np.clip(y, *ax.get_ylim())]).reshape(-1, 2))
    places = _INCH * pixels / ax.figure.dpi
    return places[:, 0], _INCH * ax.figure.get_size_inches()[1] - places[:, 1]


def _beyond(density: Density, quadrature: Quadrature | None, x: np.ndarray) -> Interval:
    """Numbers of eigenvalues beyond x, as seen from zero, with their bands where these are known."""
    if quadrature is None:
        steps = np.diff(density.grid) * (density.density[1:] + density.density[:-1]) / 2
        share = np.interp(x, density.grid, np.concatenate([[0.0], np.cumsum(steps)]))
        below = Interval(share, share, share)
    else:
        below = quadrature.cdf(x)
    above = Interval(1 - below.upper, 1 - below.estimate, 1 - below.lower)
    return Interval(*(density.size * np.where(x < 0, b, a) for a, b in zip(above, below, strict=True)))


def _at_point(size: int, value: float, curve: list, beyond: list) -> str:
    low, count, high = (f"{max(end, 0):,.0f}" for end in beyond)
    band = "" if low == high else f" [{low}, {high}]"
    side = "below" if value < 0 else "above"
    height, least, most = (max(float(end), 0.0) for end in curve)
    return (
        f"λ = {value:.4g}: {count}{band} of {size:,} eigenvalues {side}; "
        f"density {height:.3g} {span(least, most, 2)}"
    )


def _at_outlier(value: float, outliers: np.ndarray, single: bool) -> str:
    """By its place among those that stand alone on its side of zero, counted from the outside."""
    if not single:
        return f"λ = {value:.6g}: an eigenvalue that stands alone, or several equal ones"
    place = np.sum(outliers < value) if value < 0 else np.sum(outliers > value)
    rank = "the" if place == 0 else f"no. {place + 1} of the"
    end = "smallest" if value < 0 else "largest"
    return f"λ = {value:.6g}: a single eigenvalue, {rank} {end} that are resolved"
