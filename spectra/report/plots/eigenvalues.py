"""Pictures of eigenvalues: their cumulative distribution, pairs by rank, and where eigenvectors live."""

from typing import TYPE_CHECKING

import jax
import numpy as np

from spectra.base.errors import SpectraError
from spectra.base.paths import group_leaves
from spectra.quadrature import distribution
from spectra.report.plots.style import (
    ACCENT,
    COLOR,
    MAP,
    add_colorbar,
    add_legend,
    asks_for_logarithm,
    new_axes,
    styled,
    symlog,
)
from spectra.report.spectrum import SpectrumReport
from spectra.results import Eigenpairs, Quadrature, as_quadrature

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.typing import ColorType

YSCALES = ("linear", "log", "complement")
_NOTHING = 1e-30  # stands for zero on a logarithmic axis


@styled
def plot_cdf(
    quadrature: Quadrature | SpectrumReport,
    ax: "Axes | None" = None,
    *,
    level: float = 0.95,
    yscale: str = "linear",
    color: "ColorType" = COLOR,
) -> "Axes":
    """Draw the cumulative distribution of the eigenvalues with its bracket and its band.

    The dark area is the bracket: what the steps leave open for the probes drawn, which is certain. The light
    area around it adds what a finite number of probes leaves open: the whole curve lies within it with
    probability `level`.

    Args:
        quadrature: result of `slq`, or a report, which contains it.
        ax: where to draw; default: a new figure of 8 cm width.
        level: confidence of the band.
        yscale: "linear"; "log", which shows the few eigenvalues at the lower end; or "complement", the
            number of eigenvalues above each point on a logarithmic axis: the distribution of a network is
            a single step on a linear one.
        color: color of line, bracket and band.

    Returns:
        The Axes.

    Raises:
        SpectraError: unknown yscale.

    Examples:
        >>> import matplotlib; matplotlib.use("Agg")
        >>> import jax, jax.numpy as jnp, spectra
        >>> op = spectra.MatrixOperator(jnp.diag(jnp.linspace(0.0, 1.0, 200)))
        >>> quadrature = spectra.slq(op, key=jax.random.key(0), num_steps=30, num_probes=4)
        >>> spectra.plot_cdf(quadrature).get_ylabel()
        'share of eigenvalues below'
    """
    from spectra.density.smoothing import spectral_density

    if yscale not in YSCALES:
        raise SpectraError(f"yscale={yscale!r}: use one of {YSCALES}.")
    quadrature = as_quadrature(quadrature)
    density = spectral_density(quadrature)
    own, ax = ax is None, new_axes(ax)
    x = np.unique(np.concatenate([density.grid, np.asarray(quadrature.nodes).ravel()]))
    inner_lower, estimate, inner_upper, lower, upper = distribution.curves(quadrature, x, level)
    curves = [lower, upper, inner_lower, inner_upper, np.clip(estimate, lower, upper)]
    if yscale == "complement":
        curves = [quadrature.size * (1 - curve) for curve in curves]
    if yscale != "linear":  # zero is below the picture, not nowhere
        curves = [np.maximum(curve, _NOTHING) for curve in curves]
    lower, upper, inner_lower, inner_upper, estimate = curves
    step = {"step": "post", "color": color, "linewidth": 0}
    ax.fill_between(x, lower, upper, alpha=0.2, label=f"{100 * level:g} % band", **step)
    ax.fill_between(x, inner_lower, inner_upper, alpha=0.4, label="bracket", **step)
    ax.step(x, estimate, where="post", color=color, linewidth=1.0, label="estimate")
    low, high = float(density.grid[0]), float(density.grid[-1])
    if asks_for_logarithm(density.linear_scale, low, high):
        symlog(ax.xaxis, density.linear_scale, low, high)
    else:
        ax.set_xlim(low, high)
    if yscale == "linear":
        ax.set_ylim(-0.02, 1.02)
    else:
        ax.set_yscale("log")
        unit = 1.0 if yscale == "complement" else 1 / quadrature.size
        ax.set_ylim(unit / 2, 1.5 * unit * quadrature.size)
    ax.set_xlabel("eigenvalue")
    ax.set_ylabel("number of eigenvalues above" if yscale == "complement" else "share of eigenvalues below")
    add_legend(ax, own)
    return ax


