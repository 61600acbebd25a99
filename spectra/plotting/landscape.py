"""The loss around the parameters, in the plane of two eigenvectors."""

from typing import TYPE_CHECKING

import numpy as np

from spectra._errors import SpectraError
from spectra.plotting.style import ACCENT, MAP, add_colorbar, new_axes, styled
from spectra.results import LossSlice

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@styled
def plot_landscape(
    plane: LossSlice, ax: "Axes | None" = None, *, levels: int = 10, quadratic: bool = True
) -> "Axes":
    """Draw the loss in the plane of two eigenvectors, and what the eigenvalues predict for it.

    No loss is evaluated: `loss_slice` has done that.

    Args:
        plane: result of `loss_slice`.
        ax: where to draw; default: a new figure of 8 cm width.
        levels: lines of equal loss, about.
        quadratic: draw every second of them for the quadratic model, dashed.

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
    ax = new_axes(ax, height=2.75)
    loss = np.ma.masked_invalid(plane.loss)
    edges = MaxNLocator(levels).tick_values(float(loss.min()), float(loss.max()))
    filled = ax.contourf(plane.x, plane.y, loss, levels=edges, cmap=MAP)
    ax.contour(plane.x, plane.y, loss, levels=edges, colors="white", linewidths=0.4, alpha=0.7)
    if quadratic:
        every_second = edges[1::2]
        style = {"colors": ACCENT, "linewidths": 0.7, "linestyles": "dashed"}
        if (plane.quadratic.min() < every_second[-1]) and (plane.quadratic.max() > every_second[0]):
            ax.contour(plane.x, plane.y, plane.quadratic, levels=every_second, **style)
    ax.plot(0, 0, "o", color="white", markeredgecolor="black", markersize=4, markeredgewidth=0.7)
    ax.set_aspect("equal")
    ax.spines[:].set_visible(False)
    for axis, i in ((ax.xaxis, 0), (ax.yaxis, 1)):
        axis.set_major_locator(MaxNLocator(5, symmetric=True))
        axis.set_label_text(f"along $v_{i + 1}$, λ = {plane.eigenvalues[i]:.4g}")
    add_colorbar(filled, ax, "loss", ticks=edges[::2])
    return ax
