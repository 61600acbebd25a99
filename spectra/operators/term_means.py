"""Whether a loss is the mean over its terms that a matrix of their gradients takes for granted.

It is compared with the mean over two halves of some outputs, as `means` does with data. The programs of the
checks of a Fisher matrix, made here, run once on few examples: they are compiled quickly.
"""

# pyright: reportPrivateUsage=false
# Operators have parts that only this package uses.

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import programs, trees
from spectra.base.errors import DataError
from spectra.base.trees import PyTree
from spectra.operators.batches import batch_size, owned_leaves, replace_owned, weigh
from spectra.operators.doubled import QUICK
from spectra.operators.ggn import split
from spectra.operators.jaxprs import drawn_shapes, largest_epsilon, rounding_of_sums
from spectra.operators.means import FAR, MARGIN, kind_of, known_means, remember, waves
from spectra.operators.redraws import joined
from spectra.operators.redraws import rows as examples
from spectra.operators.stochastic import explain_underflow

OUTPUTS = 64
"""Examples whose outputs are looked at."""

once = partial(programs.jit, options=QUICK)


@once
def outputs_of(op: Any) -> PyTree:
    """The model's outputs on the operator's data."""
    with jax.default_matmul_precision(op.matmul_precision):
        return op.model_fn(op._merge(op._variables()), split(op.data)[0])


def require_mean_of_outputs(op: Any) -> None:
    """Raise if the loss on the outputs of some examples is not the mean of that on two halves of them.

    For matrices that are sums over terms of the loss, each with a gradient of its own in output space.

    Raises:
        DataError: the loss is not a mean over examples.

    Cost: the outputs of some examples once, and a few evaluations of the loss on them.
    """
    if not trees.has_values((op.params, op.data)) or trees.is_traced(op):
        return
    half = min(batch_size(op.data, op.shared), OUTPUTS) // 2
    if half == 0:
        return
    few = op._with(data=examples(op, op.data, 0, 2 * half))
    outputs = outputs_of(few)
    floating = all(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(outputs))
    if not floating or any(x.shape[:1] != (2 * half,) for x in jax.tree.leaves(outputs)):
        return
    kind = kind_of(few, few.data)
    if kind in known_means:
        return
    _require_counts(few, outputs)
    try:
        jaxpr = _values_of_outputs.trace(few, outputs).jaxpr
    except Exception:  # it takes no batches of this size
        return
    if drawn_shapes(jaxpr):
        return
    unit = max(largest_epsilon(jaxpr), op.precision)
    treedef, leaves = jax.tree.structure(outputs), jax.tree.leaves(outputs)
    for amount in (0.0, FAR):
        values = jax.device_get(_values_of_outputs(few, treedef.unflatten(waves(leaves, amount))))
        whole, turned, first, second = map(float, np.asarray(values[0], float))
        weights = np.asarray(values[1], float)
        mean = float(np.array([first, second]) @ weights / weights.sum()) if weights.all() else whole
        size = max(map(abs, (whole, first, second)))
        if not np.isfinite(size):
            return
        rounding = size * (unit / 2 + rounding_of_sums(jaxpr))
        by_order = abs(whole - turned)  # a mean changes by its rounding alone
        if by_order > MARGIN**2 * rounding or abs(whole - mean) > MARGIN * (rounding + by_order):
            if underflow := explain_underflow(size, op.dtype, "values"):
                raise DataError(f"the loss is too small for its type. {underflow}")
            raise DataError(
                f"kind={op.kind!r} needs a loss that is the mean over its terms: on the outputs of "
                f"{2 * half} examples it is {whole:.6g}, the mean of its values on two halves, by the size "
                f"of their gradients, {mean:.6g}. If it is a sum, divide it by the number of examples; if "
                "its terms count otherwise (tokens, masks), give their number by weight_fn=; a loss that "
                "sets examples against each other has no such matrix: use GGNOperator on one batch."
            )
    remember(kind)


def _require_counts(op: Any, outputs: PyTree) -> None:
    """Raise where a weight of an example is no number of terms: in g gᵀ it would count twice."""
    axis = op._class_axis(outputs, split(op.data)[1])
    count = op.count_fn if axis is None else op.weight_fn
    draws_with_weights = op.kind == "mc" and op.sample_fn is None  # those of the loss
    if count is None or draws_with_weights:
        return
    try:
        weights = np.asarray(_single_weights(op, count), float)
    except Exception:  # it takes no single examples
        return
    most = sum(leaf[0].size for leaf in jax.tree.leaves(outputs))
    wrong = weights[(weights != np.round(weights)) | (weights > most)]
    if len(wrong):
        raise DataError(
            f"kind={op.kind!r}: weight_fn gives {wrong[0]:.4g} for an example of {most} outputs, which is no "
            "number of terms, and a weight would count twice, in both gradients of a product. It counts once "
            "in GradientCovarianceOperator(lambda params, batch: loss_fn(model_fn(params, batch[0]), "
            "batch[1]), params, data, weight_fn=...). check_data=False takes it for a number of terms."
        )


@partial(once, static_argnames="count")
def _single_weights(op: Any, count: Any) -> jax.Array:
    def one(example: list[jax.Array]) -> jax.Array:
        return jnp.asarray(weigh(count, replace_owned(op.data, op.shared, [x[None] for x in example])), float)

    return jax.vmap(one)(owned_leaves(op.data, op.shared))


def _by_slope(op: Any, outputs: PyTree) -> tuple[PyTree, PyTree]:
    """The outputs and their data in another order: examples without a gradient, masked ones, in one half.

    Halves of which as much is masked have a mean in which the examples that do not count count, too. The
    example with the steepest loss stays with those without, so that each half has something that counts.
    """
    gradient = jax.grad(op._output_loss)(outputs, split(op.data)[1])
    rows = [jnp.max(jnp.abs(g.reshape(len(g), -1)), 1, initial=0) for g in jax.tree.leaves(gradient)]
    order = jnp.roll(jnp.argsort(jnp.max(jnp.stack(rows), 0)), 1)
    owned = [jnp.asarray(x)[order] for x in owned_leaves(op.data, op.shared)]
    return jax.tree.map(lambda x: x[order], outputs), replace_owned(op.data, op.shared, owned)


@once
def _values_of_outputs(op: Any, outputs: PyTree) -> tuple[list[jax.Array], list[jax.Array]]:
    """The loss of the outputs, of their halves in the other order, and of each half, with its weight."""
    half = batch_size(op.data, op.shared) // 2
    outputs, data = _by_slope(op, outputs)
    op = op._with(data=data)
    first, second = (examples(op, op.data, a, a + half) for a in (0, half))
    here, there = (jax.tree.map(lambda x, a=a: x[a : a + half], outputs) for a in (0, half))
    swapped = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), there, here)
    pairs = [(outputs, op.data), (swapped, joined(op, second, first)), (here, first), (there, second)]
    values = [op._output_loss(f, split(piece)[1]) for f, piece in pairs]
    return values, [op._num_terms(f, split(piece)[1], piece) for f, piece in pairs[2:]]
