"""The exact diagonal of a Gauss-Newton matrix from the layers of a model, without a product for each entry.

With Σ_k r_nk r_nkᵀ the loss's Hessian in the outputs of example n, the matrix is Σ_nk G_nk G_nkᵀ with the
gradients G_nk = J_nᵀ r_nk, and its diagonal Σ_nk G_nk². A layer y = W a has G_nk = Σ_s a_ns g_nksᵀ over its
positions and uses. Where there is one position no gradient of an example is formed: Σ_nk a_n² ⊗ g_nk².

Where float64 is fast, that is computed in float64, too. Products in it would say what rounding does to a
loss, but not what it does to sums of squares: of 30,000 equal ones float32 loses four digits.
"""

# pyright: reportPrivateUsage=false
# Operators have parts that only this package uses.

import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import arrays, host, programs, trees
from spectra.base.calls import automatic
from spectra.base.errors import MemoryLimitError, StructureError
from spectra.base.trees import PyTree
from spectra.operators.accumulate import weighted_sum
from spectra.operators.base import LinearOperator
from spectra.operators.batches import batch_size
from spectra.operators.doubled import doubled, in_wide, types
from spectra.operators.fisher import FisherOperator
from spectra.operators.ggn import GGNOperator, ModelOperator, split
from spectra.operators.kfac_checks import (
    error_of_roots,
    few_examples,
    loss_form,
    model_outputs,
    require_examples,
)
from spectra.operators.kfac_plan import Group, plan_of
from spectra.operators.kfac_sums import COLUMNS, Pass, Setup, mean_over_pieces, squares, traced
from spectra.operators.layers import Path
from spectra.operators.loss_roots import num_roots
from spectra.operators.stochastic import QUICK
from spectra.results import format_bytes

CHUNK = 256
"""Examples whose squares are added up in one sum, in the type of the operator."""
_WHOLE: dict[str, Any] = {"sequence": "expand", "bias": "joint", "exact_limit": 0, "factor_limit": 2**62}


@dataclasses.dataclass(frozen=True)
class LayerDiagonal:
    """How the diagonal is computed: `value()` is it."""

    op: FisherOperator  # the matrix, as a sum over roots of the loss's Hessian
    setup: Setup
    passes: int  # backward passes, one for each root of an example
    terms: int  # squares that are added up to an entry, of one batch, in the type of the operator
    chain: int  # the most of them that are added one after the other
    in_double: bool  # whether there is `unrounded`, too
    reason: str

    def value(self) -> PyTree:
        """The diagonal in the type of the operator, a pytree like the parameters."""
        return weighted_sum(lambda piece: _diagonal(_in_chunks(piece), self.setup), self._pieces())

    def unrounded(self) -> np.ndarray:
        """The same in float64, flat, on the host."""
        total: Any = 0.0
        for weight, piece in self._pieces():
            total = total + weight * self._unrounded(piece)
        return total

    def _pieces(self) -> Iterator[tuple[float, Any]]:
        return iter([(1.0, self.op)]) if self.op.stream is None else super(FisherOperator, self.op)._pieces()

    def _unrounded(self, piece: FisherOperator) -> np.ndarray:
        """That of one piece in float64, flat, on the host."""
        piece, own = jax.tree.map(jnp.asarray, piece), types()
        with jax.enable_x64(True):
            leaves = _diagonal_in_double(piece, setup=self.setup, own=own)
        return np.concatenate([np.asarray(leaf).ravel() for leaf in leaves])


@automatic
def layer_diagonal(op: LinearOperator, most: int) -> LayerDiagonal | str:
    """The diagonal from at most `most` backward passes, or why there is none, "" for other operators.

    Cost: nothing but shapes where there is none by then; else the outputs of a few examples, on which it is
    seen that each depends on its own example alone and that the roots make the loss's Hessian.
    """
    kind = "type2" if type(op) is GGNOperator else getattr(op, "kind", "")
    if type(op) not in (GGNOperator, FisherOperator) or kind not in ("type2", "empirical"):
        return ""
    assert isinstance(op, ModelOperator)
    piece = op.first_piece()
    if trees.is_traced(piece) or not trees.has_values((op.params, piece.data)):
        return "there are no values, as inside jit"
    if hasattr(op.loss_fn, "gauss_newton"):
        return "the loss computes its own logits"
    fisher = _as_fisher(op, kind)
    first = fisher.first_piece()
    try:
        outputs = jax.eval_shape(lambda: model_outputs(first))
        passes = num_roots(first, outputs, split(first.data)[1])
        if passes > most:
            return f"an example has {passes:,} outputs, which take as many backward passes"
        require_examples(first)
        setup = Setup(form=loss_form(first) if kind == "type2" else "dense", **_WHOLE)
        if (wrong := _does_not_fit(first) or _no_roots(first, setup)) is not None:
            return wrong
    except (StructureError, MemoryLimitError) as error:
        return str(error).split(":")[0].split(",")[0]
    wide = doubled(op) is not None
    terms, chain = _additions(first, passes)
    return LayerDiagonal(fisher, setup, passes, terms, chain, wide, _words(first, setup, passes))


def _in_chunks(op: FisherOperator) -> FisherOperator:
    return op._with(microbatch=min(CHUNK, op.microbatch or CHUNK))


