"""Where in the network the leading eigenvectors live."""

from typing import TYPE_CHECKING

import jax
import numpy as np

from spectra._errors import SpectraError
from spectra._paths import group_leaves
from spectra.plotting.style import MAP, add_colorbar, new_axes, styled
from spectra.results import Eigenpairs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAME = 26  # characters of a layer's name that are shown


@styled
def plot_eigenvector_mass(pairs: Eigenpairs, ax: "Axes | None" = None, *, by: str = "layer") -> "Axes":
    """Draw the mass of each eigenvector in each layer: the sum of the squares of its entries there.

    The masses of a vector, a column, add up to one. The first column is the share of the parameters
    that each layer holds: the mass of a vector that has nothing to do with layers.

    Args:
        pairs: result of `eigsh`; columns are in the order of |λ|, the largest first.
        ax: where to draw; default: a new figure of 8 cm width.
        by: "layer" or "leaf".

    Returns:
        The Axes.

    Raises:
        StructureError: unknown `by`.
        SpectraError: there are no pairs.

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
    ax.set_xlabel("eigenvector")
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
