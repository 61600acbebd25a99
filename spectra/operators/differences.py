"""The step of central differences, and what it leaves of a product's precision, as measured.

eps^(1/3) |θ| suits parameters that are all of one size, as far as the loss is concerned. Where those of one
leaf are far larger than what bends the loss along another, that step is too long: at a last layer of weights
around 100 it was wrong by half the product. So a few steps are tried in a few directions.
"""

# pyright: reportPrivateUsage=false
# Operators have parts that only this package uses.

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spectra.base import programs, trees
from spectra.base.trees import PyTree

if TYPE_CHECKING:
    from spectra.operators.data import DataOperator

STEPS = 8.0 ** np.arange(1, -7, -1)
"""Those that are tried, in units of eps^(1/3) |θ|, the longest first."""
DIRECTIONS = 4
"""Groups of leaves that are tried one by one, beside all together."""
RESOLVED = 0.1
"""Share of a product by which two steps may differ that are said to agree."""
TOLERATED = 16
"""Multiple of eps^(2/3) that neighbouring steps may differ by where all leaves are alike: the usual step
truncates and rounds by eps^(2/3) each, and an eighth of it rounds eight times as much. That is ten, with
room for constants of the loss."""


class Differences(NamedTuple):
    """How an operator takes differences: what multiplies the step, and the error where it is not usual."""

    step: float = 1.0
    error: float = 0.0  # of a product, in units of the largest one seen


def measured(op: "DataOperator") -> Differences:
    """The step for an operator on one batch whose mode is that of finite differences.

    It stays as it is where it is good enough, where nothing can be evaluated, and where no two steps agree.

    Cost: 16 gradients for each of up to five directions.
    """
    if trees.is_traced(op) or not trees.has_values((op.params, op.data)):
        return Differences()
    op, usual = op._with(differences=Differences()), op.precision
    trials = [jax.device_get(_trial(op, direction)) for direction in _directions(op)]
    found = [each for changes, sizes in trials if (each := _plateau(changes, sizes)) is not None]
    size = max((size for size, _ in found), default=0.0)
    if size == 0:
        return Differences()
    errors = np.max([error for _, error in found], axis=0) / size
    if errors[np.flatnonzero(STEPS == 1)[0]] <= TOLERATED * usual:
        return Differences()
    best = int(np.argmin(errors))
    error = 2.0 ** np.ceil(np.log2(errors[best])) if errors[best] > TOLERATED * usual else 0.0
    return Differences(float(STEPS[best]), float(error))


def _directions(op: "DataOperator") -> list[PyTree]:
    """Of length one, without random numbers: all leaves, and groups of them."""
    leaves, treedef = jax.tree.flatten(op.structure)
    count = min(DIRECTIONS, len(leaves))
    groups = [np.arange(len(leaves))]
    if count > 1:
        groups += np.array_split(groups[0], count)
    waves = [jnp.cos(2 * jnp.arange(x.size, dtype=x.dtype) + i) for i, x in enumerate(leaves)]
    waves = [wave.reshape(x.shape) for wave, x in zip(waves, leaves, strict=True)]
    parts = [[x if i in group else jnp.zeros_like(x) for i, x in enumerate(waves)] for group in groups]
    return [treedef.unflatten(part) for part in parts]


@programs.jit
def _trial(op: "DataOperator", v: PyTree) -> tuple[jax.Array, jax.Array]:
    """|A v| by each step, and by how much the product differs from that by the step before; |v| is one."""
    v = trees.scale(1 / trees.norm(v), v)

    def body(before: PyTree, step: jax.Array) -> tuple[PyTree, tuple[jax.Array, jax.Array]]:
        found = op._with(differences=Differences(step)).mv(v)  # pyright: ignore[reportArgumentType]
        return found, (trees.norm(jax.tree.map(jnp.subtract, found, before)), trees.norm(found))

    steps = jnp.asarray(STEPS, trees.scalar_dtype(op.structure))
    return lax.scan(body, jax.tree.map(jnp.zeros_like, v), steps)[1]


def _plateau(changes: np.ndarray, sizes: np.ndarray) -> tuple[float, np.ndarray] | None:
    """The length of the product where two steps agree best, and the error of each step: how far it is from
    there, step by step. None where no two agree.

    Along a curve that has levelled off, longer and longer steps agree ever better in absolute terms.
    """
    changes, sizes = (np.nan_to_num(np.asarray(x, float), nan=np.inf) for x in (changes[1:], sizes))
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = np.nan_to_num(changes / np.maximum(sizes[1:], sizes[:-1]), nan=np.inf)
    best = int(np.argmin(shares))
    if not shares[best] <= RESOLVED:
        return None
    errors = [*np.cumsum(changes[best::-1])[::-1], *np.cumsum(changes[best:])]
    return float(sizes[best]), np.asarray(errors)
