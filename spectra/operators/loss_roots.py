"""Square roots of the loss's curvature in output space: the vectors whose outer products are summed.

With outputs f_n of each example, Σ_k r_nk r_nkᵀ is the Hessian of the mean loss in f_n ("type2"), or has it
as its mean ("mc"), or is Σ_t w_t ∇ℓ_t ∇ℓ_tᵀ at the data's own targets ("empirical").
"""

# pyright: reportPrivateUsage=false
# Operators have parts that only this package uses.

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import arrays, draws, host, programs, trees
from spectra.base.errors import MemoryLimitError, StructureError
from spectra.base.trees import PyTree
from spectra.operators.fisher import FisherOperator
from spectra.operators.ggn import split
from spectra.operators.stochastic import QUICK
from spectra.results import format_bytes

FORMS = ("softmax", "diagonal", "dense")
UNITS = 11
"""Powers of two that examples are told apart by, as many in turn in an order of chance."""


@dataclasses.dataclass(frozen=True)
class Roots:
    """`count` vectors for each example; `column(k)` are the k-th of all examples, in the outputs' form."""

    count: int
    column: Callable[[jax.Array], PyTree]


def roots(op: FisherOperator, form: str, outputs: PyTree, piece: PyTree, keys: jax.Array | None) -> Roots:
    """The vectors of one piece of data, at its outputs."""
    targets = split(piece)[1]
    if op.kind == "mc":
        assert keys is not None
        return _sampled(op, outputs, piece, keys)
    if op.kind == "empirical":
        return _of_terms(op, outputs, piece)
    if form == "softmax":
        return _softmax(op, outputs, targets)
    if form == "diagonal":
        return _diagonal(op, outputs, targets)
    return _dense(op, outputs, targets)


def num_roots(op: FisherOperator, outputs: PyTree, targets: PyTree) -> int:
    """How many there are for an example, from shapes alone."""
    if op.kind == "type2":
        return _numbers(outputs)
    axis = op._class_axis(outputs, targets)
    return 1 if axis is None else math.prod(n for i, n in enumerate(outputs.shape) if i not in (0, axis))


def form_of(op: FisherOperator, outputs: PyTree, piece: PyTree, limit: float) -> str:
    """Which root the loss's Hessian has, seen on a few examples.

    Raises:
        StructureError: it is not made of a block for each example, whose roots there are.
    """
    *errors, coupled = jax.device_get(_form_errors(op, outputs, piece))
    form = next((form for form, error in zip(FORMS, errors, strict=False) if error <= limit), "dense")
    if form == "dense" and coupled > limit:
        raise StructureError(
            "the loss sets examples against each other: a move of the outputs of one changes the gradient in "
            f"those of others (relative error {coupled:.1e}), as in contrastive losses and in functions of a "
            "mean. Kronecker factors are means over single examples: use GGNOperator."
        )
    return form


@partial(programs.jit, options=QUICK)
def _form_errors(op: FisherOperator, outputs: PyTree, piece: PyTree) -> tuple[jax.Array, ...]:
    """How far ∇²ℓ is from that of a softmax, from a diagonal, and from a block for each example."""
    targets = split(piece)[1]
    u = draws.sample(jax.random.key(0), outputs, jax.random.normal)
    own = op._curvature(outputs, targets, u)
    size = trees.largest(own)

    def error(other: Any) -> Any:
        difference = trees.largest(jax.tree.map(jnp.subtract, own, other))
        return jnp.where(size > 0, difference / size, difference)

    softmax = jnp.asarray(jnp.inf)
    if op._class_axis(outputs, targets) is not None:
        p, weight, axis = _probabilities(op, outputs, targets)
        softmax = error(weight * p * (u - jnp.sum(p * u, axis, keepdims=True)))
    ones = jax.tree.map(jnp.ones_like, outputs)
    diagonal = error(jax.tree.map(jnp.multiply, op._curvature(outputs, targets, ones), u))
    return softmax, diagonal, _coupling(op, outputs, targets, u)


