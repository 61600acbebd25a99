"""Densities of many operators side by side: small multiples, or a heat map with a row for each."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from spectra.base.calls import checked
from spectra.base.errors import SpectraError
from spectra.report.plots.density import Held, as_density, plot_density
from spectra.report.plots.marks import floor, heat, top_of
from spectra.report.plots.style import (
    COLOR,
    ROOM,
    add_colorbar,
    asks_for_logarithm,
    mark_linear,
    new_axes,
    plot_style,
    short_names,
    symlog,
    symlog_grid,
    wrapped,
)
from spectra.results import Density, by_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.typing import ColorType

_PANELS = 20  # beyond which they are too many to be looked at one by one
_POINTS = 400  # of the eigenvalue axis of a heat map


@checked
def plot_blocks(
    results: Mapping[str, Held] | Sequence[Held],
    ax: "Axes | Sequence[Axes] | np.ndarray | None" = None,
    *,
    columns: int | None = None,
    color: "ColorType" = COLOR,
    own_x: bool = False,
    heat_map: bool | None = None,
) -> "np.ndarray":
    """Draw the densities of several operators as small multiples, or many of them as a heat map.

    Args:
        results: reports, quadratures or densities by name, such as `slq(op.blocks(by="layer"), key=key)`.
        ax: where to draw: one Axes for each result, such as the array that `plt.subplots` returns, row by
            row, or a single one for a heat map; default: a new figure.
        columns: panels in a row of a new figure; default: as square as possible, at most six.
        color: of lines and bands.
        own_x: give each panel its own horizontal axis instead of the same one.
        heat_map: draw a row of colours for each result instead of a panel; default: if there are more than
            twenty, or in a single `ax` more than one.

    Returns:
        Array of the Axes: one for each result, in order, or only one for a heat map. `axes[0].figure` is the
        figure.

    Raises:
        SpectraError: there is nothing to draw, fewer than one column, or another number of Axes.

    Examples:
        >>> import matplotlib; matplotlib.use("Agg")
        >>> import jax, jax.numpy as jnp, spectra
        >>> blocks = {f"layer {i}": spectra.MatrixOperator(jnp.diag(i * jnp.linspace(0.5, 1.0, 50)))
        ...           for i in (1, 2, 3)}
        >>> axes = spectra.plot_blocks(spectra.slq(blocks, key=jax.random.key(0), num_probes=2))
        >>> [ax.get_title() for ax in axes]
        ['layer 1, n = 50', 'layer 2, n = 50', 'layer 3, n = 50']
    """
    results = by_name(results)
    if not results:
        raise SpectraError("there are no blocks to draw.")
    densities = [as_density(result) for result in results.values()]
    given = None if ax is None else [new_axes(one) for one in np.ravel(np.array(ax, object))]
    if heat_map:
        for name, chosen in {"columns": columns is not None, "own_x": own_x}.items():
            if chosen:
                raise SpectraError(f"{name}= is for panels: leave it out, or leave out heat_map=True.")
    if heat_map is None:
        heat_map = len(results) > _PANELS if given is None else len(given) == 1 < len(results)
    if given is not None:
        _check_given(given, 1 if heat_map else len(results), columns)
    if heat_map:
        return np.array([_rows(list(results), densities, given[0] if given else None)], object)
    axes = given or _panels(len(results), columns, share=not own_x)
    for panel, name, density in zip(axes, results, densities, strict=True):
        plot_density(density, panel, color=color, xscale="linear", kernel=False)  # until the axis is known
        title = _title(name, density.size)
        panel.set_title(title, fontsize=5.5 if given is None else "small", parse_math=False)
        if given is None:  # labels are the figure's
            panel.set_xlabel("")
            panel.set_ylabel("")
    bottom = min(map(floor, densities))
    top = top_of(densities, band=True, bottom=bottom)
    for panel, density in zip(axes, densities, strict=True):
        _set_x(panel, [density] if own_x else densities)
        panel.set_ylim(bottom, top)
    return np.array(axes, object)


def _check_given(axes: list["Axes"], needed: int, columns: int | None) -> None:
    """The caller's Axes are as many as are drawn into, and arranged already."""
    if columns is not None:
        raise SpectraError("columns= is for a new figure: leave it out, or leave out ax=.")
    if len(axes) != needed:
        raise SpectraError(
            f"ax holds {len(axes)} Axes, and {needed} are drawn: give one for each result, or a single one "
            "for a heat map."
        )


def _panels(count: int, columns: int | None, share: bool) -> list["Axes"]:
    """The Axes of a new figure, row by row; the lowest of each column has labels of its ticks."""
    import matplotlib.pyplot as plt

    if columns is not None and columns < 1:
        raise SpectraError(f"columns={columns}: use 1 or more, or None.")
    columns = columns or min(6, int(np.ceil(np.sqrt(count))))
    rows = -(-count // columns)
    size = (1.55 * columns + 0.4, 1.25 * rows + 0.4)
    with plot_style(xtick_labelsize=6, ytick_labelsize=6):
        figure, grid = plt.subplots(
            rows, columns, figsize=size, sharex=share, sharey=True, squeeze=False, layout="constrained"
        )
    axes = list(grid.ravel())
    for ax in axes[count:]:
        ax.set_visible(False)
    for ax in axes[:count][-columns:]:
        ax.tick_params(labelbottom=True)
    figure.supxlabel("eigenvalue", fontsize=8)
    figure.supylabel("density", fontsize=8)
    return axes[:count]


def _title(name: str, size: int) -> str:
    """A name and a size, which no line ends within."""
    kept = "\N{NO-BREAK SPACE}"
    return wrapped(f"{name}, n{kept}={kept}{size:,}", 34).replace(kept, " ")


def _set_x(ax: "Axes", densities: list[Density]) -> None:
    """A horizontal axis for these densities."""
    scale, low, high = _extent(densities)
    if asks_for_logarithm(scale, low, high):
        mark_linear(ax, symlog(ax.xaxis, scale, low, high, labels=4, room=ROOM))
    else:
        ax.set_xscale("linear")
        ax.set_xlim(low, high)


def _extent(densities: list[Density]) -> tuple[float, float, float]:
    """Scale below which detail ends, and both ends of the axis."""
    scale = float(np.median([d.linear_scale for d in densities]))
    return scale, min(float(d.grid[0]) for d in densities), max(float(d.grid[-1]) for d in densities)


def _rows(names: list[str], densities: list[Density], ax: "Axes | None") -> "Axes":
    """A heat map with a row for each density, the first above."""
    scale, low, high = _extent(densities)
    wide = asks_for_logarithm(scale, low, high)
    grid = symlog_grid(scale, low, high, _POINTS) if wide else np.linspace(low, high, _POINTS)
    values = np.array([np.interp(grid, d.grid, d.density, left=0, right=0) for d in densities])
    with plot_style(ytick_labelsize=5) if ax is None else contextlib.nullcontext():
        ax = new_axes(ax, height=min(1.0 + 0.09 * len(names), 8.0))
        mesh = heat(ax, grid, np.arange(len(names)), values, min(map(floor, densities)))
        stride = -(-len(names) // 80)
        labels = short_names(names[::stride])
        if wide:  # long names take the room of labels below
            symlog(ax.xaxis, scale, low, high, labels=7 if max(map(len, labels)) < 12 else 4)
        ax.invert_yaxis()
        ax.set_yticks(np.arange(0, len(names), stride), labels, parse_math=False)
        ax.set_xlabel("eigenvalue")
        add_colorbar(mesh, ax, "density")
    return ax
