"""The perturbations that compression makes: rounding to few bits, and pruning of small weights."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from spectra import _paths, _tree
from spectra._errors import SpectraError
from spectra._mesh import automatic
from spectra.operators.base import LinearOperator, require_operator

PyTree = Any


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
        channel_axis: axis of the output channels: -1 as in Flax, 0 as in PyTorch; None for one scale a leaf.
        by: "layer" or "leaf".

    Returns:
        {name: vector with None in the place of leaves that do not change}, for `perturbation`.

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
    if not isinstance(bits, int) or not 2 <= bits <= 16:
        raise SpectraError(f"bits={bits}: use 2 to 16.")
    levels = 2 ** (bits - 1) - 1

    def rounded(w, stacked):
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
        {name: vector with None in the place of leaves that do not change}, for `perturbation`.

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

    def pruned(w, stacked):
        rows = w.reshape(w.shape[0], -1) if stacked else w.reshape(1, -1)
        count = math.floor(share * rows.shape[1] + 0.5)
        ranks = jnp.argsort(jnp.argsort(jnp.abs(rows), axis=1), axis=1)  # ties by their order
        return jnp.where(ranks < count, -rows, 0).reshape(w.shape)

    return _by_layer(op, by, pruned)


def _by_layer(op: LinearOperator, by: str, change: Callable[..., jax.Array]) -> dict[str, PyTree]:
    """The perturbations of matrices by layer; those of a stack of layers are one for each."""
    require_operator(op)
    leaves, treedef = jax.tree.flatten(op.like)
    if not _tree.has_values(leaves):
        raise SpectraError("op knows the shapes of its parameters only, not their values.")
    found = {}
    for name, indices, stack in _paths.stacked_groups(op.like, by, op._stacks()):
        stacked = stack is not None
        chosen = [i for i in indices if leaves[i].ndim >= 2 + stacked and leaves[i].size]
        if not chosen:
            continue
        parts = {i: change(_tree.lift(jnp.asarray(leaves[i])), stacked) for i in chosen}
        named = {name: parts}
        if stack is not None:
            named = {
                _paths.numbered(name, stack, layer): {i: _only(part, layer) for i, part in parts.items()}
                for layer in range(leaves[chosen[0]].shape[0])
            }
        for each, kept in named.items():
            found[each] = treedef.unflatten([kept.get(i) for i in range(len(leaves))])
    if not found:
        raise SpectraError("no parameter has two axes or more: there are no weights to compress.")
    return found


def _only(stack: jax.Array, layer: int) -> jax.Array:
    return jnp.zeros_like(stack).at[layer].set(stack[layer])
