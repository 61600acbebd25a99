"""Examples of similar loss, from each of which some are drawn: those of large loss more often.

In a trained network few examples carry the curvature, and they are those whose loss is still large: of a
sample drawn alike from all, most have nothing to say. Drawn from strata of the loss, in proportion to it, and
weighted by what each stands for, the same number of examples gives the curvature along a vector with a fifth
to a tenth of the variance (digits and MNIST networks of benchmarks/population.py; at the start of training,
when all examples are alike, with nine tenths). A share of the draws is proportional to the number of
examples, whatever their loss, which bounds the variance where the loss says nothing about the curvature.
"""

# pyright: reportPrivateUsage=false
# Operators have parts that only this package uses.

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import programs, trees
from spectra.base.errors import NonFiniteError
from spectra.base.trees import PyTree
from spectra.operators.base import LinearOperator
from spectra.operators.batches import owned_leaves, replace_owned
from spectra.operators.data import DataOperator
from spectra.operators.pytree import operator

NUMBERS = range(6, 11)
"""Of strata: from four to eight the error falls by a sixth, from eight to sixteen not at all."""
ALIKE = 0.3
"""Share of the draws in which all examples are alike."""
LARGEST = 10.0
"""Loss in units of the mean above which examples count alike: the curvature of a badly wrong one falls."""
TOGETHER = 64
"""Examples whose losses are evaluated at a time, unless the operator has microbatches."""


class Plan(NamedTuple):
    """Batches from strata, all of one size."""

    strata: int
    each: int  # batches from each, a multiple of the folds
    size: int  # examples a batch


def plan(examples: int, most: int, folds: int) -> Plan | None:
    """Between three quarters of `most` batches and all of them, using as many examples as possible; None
    where there are too few. Two batches for each fold in each stratum at least."""
    found = [
        Plan(number, each, examples // (number * each))
        for number in NUMBERS
        for each in range(2 * folds, most // number + 1, folds)
        if 4 * number * each >= 3 * most
    ]
    return max(found, key=lambda p: (p.strata * p.each * p.size, p.each), default=None)


def losses(op: DataOperator) -> np.ndarray:
    """The loss of each example, in float64 on the host; one evaluation of all data."""
    found = np.asarray(_losses(op), np.float64)
    if not np.isfinite(found).all():
        raise NonFiniteError(op.explain_non_finite())
    return found


@programs.jit
def _losses(op: DataOperator) -> jax.Array:
    def one(leaves: list[jax.Array]) -> jax.Array:
        piece = replace_owned(op.data, op.shared, [x[None] for x in leaves])
        return op._value(params, piece).astype(jnp.float32)

    params = op._merge(op._variables())
    with jax.default_matmul_precision(op.matmul_precision):
        leaves = owned_leaves(op.data, op.shared)
        return jax.lax.map(one, leaves, batch_size=op.microbatch or TOGETHER)


def split(losses: np.ndarray, plan: Plan) -> list[np.ndarray]:
    """Examples of each stratum, from the largest losses down; each is given the same number of draws.

    The strata have equal shares of the mass `ALIKE / n + (1 - ALIKE) loss / sum of losses`, but hold at least
    as many examples as are drawn.
    """
    sizes = losses - min(losses.min(), 0.0)
    sizes = np.minimum(sizes, LARGEST * sizes.mean())
    mass = np.full(len(losses), ALIKE / len(losses))
    if sizes.sum() > 0:
        mass = mass + (1 - ALIKE) * sizes / sizes.sum()
    order, need = np.argsort(-sizes, kind="stable"), plan.each * plan.size
    found: list[np.ndarray] = []
    for left in range(plan.strata, 1, -1):
        total = np.cumsum(mass[order])
        cut = int(np.searchsorted(total, float(total[-1]) / left)) + 1
        cut = min(max(cut, need), len(order) - need * (left - 1))
        found.append(order[:cut])
        order = order[cut:]
    return [*found, order]


@operator(leaves=("parts", "weights"))
class WeightedBatches(LinearOperator):
    """The weighted mean of an operator over runs of its examples, all of one length."""

    parts: DataOperator
    weights: jax.Array  # (b,), sum one

    @property
    def like(self) -> PyTree:
        """The parameters that vary."""
        return self.parts.like

    @property
    def known_linear(self) -> bool:
        """True: a sum of derivatives."""
        return True

    @property
    def precision(self) -> float:
        """As of the operator of each batch."""
        return self.parts.precision

    @property
    def computes_in(self) -> str:
        """As the operator of each batch."""
        return self.parts.computes_in

    def mv(self, v: PyTree) -> PyTree:
        """Σ_b w_b H_b v."""
        data, shared = self.parts.data, self.parts.shared
        count = len(self.weights)
        runs = [x.reshape(count, -1, *x.shape[1:]) for x in owned_leaves(data, shared)]

        def add(total: PyTree, batch: Any) -> PyTree:
            leaves, weight = batch
            own = self.parts._on(data=replace_owned(data, shared, leaves))
            return trees.axpy(weight, own.mv(v), total), None

        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, v), (runs, self.weights))[0]
