"""Pictures of eigenvalues: their cumulative distribution, pairs by rank, and where eigenvectors live."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import jax
import numpy as np

from spectra.base.errors import SpectraError
from spectra.base.paths import group_leaves
from spectra.quadrature import distribution
from spectra.report.plots.style import (
    ACCENT,
    COLOR,
    COLORS,
    DASHES,
    MAP,
    add_colorbar,
    add_legend,
    asks_for_logarithm,
    label_text,
    new_axes,
    short_names,
    styled,
    symlog,
)
from spectra.report.spectrum import SpectrumReport
from spectra.results import Eigenpairs, Quadrature, as_quadrature, by_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.typing import ColorType

Held = Quadrature | SpectrumReport
YSCALES = ("linear", "log", "complement")
_NOTHING = 1e-30  # stands for zero on a logarithmic axis


@styled
def plot_cdf(
    quadrature: Held | Mapping[str, Held],
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
        quadrature: result of `slq`, or a report, which contains it; or a mapping of several, at most six, of
            which each is drawn with its band, in a colour and dashes of its own.
        ax: where to draw; default: a new figure of 8 cm width.
        level: confidence of the band.
        yscale: "linear"; "log", which shows the few eigenvalues at the lower end; or "complement", the
            number of eigenvalues above each point on a logarithmic axis: the distribution of a network is
            a single step on a linear one.
        color: color of line, bracket and band; not for a mapping.

    Returns:
        The Axes.

    Raises:
        SpectraError: unknown yscale; a mapping of none or of more than six.

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
    several = isinstance(quadrature, Mapping)
    held = _few(quadrature) if several else {"estimate": quadrature}
    quadratures = {name: as_quadrature(each) for name, each in held.items()}
    densities = [spectral_density(each) for each in quadratures.values()]
    low, high = (float(end([d.grid[i] for d in densities])) for end, i in ((min, 0), (max, -1)))
    own, ax = ax is None, new_axes(ax)
    colors = COLORS if several else (color,)
    for (name, each), density, tone, dash in zip(
        quadratures.items(), densities, colors, DASHES, strict=False
    ):
        x = np.unique(np.concatenate([density.grid, np.asarray(each.nodes).ravel(), [low, high]]))
        lower, upper, inner_lower, inner_upper, estimate = _distribution(each, x, level, yscale)
        step = {"step": "post", "color": tone, "linewidth": 0}
        if several:
            ax.fill_between(x, lower, upper, alpha=0.15, **step)
        else:
            ax.fill_between(x, lower, upper, alpha=0.2, label=f"{100 * level:g} % band", **step)
            ax.fill_between(x, inner_lower, inner_upper, alpha=0.4, label="bracket", **step)
        line = {"color": tone, "linewidth": 1.0, "linestyle": dash, "label": label_text(name)}
        ax.step(x, estimate, where="post", **line)
    scale = min(density.linear_scale for density in densities)
    if asks_for_logarithm(scale, low, high):
        symlog(ax.xaxis, scale, low, high)
    else:
        ax.set_xlim(low, high)
    if yscale == "linear":
        ax.set_ylim(-0.02, 1.02)
    else:
        ax.set_yscale("log")
        size = max(each.size for each in quadratures.values())
        unit = 1.0 if yscale == "complement" else 1 / size
        ax.set_ylim(unit / 2, 1.5 * unit * size)
    ax.set_xlabel("eigenvalue")
    ax.set_ylabel("number of eigenvalues above" if yscale == "complement" else "share of eigenvalues below")
    add_legend(ax, own)
    return ax


def _distribution(quadrature: Quadrature, x: np.ndarray, level: float, yscale: str) -> list[np.ndarray]:
    """Band, bracket and estimate at the points of a picture; zero is below the picture, not nowhere."""
    inner_lower, estimate, inner_upper, lower, upper = distribution.curves(quadrature, x, level)
    curves = [lower, upper, inner_lower, inner_upper, np.clip(estimate, lower, upper)]
    if yscale == "complement":
        curves = [quadrature.size * (1 - curve) for curve in curves]
    return curves if yscale == "linear" else [np.maximum(curve, _NOTHING) for curve in curves]


def _few(results: Any) -> dict[str, Any]:
    """The results of a mapping, if one picture can tell them apart."""
    named = by_name(results)
    if not named:
        raise SpectraError("there are no results to draw: the mapping is empty.")
    if len(named) > len(COLORS):
        raise SpectraError(
            f"{len(named)} results: one picture can tell {len(COLORS)} apart; draw others into Axes of "
            "their own."
        )
    return named


@styled
def plot_eigenvalues(
    result: Eigenpairs | Held | Mapping[str, Eigenpairs | Held],
    ax: "Axes | None" = None,
    *,
    color: "ColorType" = COLOR,
) -> "Axes":
    """Draw eigenpairs by rank, with their residuals and rounding, or a quadrature as `plot_cdf` does.

    Args:
        result: result of `eigsh` or of `slq`, or a report. Several, at most six, in a mapping: all of them
            pairs, or none.
        ax: where to draw; default: a new figure of 8 cm width.
        color: color of the eigenvalues; not for a mapping. Pairs that have not converged are open circles.

    Returns:
        The Axes.

    Raises:
        SpectraError: a mapping of none, of more than six, or of pairs beside other results; no pairs.

    Examples:
        >>> import matplotlib; matplotlib.use("Agg")
        >>> import jax, jax.numpy as jnp, spectra
        >>> op = spectra.MatrixOperator(jnp.diag(jnp.linspace(0.0, 1.0, 200)))
        >>> pairs = spectra.eigsh(op, 3, which="LA", key=jax.random.key(0))
        >>> spectra.plot_eigenvalues(pairs).get_ylabel()
        'eigenvalue'
    """
    several = isinstance(result, Mapping)
    held = _few(result) if several else {"": result}
    pairs = {name: each for name, each in held.items() if isinstance(each, Eigenpairs)}
    if not pairs:
        return plot_cdf(cast("Any", result), ax, color=color)
    if len(pairs) < len(held):
        others = ", ".join(name for name in held if name not in pairs)
        raise SpectraError(
            f"one picture shows either eigenpairs or distributions, and {others} is no Eigenpairs: draw them "
            "into Axes of their own."
        )
    from matplotlib.ticker import MaxNLocator

    values = np.concatenate([np.asarray(each.values) for each in pairs.values()])
    if not len(values):
        raise SpectraError("there are no eigenpairs to draw.")
    own, ax = ax is None, new_axes(ax)
    for (name, each), tone in zip(pairs.items(), COLORS if several else (color,), strict=False):
        _add_pairs(ax, each, tone, label_text(name) if several else None)
    most = max(len(each.values) for each in pairs.values())
    done = all(np.all(each.converged) for each in pairs.values())
    if (values > 0).all() and values.max() > 50 * values.min():
        ax.set_yscale("log")
    else:
        ax.axhline(0, color=ACCENT, linewidth=0.6, linestyle=":")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if most < 3:  # the locator has no whole steps that small
        ax.set_xticks(np.arange(1, most + 1))
        ax.set_xlim(0.5, most + 0.5)
    elif own:
        ax.set_xlim(left=max(0.5, ax.get_xlim()[0]))  # there is no rank 0
    ax.set_xlabel("rank")
    ax.set_ylabel("eigenvalue")
    if several or (own and not done):
        add_legend(ax, own)
    return ax


def _add_pairs(ax: "Axes", pairs: Eigenpairs, color: "ColorType", label: str | None) -> None:
    """Eigenvalues by rank, the largest first, with what they may be off by."""
    values = np.asarray(pairs.values)[::-1]
    residuals = np.asarray(pairs.residuals)[::-1] + pairs.noise_floor
    rank = np.arange(1, len(values) + 1)
    done = np.asarray(pairs.converged)[::-1]
    ax.errorbar(rank, values, residuals, fmt="none", ecolor=color, elinewidth=0.8, capsize=1.5)
    ax.plot(rank[done], values[done], "o", color=color, markersize=3, label=label)
    if not done.all():
        hollow = "not converged, ± residual" if label is None else f"{label}, not converged"
        circles = {"markersize": 3, "markerfacecolor": "white", "label": hollow}
        ax.plot(rank[~done], values[~done], "o", color=color, **circles)


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
    ax.set_yticks(np.arange(0, rows, stride), short_names(names[::stride]), parse_math=False)
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
