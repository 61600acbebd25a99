"""The spectrum along training: its density as a heat map, and what training recorded with it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from spectra.base.errors import SpectraError
from spectra.report.plots.density import edge_of_stability
from spectra.report.plots.marks import EDGE, floor_of, heat
from spectra.report.plots.style import (
    ACCENT,
    COLORS,
    DASHES,
    DYNAMIC,
    add_colorbar,
    add_legend,
    asks_for_logarithm,
    ink,
    label_text,
    new_axes,
    styled,
    symlog,
    symlog_grid,
)
from spectra.results import SpectrumHistory

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LARGEST = "largest eigenvalue"
"""What `plot_course` takes from the snapshots: "sharpness" may be a number that training recorded."""
_POINTS = 300  # of each axis: two a pixel row at 8 cm in print


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

    Colours are logarithmic and end, as in `plot_density`, at a tenth of the height of one eigenvalue. The
    picture has 300 columns; of more snapshots, the colours show 300, evenly chosen and including the first
    and the last, while lines show all. No product is computed: everything comes from the history.

    Args:
        history: from a `SpectrumTracker`, or from `spectra.load`.
        ax: where to draw; default: a new figure of 8 cm width.
        learning_rate: draw the line 2 / learning rate, where gradient descent becomes unstable; True
            takes the `learning_rate=` that the tracker was called with.
        limit: draw another stability limit: a number, or one per snapshot, such as
            (2 + 2 b1) / ((1 - b1) learning_rate) for gradient descent with momentum and Adam.
        yscale: "symlog", "linear", or "auto".
        colorbar: add a colour bar.

    Returns:
        The Axes.

    Raises:
        SpectraError: fewer than two snapshots, no recorded learning rate, a limit of another length, or an
            unknown yscale.

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
    from spectra.density.smoothing import default_points, smoothed

    limits = _limits(history, learning_rate, limit)
    chosen = in_colour(len(history))
    shown = [history[i].quadrature for i in chosen]
    scales, grids, widths = zip(*map(default_points, shown), strict=True)
    scale = float(np.median(scales))
    low = min(float(grid[0]) for grid in grids)
    lines = [1.2 * float(np.nanmax(y)) for _, y, _ in limits]
    high = max([float(grid[-1]) for grid in grids] + lines + [float(np.max(history.sharpness))])
    wide = yscale == "symlog" or (yscale == "auto" and asks_for_logarithm(scale, low, high))
    grid = symlog_grid(scale, low, high, _POINTS) if wide else np.linspace(low, high, _POINTS)
    lowest = min(floor_of(q.size, h) for q, h in zip(shown, widths, strict=True))
    densities = np.stack([smoothed(q, grid) for q in shown])
    own_figure, ax = ax is None, new_axes(ax)
    mesh = _heat(ax, history.steps[chosen], grid, densities, lowest)
    ax.plot(history.steps, history.sharpness, color=ACCENT, linewidth=1.2, label=LARGEST)
    for name, y, dash in limits:
        ax.plot(history.steps, y, color=ink(ax), linewidth=0.9, linestyle=dash, label=name)
    if wide:
        symlog(ax.yaxis, scale, low, high)
    else:
        ax.set_ylim(low, high)
    _label_steps(ax)
    ax.set_ylabel("eigenvalue")
    add_legend(ax, own_figure)
    if colorbar:
        add_colorbar(mesh, ax, "density")
    return ax


def in_colour(count: int) -> np.ndarray:
    """Which of so many snapshots the colours of `plot_density_over_time` show: as many as it has columns."""
    return np.unique(np.linspace(0, count - 1, min(count, _POINTS)).round().astype(int))


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
    _label_steps(ax)
    ax.set_ylabel(label_text(name))
    if len(drawn) > 1:
        add_legend(ax, own_figure)
    return ax


def _label_steps(ax: "Axes") -> None:
    """The horizontal axis of a course of training, whose steps are whole numbers."""
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    ax.set_xlabel("training step")


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
        lines.append((EDGE, edge, "--"))
    if limit is not None:
        if np.shape(limit) not in ((), (1,), (len(history),)):
            raise SpectraError(
                f"limit has shape {np.shape(limit)}: use a number, or one for each of the {len(history)} "
                "snapshots."
            )
        lines.append(("limit of stability", np.broadcast_to(np.asarray(limit, float), len(history)), ":"))
    return lines


def _heat(ax, steps: np.ndarray, grid: np.ndarray, densities: np.ndarray, lowest: float):
    """Columns of colour; between snapshots the logarithm of the density is interpolated."""
    logs = np.log(np.maximum(densities, lowest / 10))
    times = np.linspace(steps[0], steps[-1], _POINTS)
    after = np.clip(np.searchsorted(steps, times, side="right"), 1, len(steps) - 1)
    share = ((times - steps[after - 1]) / (steps[after] - steps[after - 1]))[:, None]
    values = np.exp((1 - share) * logs[after - 1] + share * logs[after]).T
    return heat(ax, times, grid, values, lowest)
