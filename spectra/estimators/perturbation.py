"""What perturbations of the parameters do to the loss, and the perturbations that compression makes."""

# pyright: reportPrivateUsage=false
# Operators have parts that only this package uses.

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import paths, programs, trees
from spectra.base.calls import automatic
from spectra.base.errors import NonFiniteError, SpectraError, StructureError
from spectra.base.trees import PyTree
from spectra.estimators.loss_errors import measured_change
from spectra.operators.base import LinearOperator, require_operator
from spectra.operators.data import DataOperator
from spectra.results import Perturbation


@automatic
def rounding_deltas(
    op: LinearOperator, bits: int = 8, *, channel_axis: int | None = -1, by: str = "layer"
) -> dict[str, PyTree]:
    """Make the perturbation of each layer whose weights are rounded to nearest, symmetrically per channel.

    δ = s round(w / s) - w with s = max |w| / (2^(bits - 1) - 1), the maximum taken over one output channel.
    Leaves of fewer than two axes (biases, norms) stay as they are.

    Args:
        op: operator whose `like` are the parameters.
        bits: 2 to 16.
        channel_axis: axis of the output channels: -1 as in Flax, 0 as in PyTorch; None for one scale per
            leaf.
        by: "layer" or "leaf".

    Returns:
        {name: vector with None in place of leaves that do not change}, for `perturbation`.

    Raises:
        SpectraError: bits out of range, or no leaf has two axes.

    Examples:
        >>> import jax.numpy as jnp, spectra
        >>> params = {"w": jnp.array([[1.0, 0.3], [0.4, 0.6]])}
        >>> op = spectra.HessianOperator(lambda p, _: jnp.sum(p["w"] ** 2), params, None)
        >>> deltas = spectra.rounding_deltas(op, 2, by="leaf")  # levels -1, 0, 1 times the largest
        >>> [[round(float(x), 2) for x in row] for row in deltas["w"]["w"]]
        [[0.0, -0.3], [-0.4, 0.0]]
    """
    if not isinstance(bits, int) or not 2 <= bits <= 16:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise SpectraError(f"bits={bits}: use 2 to 16.")
    levels = 2 ** (bits - 1) - 1

    def rounded(w: jax.Array, stacked: bool) -> jax.Array:
        axes = tuple(range(int(stacked), w.ndim))
        if channel_axis is not None:
            if not -w.ndim + int(stacked) <= channel_axis < w.ndim - int(stacked):
                raise SpectraError(f"channel_axis={channel_axis}: a leaf has shape {w.shape}.")
            channel = channel_axis % w.ndim if channel_axis < 0 else channel_axis + int(stacked)
            axes = tuple(axis for axis in axes if axis != channel)
        step = jnp.max(jnp.abs(w), axis=axes, keepdims=True) / levels
        step = jnp.where(step > 0, step, 1)
        return step * jnp.round(w / step) - w

    return _by_layer(op, by, rounded)


@automatic
def pruning_deltas(op: LinearOperator, share: float = 0.5, *, by: str = "layer") -> dict[str, PyTree]:
    """Make the perturbation of each layer whose smallest weights are set to zero.

    Of every leaf with two axes or more the `share` of entries with the smallest |w| is removed: δ = -w there.

    Args:
        op: operator whose `like` are the parameters.
        share: part of the entries, between 0 and 1.
        by: "layer" or "leaf".

    Returns:
        {name: vector with None in place of leaves that do not change}, for `perturbation`.

    Raises:
        SpectraError: share out of range, or no leaf has two axes.

    Examples:
        >>> import jax.numpy as jnp, spectra
        >>> params = {"w": jnp.array([[1.0, 0.3], [0.4, 0.6]])}
        >>> op = spectra.HessianOperator(lambda p, _: jnp.sum(p["w"] ** 2), params, None)
        >>> deltas = spectra.pruning_deltas(op, 0.5, by="leaf")
        >>> [[round(float(x), 2) for x in row] for row in deltas["w"]["w"]]
        [[0.0, -0.3], [-0.4, 0.0]]
    """
    if not 0 < share < 1:
        raise SpectraError(f"share={share} is not between 0 and 1.")

    def pruned(w: jax.Array, stacked: bool) -> jax.Array:
        rows = w.reshape(w.shape[0], -1) if stacked else w.reshape(1, -1)
        count = math.floor(share * rows.shape[1] + 0.5)
        ranks = jnp.argsort(jnp.argsort(jnp.abs(rows), axis=1), axis=1)  # ties by their order
        return jnp.where(ranks < count, -rows, 0).reshape(w.shape)

    return _by_layer(op, by, pruned)


