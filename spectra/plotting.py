"""Pictures of results. Functions take a result and optionally an Axes, and return the Axes."""

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from spectra._errors import SpectraError
from spectra.results import Density, Quadrature

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOR = "#0072B2"  # from the palette of Okabe and Ito, which colour-blind readers can tell apart
ACCENT = "#D55E00"
_HIDDEN = 1e-9  # of the lowest density shown: stands for zero on a logarithmic axis
_DYNAMIC = 50.0  # a spectrum with wider magnitudes than this asks for a logarithmic axis


def plot_density(
    density: Density,
    ax: "Axes | None" = None,
    *,
    xscale: str = "auto",
    learning_rate: float | None = None,
    color: str = COLOR,
    label: str | None = None,
) -> "Axes":
    """Draw a spectral density with its band, its outliers as ticks, on axes that fit the spectrum.

    The vertical axis is logarithmic and ends where one eigenvalue in n would be a tenth of the way up
    from nothing: below lies no information. The horizontal axis is signed-logarithmic (linear within
    `density.linear_scale`) if the spectrum spans more than a factor of 50 of that, else linear.

    Args:
        density: result of `spectral_density`.
        ax: where to draw; default: a new figure of 8 cm width.
        xscale: "auto", "symlog" or "linear".
        learning_rate: draw the line 2 / learning rate, the stability limit of gradient descent.
        color: of line and band.
        label: for a legend.

    Returns:
        The Axes.

    Raises:
        SpectraError: unknown xscale.

    Examples:
        >>> import matplotlib; matplotlib.use("Agg")
        >>> import jax, jax.numpy as jnp, spectra
        >>> op = spectra.MatrixOperator(jnp.diag(jnp.linspace(0.0, 1.0, 200)))
        >>> quadrature = spectra.slq(op, key=jax.random.key(0), num_steps=30, num_probes=4)
        >>> ax = spectra.plot_density(spectra.spectral_density(quadrature))
        >>> ax.get_xlabel()
        'eigenvalue'
    """
    if xscale not in ("auto", "symlog", "linear"):
        raise SpectraError(f"xscale={xscale!r}: use 'auto', 'symlog' or 'linear'.")
    ax = _axes(ax)
    grid = np.asarray(density.grid)
    floor = _floor(density)
    visible = grid[np.asarray(density.density) > floor]
    low, high = visible[0], visible[-1]
    edge = max(abs(low), abs(high))
    if xscale == "auto":
        xscale = "symlog" if edge > _DYNAMIC * density.linear_scale else "linear"
    peak = float(np.max(density.density))
    with np.errstate(divide="ignore"):
        line = np.maximum(density.density, floor * _HIDDEN)
    ax.fill_between(
        grid,
        np.maximum(density.lower, floor * _HIDDEN),
        np.maximum(density.upper, floor * _HIDDEN),
        color=color,
        alpha=0.22,
        linewidth=0,
    )
    ax.plot(grid, line, color=color, linewidth=1.0, label=label)
    ax.set_yscale("log")
    ax.set_ylim(floor, peak * 4)
    _mark_outliers(ax, density, color)
    if xscale == "symlog":
        _symlog(ax, density.linear_scale, low, high)
    else:
        ax.set_xlim(low, high)
    if learning_rate is not None:
        limit = 2 / learning_rate
        ax.axvline(limit, color=ACCENT, linewidth=0.9, linestyle="--", label="2 / learning rate")
        ax.set_xlim(low, max(high, limit * 1.5))
    ax.set_xlabel("eigenvalue")
    ax.set_ylabel("density")
    return ax


def plot_eigenvalues(quadrature: Quadrature, ax: "Axes | None" = None, *, color: str = COLOR) -> "Axes":
    """Draw the cumulative distribution of the eigenvalues with its band.

    Args:
        quadrature: result of `slq`.
        ax: where to draw; default: a new figure of 8 cm width.
        color: of line and band.

    Returns:
        The Axes.

    Examples:
        >>> import matplotlib; matplotlib.use("Agg")
        >>> import jax, jax.numpy as jnp, spectra
        >>> op = spectra.MatrixOperator(jnp.diag(jnp.linspace(0.0, 1.0, 200)))
        >>> quadrature = spectra.slq(op, key=jax.random.key(0), num_steps=30, num_probes=4)
        >>> spectra.plot_eigenvalues(quadrature).get_ylabel()
        'share of eigenvalues below'
    """
    from spectra.density.smoothing import spectral_density

    density = spectral_density(quadrature)
    ax = _axes(ax)
    x = np.unique(np.concatenate([density.grid, np.asarray(quadrature.nodes).ravel()]))
    lower, estimate, upper = quadrature.cdf(x)
    ax.fill_between(x, lower, upper, color=color, alpha=0.22, linewidth=0, step="post")
    ax.step(x, estimate, where="post", color=color, linewidth=1.0)
    if max(abs(x[0]), abs(x[-1])) > _DYNAMIC * density.linear_scale:
        _symlog(ax, density.linear_scale, density.grid[0], density.grid[-1])
    ax.set_ylim(-0.02, 1.02)
    ax.set_xlabel("eigenvalue")
    ax.set_ylabel("share of eigenvalues below")
    return ax


