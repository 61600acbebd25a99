"""Pictures of spectral densities: one with its band, several on common axes."""

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from spectra.base.errors import SpectraError
from spectra.report.plots.marks import (
    EDGE,
    add_count_axis,
    add_curve,
    add_kernel,
    add_stems,
    floor,
    top_of,
    visible_range,
)
from spectra.report.plots.style import (
    ACCENT,
    COLOR,
    COLORS,
    DASHES,
    ROOM,
    add_legend,
    asks_for_logarithm,
    label_decades,
    mark_linear,
    new_axes,
    shades,
    styled,
    symlog,
    wrapped,
)
from spectra.report.spectrum import SpectrumReport
from spectra.results import Density, Moments, Quadrature, Snapshot, as_quadrature, as_spectrum, by_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.typing import ColorType

Held = SpectrumReport | Snapshot | Quadrature | Moments | Density
_MOST = 20  # spectra in one picture, in shades and dashes that a legend can name
XSCALES = ("auto", "symlog", "linear", "loglog")


@styled
def plot_density(
    density: Held | Mapping[str, Held],
    ax: "Axes | None" = None,
    *,
    xscale: str = "auto",
    yscale: str = "log",
    learning_rate: float | None = None,
    color: "ColorType" = COLOR,
    linestyle="-",
    label: str | None = None,
    band: bool = True,
    outliers: bool = True,
    counts: bool = False,
    bandwidth: float | None = None,
    kernel: bool = True,
    title: str | None = None,
) -> "Axes":
    """Draw a spectral density with its band, its outliers as stems, on axes that fit the spectrum.

    A logarithmic vertical axis ends at a tenth of the height that one eigenvalue in n reaches: below that
    there is no information. The horizontal axis is signed-logarithmic (linear within `density.linear_scale`,
    with a grey background) if the spectrum spans more than a factor of 50 of that, else linear.

    Args:
        density: result of `spectral_density`, or a report, a quadrature or moments to compute it from. A
            mapping of several is drawn as by `plot_comparison`, without the arguments from `color` to
            `counts` and `kernel`.
        ax: where to draw; default: a new figure of 8 cm width.
        xscale: "auto", "symlog", "linear", or "loglog": the logarithm of |λ|, with the density of negative
            eigenvalues as a second, dotted line, which shows power laws as straight lines.
        yscale: "log" or "linear".
        learning_rate: draw the line 2 / learning rate, the stability limit of gradient descent.
        color: color of line and band.
        linestyle: style of the line.
        label: label for a legend.
        band: draw the band.
        outliers: draw a stem for each eigenvalue that stands alone, up to the peak that a single one has
            there; "single" in the legend if all of them are known to be one eigenvalue each.
        counts: draw the number of eigenvalues beyond each point, as seen from zero, as a grey line with its
            own axis on the right.
        bandwidth: kernel width, see `spectral_density`; not for a density, which already has one.
        kernel: draw a bar of one kernel width to each side; the curve cannot show anything narrower.
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
    xscale = _fitting(xscale, density.linear_scale, low, _with_edge(high, learning_rate))
    if own and label is None:  # in Axes of the caller's, the caller says what a legend holds
        label = "density"
    add_curve(ax, density, xscale, color, linestyle, label, alpha=0.22 if band else 0.0)
    if own and band:
        ax.collections[-1].set_label(f"{100 * density.level:g} % band")
    if outliers:
        add_stems(ax, density, xscale)
        if own and np.any((density.outliers > low) & (density.outliers < high)):
            known = density.num_single == len(density.outliers)
            ax.collections[-1].set_label("single eigenvalues" if known else "isolated eigenvalues")
    _set_axes(ax, [density], xscale, yscale, density.linear_scale, (low, high), learning_rate, band)
    if kernel:
        add_kernel(ax, density, color)
    if counts:
        add_count_axis(ax, density, xscale)
    if title is not None:
        ax.set_title(wrapped(title, 44) if own else title, parse_math=False)
    if own or learning_rate is not None:
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

    More than six spectra, such as the snapshots of a run, are drawn in shades from dark to light in their
    order, without bands and kernel widths, which would hide each other.

    Args:
        results: reports, quadratures or densities by name, or a list of them, at most twenty.
        ax: where to draw; default: a new figure of 8 cm width.
        xscale: see `plot_density`; "auto" fits all spectra.
        yscale: see `plot_density`.
        learning_rate: see `plot_density`.

    Returns:
        The Axes.

    Raises:
        SpectraError: nothing to draw, or more than twenty spectra: use `plot_blocks` for those.

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
    if not results:
        raise SpectraError("there are no spectra to draw: the mapping is empty.")
    if len(results) > _MOST:
        raise SpectraError(
            f"{len(results)} spectra: one picture can tell {_MOST} apart; plot_blocks draws any number "
            "side by side."
        )
    _check(xscale, yscale)
    own, ax = ax is None, new_axes(ax)
    densities = {name: as_density(result) for name, result in results.items()}
    drawn = list(densities.values())
    few = len(drawn) <= len(COLORS)
    colors = COLORS if few else shades(len(drawn))
    xscale = _common(drawn, xscale, learning_rate)[0]
    for (name, density), color, dash in zip(densities.items(), colors, itertools.cycle(DASHES), strict=False):
        add_curve(ax, density, xscale, color, dash, name, alpha=0.1 * few, edge=0.4 * few)
    set_axes(ax, drawn, xscale, yscale, learning_rate, band=few)
    if few:
        for density, color in zip(drawn, colors, strict=False):
            add_kernel(ax, density, color)
    add_legend(ax, own)
    return ax


def set_axes(
    ax: "Axes",
    densities: Sequence[Density],
    xscale: str = "auto",
    yscale: str = "log",
    learning_rate: float | None = None,
    band: bool = True,
) -> str:
    """Make room for all of the densities, and return the horizontal scale that fits them."""
    xscale, scale, ends = _common(densities, xscale, learning_rate)
    _set_axes(ax, densities, xscale, yscale, scale, ends, learning_rate, band)
    return xscale


def _common(
    densities: Sequence[Density], xscale: str, learning_rate: float | None = None
) -> tuple[str, float, tuple[float, float]]:
    """The horizontal scale that fits all, up to where it is linear, and its ends."""
    ranges = [visible_range(density) for density in densities]
    low, high = min(r[0] for r in ranges), max(r[1] for r in ranges)
    scale = min(density.linear_scale for density in densities)
    return _fitting(xscale, scale, low, _with_edge(high, learning_rate)), scale, (low, high)


def _with_edge(high: float, learning_rate: float | None) -> float:
    """The right end of an axis that shows the line of a learning rate too."""
    return high if learning_rate is None else max(high, 1.5 * edge_of_stability(learning_rate))


def edge_of_stability(learning_rate: float) -> float:
    """2 / learning rate: gradient descent is unstable along eigenvectors of a larger eigenvalue.

    Raises:
        SpectraError: the rate is not a positive number.
    """
    try:
        positive = 0 < learning_rate < np.inf
    except TypeError:  # a text, or a schedule
        positive = False
    if not positive:
        raise SpectraError(f"learning_rate={learning_rate!r}: use a positive number.")
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


def _set_axes(ax, densities, xscale, yscale, scale, ends, learning_rate, band=True) -> None:
    """Scales, limits and labels for the densities drawn; the line of a learning rate widens the axis."""
    low, high = ends
    if yscale == "log":
        ax.set_yscale("log")
        bottom = min(map(floor, densities))
        ax.set_ylim(bottom, top_of(densities, band, bottom))
    else:
        ax.set_ylim(0, top_of(densities, band))
    if learning_rate is not None:
        limit = edge_of_stability(learning_rate)
        ax.axvline(limit, color=ACCENT, linewidth=0.9, linestyle="--", label=EDGE)
        high = _with_edge(high, learning_rate)
    if xscale == "symlog":
        linear = symlog(ax.xaxis, scale, low, high, room=ROOM)
        mark_linear(ax, linear)
        left, right = max(low, -linear), min(high, linear)
        if left < right:
            place = {"transform": ax.get_xaxis_transform(), "ha": "center", "va": "top"}
            middle = (left + right) / 2
            across = ax.transAxes.inverted().transform(ax.transData.transform((middle, ax.get_ylim()[1])))[0]
            height = 0.99 if across < 0.55 else 0.85  # the width of the kernel is written at the right
            ax.text(middle, height, "linear", color="0.5", in_layout=False, **place)
    elif xscale == "linear":
        ax.set_xlim(low, high)
    else:
        ax.set_xscale("log")
        least, most = scale / 10, max(abs(low), abs(high))
        ax.set_xlim(least, most * (most / least) ** ROOM)
        label_decades(ax.xaxis)
    ax.set_xlabel("|eigenvalue|" if xscale == "loglog" else "eigenvalue")
    ax.set_ylabel("density")


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