def _coupling(op: FisherOperator, outputs: PyTree, targets: PyTree, u: PyTree) -> jax.Array:
    """|∇²ℓ S u - S ∇²ℓ u| over |S ∇²ℓ u|, zero for blocks: S multiplies each example by a number of its own.

    These are powers of two, with which no product of a block is rounded otherwise: predictions that are sure
    have little more than rounding in theirs.
    """
    count = len(jax.tree.leaves(outputs)[0])
    units = np.exp2(np.random.default_rng(0).permutation(count) % UNITS)

    def scaled(x: jax.Array) -> jax.Array:
        return x * jnp.asarray(units, x.dtype).reshape(-1, *[1] * (x.ndim - 1))

    both = jax.tree.map(lambda x: jnp.stack([x, scaled(x)]), u)
    images = jax.vmap(lambda v: op._curvature(outputs, targets, v))(both)
    own = jax.tree.map(lambda x: scaled(x[0]), images)
    size, off = trees.largest(own), trees.largest(jax.tree.map(lambda x, y: x[1] - y, images, own))
    return jnp.where(size > 0, off / jnp.where(size > 0, size, 1), off)


def _probabilities(
    op: FisherOperator, outputs: jax.Array, targets: PyTree
) -> tuple[jax.Array, jax.Array, int]:
    """p, the weight of each term, and the axis of the classes."""
    axis = op._class_axis(outputs, targets)
    assert axis is not None
    weights = op._softmax_weights(outputs, targets, axis)
    return jax.nn.softmax(outputs, axis), weights, axis


def _softmax(op: FisherOperator, outputs: jax.Array, targets: PyTree) -> Roots:
    """√w (√p_c e_c - √p_c p) for each term and class c."""
    p, weight, axis = _probabilities(op, outputs, targets)
    last = jnp.moveaxis(p, axis, -1).reshape(len(p), -1, p.shape[axis])
    size = jnp.sqrt(jnp.maximum(weight, 0))
    terms, classes = last.shape[1:]

    def column(k: jax.Array) -> PyTree:
        term, c = k // classes, k % classes
        row = jnp.take(last, term, axis=1)
        own = jnp.take(row, c, axis=1)[:, None]
        unit = jax.nn.one_hot(c, classes, dtype=p.dtype)
        others = row * (1 - unit)  # whose sum is 1 - p_c, of which a prediction that is sure leaves no digits
        values = jnp.sqrt(own) * (unit * jnp.sum(others, 1, keepdims=True) - others)
        only = jax.nn.one_hot(term, terms, dtype=p.dtype)
        moved = (only[:, None] * values[:, None, :]).reshape(jnp.moveaxis(p, axis, -1).shape)
        return size * jnp.moveaxis(moved, -1, axis)

    return Roots(terms * classes, column)


def _numbers(outputs: PyTree) -> int:
    """Outputs of one example."""
    return sum(math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(outputs))


def _unit(outputs: PyTree, k: jax.Array) -> PyTree:
    """The k-th unit vector for every example."""
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), outputs)
    flat = jax.nn.one_hot(k, _numbers(outputs), dtype=trees.scalar_dtype(outputs))
    return jax.tree.map(lambda u, x: jnp.broadcast_to(u, x.shape), trees.unravel(flat, one), outputs)


def _diagonal(op: FisherOperator, outputs: PyTree, targets: PyTree) -> Roots:
    """√h_k e_k for each output k."""
    second = op._curvature(outputs, targets, jax.tree.map(jnp.ones_like, outputs))
    root = jax.tree.map(lambda h: jnp.sqrt(jnp.maximum(h, 0)), second)
    return Roots(_numbers(outputs), lambda k: jax.tree.map(jnp.multiply, root, _unit(outputs, k)))


