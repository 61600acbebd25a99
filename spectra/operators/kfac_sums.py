"""The sums over data that Kronecker factors are made of: rows of layers, and gradients of their outputs."""

# pyright: reportPrivateUsage=false
# Operators have parts that only this package uses.

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from spectra.base import arrays, programs, trees
from spectra.base.errors import StructureError
from spectra.base.trees import PyTree
from spectra.operators.accumulate import mean_over_microbatches
from spectra.operators.batches import batch_size, owned_leaves, replace_owned, shared_leaves, weigh
from spectra.operators.fisher import FisherOperator
from spectra.operators.ggn import split
from spectra.operators.kfac_plan import Group, Plan, plan_of
from spectra.operators.kronecker import Place
from spectra.operators.layers import Found, Path, find_sites
from spectra.operators.loss_roots import roots
from spectra.operators.replay import arranged, output_rows, replay

COLUMNS = 16
"""Gradients of each example in flight at a time."""
ENTRIES = 2**25
"""Numbers of the weight gradients of single examples in flight at a time."""
_einsum = arrays.einsum


@dataclasses.dataclass(frozen=True)
class Setup:
    """What decides the factors beside the model: static."""

    sequence: str
    bias: str
    form: str
    exact_limit: int
    factor_limit: int


def traced(op: FisherOperator) -> tuple[Any, Found, list[jax.Array]]:
    """The model on one example as a jaxpr, its sites, and the leaves that examples own."""
    owned = owned_leaves(op.data, op.shared)
    variables = op._variables()

    def model(variables: PyTree, example: list[Any]) -> PyTree:
        batch = replace_owned(op.data, op.shared, [x[None] for x in example])
        return op.model_fn(op._merge(variables), split(batch)[0])

    with jax.default_matmul_precision(op.matmul_precision):
        jaxpr = jax.make_jaxpr(model)(variables, [_first(x) for x in owned])
    return jaxpr, find_sites(jaxpr, len(jax.tree.leaves(variables))), owned


def _first(x: Any) -> jax.ShapeDtypeStruct:
    """Of an example, as JAX would have it: of labels that NumPy holds in 64 bits it warns otherwise."""
    return jax.ShapeDtypeStruct(x.shape[1:], jax.dtypes.canonicalize_dtype(x.dtype))


