"""Pictures of spectral densities: one with its band, several on common axes."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from spectra.base.errors import SpectraError
from spectra.report.plots.style import (
    ACCENT,
    COLOR,
    COLORS,
    DASHES,
    add_legend,
    asks_for_logarithm,
    label_text,
    mark_linear,
    new_axes,
    styled,
    symlog,
)
from spectra.report.spectrum import SpectrumReport
from spectra.results import Density, Moments, Quadrature, Snapshot, as_quadrature, as_spectrum, by_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HIDDEN = 1e-9  # of the lowest density shown: stands for zero on a logarithmic axis
Held = SpectrumReport | Snapshot | Quadrature | Moments | Density
XSCALES = ("auto", "symlog", "linear", "loglog")


@styled
def plot_density(
    density: Held | Mapping[str, Held],
    ax: "Axes | None" = None,
    *,
    xscale: str = "auto",
    yscale: str = "log",
    learning_rate: float | None = None,
    color: str = COLOR,
    linestyle="-",
    label: str | None = None,
    band: bool = True,
    outliers: bool = True,
    counts: bool = False,
    bandwidth: float | None = None,
    title: str | None = None,
) -> "Axes":
    """Draw a spectral density with its band, its outliers as stems, on axes that fit the spectrum.

    A logarithmic vertical axis ends at a tenth of the height that one eigenvalue in n reaches: below that
    there is no information. The horizontal axis is signed-logarithmic (linear within `density.linear_scale`,
    with a grey background) if the spectrum spans more than a factor of 50 of that, else linear.

    Args:
        density: result of `spectral_density`, or a report, a quadrature or moments to compute it from. A
            mapping of several is drawn as by `plot_comparison`, which ignores the arguments from `color` to
            `counts`.
        ax: where to draw; default: a new figure of 8 cm width.
        xscale: "auto", "symlog", "linear", or "loglog": the logarithm of |λ|, with the density of negative
            eigenvalues as a second, dotted line, which shows power laws as straight lines.
        yscale: "log" or "linear".
        learning_rate: draw the line 2 / learning rate, the stability limit of gradient descent.
        color: color of line and band.
        linestyle: style of the line.
        label: label for a legend.
        band: draw the band.
        outliers: draw a stem for each resolved eigenvalue, up to the peak that a single eigenvalue has there.
        counts: draw the number of eigenvalues beyond each point, as seen from zero, as a grey line with its
            own axis on the right.
        bandwidth: kernel width, see `spectral_density`; not for a density, which already has one.
        title: title above the plot.

    Returns:
        The Axes.

    Raises:
        SpectraError: unknown xscale or yscale; a bandwidth for a density that is already smoothed; a
            learning rate that is not positive.

    Examples:
        >>> import matplotlib; matplotlib.use("Agg")
        >>> import jax, jax.numpy as jnp, spectra
        >>> op = spectra.MatrixOperator(jnp.diag(jnp.linspace(0.0, 1.0, 200)))
        >>> quadrature = spectra.slq(op, key=jax.random.key(0), num_steps=30, num_probes=4)
        >>> ax = spectra.plot_density(spectra.spectral_density(quadrature))
        >>> ax.get_xlabel()
        'eigenvalue'
    """
    if isinstance(density, Mapping):
        densities = {name: as_density(part, bandwidth) for name, part in density.items()}
        ax = plot_comparison(densities, ax, xscale=xscale, yscale=yscale, learning_rate=learning_rate)
        if title is not None:
            ax.set_title(title, parse_math=False)
        return ax
    _check(xscale, yscale)
    density = as_density(density, bandwidth)
    own, ax = ax is None, new_axes(ax)
    low, high = visible_range(density)
    xscale = _fitting(xscale, density.linear_scale, low, high)
    _curve(ax, density, xscale, color, linestyle, label, alpha=0.22 if band else 0.0)
    if outliers:
        _stems(ax, density, xscale)
    top = density.density if yscale == "log" else density.upper
    _set_axes(ax, [density], xscale, yscale, density.linear_scale, (low, high), top, learning_rate)
    if counts:
        _count_axis(ax, density, xscale)
    if title is not None:
        ax.set_title(title, parse_math=False)
    if learning_rate is not None:
        add_legend(ax, own)
    return ax


@styled
def plot_comparison(
    results: Mapping[str, Held] | Sequence[Held],
    ax: "Axes | None" = None,
    *,
    xscale: str = "auto",
    yscale: str = "log",
    learning_rate: float | None = None,
) -> "Axes":
    """Draw several spectra into one plot, each with its band, distinguished by colour and dashes.

    Args:
        results: reports, quadratures or densities by name, or a list of them, at most six.
        ax: where to draw; default: a new figure of 8 cm width.
        xscale: see `plot_density`; "auto" fits all spectra.
        yscale: see `plot_density`.
        learning_rate: see `plot_density`.

    Returns:
        The Axes.

    Raises:
        SpectraError: nothing to draw, or more than six spectra: use `plot_blocks` for those.

    Examples:
        >>> import matplotlib; matplotlib.use("Agg")
        >>> import jax, jax.numpy as jnp, spectra
        >>> diagonals = {"flat": jnp.linspace(0, 1, 99), "steep": jnp.logspace(-3, 0, 99)}
        >>> operators = {name: spectra.MatrixOperator(jnp.diag(d)) for name, d in diagonals.items()}
        >>> results = spectra.slq(operators, key=jax.random.key(0), num_steps=20, num_probes=2)
        >>> [line.get_label() for line in spectra.plot_comparison(results).get_lines()]
        ['flat', 'steep']
    """
    results = by_name(results)
    if not 1 <= len(results) <= len(COLORS):
        raise SpectraError(
            f"{len(results)} spectra: one picture can tell 1 to {len(COLORS)} apart; plot_blocks draws any "
            "number side by side."
        )
    _check(xscale, yscale)
    own, ax = ax is None, new_axes(ax)
    densities = {name: as_density(result) for name, result in results.items()}
    ranges = [visible_range(d) for d in densities.values()]
    low, high = min(r[0] for r in ranges), max(r[1] for r in ranges)
    scale = min(d.linear_scale for d in densities.values())
    xscale = _fitting(xscale, scale, low, high)
    for (name, density), color, dash in zip(densities.items(), COLORS, DASHES, strict=False):
        _curve(ax, density, xscale, color, dash, name, alpha=0.12)
    top = np.concatenate([d.density for d in densities.values()])
    _set_axes(ax, list(densities.values()), xscale, yscale, scale, (low, high), top, learning_rate)
    add_legend(ax, own, columns=3 if len(results) > 2 else 2)
    return ax


def edge_of_stability(learning_rate: float) -> float:
    """2 / learning rate: gradient descent is unstable along eigenvectors of a larger eigenvalue.

    Raises:
        SpectraError: the rate is not a positive number.
    """
    if not 0 < learning_rate < np.inf:
        raise SpectraError(f"learning_rate={learning_rate}: use a positive number.")
    return 2 / float(learning_rate)


def _check(xscale: str, yscale: str) -> None:
    if xscale not in XSCALES:
        raise SpectraError(f"xscale={xscale!r}: use one of {XSCALES}.")
    if yscale not in ("log", "linear"):
        raise SpectraError(f"yscale={yscale!r}: use 'log' or 'linear'.")


def _fitting(xscale: str, scale: float, low: float, high: float) -> str:
    if xscale != "auto":
        return xscale
    return "symlog" if asks_for_logarithm(scale, low, high) else "linear"


def _set_axes(ax, densities, xscale, yscale, scale, ends, top, learning_rate) -> None:
    """Scales, limits and labels for the densities drawn; the line of a learning rate widens the axis."""
    low, high = ends
    if yscale == "log":
        ax.set_yscale("log")
        ax.set_ylim(min(map(floor, densities)), 4 * float(np.max(top)))
    else:
        ax.set_ylim(0, 1.08 * float(np.max(top)))
    if learning_rate is not None:
        limit = edge_of_stability(learning_rate)
        ax.axvline(limit, color=ACCENT, linewidth=0.9, linestyle="--", label="2 / learning rate")
        high = max(high, limit * 1.5)
    if xscale == "symlog":
        linear = symlog(ax.xaxis, scale, low, high)
        mark_linear(ax, linear)
        left, right = max(low, -linear), min(high, linear)
        if left < right:
            place = {"transform": ax.get_xaxis_transform(), "ha": "center", "va": "top"}
            ax.text((left + right) / 2, 0.99, "linear", color="0.5", in_layout=False, **place)
    elif xscale == "linear":
        ax.set_xlim(low, high)
    else:
        ax.set_xscale("log")
        ax.set_xlim(scale / 10, max(abs(low), abs(high)))
    ax.set_xlabel("|eigenvalue|" if xscale == "loglog" else "eigenvalue")
    ax.set_ylabel("density")


def _curve(ax, density: Density, xscale: str, color: str, linestyle, label, alpha: float = 0.22) -> None:
    """Band and line; on a log-log axis the negative part as a line of its own."""
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
        ax.fill_between(x[part], lower[part], upper[part], color=color, alpha=alpha, linewidth=0)
        text = None if name is None else label_text(name)
        ax.plot(x[part], line[part], color=color, linewidth=1.0, linestyle=dash, label=text)


def _stems(ax, density: Density, xscale: str) -> None:
    """A stem for each eigenvalue resolved one by one, to the peak that a single one makes there."""
    values = np.asarray(density.outliers, float)
    widths = np.interp(values, density.grid, density.bandwidth)
    tops = 1 / (density.size * widths * np.sqrt(2 * np.pi))
    places = np.abs(values) if xscale == "loglog" else values
    ax.vlines(places, floor(density) * _HIDDEN, tops, color=ACCENT, linewidth=0.8)


def _count_axis(ax, density: Density, xscale: str) -> None:
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


def as_density(held: Any, bandwidth: float | None = None) -> Density:
    """The density of a report, a quadrature or of moments; a density as it is."""
    from spectra.density.smoothing import spectral_density

    if bandwidth is not None:
        if isinstance(held, Density):
            raise SpectraError(
                f"bandwidth={bandwidth}: a density has one already. Pass the quadrature or the report."
            )
        return spectral_density(as_quadrature(held), bandwidth=bandwidth)
    found = as_spectrum(held)
    return found if isinstance(found, Density) else spectral_density(found)


def floor(density: Density) -> float:
    """A tenth of the peak that a single eigenvalue makes where the kernel is widest."""
    widest = float(np.max(density.bandwidth))
    return 0.1 / (density.size * widest * np.sqrt(2 * np.pi))


def visible_range(density: Density) -> tuple[float, float]:
    """Where the density is above the floor, and two kernel widths on: curves end inside of the axes."""
    visible = np.flatnonzero(np.asarray(density.density) > floor(density))
    (first, last), grid, widths = visible[[0, -1]], density.grid, density.bandwidth
    return float(grid[first] - 2 * widths[first]), float(grid[last] + 2 * widths[last])