def _by_layer(op: LinearOperator, by: str, change: Callable[..., jax.Array]) -> dict[str, PyTree]:
    """The perturbations of matrices by layer; those of a stack of layers are one for each."""
    require_operator(op)
    leaves, treedef = jax.tree.flatten(op.like)
    if not trees.has_values(leaves):
        raise SpectraError("op knows only the shapes of its parameters, not their values.")
    found: dict[str, PyTree] = {}
    for name, indices, stack in paths.stacked_groups(op.like, by, op._stacks()):
        stacked = stack is not None
        chosen = [i for i in indices if leaves[i].ndim >= 2 + stacked and leaves[i].size]
        if not chosen:
            continue
        parts = {i: change(trees.lift(jnp.asarray(leaves[i])), stacked) for i in chosen}
        named = {name: parts}
        if stack is not None:
            named = {
                paths.numbered(name, stack, layer): {i: _only(part, layer) for i, part in parts.items()}
                for layer in range(leaves[chosen[0]].shape[0])
            }
        for each, kept in named.items():
            found[each] = treedef.unflatten([kept.get(i) for i in range(len(leaves))])
    if not found:
        raise SpectraError("no parameter has two axes or more: there are no weights to compress.")
    return found


def _only(stack: jax.Array, layer: int) -> jax.Array:
    return jnp.zeros_like(stack).at[layer].set(stack[layer])


@automatic
def perturbation(op: DataOperator, deltas: Mapping[str, PyTree], *, measure: bool = False) -> Perturbation:
    """Predict the change of the loss under perturbations, singly and combined.

    L(θ + δ) - L(θ) = gᵀδ + ½ δᵀHδ + O(|δ|³), with δ any sum of the perturbations: p products give the
    changes of all 2^p sets of them. For rounded or pruned layers see `rounding_deltas` and
    `pruning_deltas`.

    Args:
        op: operator on data; a `HessianOperator` for the change of the loss itself. With a Gauss-Newton or
            Fisher operator, the curvature is that of its matrix.
        deltas: perturbations by name: vectors like the parameters, flat or as a tree in which leaves that do
            not change may be None.
        measure: also evaluate the loss at θ + δ, for each perturbation and for all combined, and measure what
            rounding does to these changes.

    Returns:
        `Perturbation`: `.changes`, `.pairs`, `.change(names)`, `.ranking`, `.measured` to within
        `.rounding`; print it for the table.

    Raises:
        StructureError: `op` has no loss, or a perturbation is not like the parameters.
        SpectraError: there are no perturbations.
        NonFiniteError: the loss, or a perturbation, is NaN or infinite.

    Cost: one gradient and p products; with `measure` p + 2 evaluations of the loss, and for their
    rounding 2 (p + 1) in float64, or 8 (p + 1) in stochastic arithmetic where that is slow. One product in
    memory at a time, besides the perturbations.

    Fails where the loss is not quadratic over the length of δ, as with four bits or fewer: `measure` shows
    it.

    References:
        LeCun, Denker and Solla, Optimal brain damage, NeurIPS 1989; Dong et al., arXiv:1905.03696.

    Examples:
        >>> import jax.numpy as jnp, spectra
        >>> def loss_fn(params, x):
        ...     return 0.5 * jnp.mean((x @ (params["a"] + params["b"])) ** 2)
        >>> params = {"a": jnp.ones(2), "b": jnp.zeros(2)}
        >>> op = spectra.HessianOperator(loss_fn, params, jnp.eye(2))
        >>> deltas = {"a": {"a": -jnp.ones(2), "b": None}, "b": {"a": None, "b": jnp.ones(2)}}
        >>> found = spectra.perturbation(op, deltas)
        >>> [float(x) for x in found.changes], found.change()
        ([-0.5, 1.5], 0.0)
    """
    if not isinstance(op, DataOperator):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise StructureError(f"op is a {type(op).__name__}, which has no loss: pass an operator on data.")
    if not isinstance(deltas, Mapping) or not deltas:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise SpectraError("deltas is a mapping from names to perturbations, with at least one.")
    trees.require_values("perturbation", (op.params, op.data, list(deltas.values())))
    names = [str(name) for name in deltas]
    if len(set(names)) < len(names):
        raise SpectraError(f"deltas has names that are the same as text: {names}.")
    parts = {name: _parts(op, delta, name) for name, delta in zip(names, deltas.values(), strict=True)}
    loss = float(op.loss())
    if not math.isfinite(loss):
        raise NonFiniteError(op.explain_non_finite())
    kept = list(parts.values())
    # Squares of small perturbations underflow in float32, and those of large ones overflow.
    sizes, units = zip(*(_in_units(part) for part in kept), strict=True)
    sizes, units = np.asarray(jax.device_get(sizes), float), list(units)
    slopes = sizes * np.asarray(_dots(jax.tree.leaves(op.gradient()), units), float)
    prepared = op.prepare()
    rows = [_dots(jax.tree.leaves(prepared @ _filled(op, unit)), units) for unit in units]
    curvature = np.outer(sizes, sizes) * np.asarray(jax.device_get(rows), float)
    lengths = [trees.length(part) for part in kept]
    measured = _measured(op, kept, loss) if measure else {}
    return Perturbation(
        names=tuple(parts),
        slopes=slopes,
        curvature=(curvature + curvature.T) / 2,
        lengths=np.array(lengths),
        loss=loss,
        num_matvecs=len(parts),
        **measured,
    )