def _additions(op: FisherOperator, passes: int) -> tuple[int, int]:
    """Squares that are added up to an entry, and how many at most are so one after the other.

    A row of an embedding may be read at all positions of an example.
    """
    _, found, _ = traced(op)
    read = [site for site in found.sites.values() if site.kind == "embedding"]
    positions = [math.prod(x.loops) * math.prod(x.out_shape) // max(x.sizes[2], 1) for x in read]
    count, each = batch_size(op.data, op.shared), passes * max(positions, default=1)
    chunk = min(count, _in_chunks(op).microbatch or count)
    return count * each, chunk * each + count // chunk


def _as_fisher(op: ModelOperator, kind: str) -> FisherOperator:
    """The same matrix in the form that Kronecker factors are made from, its curvature at the own targets."""
    if isinstance(op, FisherOperator):
        return op
    fisher = object.__new__(FisherOperator)
    own = {"key": None, "sample_fn": None, "count_fn": op.weight_fn, "labels": None, "softmax": None}
    fisher._set(**(vars(op) | {"kind": kind} | own))
    return fisher


def _does_not_fit(op: FisherOperator) -> str | None:
    """What would be held of one microbatch: rows, and gradients of several roots side by side."""
    _, found, _ = traced(op)
    plan = plan_of(op.like, found, Setup(form="dense", **_WHOLE))
    sites = [found.sites[path] for group in plan.groups for path in group.paths]
    outputs = sum(math.prod(site.loops) * math.prod(site.out_shape) for site in sites)
    leaves = jax.tree.leaves(op.structure)
    rest = sum(math.prod(leaves[i].shape) for i in plan.rest_leaves)
    rows = sum(
        math.prod(site.loops) * math.prod(site.out_shape) // max(site.sizes[2], 1) * site.sizes[1]
        for site in sites
        if site.kind != "embedding"
    )
    examples = min(op.microbatch or 2**62, batch_size(op.data, op.shared))
    width = 8 if doubled(op) is not None else jnp.dtype(op.dtype).itemsize
    needed = examples * (COLUMNS * (outputs + rest) + rows) * width
    free = host.available_bytes()
    if free is None or needed <= free // 2:
        return None
    return f"gradients of {examples:,} examples would take {format_bytes(needed)}; microbatch= reduces that"


def _no_roots(op: FisherOperator, setup: Setup) -> str | None:
    """Why the roots are not those of the loss's Hessian, where it is no sum of squares over examples."""
    few = few_examples(op)
    if op.kind != "type2" or few is None:
        return None
    if float(error_of_roots(few, setup.form)) <= op.precision**0.5:
        return None
    return "the loss is not convex in the outputs, or sets examples against each other"


def _words(op: FisherOperator, setup: Setup, passes: int) -> str:
    _, found, _ = traced(op)
    plan = plan_of(op.like, found, setup)
    text = f"exact from {passes} backward passes through {len(plan.groups)} layers"
    others = [place.name for place in plan.rest]
    shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
    return text + (f"; gradients of single examples for {shown}" if others else "")


# Without any optimisation loops over the roots of convolutions take 14 times as long.
@partial(programs.jit, static_argnames=("setup", "own"), options=QUICK)
def _diagonal_in_double(op: FisherOperator, setup: Setup, own: bool) -> list[jax.Array]:
    return in_wide(partial(_diagonal, setup=setup), op, own=own)


@partial(programs.jit, static_argnames="setup")
def _diagonal(op: FisherOperator, setup: Setup) -> PyTree:
    plan = plan_of(op.like, traced(op)[1], setup)

    def piece_sums(piece: PyTree, keys: Any) -> Any:
        run = Pass(op, setup, piece, keys)

        def sums(gradients: Any, rest: Any) -> Any:
            layers = [_layer(run, gradients, group, op.dtype) for group in run.plan.groups]
            return layers, [jnp.sum(g.astype(op.dtype) ** 2, axis=(0, 1)) for g in rest]

        return run.sum_over_gradients(sums)

    layers, rest = mean_over_pieces(op, piece_sums, None)
    leaves, treedef = jax.tree.flatten(op.structure)
    shapes, found = [leaf.shape for leaf in leaves], dict(zip(plan.rest_leaves, rest, strict=True))
    for group, entries in zip(plan.groups, layers, strict=True):
        found |= group.place.scatter(entries, shapes)
    return treedef.unflatten([found[i].astype(leaf.dtype) for i, leaf in enumerate(leaves)])


def _layer(run: Pass, gradients: dict[Path, jax.Array], group: Group, dtype: Any) -> jax.Array:
    """Σ G² of one layer, (groups, inputs, outputs)."""
    if group.kind == "embedding" and group.turns == (False,):
        return _embedding(run, gradients, group, dtype)
    return squares(run, gradients, group, None, None, dtype)


def _embedding(run: Pass, gradients: dict[Path, jax.Array], group: Group, dtype: Any) -> jax.Array:
    """The same where rows are read by number: (Σ_s g_s)² over the positions s of a row is Σ_s g_s Σ_t g_t.

    S² operations for S positions instead of a gradient with all rows.
    """
    rows = jnp.concatenate([run.rows[path] for path in group.paths], axis=2)  # (N, groups, S)
    g = jnp.concatenate([gradients[path].astype(dtype) for path in group.paths], axis=3)
    alike = (rows[..., :, None] == rows[..., None, :]).astype(dtype)
    products = g * arrays.einsum("ngst,kngto->kngso", alike, g)
    each = jnp.sum(products, axis=0)  # (N, groups, S, outputs)

    def one(own: jax.Array, values: jax.Array) -> jax.Array:  # of one group; what is out of range is dropped
        zero = jnp.zeros((group.input_size(False), values.shape[-1]), dtype)
        return zero.at[own.reshape(-1)].add(values.reshape(-1, values.shape[-1]), mode="drop")

    return jax.vmap(one, in_axes=(1, 1))(rows, each)