def _dense(op: FisherOperator, outputs: PyTree, targets: PyTree) -> Roots:
    """V √Λ of each example's Hessian V Λ Vᵀ, without negative curvature."""
    count, examples = _numbers(outputs), len(jax.tree.leaves(outputs)[0])
    dtype = trees.scalar_dtype(outputs)
    needed, free = 3 * examples * count**2 * jnp.dtype(dtype).itemsize, host.available_bytes()
    if free is not None and needed > free / 2:
        raise MemoryLimitError(
            f"the Hessian of this loss in its {count:,} outputs an example is neither that of a softmax "
            f"nor diagonal, and {format_bytes(needed)} for {examples} examples do not fit: use kind='mc', "
            "or a smaller microbatch."
        )
    ravel = jax.vmap(trees.ravel)
    rows = jax.lax.map(lambda k: ravel(op._curvature(outputs, targets, _unit(outputs, k))), jnp.arange(count))
    hessian = jnp.moveaxis(rows, 0, 1)
    root = _root((hessian + jnp.swapaxes(hessian, 1, 2)) / 2)
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), outputs)
    return Roots(count, lambda k: jax.vmap(lambda flat: trees.unravel(flat, one))(jnp.take(root, k, axis=2)))


@jax.custom_jvp
def _root(matrices: jax.Array) -> jax.Array:
    """V √Λ of symmetric V Λ Vᵀ, without negative eigenvalues."""
    return _decomposed(matrices)[1]


def _decomposed(matrices: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """V, V √Λ, and the diagonal of 1 / √Λ, zero for eigenvalues of rounding."""
    values, basis = arrays.eigh(matrices)
    least = matrices.shape[-1] * jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values), -1, keepdims=True)
    inverse = jnp.where(values > least, 1 / jnp.sqrt(jnp.where(values > least, values, 1)), 0)
    return basis, basis * jnp.sqrt(jnp.maximum(values, 0))[:, None, :], inverse


@_root.defjvp
def _root_forward(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:  # pyright: ignore[reportUnusedFunction]
    """(dH - P dH / 2) V / √Λ with P the projector on the range: of one of the roots of H + dH, in which zero
    eigenvalues, as a softmax has one, have no part. Those of the eigenvectors would divide by them."""
    basis, root, inverse = _decomposed(primals[0])
    moved = arrays.einsum("nij,njk->nik", tangents[0], basis * inverse[:, None, :])
    within = basis * (inverse > 0)[:, None, :]
    projected = arrays.einsum("nij,nkj->nik", within, within)
    return root, moved - arrays.einsum("nij,njk->nik", projected, moved) / 2


def _sampled(op: FisherOperator, outputs: PyTree, piece: PyTree, keys: jax.Array) -> Roots:
    """√w_t ∇ℓ_t at targets drawn from the model, all terms of an example at once; `keys` is (N, samples)."""
    targets, samples = split(piece)[1], keys.shape[1]

    def one(keys: jax.Array) -> PyTree:
        drawn = op._redraw(keys, outputs, targets, piece)
        scores = op._scores(outputs, drawn, piece)
        return jax.tree.map(lambda g: g / np.sqrt(samples).astype(g.dtype), scores)

    stack = jax.lax.map(one, keys.T)
    return Roots(samples, lambda k: jax.tree.map(lambda x: jnp.take(x, k, axis=0), stack))


def _of_terms(op: FisherOperator, outputs: PyTree, piece: PyTree) -> Roots:
    """√w_t ∇ℓ_t for one term of every example at a time."""
    targets = split(piece)[1]
    scores = op._scores(outputs, targets, piece)
    axis = op._class_axis(outputs, targets)
    if axis is None:
        return Roots(1, lambda k: scores)
    shape = [1 if i in (0, axis) else n for i, n in enumerate(outputs.shape)]
    terms = math.prod(shape)

    def column(k: jax.Array) -> PyTree:
        return scores * jax.nn.one_hot(k, terms, dtype=scores.dtype).reshape(shape)

    return Roots(terms, column)
