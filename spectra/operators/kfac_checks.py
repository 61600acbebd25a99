"""What Kronecker factors ask of a model and a loss, seen on few examples."""

# pyright: reportPrivateUsage=false
# Operators have parts that only this package uses.

from collections.abc import Callable
from typing import cast

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from spectra.base import programs, trees
from spectra.base.errors import StructureError
from spectra.base.trees import PyTree
from spectra.operators.batches import batch_size, rows
from spectra.operators.fisher import FisherOperator
from spectra.operators.fisher_checks import CHECKED_EXAMPLES
from spectra.operators.ggn import split
from spectra.operators.kfac_sums import traced
from spectra.operators.loss_roots import form_of


def few_examples(fisher: FisherOperator) -> FisherOperator | None:
    """The operator of a few examples, where its numbers can be looked at."""
    arrays = jax.tree.leaves((fisher.params, fisher.data))
    if trees.is_traced(arrays) or not all(isinstance(x, (jax.Array, np.ndarray)) for x in arrays):
        return None
    return fisher._with(data=rows(fisher.data, 0, CHECKED_EXAMPLES, fisher.shared), microbatch=None)


@programs.jit
def model_outputs(fisher: FisherOperator) -> PyTree:
    """The outputs of all examples."""
    with jax.default_matmul_precision(fisher.matmul_precision):
        return fisher.model_fn(fisher._merge(fisher._variables()), split(fisher.data)[0])


@programs.jit
def _outputs_one_by_one(fisher: FisherOperator) -> list[jax.Array]:
    jaxpr, _, owned = traced(fisher)
    leaves = jax.tree.leaves(fisher._variables())
    run = cast("Callable[..., list[jax.Array]]", jax.extend.core.jaxpr_as_fun(jaxpr))
    return jax.vmap(lambda example: [x[0] for x in run(*leaves, *example)])(owned)


def loss_form(fisher: FisherOperator) -> str:
    """The root of the loss's Hessian; the general one where there are no numbers to look at."""
    few = few_examples(fisher)
    if few is None:
        return "dense"
    return form_of(few, model_outputs(few), few.data, fisher.precision**0.5)


def require_examples(fisher: FisherOperator) -> None:
    """Raise unless the model's outputs are those of each example by itself."""
    few = few_examples(fisher.first_piece())
    if few is None:
        return
    whole = jax.tree.leaves(model_outputs(few))
    size = batch_size(few.data, few.shared)
    shapes = [list(x.shape) for x in whole]
    if any(x.shape[:1] != (size,) for x in whole):
        raise StructureError(
            f"the model's outputs for {size} examples have shapes {shapes}: KFAC needs the examples along "
            "the first axis of each, and the inputs' leading axis to be theirs (shared= names what is not)."
        )
    try:
        alone = _outputs_one_by_one(few)
    except NotImplementedError as error:
        raise StructureError(
            "the model cannot be mapped over its examples by jax.vmap, which makes gradients of single ones: "
            f"{str(error).splitlines()[0].rstrip('.')}. Use GGNOperator, or an operation that jax.vmap knows."
        ) from error
    limit = fisher.precision**0.5
    for together, own in zip(whole, alone, strict=True):
        scale = float(jnp.max(jnp.abs(together)))
        if float(jnp.max(jnp.abs(together - own))) > limit * scale:
            raise StructureError(
                "the model's outputs for an example change with the others of its batch (batch statistics, "
                "a loss or norm across examples?), so that no layer has gradients of single examples. "
                "Evaluate with fixed statistics, or use GGNOperator."
            )
