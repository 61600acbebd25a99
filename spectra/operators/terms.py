"""Whether a loss is the mean over terms that a Fisher matrix, with a gradient for each, takes for granted."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectra import _tree
from spectra._errors import DataError
from spectra.data import batch_size
from spectra.operators.cuts import joined, rows
from spectra.operators.diagnose import coarsest_rounding, drawn_shapes, rounding_of_sums
from spectra.operators.ggn import split
from spectra.operators.means import FAR, MARGIN, kind_of, known_means, remember, waves

PyTree = Any
OUTPUTS = 64
"""Examples whose outputs are looked at."""


def require_mean_of_outputs(op: Any) -> None:
    """Raise if the loss on the outputs of some examples is not the mean of that on two halves of them.

    For matrices that are sums over terms of the loss, each with a gradient of its own in output space.

    Raises:
        DataError: the loss is not a mean over examples.

    Cost: the outputs of some examples once, and a few evaluations of the loss on them.
    """
    if not _tree.has_values((op.params, op.data)) or _tree.is_traced((op.params, op.data)):
        return
    half = min(batch_size(op.data, op.shared), OUTPUTS) // 2
    if half == 0:
        return
    few = op._with(data=rows(op, op.data, 0, 2 * half))
    outputs = _outputs(few)
    floating = all(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(outputs))
    if not floating or any(x.shape[:1] != (2 * half,) for x in jax.tree.leaves(outputs)):
        return
    kind = kind_of(few, few.data)
    if kind in known_means:
        return
    try:
        jaxpr = _values_of_outputs.trace(few, outputs).jaxpr
    except Exception:  # it takes no batches of this size
        return
    if drawn_shapes(jaxpr):
        return
    unit = max(coarsest_rounding(jaxpr), op.precision)
    treedef, leaves = jax.tree.structure(outputs), jax.tree.leaves(outputs)
    for amount in (0.0, FAR):
        values = jax.device_get(_values_of_outputs(few, treedef.unflatten(waves(leaves, amount))))
        whole, turned, first, second = np.asarray(values[0], float)
        weights = np.asarray(values[1], float)
        mean = float(np.array([first, second]) @ weights / weights.sum()) if weights.all() else whole
        size = max(map(abs, (whole, first, second)))
        if not np.isfinite(size):
            return
        rounding = size * (unit / 2 + rounding_of_sums(jaxpr))
        by_order = abs(whole - turned)  # a mean changes by its rounding alone
        if by_order > MARGIN**2 * rounding or abs(whole - mean) > MARGIN * (rounding + by_order):
            raise DataError(
                f"kind={op.kind!r} needs a loss that is the mean over its terms: on the outputs of "
                f"{2 * half} examples it is {whole:.6g}, the mean of its values on two halves {mean:.6g}. "
                "If it is a sum, divide it by the number of examples; if its terms count otherwise (tokens, "
                "masks), give their number by weight_fn=; a loss that sets examples against each other has "
                "no such matrix: use GGNOperator on one batch."
            )
    remember(kind)


@jax.jit
def _outputs(op: Any) -> PyTree:
    with jax.default_matmul_precision(op.matmul_precision):
        return op.model_fn(op._merge(op._variables()), split(op.data)[0])


@jax.jit
def _values_of_outputs(op: Any, outputs: PyTree) -> tuple[list[jax.Array], list[jax.Array]]:
    """The loss of the outputs, of their halves in the other order, and of each half, with its weight."""
    half = batch_size(op.data, op.shared) // 2
    first, second = (rows(op, op.data, a, a + half) for a in (0, half))
    here, there = (jax.tree.map(lambda x, a=a: x[a : a + half], outputs) for a in (0, half))
    swapped = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), there, here)
    pairs = [(outputs, op.data), (swapped, joined(op, second, first)), (here, first), (there, second)]
    values = [op._output_loss(f, split(piece)[1]) for f, piece in pairs]
    return values, [op._num_terms(f, split(piece)[1], piece) for f, piece in pairs[2:]]