Parts = list[jax.Array | None]  # leaves of a perturbation, None for those that do not change


def _parts(op: DataOperator, delta: PyTree, name: str) -> Parts:
    """The leaves of a perturbation, None for those that do not change."""
    structure = op.structure
    if op.is_flat(delta):
        delta = op.as_vector(delta, f"deltas['{name}']")
    whole = jax.tree.structure(structure, is_leaf=_is_none)
    if jax.tree.structure(delta, is_leaf=_is_none) != whole:
        trees.check_structure(delta, structure, f"deltas['{name}']")  # says where
    wanted, found = (jax.tree.leaves(x, is_leaf=_is_none) for x in (structure, delta))
    pairs = [(like, x) for like, x in zip(wanted, found, strict=True) if like is not None]
    if all(x is None for _, x in pairs):
        raise SpectraError(f"deltas['{name}'] changes nothing: all of its leaves are None.")
    whole = [jnp.zeros(like.shape, like.dtype) if x is None else x for like, x in pairs]
    vector = jax.tree.unflatten(jax.tree.structure(structure), whole)
    trees.check_structure(vector, structure, f"deltas['{name}']")
    leaves = jax.tree.leaves(trees.cast_like(vector, structure))
    kept = [None if x is None else leaf for leaf, (_, x) in zip(leaves, pairs, strict=True)]
    if not trees.all_finite(kept):
        raise NonFiniteError(f"deltas['{name}'] holds NaN or infinity.")
    return kept


def _is_none(x: Any) -> bool:
    return x is None


def _filled(op: DataOperator, parts: Parts) -> PyTree:
    """The perturbation as a vector, zero where it changes nothing."""
    leaves, treedef = jax.tree.flatten(op.structure)
    return treedef.unflatten(
        [jnp.zeros(s.shape, s.dtype) if x is None else x for s, x in zip(leaves, parts, strict=True)]
    )


@programs.jit
def _in_units(parts: Parts) -> tuple[jax.Array, Parts]:
    """The size of a perturbation, and the perturbation in units of it."""
    size = trees.power_of_two(trees.largest(parts))
    return size, [None if x is None else trees.scale(1 / size, x) for x in parts]


@programs.jit
def _dots(image: list[jax.Array], kept: list[Parts]) -> jax.Array:
    """Inner products of one vector with all perturbations."""

    def one(parts: Parts) -> jax.Array:
        pairs = [(a, b) for a, b in zip(image, parts, strict=True) if b is not None]
        return trees.vdot([a for a, _ in pairs], [b for _, b in pairs])

    return jnp.stack([one(parts) for parts in kept])


def _measured(op: DataOperator, kept: list[Parts], loss: float) -> dict[str, Any]:
    """True changes and what rounding moves them by, of each perturbation and of their sum."""
    vectors = (_filled(op, parts) for parts in kept)
    total: list[PyTree] = []
    found: list[tuple[float, float]] = []
    for vector in vectors:
        found.append(measured_change(op, [vector], loss))
        total = _added(*total, vector) if total else [vector, jax.tree.map(jnp.zeros_like, vector)]
    changes, rounding = np.array(found).T
    together, unsure = measured_change(op, total, loss)
    return {"measured": changes, "measured_all": together, "rounding": rounding, "rounding_all": unsure}


@programs.jit
def _added(total: PyTree, left: PyTree, vector: PyTree) -> list[PyTree]:
    """The sum with a further vector, and what its rounding has left of all (Knuth's TwoSum)."""

    def lost(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
        return (a - (c - (c - a))) + (b - (c - a))

    new = jax.tree.map(jnp.add, total, vector)
    return [new, jax.tree.map(jnp.add, left, jax.tree.map(lost, total, vector, new))]