def plot_blocks(
    results: Mapping[str, Quadrature | Density], *, columns: int | None = None, color: str = COLOR
) -> "np.ndarray":
    """Draw the densities of several operators as small multiples on common axes.

    Args:
        results: quadratures or densities by name, such as `slq(op.blocks(by="layer"), key=key)`.
        columns: panels in a row; default: as square as possible, at most six.
        color: of lines and bands.

    Returns:
        Array of the Axes, one for each result, in order; `axes[0].figure` is the picture.

    Raises:
        SpectraError: there is nothing to draw.

    Examples:
        >>> import matplotlib; matplotlib.use("Agg")
        >>> import jax, jax.numpy as jnp, spectra
        >>> blocks = {f"layer {i}": spectra.MatrixOperator(jnp.diag(i * jnp.linspace(0.5, 1.0, 50)))
        ...           for i in (1, 2, 3)}
        >>> axes = spectra.plot_blocks(spectra.slq(blocks, key=jax.random.key(0), num_probes=2))
        >>> [ax.get_title() for ax in axes]
        ['layer 1', 'layer 2', 'layer 3']
    """
    import matplotlib.pyplot as plt

    from spectra.density.smoothing import spectral_density

    if not results:
        raise SpectraError("there are no blocks to draw.")
    densities = [spectral_density(r) if isinstance(r, Quadrature) else r for r in results.values()]
    columns = columns or min(6, int(np.ceil(np.sqrt(len(densities)))))
    rows = -(-len(densities) // columns)
    size = (1.55 * columns + 0.4, 1.25 * rows + 0.4)
    figure, grid = plt.subplots(
        rows, columns, figsize=size, dpi=200, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    axes = grid.ravel()[: len(densities)]
    for ax in grid.ravel()[len(densities) :]:
        ax.set_visible(False)
    for ax, name, density in zip(axes, results, densities, strict=True):
        plot_density(density, ax, color=color)
        _tidy(ax, labels=6)
        lines = textwrap.wrap(name.replace("/", "/ "), 34, break_long_words=False)
        ax.set_title("\n".join(lines).replace("/ ", "/"), fontsize=5.5)
        ax.set_xlabel("")
        ax.set_ylabel("")
    for ax in axes[-columns:]:  # the lowest panel of each column
        ax.tick_params(labelbottom=True)
    scale = float(np.median([d.linear_scale for d in densities]))
    low = min(float(d.grid[0]) for d in densities)
    high = max(float(d.grid[-1]) for d in densities)
    if max(abs(low), abs(high)) > _DYNAMIC * scale:
        _symlog(axes[0], scale, low, high, labels=4)
    else:
        axes[0].set_xscale("linear")
        axes[0].set_xlim(low, high)
    axes[0].set_ylim(min(map(_floor, densities)), 4 * max(float(np.max(d.density)) for d in densities))
    figure.supxlabel("eigenvalue", fontsize=8)
    figure.supylabel("density", fontsize=8)
    return axes


def _axes(ax):
    import matplotlib.pyplot as plt

    if ax is not None:
        return ax
    _, ax = plt.subplots(figsize=(3.15, 2.4), dpi=200, layout="constrained")
    _tidy(ax, labels=7)
    ax.xaxis.label.set_fontsize(8)
    ax.yaxis.label.set_fontsize(8)
    return ax


def _tidy(ax, labels: int) -> None:
    ax.tick_params(labelsize=labels, which="both")
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _floor(density: Density) -> float:
    """A tenth of the peak that a single eigenvalue makes where the kernel is widest."""
    widest = float(np.max(density.bandwidth))
    return 0.1 / (density.size * widest * np.sqrt(2 * np.pi))


def _symlog(ax, scale: float, low: float, high: float, labels: int = 7) -> None:
    """A signed-log axis with a linear part one decade wide and at most `labels` labels."""
    from matplotlib.ticker import FixedLocator, NullLocator

    first = np.floor(np.log10(scale))
    linthresh = 10.0**first
    ax.set_xscale("symlog", linthresh=linthresh, linscale=0.6)
    ax.set_xlim(low, high)
    ticks = [0.0]
    spans = [
        (sign, np.floor(np.log10(abs(end)))) for sign, end in ((-1, low), (1, high)) if sign * end > linthresh
    ]
    decades = sum(last - first + 1 for _, last in spans)
    inner = first if labels > 4 else first + 1  # small panels have no room beside the zero
    stride = max(1, int(np.ceil(decades / (labels - 1))))
    for sign, last in spans:
        ticks += [sign * 10.0**e for e in np.arange(last, inner - 0.5, -stride)]
    ax.xaxis.set_major_locator(FixedLocator(sorted(ticks)))
    ax.xaxis.set_minor_locator(NullLocator())


def _mark_outliers(ax, density: Density, color: str) -> None:
    """Short ticks under the outliers, outside the curve's area."""
    for value in density.outliers:
        ax.axvline(value, ymin=0.0, ymax=0.035, color=ACCENT, linewidth=0.8)
