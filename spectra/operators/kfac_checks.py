"""What Kronecker factors ask of a model and a loss, seen on few examples."""

# pyright: reportPrivateUsage=false
# Operators have parts that only this package uses.

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from spectra.base import draws, programs, trees
from spectra.base.errors import StructureError
from spectra.base.trees import PyTree
from spectra.operators.batches import batch_size, rows
from spectra.operators.fisher import FisherOperator
from spectra.operators.fisher_checks import CHECKED_EXAMPLES
from spectra.operators.ggn import split
from spectra.operators.kfac_sums import traced
from spectra.operators.loss_roots import form_of, roots
from spectra.operators.stochastic import QUICK


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


def require_convex(fisher: FisherOperator, form: str) -> None:
    """Raise where the roots of this form leave out curvature of the loss, as they do where it is negative.

    Of predictions that are sure all of it may be rounding: it has to be missing at normal outputs, too.
    """
    few = few_examples(fisher)
    if few is None:
        return
    error = min(float(error_of_roots(few, form, elsewhere)) for elsewhere in (False, True))
    if error > fisher.precision**0.5:
        raise StructureError(
            "the loss is not convex in the model's outputs: Kronecker factors are sums of squares, and would "
            f"leave its negative curvature out (relative error {error:.1e}). If loss_fn is maximised, pass "
            "its negative; for eigenvalues of both signs use GGNOperator."
        )


@partial(programs.jit, static_argnames=("form", "elsewhere"), options=QUICK)
def error_of_roots(op: FisherOperator, form: str, elsewhere: bool = False) -> jax.Array:
    """|∇²ℓ u - Σ_k r_k (r_k · u)| over |∇²ℓ u|, with the sum example by example.

    At the model's outputs, or elsewhere: at normal ones.
    """
    outputs = model_outputs(op)
    u = draws.sample(jax.random.key(0), outputs, jax.random.normal)
    outputs = draws.sample(jax.random.key(1), outputs, jax.random.normal) if elsewhere else outputs
    found = roots(op, form, outputs, op.data, None)
    own = op._curvature(outputs, split(op.data)[1], u)

    def add(total: Any, k: Any) -> Any:
        column = found.column(k)
        dots = jax.vmap(trees.vdot)(column, u)
        moved = jax.tree.map(lambda c: c * dots.reshape(-1, *[1] * (c.ndim - 1)), column)
        return jax.tree.map(jnp.add, total, trees.cast_like(moved, total)), None

    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, trees.working_dtype(x.dtype)), outputs)
    made, _ = jax.lax.scan(add, zero, jnp.arange(found.count))
    size = trees.largest(own)
    error = trees.largest(jax.tree.map(jnp.subtract, own, made))
    return jnp.where(size > 0, error / jnp.where(size > 0, size, 1), error)


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
