"""A traced function with other random numbers: its jaxpr is evaluated with another key at each draw.

The keys of a loss may lie in its batch, in its closure, or be made inside it from an integer; where they are
used, at the primitives that turn a key into numbers, all are seen. Control flow is entered, calls are
inlined: values are those of the function, derivatives (of `custom_jvp` functions) need not be.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from spectra.operators.diagnose import drawn_shapes, draws, inner_jaxprs

KEYED = ("random_bits", "random_gamma")
"""Primitives that draw, with a key as their first operand."""


def can_redraw(jaxpr: Any) -> bool:
    """Whether all random numbers of a closed jaxpr are drawn where another key can be set."""
    return _can_redraw(jaxpr.jaxpr)


def _can_redraw(jaxpr: Any) -> bool:
    return all(
        eqn.primitive.name in KEYED
        if draws(eqn)
        else not _draws_inside(eqn)
        or (_is_entered(eqn) and all(_can_redraw(inner) for inner in inner_jaxprs(eqn)))
        for eqn in jaxpr.eqns
    )


def _draws_inside(eqn: Any) -> bool:
    return any(drawn_shapes(inner) for inner in inner_jaxprs(eqn))


def _is_entered(eqn: Any) -> bool:
    inner = inner_jaxprs(eqn)
    return eqn.primitive.name in ("scan", "while", "cond") or (
        len(inner) == 1 and len(inner[0].invars) == len(eqn.invars) and eqn.primitive.name != "shard_map"
    )


def redrawn(jaxpr: Any, salt: jax.Array, *leaves: Any) -> list[jax.Array]:
    """The results of a closed jaxpr at `leaves` with the numbers that belong to `salt`."""
    return _evaluate(jaxpr.jaxpr, jaxpr.consts, leaves, salt)


def _evaluate(jaxpr: Any, consts, args, salt: jax.Array) -> list[Any]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(var):
        return var.val if hasattr(var, "val") else values[var]  # a literal

    for eqn in jaxpr.eqns:
        inputs = [read(var) for var in eqn.invars]
        if draws(eqn):
            inputs[0] = _salted(inputs[0], salt)
        if _draws_inside(eqn):
            found = _enter(eqn, inputs, salt)
        else:
            found = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
        values.update(zip(eqn.outvars, found if eqn.primitive.multiple_results else [found], strict=True))
    return [read(var) for var in jaxpr.outvars]


def _salted(key: jax.Array, salt: jax.Array) -> jax.Array:
    return jax.random.wrap_key_data(jax.random.key_data(key) + salt, impl=jax.random.key_impl(key))


def _closed(jaxpr: Any, args, salt: jax.Array) -> list[Any]:
    """A closed jaxpr, or one without constants."""
    return _evaluate(getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ()), args, salt)


def _enter(eqn: Any, inputs: list[Any], salt: jax.Array) -> list[Any]:
    params = eqn.params
    if eqn.primitive.name == "scan":
        return _scan(params, inputs, salt)
    if eqn.primitive.name == "while":
        return _while(params, inputs, salt)
    if eqn.primitive.name == "cond":
        branches = [lambda *args, b=b: _closed(b, args, salt) for b in params["branches"]]
        return lax.switch(inputs[0], branches, *inputs[1:])
    (inner,) = (x for x in params.values() if hasattr(getattr(x, "jaxpr", x), "eqns"))
    return _closed(inner, inputs, salt)


def _scan(params: dict[str, Any], inputs: list[Any], salt: jax.Array) -> list[Any]:
    consts, carry = params["num_consts"], params["num_carry"]
    fixed, start, rows = inputs[:consts], inputs[consts : consts + carry], inputs[consts + carry :]

    def body(state, row):
        out = _closed(params["jaxpr"], [*fixed, *state, *row], salt)
        return out[:carry], out[carry:]

    last, stacked = lax.scan(body, start, rows, length=params["length"], reverse=params["reverse"])
    return [*last, *stacked]


def _while(params: dict[str, Any], inputs: list[Any], salt: jax.Array) -> list[Any]:
    a, b = params["cond_nconsts"], params["body_nconsts"]
    asked, fixed, start = inputs[:a], inputs[a : a + b], inputs[a + b :]
    return lax.while_loop(
        lambda state: _closed(params["cond_jaxpr"], [*asked, *state], salt)[0],
        lambda state: _closed(params["body_jaxpr"], [*fixed, *state], salt),
        start,
    )


def salts(count: int) -> jax.Array:
    """The first numbers that keys can be moved by; none leaves them where they are."""
    return jnp.arange(1, count + 1, dtype=jnp.uint32)
