"""A picture of a density whose points can be read: by pointer, finger or keyboard."""

import html
import json
from pathlib import Path

import numpy as np

from spectra.report.plots.density import plot_density
from spectra.report.plots.gallery import svg
from spectra.results import Density, Interval, Quadrature

SCRIPT = Path(__file__).with_name("page.js")
_POINTS = 200  # that can be read, beside the eigenvalues known one by one: two a pixel of a phone
_INCH = 72  # units of length in matplotlib's SVG


def readable(density: Density, quadrature: Quadrature | None, caption: str) -> str:
    """The picture of a density, with a slider and a line of text that say what the curve is at a point."""
    axes = []

    def make():
        axes.append(plot_density(density))
        return axes[0]

    picture = svg(make, caption[:200])
    curve = html.escape(json.dumps(_curve(axes[0], density, quadrature), ensure_ascii=False), quote=True)
    return (
        f'<figure data-curve="{curve}">{picture}<div class="read" hidden><output></output>'
        '<input type="range" min="0" value="0" aria-label="Point of the curve"></div>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _curve(ax, density: Density, quadrature: Quadrature | None) -> dict[str, list]:
    """Positions in the picture, and what there is to say at each: points of the curve, and outliers."""
    box = ax.bbox
    across = np.linspace(box.x0, box.x1, _POINTS)  # equal steps in the picture: those of the grid are not
    grid = ax.transData.inverted().transform(np.column_stack([across, np.full(_POINTS, box.y0)]))[:, 0]
    curves = [np.interp(grid, density.grid, y) for y in (density.density, density.lower, density.upper)]
    beyond = _beyond(density, quadrature, grid)
    points = [
        (x, y, _at_point(density.size, value, [curve[i] for curve in curves], [end[i] for end in beyond]))
        for i, (x, y, value) in enumerate(zip(*_places(ax, grid, curves[0]), grid, strict=True))
    ]
    outliers = np.sort(np.asarray(density.outliers, float))
    seen = outliers[(outliers >= grid[0]) & (outliers <= grid[-1])]
    places = _places(ax, seen, np.full(len(seen), ax.get_ylim()[0]))
    points += [(x, y, _at_outlier(value, outliers)) for x, y, value in zip(*places, seen, strict=True)]
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
        f"density {height:.3g} [{least:.2g}, {most:.2g}]"
    )


def _at_outlier(value: float, outliers: np.ndarray) -> str:
    """By its place among those that are resolved on its side of zero, counted from the outside."""
    place = np.sum(outliers < value) if value < 0 else np.sum(outliers > value)
    rank = "the" if place == 0 else f"no. {place + 1} of the"
    end = "smallest" if value < 0 else "largest"
    return f"λ = {value:.6g}: a single eigenvalue, {rank} {end} that are resolved"
