"""Small multiples: the densities of all blocks on common axes."""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np

from spectra._errors import SpectraError
from spectra.plotting.density import Held, as_density, floor, plot_density
from spectra.plotting.style import COLOR, asks_for_logarithm, mark_linear, plot_style, symlog
from spectra.results import by_name


def plot_blocks(
    results: Mapping[str, Held] | Sequence[Held], *, columns: int | None = None, color: str = COLOR
) -> "np.ndarray":
    """Draw the densities of several operators as small multiples on common axes.

    Args:
        results: reports, quadratures or densities by name, such as `slq(op.blocks(by="layer"), key=key)`.
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

    results = by_name(results)
    if not results:
        raise SpectraError("there are no blocks to draw.")
    densities = [as_density(result) for result in results.values()]
    columns = columns or min(6, int(np.ceil(np.sqrt(len(densities)))))
    rows = -(-len(densities) // columns)
    size = (1.55 * columns + 0.4, 1.25 * rows + 0.4)
    with plot_style(xtick_labelsize=6, ytick_labelsize=6):
        figure, grid = plt.subplots(
            rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
        )
    axes = grid.ravel()[: len(densities)]
    for ax in grid.ravel()[len(densities) :]:
        ax.set_visible(False)
    for ax, name, density in zip(axes, results, densities, strict=True):
        plot_density(density, ax, color=color, xscale="linear")  # until the axis that all share is known
        lines = textwrap.wrap(name.replace("/", "/ "), 34, break_long_words=False)
        ax.set_title("\n".join(lines).replace("/ ", "/"), fontsize=5.5, parse_math=False)
        ax.set_xlabel("")
        ax.set_ylabel("")
    for ax in axes[-columns:]:  # the lowest panel of each column
        ax.tick_params(labelbottom=True)
    scale = float(np.median([d.linear_scale for d in densities]))
    low = min(float(d.grid[0]) for d in densities)
    high = max(float(d.grid[-1]) for d in densities)
    if asks_for_logarithm(scale, low, high):
        linear = symlog(axes[0].xaxis, scale, low, high, labels=4)
        for ax in axes:
            mark_linear(ax, linear)
    else:
        axes[0].set_xscale("linear")
        axes[0].set_xlim(low, high)
    axes[0].set_ylim(min(map(floor, densities)), 4 * max(float(np.max(d.density)) for d in densities))
    figure.supxlabel("eigenvalue", fontsize=8)
    figure.supylabel("density", fontsize=8)
    return axes
