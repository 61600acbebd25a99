"""What perturbations of the parameters do to the loss, from one product for each of them."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectra import _tree
from spectra._errors import NonFiniteError, SpectraError, StructureError
from spectra._mesh import automatic
from spectra.estimators.landscape import losses_at
from spectra.operators.data_operator import DataOperator
from spectra.results import Perturbation

PyTree = Any


@automatic
def perturbation(op: DataOperator, deltas: Mapping[str, PyTree], *, measure: bool = False) -> Perturbation:
    """Predict the change of the loss under perturbations, alone and together.

    L(θ + δ) - L(θ) = gᵀδ + ½ δᵀHδ + O(|δ|³), with δ any sum of the perturbations: p products give the
    changes of all 2^p sets of them. For layers that are rounded or pruned see `rounding_deltas` and
    `pruning_deltas`.

    Args:
        op: operator on data; a `HessianOperator` for the change of the loss itself. With a Gauss-Newton or
            Fisher matrix in its place the curvature is that of the matrix.
        deltas: perturbations by name: vectors like the parameters, flat or as a tree in which leaves that do
            not change may be None.
        measure: evaluate the loss at θ + δ as well, for each perturbation and for all together.

    Returns:
        `Perturbation`: `.changes`, `.pairs`, `.change(names)`, `.ranking`; print it for the table.

    Raises:
        StructureError: `op` has no loss, or a perturbation is not like the parameters.
        SpectraError: there are no perturbations.
        NonFiniteError: the loss, or a perturbation, is NaN or infinite.

    Cost: one gradient and p products; with `measure` p + 2 evaluations of the loss. One image in memory at a
    time, beside the perturbations.

    Fails where the loss is not quadratic over the length of δ, as with four bits or less: `measure` says so.

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
    if not isinstance(op, DataOperator):
        raise StructureError(f"op is a {type(op).__name__}, which has no loss: pass an operator on data.")
    if not isinstance(deltas, Mapping) or not deltas:
        raise SpectraError("deltas is a mapping from names to perturbations, with at least one.")
    parts = {str(name): _parts(op, delta, str(name)) for name, delta in deltas.items()}
    loss = float(op.loss())
    if not math.isfinite(loss):
        raise NonFiniteError(op.explain_non_finite())
    kept = list(parts.values())
    slopes = _dots(jax.tree.leaves(op.gradient()), kept)
    prepared = op.prepare()
    rows = [_dots(jax.tree.leaves(prepared @ _filled(op, part)), kept) for part in kept]
    curvature = np.asarray(jax.device_get(rows), float)
    lengths = [_tree.length(part) for part in kept]
    measured, together = _measured(op, kept, loss) if measure else (None, None)
    return Perturbation(
        names=tuple(parts),
        slopes=np.asarray(slopes, float),
        curvature=(curvature + curvature.T) / 2,
        lengths=np.array(lengths),
        loss=loss,
        num_matvecs=len(parts),
        measured=measured,
        measured_all=together,
    )


def _parts(op: DataOperator, delta: PyTree, name: str) -> list:
    """The leaves of a perturbation, None for those that do not change."""
    structure = op.structure
    if op._is_flat(delta):
        delta = op.as_vector(delta, f"deltas['{name}']")
    whole = jax.tree.structure(structure, is_leaf=_is_none)
    if jax.tree.structure(delta, is_leaf=_is_none) != whole:
        _tree.check_structure(delta, structure, f"deltas['{name}']")  # says where
    wanted, found = (jax.tree.leaves(x, is_leaf=_is_none) for x in (structure, delta))
    pairs = [(like, x) for like, x in zip(wanted, found, strict=True) if like is not None]
    if all(x is None for _, x in pairs):
        raise SpectraError(f"deltas['{name}'] changes nothing: all of its leaves are None.")
    whole = [jnp.zeros(like.shape, like.dtype) if x is None else jnp.asarray(x) for like, x in pairs]
    vector = jax.tree.unflatten(jax.tree.structure(structure), whole)
    _tree.check_structure(vector, structure, f"deltas['{name}']")
    leaves = jax.tree.leaves(_tree.cast_like(vector, structure))
    kept = [None if x is None else leaf for leaf, (_, x) in zip(leaves, pairs, strict=True)]
    if not _tree.all_finite(kept):
        raise NonFiniteError(f"deltas['{name}'] holds NaN or infinity.")
    return kept


def _is_none(x: Any) -> bool:
    return x is None


def _filled(op: DataOperator, parts: list) -> PyTree:
    """The perturbation as a vector, zero where it changes nothing."""
    leaves, treedef = jax.tree.flatten(op.structure)
    return treedef.unflatten(
        [jnp.zeros(s.shape, s.dtype) if x is None else x for s, x in zip(leaves, parts, strict=True)]
    )


@jax.jit
def _dots(image: list, kept: list[list]) -> jax.Array:
    """Inner products of one vector with all perturbations."""

    def one(parts):
        pairs = [(a, b) for a, b in zip(image, parts, strict=True) if b is not None]
        return _tree.vdot([a for a, _ in pairs], [b for _, b in pairs])

    return jnp.stack([one(parts) for parts in kept])


def _measured(op: DataOperator, kept: list[list], loss: float) -> tuple[np.ndarray, float]:
    """True changes, of each perturbation and of their sum."""

    def change(vector):
        stack = jax.tree.map(lambda x: x[None], vector)
        return float(losses_at(op, stack, np.ones((1, 1)))[0]) - loss

    vectors = (_filled(op, parts) for parts in kept)
    total, changes = None, []
    for vector in vectors:
        changes.append(change(vector))
        total = vector if total is None else _tree.axpy(1.0, vector, total)
    return np.array(changes), change(total)
