"""Several densities, or two variables: blocks, the density along training, the loss in a plane."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from spectra.base.errors import SpectraError
from spectra.report.plots.density import Held, as_density, edge_of_stability, plot_density
from spectra.report.plots.marks import floor
from spectra.report.plots.style import (
    ACCENT,
    COLOR,
    COLORS,
    DASHES,
    DYNAMIC,
    MAP,
    add_colorbar,
    add_legend,
    asks_for_logarithm,
    ink,
    label_text,
    mark_linear,
    new_axes,
    plot_style,
    styled,
    symlog,
    wrapped,
)
from spectra.results import Density, LossSlice, SpectrumHistory, by_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LARGEST = "largest eigenvalue"
"""What `plot_course` takes from the snapshots: "sharpness" may be a number that training recorded."""
_POINTS = 300  # of the eigenvalue axis: two a pixel row at 8 cm in print


@styled
def plot_density_over_time(
    history: SpectrumHistory,
    ax: "Axes | None" = None,
    *,
    learning_rate: float | bool | None = None,
    limit=None,
    yscale: str = "auto",
    colorbar: bool = True,
) -> "Axes":
    """Draw the spectrum along training: the density as a heat map, the largest eigenvalue as a line.

    Colours are logarithmic and end, as in `plot_density`, at a tenth of the height of one eigenvalue. No
    product is computed: everything comes from the history.

    Args:
        history: of a `SpectrumTracker`, or as `spectra.load` reads it.
        ax: where to draw; default: a new figure of 8 cm width.
        learning_rate: draw the line 2 / learning rate, where gradient descent becomes unstable; True
            takes the `learning_rate=` that the tracker was called with.
        limit: draw another stability limit: a number, or one per snapshot, such as
            (2 + 2 b1) / ((1 - b1) learning_rate) for gradient descent with momentum and Adam.
        yscale: "symlog", "linear", or "auto".
        colorbar: add one.

    Returns:
        The Axes.

    Raises:
        SpectraError: fewer than two snapshots, no recorded learning rate, or unknown yscale.

    Examples:
        >>> import matplotlib; matplotlib.use("Agg")
        >>> import jax.numpy as jnp, spectra
        >>> tracker = spectra.SpectrumTracker(
        ...     lambda t: spectra.MatrixOperator((1 + t) * jnp.diag(jnp.linspace(0.0, 1.0, 50))), 1)
        >>> for step in range(3):
        ...     snapshot = tracker(step, float(step))
        >>> spectra.plot_density_over_time(tracker.history, learning_rate=0.5).get_xlabel()
        'training step'
    """
    if yscale not in ("auto", "symlog", "linear"):
        raise SpectraError(f"yscale={yscale!r}: use 'auto', 'symlog' or 'linear'.")
    if not isinstance(history, SpectrumHistory):
        raise SpectraError(
            f"a SpectrumHistory is needed, not a {type(history).__name__}: `SpectrumTracker(...).history` is "
            "one, and `spectra.load` of the tracker's file. plot_density draws a single spectrum."
        )
    if len(history) < 2:
        raise SpectraError(f"{len(history)} snapshots are no history yet: at least two are needed.")
    from spectra.density.smoothing import spectral_density

    limits = _limits(history, learning_rate, limit)
    own = [spectral_density(s.quadrature) for s in history]
    scale = float(np.median([d.linear_scale for d in own]))
    low = min(float(d.grid[0]) for d in own)
    high = max([float(d.grid[-1]) for d in own] + [1.2 * float(np.nanmax(y)) for _, y, _ in limits])
    wide = yscale == "symlog" or (yscale == "auto" and asks_for_logarithm(scale, low, high))
    grid = _grid(scale, low, high) if wide else np.linspace(low, high, _POINTS)
    densities = [spectral_density(s.quadrature, grid=grid) for s in history]
    own_figure, ax = ax is None, new_axes(ax)
    mesh = _heat(ax, history.steps, densities, min(map(floor, own)))
    ax.plot(history.steps, history.sharpness, color=ACCENT, linewidth=1.2, label="largest eigenvalue")
    for name, y, dash in limits:
        ax.plot(history.steps, y, color=ink(ax), linewidth=0.9, linestyle=dash, label=name)
    if wide:
        symlog(ax.yaxis, scale, low, high)
    else:
        ax.set_ylim(low, high)
    ax.set_xlabel("training step")
    ax.set_ylabel("eigenvalue")
    add_legend(ax, own_figure)
    if colorbar:
        add_colorbar(mesh, ax, "density")
    return ax


@styled
def plot_course(histories: Mapping[str, SpectrumHistory], name: str, ax: "Axes | None" = None) -> "Axes":
    """Draw a number that training recorded, or `LARGEST`, against the step: a line for each run.

    The axis is logarithmic where all numbers are positive and their range is wide.
    """
    own_figure, ax = ax is None, new_axes(ax, height=1.8)
    drawn = []
    for i, (run, history) in enumerate(histories.items()):
        values = history.sharpness if name == LARGEST else history.scalar(name)
        known = np.isfinite(values)
        if known.any():
            style = {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[i // len(COLORS) % len(DASHES)]}
            ax.plot(history.steps[known], values[known], marker=".", label=label_text(run), **style)
            drawn.append(values[known])
    if drawn:
        low, high = (end(list(map(end, drawn))) for end in (min, max))
        if low > 0 and high > DYNAMIC * low:
            ax.set_yscale("log")
    ax.set_xlabel("training step")
    ax.set_ylabel(label_text(name))
    if len(drawn) > 1:
        add_legend(ax, own_figure)
    return ax


def _limits(history: SpectrumHistory, learning_rate, limit) -> list[tuple[str, np.ndarray, str]]:
    """Name, values and dashes of the lines that are asked for."""
    lines = []
    if learning_rate is not None and learning_rate is not False:
        if learning_rate is True:
            rates = history.scalar("learning_rate")
            edge = 2 / np.where(rates > 0, rates, np.nan)  # a warm-up begins at zero, where all is stable
            if np.isnan(edge).all():
                raise SpectraError(
                    "no learning rate was recorded, or none above zero: call the tracker with "
                    "learning_rate=, or pass the number."
                )
        else:
            edge = np.full(len(history), edge_of_stability(learning_rate))
        lines.append(("2 / learning rate", edge, "--"))
    if limit is not None:
        lines.append(("limit of stability", np.broadcast_to(np.asarray(limit, float), len(history)), ":"))
    return lines


def _grid(scale: float, low: float, high: float) -> np.ndarray:
    """Points that are equally spaced on a signed-logarithmic axis."""
    return scale * np.sinh(np.linspace(np.arcsinh(low / scale), np.arcsinh(high / scale), _POINTS))


def _heat(ax, steps: np.ndarray, densities: list[Density], lowest: float):
    """Columns of colour; between snapshots the logarithm of the density is interpolated."""
    logs = np.log(np.maximum([d.density for d in densities], lowest / 10))
    times = np.linspace(steps[0], steps[-1], max(_POINTS, len(steps)))
    grid = np.asarray(densities[0].grid)
    after = np.clip(np.searchsorted(steps, times, side="right"), 1, len(steps) - 1)
    share = ((times - steps[after - 1]) / (steps[after] - steps[after - 1]))[:, None]
    values = np.exp((1 - share) * logs[after - 1] + share * logs[after]).T
    return heat(ax, times, grid, values, lowest)


def heat(ax, x: np.ndarray, y: np.ndarray, values: np.ndarray, lowest: float):
    """Densities (y, x) as colours, from white, for none, over light, for little, to dark."""
    from matplotlib.colors import LogNorm

    ax.grid(False)  # which some styles draw, over the colours
    shown = np.ma.masked_less(values, lowest)
    norm = LogNorm(lowest, max(float(np.max(values)), 2 * lowest))
    return ax.pcolormesh(x, y, shown, norm=norm, cmap=f"{MAP}_r", shading="nearest", rasterized=True)


_PANELS = 20  # beyond which they are too many to be looked at one by one
_PANEL_POINTS = 400  # of the eigenvalue axis of a heat map


def plot_blocks(
    results: Mapping[str, Held] | Sequence[Held],
    *,
    columns: int | None = None,
    color: str = COLOR,
    own_x: bool = False,
    heat_map: bool | None = None,
) -> "np.ndarray":
    """Draw the densities of several operators as small multiples, or many of them as a heat map.

    Args:
        results: reports, quadratures or densities by name, such as `slq(op.blocks(by="layer"), key=key)`.
        columns: panels in a row; default: as square as possible, at most six.
        color: of lines and bands.
        own_x: give each panel its own horizontal axis instead of a shared one.
        heat_map: draw a row of colours for each result instead of a panel; default: if there are more than
            twenty.

    Returns:
        Array of the Axes, one for each result, in order, or the single one of a heat map; `axes[0].figure` is
        the figure.

    Raises:
        SpectraError: there is nothing to draw, or in less than one column.

    Examples:
        >>> import matplotlib; matplotlib.use("Agg")
        >>> import jax, jax.numpy as jnp, spectra
        >>> blocks = {f"layer {i}": spectra.MatrixOperator(jnp.diag(i * jnp.linspace(0.5, 1.0, 50)))
        ...           for i in (1, 2, 3)}
        >>> axes = spectra.plot_blocks(spectra.slq(blocks, key=jax.random.key(0), num_probes=2))
        >>> [ax.get_title() for ax in axes]
        ['layer 1, n = 50', 'layer 2, n = 50', 'layer 3, n = 50']
    """
    import matplotlib.pyplot as plt

    results = by_name(results)
    if not results:
        raise SpectraError("there are no blocks to draw.")
    densities = [as_density(result) for result in results.values()]
    if heat_map or (heat_map is None and len(results) > _PANELS):
        return np.array([_rows(list(results), densities)], object)
    if columns is not None and columns < 1:
        raise SpectraError(f"columns={columns}: use 1 or more, or None.")
    columns = columns or min(6, int(np.ceil(np.sqrt(len(densities)))))
    rows = -(-len(densities) // columns)
    size = (1.55 * columns + 0.4, 1.25 * rows + 0.4)
    with plot_style(xtick_labelsize=6, ytick_labelsize=6):
        figure, grid = plt.subplots(
            rows, columns, figsize=size, sharex=not own_x, sharey=True, squeeze=False, layout="constrained"
        )
    axes = grid.ravel()[: len(densities)]
    for ax in grid.ravel()[len(densities) :]:
        ax.set_visible(False)
    for ax, name, density in zip(axes, results, densities, strict=True):
        plot_density(density, ax, color=color, xscale="linear", kernel=False)  # until the axis is known
        ax.set_title(wrapped(f"{name}, n = {density.size:,}", 34), fontsize=5.5, parse_math=False)
        ax.set_xlabel("")
        ax.set_ylabel("")
    for ax in axes[-columns:]:  # the lowest panel of each column
        ax.tick_params(labelbottom=True)
    if own_x:
        for ax, density in zip(axes, densities, strict=True):
            _set_x([ax], [density])
    else:
        _set_x(list(axes), densities)
    axes[0].set_ylim(min(map(floor, densities)), 4 * max(float(np.max(d.density)) for d in densities))
    figure.supxlabel("eigenvalue", fontsize=8)
    figure.supylabel("density", fontsize=8)
    return axes


def _set_x(axes: list, densities: list[Density]) -> None:
    """One horizontal axis, which these panels share, for these densities."""
    scale, low, high = _extent(densities)
    if asks_for_logarithm(scale, low, high):
        linear = symlog(axes[0].xaxis, scale, low, high, labels=4)
        for ax in axes:
            mark_linear(ax, linear)
    else:
        axes[0].set_xscale("linear")
        axes[0].set_xlim(low, high)


def _extent(densities: list[Density]) -> tuple[float, float, float]:
    """Scale below which detail ends, and both ends of the axis."""
    scale = float(np.median([d.linear_scale for d in densities]))
    return scale, min(float(d.grid[0]) for d in densities), max(float(d.grid[-1]) for d in densities)


def _rows(names: list[str], densities: list[Density]) -> Any:
    """A heat map with a row for each density, the first above."""
    import matplotlib.pyplot as plt

    scale, low, high = _extent(densities)
    wide = asks_for_logarithm(scale, low, high)
    points = np.linspace(np.arcsinh(low / scale), np.arcsinh(high / scale), _PANEL_POINTS) if wide else None
    grid = np.linspace(low, high, _PANEL_POINTS) if points is None else scale * np.sinh(points)
    values = np.array([np.interp(grid, d.grid, d.density, left=0, right=0) for d in densities])
    with plot_style(ytick_labelsize=5):
        height = min(1.0 + 0.09 * len(names), 8.0)
        _, ax = plt.subplots(figsize=(3.15, height), layout="constrained")
        mesh = heat(ax, grid, np.arange(len(names)), values, min(map(floor, densities)))
        if wide:
            symlog(ax.xaxis, scale, low, high)
        ax.invert_yaxis()
        stride = -(-len(names) // 80)
        labels = [name if len(name) <= 26 else f"…{name[-25:]}" for name in names[::stride]]
        ax.set_yticks(np.arange(0, len(names), stride), labels, parse_math=False)
        ax.set_xlabel("eigenvalue")
        add_colorbar(mesh, ax, "density")
    return ax


@styled
def plot_landscape(
    plane: LossSlice, ax: "Axes | None" = None, *, levels: int = 10, quadratic: bool = True
) -> "Axes":
    """Draw the loss in the plane of two directions, and what the curvature predicts for it.

    The loss along a single direction is a curve, with the quadratic model dashed. No loss is evaluated here;
    `loss_slice` has done that.

    Args:
        plane: result of `loss_slice`.
        ax: where to draw; default: a new figure of 8 cm width.
        levels: approximate number of contour lines.
        quadratic: draw the quadratic model, dashed; of a plane every second contour.

    Returns:
        The Axes.

    Examples:
        >>> import matplotlib; matplotlib.use("Agg")
        >>> import jax, jax.numpy as jnp, spectra
        >>> op = spectra.HessianOperator(lambda w, _: jnp.sum(w**4), jnp.array([1.0, 2.0]), None)
        >>> plane = spectra.loss_slice(op, spectra.eigsh(op, 2, key=jax.random.key(0)), num_points=9)
        >>> spectra.plot_landscape(plane).get_xlabel()
        'along $v_1$, λ = 48'
    """
    from matplotlib.ticker import MaxNLocator

    if not isinstance(plane, LossSlice):
        raise SpectraError(
            f"a LossSlice is needed, which `loss_slice` returns, not a {type(plane).__name__}."
        )
    own = ax is None
    if len(plane.y) == 1:
        return _curve(plane, new_axes(ax), quadratic, own)
    ax = new_axes(ax, height=2.95)
    loss = np.ma.masked_invalid(plane.loss)
    edges = MaxNLocator(levels).tick_values(float(loss.min()), float(loss.max()))
    filled = ax.contourf(plane.x, plane.y, loss, levels=edges, cmap=MAP)
    ax.contour(plane.x, plane.y, loss, levels=edges, colors="white", linewidths=0.4, alpha=0.7)
    if quadratic:
        every_second = edges[1::2]
        style = {"colors": ACCENT, "linewidths": 0.7, "linestyles": "dashed"}
        if (plane.quadratic.min() < every_second[-1]) and (plane.quadratic.max() > every_second[0]):
            ax.contour(plane.x, plane.y, plane.quadratic, levels=every_second, **style)
            ax.plot([], [], "--", color=ACCENT, linewidth=0.7, label="quadratic model, every second level")
    dot = {"markeredgecolor": "black", "markersize": 4, "markeredgewidth": 0.7}
    ax.plot(0, 0, "o", color="white", label="parameters", **dot)
    ax.set_aspect("equal")
    ax.spines[:].set_visible(False)
    for axis, i in ((ax.xaxis, 0), (ax.yaxis, 1)):
        axis.set_major_locator(MaxNLocator(5, symmetric=True))
        axis.set_label_text(_along(plane, i))
    add_legend(ax, own)
    add_colorbar(filled, ax, "loss", ticks=edges[::2])
    return ax


def _along(plane: LossSlice, i: int) -> str:
    if plane.of_eigenvectors:
        return f"along $v_{i + 1}$, λ = {plane.eigenvalues[i]:.4g}"
    return f"along {plane.names[i]}, curvature {plane.eigenvalues[i]:.4g}"


def _curve(plane: LossSlice, ax: "Axes", quadratic: bool, own: bool) -> "Axes":
    ax.plot(plane.x, plane.loss[0], color=ink(ax), label="loss")
    low, high = ax.get_ylim()
    if quadratic:
        style = {"linewidth": 0.7, "linestyle": "dashed", "label": "quadratic model"}
        ax.plot(plane.x, plane.quadratic[0], color=ACCENT, **style)
        ax.set_ylim(low, high)  # those of the loss: a quadratic may leave the picture
    dot = {"markeredgecolor": "black", "markersize": 4, "markeredgewidth": 0.7}
    ax.plot(0, plane.center, "o", color="white", label="parameters", **dot)
    add_legend(ax, own)
    ax.set_xlabel(_along(plane, 0))
    ax.set_ylabel("loss")
    return ax
