"""The loss along one direction or in the plane of two, beside its quadratic model."""

from typing import TYPE_CHECKING

import numpy as np

from spectra.base.errors import SpectraError
from spectra.report.plots.style import ACCENT, MAP, add_colorbar, add_legend, ink, new_axes, styled
from spectra.results import LossSlice

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
        quadratic: draw the quadratic model, dashed; in a plane, only every second contour of it.

    Returns:
        The Axes.

    Raises:
        SpectraError: `plane` is not a result of `loss_slice`.

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
