"""Evaluate a jaxpr once more, with a perturbation added to every site's output and its rows recorded.

The derivative with respect to a perturbation of zero is the gradient of the layer's output.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

from spectra.operators.jaxprs import scan_parts
from spectra.operators.layers import CALLS, Path, Site
from spectra.operators.layouts import apply_steps

Arrays = dict[Path, jax.Array]


def replay(jaxpr: Any, sites: dict[Path, Site], args: list[Any], moves: Arrays) -> tuple[list[Any], Arrays]:
    """The outputs of a closed jaxpr at `args` with `moves` added at the sites, and the rows of each.

    Rows are (*loops, groups, positions, inputs) for dense layers and convolutions, and the indices
    (*loops, positions) for embeddings.
    """
    rows: Arrays = {}
    outputs = _replay(jaxpr.jaxpr, jaxpr.consts, sites, args, moves, rows, ())
    return outputs, rows


def _replay(
    jaxpr: Jaxpr,
    consts: Sequence[Any],
    sites: Any,
    args: Sequence[Any],
    moves: Arrays,
    rows: Arrays,
    path: Path,
) -> list[Any]:
    known = dict(zip((id(v) for v in (*jaxpr.constvars, *jaxpr.invars)), (*consts, *args), strict=True))
    inside = {site[: len(path) + 1] for site in sites if site[: len(path)] == path}

    def read(var: Any) -> Any:
        return var.val if isinstance(var, Literal) else known[id(var)]

    for number, eqn in enumerate(jaxpr.eqns):
        here, operands = (*path, number), [read(var) for var in eqn.invars]
        if here in sites:
            site = sites[here]
            rows[here] = _rows(site, operands)
            results = [_bind(jaxpr, eqn, operands)[0] + moves[here]]
        elif here not in inside:
            results = _bind(jaxpr, eqn, operands)
        elif eqn.primitive.name in CALLS:
            inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            body: Any = getattr(inner, "jaxpr", inner)
            extra: Sequence[Any] = getattr(inner, "consts", ())
            results = _replay(body, extra, sites, operands, moves, rows, here)
        else:
            results = _scan(eqn, operands, sites, moves, rows, here)
        known.update(zip((id(var) for var in eqn.outvars), results, strict=True))
    return [read(var) for var in jaxpr.outvars]


def _bind(jaxpr: Any, eqn: Any, operands: list[Any]) -> list[Any]:
    """One equation as a program of its own: how a primitive with functions among its parameters is bound
    differs between releases of JAX."""
    known = {id(var): (var, value) for var, value in zip(eqn.invars, operands, strict=True)}
    inputs = [(var, value) for var, value in known.values() if not isinstance(var, Literal)]
    program = jaxpr.replace(
        constvars=(), invars=[var for var, _ in inputs], outvars=eqn.outvars, eqns=[eqn], effects=eqn.effects
    )
    values = [value for _, value in inputs]
    return jaxpr_as_fun(ClosedJaxpr(program, ()))(*values)  # pyright: ignore[reportUnknownVariableType]


def _scan(
    eqn: Any, operands: Sequence[Any], sites: Any, moves: Arrays, rows: Arrays, path: Path
) -> list[Any]:
    """The scan with the perturbations of each step among what it runs over, and the rows stacked."""
    params, body = eqn.params, eqn.params["jaxpr"]
    first, carried = scan_parts(eqn)
    columns = first + carried
    consts = operands[:first]
    own = {site: moves[site] for site in sites if site[: len(path)] == path}

    def step(carry: Any, xs: Any) -> Any:
        columns, moved = xs
        inner: Arrays = {}
        args = [*consts, *carry, *columns]
        results = _replay(body.jaxpr, body.consts, sites, args, moved, inner, path)
        return results[:carried], (results[carried:], inner)

    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, (stacked, inner) = lax.scan(step, operands[first:columns], (operands[columns:], own), **options)
    rows.update(inner)
    return [*carry, *stacked]


def _rows(site: Site, operands: list[Any]) -> jax.Array:
    eqn, activation = site.eqn, operands[site.activation]
    if site.kind == "dense":
        return _dense_rows(site, activation)
    if site.kind == "convolution":
        return _patches(site, activation)
    indices = activation.reshape(-1)  # an index into the last of one axis
    rows = site.sizes[1]
    wrapped = jnp.clip(indices, 0, rows - 1)
    inside = (indices >= 0) & (indices < rows)
    clips = "CLIP" in str(eqn.params["mode"])
    return wrapped if clips else jnp.where(inside, wrapped, rows)  # what is out of range reads no row


def _dense_rows(site: Site, activation: jax.Array) -> jax.Array:
    contract, batch = (pair[site.activation] for pair in site.eqn.params["dimension_numbers"])
    free = [axis for axis in range(activation.ndim) if axis not in (*contract, *batch)]
    moved = activation.transpose((*batch, *free, *contract))
    return moved.reshape(site.sizes[0], -1, site.sizes[1])


def _patches(site: Site, image: jax.Array) -> jax.Array:
    """(groups, positions, channels of a group * window), the channel first as in the kernel's layout."""
    params, (groups, inputs, _) = site.eqn.params, site.sizes
    numbers = params["dimension_numbers"]
    shape = site.eqn.invars[1].aval.shape
    window = tuple(shape[axis] for axis in numbers.rhs_spec[2:])
    moved = image.transpose(numbers.lhs_spec)  # examples, channels, space
    patches = lax.conv_general_dilated_patches(
        moved,
        window,
        params["window_strides"],
        params["padding"],
        lhs_dilation=params["lhs_dilation"],
        rhs_dilation=params["rhs_dilation"],
        precision=lax.Precision.HIGHEST,
    )
    folded = patches.reshape(patches.shape[0], groups, inputs, -1)
    return jnp.moveaxis(folded, (1, 0, 3, 2), (0, 1, 2, 3)).reshape(groups, -1, inputs)


def arranged(site: Site, stack: jax.Array, per_site: int) -> jax.Array:
    """Values of one example, (*loops, groups, positions, n), with scanned layers among the groups.

    The other loops (a recurrent layer's steps) are positions; `per_site` is the number of axes behind them.
    """
    depth = len(site.loops)
    if per_site == 1:  # the indices of an embedding have no groups
        stack = stack[(*[slice(None)] * depth, None, slice(None), None)]
    layers = site.view.loops
    steps = [axis for axis in range(depth) if axis not in layers]
    moved = stack.transpose((*layers, depth, *steps, depth + 1, depth + 2))
    groups = math.prod(site.loops[axis] for axis in layers) * stack.shape[depth]
    moved = moved.reshape(groups, -1, stack.shape[-1])
    return moved[..., 0] if per_site == 1 else moved


def output_rows(site: Site, gradient: jax.Array) -> jax.Array:
    """The gradient of a site's output, (*loops, *out_shape), as (groups, positions, outputs)."""
    flat = gradient.reshape(-1, *site.out_shape)
    moved = jax.vmap(lambda x: apply_steps(site.out_steps, x))(flat)
    return arranged(site, moved.reshape(*site.loops, *moved.shape[1:]), 3)