class Pass:
    """The model's outputs on one piece of data, the rows of its layers, and the way back to gradients."""

    def __init__(self, op: FisherOperator, setup: Setup, piece: PyTree, keys: jax.Array | None):
        op = op._with(data=piece, microbatch=None)
        jaxpr, found, owned = traced(op)
        self.plan = plan_of(op.like, found, setup)
        self.sites = {path: found.sites[path] for group in self.plan.groups for path in group.paths}
        leaves, count = jax.tree.leaves(op._variables()), len(owned[0])

        def one(
            moves: dict[Path, jax.Array], rest: list[jax.Array], example: list[Any]
        ) -> tuple[list[jax.Array], dict[Path, Any]]:
            own = list(leaves)
            for i, leaf in zip(self.plan.rest_leaves, rest, strict=True):
                own[i] = leaf
            outputs, rows = replay(jaxpr, self.sites, [*own, *example], moves)
            return [x[0] for x in outputs], rows

        for aval in jaxpr.out_avals:
            if aval.shape[:1] != (1,):
                raise StructureError(
                    f"the model's outputs on one example have shape {list(aval.shape)}: they need the "
                    "axis of the examples as their first."
                )
        zeros = {
            path: jnp.zeros((count, *site.loops, *site.out_shape), site.out_dtype)
            for path, site in self.sites.items()
        }
        rest = [jnp.broadcast_to(leaves[i], (count, *leaves[i].shape)) for i in self.plan.rest_leaves]
        flat, self._pull, rows = jax.vjp(lambda m, r: jax.vmap(one)(m, r, owned), zeros, rest, has_aux=True)
        treedef = jax.tree.structure(
            jax.eval_shape(lambda: op.model_fn(op._merge(op._variables()), split(piece)[0]))
        )
        self.outputs = treedef.unflatten(flat)
        self._roots = roots(op, setup.form, self.outputs, piece, keys)
        per = {path: 1 if site.kind == "embedding" else 3 for path, site in self.sites.items()}
        self.rows = {
            path: jax.vmap(lambda x, path=path: arranged(self.sites[path], x, per[path]))(rows[path])
            for path in self.sites
        }

    def sum_over_gradients(self, fn: Any) -> PyTree:
        """Σ_k fn(gradients of the k-th root, {path: (N, groups, positions, outputs)}, and of the rest)."""
        count = self._roots.count
        chunk = min(COLUMNS, count)
        steps = -(-count // chunk)

        def one(k: jax.Array) -> tuple[dict[Path, jax.Array], list[jax.Array]]:
            live = k < count
            column = self._roots.column(jnp.minimum(k, count - 1))
            column = jax.tree.map(lambda x: jnp.where(live, x, 0), column)
            moves, rest = self._pull(jax.tree.leaves(trees.cast_like(column, self.outputs)))
            moved = {path: jax.vmap(partial(output_rows, self.sites[path]))(g) for path, g in moves.items()}
            return moved, rest

        def body(total: PyTree, start: int | jax.Array) -> tuple[PyTree, None]:
            gradients = jax.vmap(one)(start + jnp.arange(chunk))
            return jax.tree.map(jnp.add, total, fn(*gradients)), None

        zero = jax.tree.map(
            lambda s: jnp.zeros(s.shape, s.dtype),
            jax.eval_shape(lambda: fn(*jax.vmap(one)(jnp.arange(chunk)))),
        )
        if steps == 1:
            return body(zero, 0)[0]
        return lax.scan(body, zero, chunk * jnp.arange(steps))[0]


def example_weights(op: FisherOperator, piece: PyTree) -> jax.Array:
    """What each example counts in means over examples: 1, or `weight_fn` of it alone; their sum is 1."""
    count = batch_size(piece, op.shared)
    if op.weight_fn is None:
        return jnp.full(count, 1 / count)
    weight_fn, owned = op.weight_fn, owned_leaves(piece, op.shared)

    def one(example: list[Any]) -> jax.Array:
        alone = replace_owned(piece, op.shared, [x[None] for x in example])
        return jnp.asarray(weigh(weight_fn, alone), float)

    weights = jax.vmap(one)(owned)
    return weights / jnp.sum(weights)


@partial(programs.jit, static_argnames="setup")
def factor_sums(
    op: FisherOperator, keys: jax.Array | None, setup: Setup
) -> tuple[list[list[jax.Array]], list[list[jax.Array]], list[jax.Array]]:
    """([(A, B) for each use] of each group, moments of each leaf that is no layer's), means over the data."""

    def piece_sums(piece: PyTree, keys: jax.Array | None) -> tuple[Any, ...]:
        run = Pass(op, setup, piece, keys)
        weights, dtype = example_weights(op, piece), op.dtype
        plan: Plan = run.plan
        inputs = [
            [_input_side(run, group, turned, weights.astype(dtype), setup) for turned in group.turns]
            for group in plan.groups
        ]

        def sums(
            gradients: dict[Path, jax.Array], rest: list[jax.Array]
        ) -> tuple[list[list[jax.Array]], list[jax.Array]]:
            sides = [
                [_output_side(gradients, group, turned, setup, dtype) for turned in group.turns]
                for group in plan.groups
            ]
            blocks = [_moments(place, g.astype(dtype)) for place, g in zip(plan.rest, rest, strict=True)]
            return sides, blocks

        return inputs, *run.sum_over_gradients(sums)

    return mean_over_pieces(op, piece_sums, keys)


@partial(programs.jit, static_argnames="setup")
def second_moments(
    op: FisherOperator,
    keys: jax.Array | None,
    bases: list[tuple[jax.Array | None, jax.Array | None]],
    setup: Setup,
) -> list[jax.Array]:
    """Σ (Uᵀ G V)² over the gradients G of single examples, for each group, a mean over the data."""

    def piece_sums(piece: PyTree, keys: jax.Array | None) -> list[jax.Array]:
        run = Pass(op, setup, piece, keys)

        def sums(gradients: dict[Path, jax.Array], rest: list[jax.Array]) -> list[jax.Array]:
            del rest
            groups = zip(run.plan.groups, bases, strict=True)
            return [squares(run, gradients, group, u, v, op.dtype) for group, (u, v) in groups]

        return run.sum_over_gradients(sums)

    return mean_over_pieces(op, piece_sums, keys)


def mean_over_pieces(op: FisherOperator, fn: Any, keys: jax.Array | None) -> PyTree:
    """The weighted mean over microbatches of fn(piece, keys of its examples)."""
    leaves, treedef = jax.tree.flatten(op.data)
    names = {str(i) for i, alike in enumerate(shared_leaves(op.data, op.shared)) if alike}

    def opened(batch: tuple[Any, ...]) -> PyTree:
        return treedef.unflatten(batch[: len(leaves)])

    count = op.weight_fn
    weight: Callable[[Any], Any] | None = None if count is None else lambda batch: count(opened(batch))
    batch = tuple(leaves) if keys is None else (*leaves, keys)

    def one(batch: tuple[Any, ...]) -> PyTree:
        return fn(opened(batch), None if keys is None else batch[-1])

    shared = names.__contains__ if names else None
    with jax.default_matmul_precision(op.matmul_precision):
        return mean_over_microbatches(one, batch, op.microbatch, weight, shared)


def _with_ones(group: Group, rows: jax.Array) -> jax.Array:
    if not group.has_bias:
        return rows
    return jnp.concatenate([rows, jnp.ones((*rows.shape[:-1], 1), rows.dtype)], -1)


def _rows(run: Pass, group: Group, turned: bool, dtype: Any) -> jax.Array:
    """Rows of all uses of one orientation along the positions, (N, groups, positions, inputs)."""
    if group.only_bias:
        shapes = [run.rows[path].shape for path in group.of(turned)]
        parts = [jnp.ones((*shape[:3], 1), dtype) for shape in shapes]
    else:
        parts = [run.rows[path] for path in group.of(turned)]
        floats = [x if jnp.issubdtype(x.dtype, jnp.integer) else x.astype(dtype) for x in parts]
        parts = [x if x.ndim == 3 else _with_ones(group, x) for x in floats]
    return jnp.concatenate(parts, axis=2)


def _gradients(gradients: dict[Path, jax.Array], group: Group, turned: bool, dtype: Any) -> jax.Array:
    """(columns, N, groups, positions, outputs) of all uses of one orientation."""
    return jnp.concatenate([gradients[path].astype(dtype) for path in group.of(turned)], axis=3)


def _input_side(run: Pass, group: Group, turned: bool, weights: jax.Array, setup: Setup) -> jax.Array:
    """A: the mean over examples of a aᵀ, a mean over positions (expand), or of the mean a (reduce)."""
    rows, size = _rows(run, group, turned, weights.dtype), group.input_size(turned)
    diagonal = group.input_is_diagonal(turned)
    if jnp.issubdtype(rows.dtype, jnp.integer):
        if setup.sequence == "expand" or rows.shape[2] == 1:
            return _frequencies(rows, weights / rows.shape[2], size)
        rows = jnp.mean(jax.nn.one_hot(rows, size, dtype=weights.dtype), axis=2, keepdims=True)
        diagonal = True
    if setup.sequence == "reduce":
        rows = jnp.mean(rows, axis=2, keepdims=True)
    scaled = rows * (weights / rows.shape[2])[:, None, None, None]
    return _einsum("ngsi,ngsi->gi" if diagonal else "ngsi,ngsj->gij", scaled, rows)


def _frequencies(indices: jax.Array, weights: jax.Array, size: int) -> jax.Array:
    """How often each row is read, (groups, size): the diagonal of A for one-hot inputs."""

    def one(own: jax.Array) -> jax.Array:  # (N, positions); what is out of range is dropped
        added = jnp.broadcast_to(weights[:, None], own.shape)
        return jnp.zeros(size, weights.dtype).at[own].add(added, mode="drop")

    return jax.vmap(one, in_axes=1)(indices)


def _output_side(
    gradients: dict[Path, jax.Array], group: Group, turned: bool, setup: Setup, dtype: Any
) -> jax.Array:
    """B: the sum over roots and examples of g gᵀ, over positions (expand) or of the sum of g (reduce)."""
    g = _gradients(gradients, group, turned, dtype)
    if setup.sequence == "reduce":
        g = jnp.sum(g, axis=3, keepdims=True)
    return _einsum("kngsi,kngsi->gi" if group.output_is_diagonal(turned) else "kngsi,kngsj->gij", g, g)


def _moments(place: Place, g: jax.Array) -> jax.Array:
    """Σ g gᵀ, or Σ g², of the gradients (columns, N, *leaf) of one leaf."""
    flat = jax.vmap(jax.vmap(lambda x: place.layout.matrix(x)[..., 0]))(g)
    return _einsum("kngi,kngi->gi" if place.kind == "diagonal" else "kngi,kngj->gij", flat, flat)


Part = tuple[bool, jax.Array, jax.Array]
"""Of one use of a layer: whether its weights are turned, the rows that come in, and the gradients."""


def squares(
    run: Pass,
    gradients: dict[Path, jax.Array],
    group: Group,
    u: jax.Array | None,
    v: jax.Array | None,
    dtype: Any,
) -> jax.Array:
    """Σ over roots and examples of (Uᵀ G V)², (groups, inputs, outputs).

    In units of the largest numbers: the square of a gradient of 1e-20 underflows, whatever its rows are.
    """
    parts: list[Part] = []
    for turned in group.turns:
        rows, g = _rows(run, group, turned, dtype), _gradients(gradients, group, turned, dtype)
        left, right = (v, u) if turned else (u, v)
        parts.append((turned, _rotated_rows(rows, left, group.input_size(turned), dtype), _turn(g, right)))
    unit, parts = _in_units(parts)
    return unit * (unit * _squares(parts, group))


def _in_units(parts: list[Part]) -> tuple[jax.Array, list[Part]]:
    """The unit of the products of rows and gradients, and both divided by their own."""
    floating = [rows for _, rows, _ in parts if not jnp.issubdtype(rows.dtype, jnp.integer)]
    of_g = trees.power_of_two(trees.largest([g for *_, g in parts]))
    if len(floating) < len(parts):  # numbers of rows, which are ones and zeros
        return of_g, [(turned, rows, g / of_g) for turned, rows, g in parts]
    of_rows = trees.power_of_two(trees.largest(floating))
    return of_g * of_rows, [(turned, rows / of_rows, g / of_g) for turned, rows, g in parts]


def _squares(parts: list[Part], group: Group) -> jax.Array:
    if len(parts) == 1 and parts[0][1].ndim == 4 and parts[0][1].shape[2] == 1:
        ((_, rows, g),) = parts
        summed = _einsum("ngsi,kngso->gio", rows**2, g**2)
        return jnp.swapaxes(summed, 1, 2) if parts[0][0] else summed
    return _by_examples(parts, group)


def _turn(g: jax.Array, basis: jax.Array | None) -> jax.Array:
    return g if basis is None else _einsum("kngso,gop->kngsp", g, basis)


def _rotated_rows(rows: jax.Array, basis: jax.Array | None, size: int, dtype: Any) -> jax.Array:
    if jnp.issubdtype(rows.dtype, jnp.integer):
        if basis is None:
            return rows
        read = jax.vmap(lambda q, own: q.at[own].get(mode="fill", fill_value=0), (0, 1), 1)
        return read(basis, rows)
    return rows if basis is None else _einsum("ngsi,gij->ngsj", rows, basis)


def _by_examples(parts: list[Part], group: Group) -> jax.Array:
    """The squares of whole gradients, of a few examples at a time."""
    count, columns = parts[0][1].shape[0], parts[0][2].shape[0]
    size = group.groups * group.input_size(False) * group.output_size(False)
    few = max(1, min(count, ENTRIES // max(size * columns, 1)))
    steps = -(-count // few)

    def body(total: jax.Array, start: int | jax.Array) -> tuple[jax.Array, None]:
        live = start + jnp.arange(few) < count
        picked = jnp.minimum(start + jnp.arange(few), count - 1)
        whole = 0.0
        for turned, rows, g in parts:
            gradient = _outer(rows[picked], g[:, picked], group.input_size(turned))
            whole = whole + (jnp.swapaxes(gradient, 3, 4) if turned else gradient)
        return total + jnp.sum(jnp.where(live[:, None, None, None], whole, 0) ** 2, (0, 1)), None

    zero = jnp.zeros((group.groups, group.input_size(False), group.output_size(False)), parts[0][2].dtype)
    return body(zero, 0)[0] if steps == 1 else lax.scan(body, zero, few * jnp.arange(steps))[0]


def _outer(rows: jax.Array, g: jax.Array, size: int) -> jax.Array:
    """Σ_s a_s g_sᵀ of each example, (columns, N, groups, inputs, outputs)."""
    if not jnp.issubdtype(rows.dtype, jnp.integer):
        return _einsum("ngsi,kngso->kngio", rows, g)

    def one(own: jax.Array, g: jax.Array) -> jax.Array:  # (positions,), (positions, outputs)
        return jnp.zeros((size, g.shape[-1]), g.dtype).at[own].add(g, mode="drop")

    over_groups = jax.vmap(one)
    return jax.vmap(jax.vmap(over_groups), (None, 0))(rows, g)