@styled
def plot_eigenvalues(
    result: Eigenpairs | Quadrature | SpectrumReport, ax: "Axes | None" = None, *, color: "ColorType" = COLOR
) -> "Axes":
    """Draw eigenpairs by rank, with their residuals and rounding, or a quadrature as `plot_cdf` does.

    Args:
        result: result of `eigsh` or of `slq`, or a report.
        ax: where to draw; default: a new figure of 8 cm width.
        color: color of the eigenvalues. Pairs that have not converged are open circles.

    Returns:
        The Axes.

    Examples:
        >>> import matplotlib; matplotlib.use("Agg")
        >>> import jax, jax.numpy as jnp, spectra
        >>> op = spectra.MatrixOperator(jnp.diag(jnp.linspace(0.0, 1.0, 200)))
        >>> pairs = spectra.eigsh(op, 3, which="LA", key=jax.random.key(0))
        >>> spectra.plot_eigenvalues(pairs).get_ylabel()
        'eigenvalue'
    """
    if not isinstance(result, Eigenpairs):
        return plot_cdf(result, ax, color=color)
    from matplotlib.ticker import MaxNLocator

    own, ax = ax is None, new_axes(ax)
    values = np.asarray(result.values)[::-1]
    residuals = np.asarray(result.residuals)[::-1] + result.noise_floor
    rank = np.arange(1, len(values) + 1)
    done = np.asarray(result.converged)[::-1]
    ax.errorbar(rank, values, residuals, fmt="none", ecolor=color, elinewidth=0.8, capsize=1.5)
    ax.plot(rank[done], values[done], "o", color=color, markersize=3)
    if not done.all():
        open_circles = {"markersize": 3, "markerfacecolor": "white", "label": "not converged, ± residual"}
        ax.plot(rank[~done], values[~done], "o", color=color, **open_circles)
    sizes = np.abs(values)
    if (values > 0).all() and sizes.max() > 50 * sizes.min():
        ax.set_yscale("log")
    else:
        ax.axhline(0, color=ACCENT, linewidth=0.6, linestyle=":")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(values) < 3:  # the locator has no whole steps that small
        ax.set_xticks(rank)
        ax.set_xlim(0.5, len(values) + 0.5)
    elif own:
        ax.set_xlim(left=max(0.5, ax.get_xlim()[0]))  # there is no rank 0
    ax.set_xlabel("rank")
    ax.set_ylabel("eigenvalue")
    if own and not done.all():
        add_legend(ax, own)
    return ax


_NAME = 26  # characters of a layer's name that are shown


@styled
def plot_eigenvector_mass(pairs: Eigenpairs, ax: "Axes | None" = None, *, by: str = "layer") -> "Axes":
    """Draw the mass of each eigenvector in each layer: the sum of the squares of its entries there.

    Each column is a vector, and its masses add up to one. The first column is the share of the parameters in
    each layer, which is the expected mass of a random vector.

    Args:
        pairs: result of `eigsh`; columns are in the order of |λ|, the largest first.
        ax: where to draw; default: a new figure of 8 cm width.
        by: "layer" or "leaf".

    Returns:
        The Axes.

    Raises:
        StructureError: unknown `by`.
        SpectraError: there are no pairs, or `pairs` is something else.

    Examples:
        >>> import matplotlib; matplotlib.use("Agg")
        >>> import jax, jax.numpy as jnp, spectra
        >>> def loss_fn(params, x):
        ...     return jnp.mean((x @ params["a"]["w"]) ** 2) + 9 * jnp.sum(params["b"]["w"] ** 2)
        >>> params = {"a": {"w": jnp.ones(3)}, "b": {"w": jnp.ones(2)}}
        >>> op = spectra.HessianOperator(loss_fn, params, jnp.eye(3))
        >>> ax = spectra.plot_eigenvector_mass(spectra.eigsh(op, 2, which="LM", key=jax.random.key(0)))
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['a', 'b']
    """
    if not isinstance(pairs, Eigenpairs):
        raise SpectraError(f"Eigenpairs are needed, which `eigsh` returns, not a {type(pairs).__name__}.")
    if not len(pairs.values):
        raise SpectraError("there are no eigenpairs to draw.")
    names, share, mass = layer_mass(pairs, by)
    order = np.argsort(-np.abs(np.asarray(pairs.values)), kind="stable")
    k, rows = len(order), len(names)
    ax = new_axes(ax, height=min(0.9 + 0.16 * max(rows, 5), 7.0))
    table = np.concatenate([share[:, None], np.full((rows, 1), np.nan), mass[:, order]], axis=1)
    image = ax.imshow(table, cmap=MAP, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    shown = np.arange(0, k, max(1, -(-k // 8)))
    ax.set_xticks(np.append(0, shown + 2), ["all", *(f"{i + 1}" for i in shown)])
    stride = max(1, -(-rows // 40))
    ax.set_yticks(np.arange(0, rows, stride), [_short(name) for name in names[::stride]], parse_math=False)
    ax.tick_params(axis="y", labelsize=6 if rows <= 24 else 5, length=0)
    ax.spines[:].set_visible(False)
    ax.grid(False)
    ax.set_xlabel("eigenvector (all: share of the parameters)")
    add_colorbar(image, ax, "mass")
    return ax


def layer_mass(pairs: Eigenpairs, by: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names of the layers (r,), their shares of the parameters (r,), and the mass in them (r, k)."""
    groups = group_leaves(pairs.vectors, by)
    leaves = [np.asarray(x, float).reshape(len(pairs.values), -1) for x in jax.tree.leaves(pairs.vectors)]
    mass = np.array([sum(np.sum(leaves[i] ** 2, axis=1) for i in group) for group in groups.values()])
    count = np.array([sum(leaves[i].shape[1] for i in group) for group in groups.values()])
    return list(groups), count / count.sum(), mass / mass.sum(axis=0)


def _short(name: str) -> str:
    """The end of a long name, which tells layers apart."""
    return name if len(name) <= _NAME else "…" + name[-_NAME + 1 :]
