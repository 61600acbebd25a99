"""Evaluate a jaxpr once more, with a rule for its equations, also of those in loops, branches and calls."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from jax import lax

from spectra.operators.jaxprs import inner_jaxprs, scan_parts

Rule = Callable[[Any, list[Any]], list[Any]]
"""An equation and its operands to its results."""
Choice = Callable[[Any], bool]
"""Whether an equation is entered, so that the rule sees what is inside of it."""
Lift = Callable[[Any, Any], Any]
"""What stands for the value of a variable that no equation computes: an argument, a constant, a literal."""


def _as_it_is(value: Any, var: Any) -> Any:
    del var
    return value


def evaluate(
    jaxpr: Any, args: Sequence[Any], rule: Rule, enters: Choice, lift: Lift = _as_it_is
) -> list[Any]:
    """The results of a jaxpr, closed or without constants."""
    consts, jaxpr = getattr(jaxpr, "consts", ()), getattr(jaxpr, "jaxpr", jaxpr)
    given = zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True)
    values: dict[Any, Any] = {var: lift(value, var) for var, value in given}

    def read(var: Any) -> Any:
        return lift(var.val, var) if hasattr(var, "val") else values[var]  # a literal

    for eqn in jaxpr.eqns:
        inputs: list[Any] = [read(var) for var in eqn.invars]
        with eqn.ctx.manager:  # the mesh that a function names, say
            found = _enter(eqn, inputs, rule, enters, lift) if enters(eqn) else rule(eqn, inputs)
        values.update(zip(eqn.outvars, found, strict=True))
    return [read(var) for var in jaxpr.outvars]


def can_enter(eqn: Any) -> bool:
    """Whether an equation has a program inside of it that `evaluate` knows how to run."""
    name, inner = eqn.primitive.name, inner_jaxprs(eqn)
    return name in ("scan", "while", "cond", "custom_linear_solve") or (
        len(inner) == 1
        and name != "shard_map"
        # A call, and not what combines two entries of a reduction.
        and _shapes(inner[0].invars) == _shapes(eqn.invars)
        and _shapes(inner[0].outvars) == _shapes(eqn.outvars)
    )


def _shapes(variables: Sequence[Any]) -> list[Any]:
    return [getattr(var.aval, "shape", None) for var in variables]


def bind(eqn: Any, inputs: list[Any]) -> list[Any]:
    """The results of an equation as it is."""
    found = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
    return found if eqn.primitive.multiple_results else [found]


def _enter(eqn: Any, inputs: list[Any], rule: Rule, enters: Choice, lift: Lift) -> list[Any]:
    params, name = eqn.params, eqn.primitive.name
    run = partial(evaluate, rule=rule, enters=enters, lift=lift)
    if name == "scan":
        return _scan(eqn, inputs, run)
    if name == "while":
        return _while(params, inputs, run)
    if name == "cond":
        return lax.switch(inputs[0], [partial(_branch, b, run) for b in params["branches"]], *inputs[1:])
    if name == "custom_linear_solve":
        return _linear_solve(params, inputs, run)
    (inner,) = (x for x in params.values() if hasattr(getattr(x, "jaxpr", x), "eqns"))
    return run(inner, inputs)


def _branch(jaxpr: Any, run: Any, *args: Any) -> list[Any]:
    return run(jaxpr, args)


def _scan(eqn: Any, inputs: list[Any], run: Any) -> list[Any]:
    params, (consts, carry) = eqn.params, scan_parts(eqn)
    fixed, start, rows = inputs[:consts], inputs[consts : consts + carry], inputs[consts + carry :]

    def body(state: Any, row: Any) -> Any:
        out = run(params["jaxpr"], [*fixed, *state, *row])
        return out[:carry], out[carry:]

    last, stacked = lax.scan(body, start, rows, length=params["length"], reverse=params["reverse"])
    return [*last, *stacked]


def _while(params: dict[str, Any], inputs: list[Any], run: Any) -> list[Any]:
    a, b = params["cond_nconsts"], params["body_nconsts"]
    asked, fixed, start = inputs[:a], inputs[a : a + b], inputs[a + b :]
    return lax.while_loop(
        lambda state: run(params["cond_jaxpr"], [*asked, *state])[0],
        lambda state: run(params["body_jaxpr"], [*fixed, *state]),
        start,
    )


def _linear_solve(params: dict[str, Any], inputs: list[Any], run: Any) -> list[Any]:
    """By the solver that it has: the product and the transposed solver are for derivatives, and the programs
    that are evaluated have theirs taken."""
    lengths = params["const_lengths"]
    before = lengths.matvec + lengths.vecmat
    fixed, right = inputs[before : before + lengths.solve], inputs[sum(lengths) :]
    return run(params["jaxprs"].solve, [*fixed, *right])
