"""What is read in a loss's jaxpr: operations in the way, random numbers, loops, stacks of layers."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters import partial_eval

from spectra.base import trees
from spectra.base.errors import StructureError
from spectra.base.programs import Program
from spectra.base.trees import PyTree
from spectra.operators.arithmetic import StepwiseOperator
from spectra.operators.base import LinearOperator, product

MAX_KINDS = 64
_convolves: dict[Any, bool] = {}  # of operators by structure and shapes: the next checkpoint is not looked at
_SUSPECTS = (
    "custom_vjp",
    "custom_jvp",
    "callback",
    "pallas_call",
    "ffi_call",
    "custom_call",
    "while",
)
_HERE = str(Path(__file__).parent.parent)
_OTHERS = ("site-packages", "dist-packages", "<frozen", "/lib/python")
_REMAT = ("checkpoint", "remat", "remat2")
_RANDOM = ("random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform", "random_gamma")

# Whether JAX refuses a value of an earlier trace where it is read, or only once its numbers are asked for,
# depends on its version.
KEPT = "reads a value that it has kept from an earlier call, where JAX traced it"
WITHOUT_NUMBERS = (
    "there are no numbers in it. Let it write nothing outside of itself; of a generator of keys "
    "(hk.PRNGSequence, nnx.Rngs) take one outside, and close over that."
)


def refusing_operations(fn: Callable[[Any], Any], *args: PyTree) -> str:
    """Name the primitives in `fn` that may lack a derivative, with the functions they come from."""
    try:
        jaxpr = jax.make_jaxpr(fn)(*args)
    except Exception:  # the loss itself was traced before; only its description is at stake here
        return "an operation that JAX could not name"
    names = dict.fromkeys(name for eqn in _equations(jaxpr.jaxpr) if (name := _suspect(eqn)))
    strongest = [name for name in names if "custom_jvp" not in name] or list(names)
    return ", ".join(strongest) or "an operation that JAX could not name"


def may_refuse_at_lowering(jaxpr: Jaxpr) -> bool:
    """Whether forward mode met a `custom_vjp`: JAX stages that, and refuses only what it compiles."""
    return any(eqn.primitive.name == "custom_lin" for eqn in _equations(jaxpr))


def largest_epsilon(jaxpr: ClosedJaxpr) -> float:
    """The largest machine epsilon among the floating numbers that a program computes with."""
    dtypes = {getattr(aval, "dtype", None) for aval in _avals(jaxpr)}
    floating = [dtype for dtype in dtypes if dtype is not None and jnp.issubdtype(dtype, jnp.floating)]
    return max((float(jnp.finfo(dtype).eps) for dtype in floating), default=0.0)


def rounding_of_sums(jaxpr: ClosedJaxpr) -> float:
    """Relative rounding of a mean over the largest array of a program, sqrt(N) u for N terms in any order.

    Numbers in half precision are added in float32.
    """
    unit = min(largest_epsilon(jaxpr), float(jnp.finfo(jnp.float32).eps)) / 2
    return unit * max((math.prod(getattr(aval, "shape", ())) for aval in _avals(jaxpr)), default=1) ** 0.5


def bytes_of_values(jaxpr: ClosedJaxpr) -> int:
    """Bytes of all arrays that a program computes, in a loop those of one pass."""
    arrays = (aval for aval in _avals(jaxpr) if hasattr(aval, "shape"))
    return sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in arrays)


def _avals(jaxpr: ClosedJaxpr) -> Iterator[Any]:
    return (var.aval for eqn in _equations(jaxpr.jaxpr) for var in eqn.outvars)


def uses(fn: Callable[..., PyTree], *args: PyTree) -> bool:
    """Whether the results of a function depend on its last argument, as far as its program shows."""
    jaxpr: Any = jax.make_jaxpr(fn)(*args).jaxpr
    _, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return any(used[len(jax.tree.leaves(args[:-1])) :])


def drawn_shapes(jaxpr: Jaxpr) -> list[tuple[int, ...]]:
    """Shapes of the random numbers that a program draws."""
    eqns = (eqn for eqn in _equations(getattr(jaxpr, "jaxpr", jaxpr)) if draws(eqn))
    return [var.aval.shape for eqn in eqns for var in eqn.outvars]


def draws(eqn: Any) -> bool:
    """Whether a primitive draws random numbers."""
    return eqn.primitive.name in _RANDOM


def scan_parts(eqn: Any) -> tuple[int, int]:
    """How many operands of a scan are constants of its body, and how many more it carries."""
    params = eqn.params
    if "num_consts" in params:  # before jax 0.11
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def rematerialises(jaxpr: Jaxpr) -> bool:
    """Whether a program has parts under `jax.checkpoint`, which derivatives evaluate again."""
    return any(eqn.primitive.name in _REMAT for eqn in _equations(getattr(jaxpr, "jaxpr", jaxpr)))


def slow_in_loops(op: LinearOperator) -> bool:
    """Whether products should be called one by one, not from a compiled loop: convolutions on a CPU.

    There XLA runs a convolution with the threads of its library at the top of a program, and as a plain
    loop inside a `while` (jax-ml/jax issue 12868): the products of a small CNN took 8 times as long.
    """
    if op.on_host or op.device.platform != "cpu":
        return False
    leaves, treedef = jax.tree.flatten(op)
    kind = treedef, *map(jax.typeof, leaves)
    if kind not in _convolves:
        if len(_convolves) == MAX_KINDS:
            _convolves.clear()
        jaxpr = product.trace(op, op.structure).jaxpr.jaxpr
        _convolves[kind] = any(eqn.primitive.name == "conv_general_dilated" for eqn in _equations(jaxpr))
    return _convolves[kind]


def outside_loops(op: LinearOperator) -> LinearOperator:
    """The operator itself, or driven from the host if its products are slow in compiled loops."""
    return StepwiseOperator(op) if slow_in_loops(op) else op


def _equations(jaxpr: Jaxpr) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in inner_jaxprs(eqn):
            yield from _equations(inner)


def inner_jaxprs(eqn: Any) -> list[Any]:
    """The jaxprs that an equation calls, without their constants."""
    values = jax.tree.leaves(
        list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
    )
    found = (getattr(value, "jaxpr", value) for value in values)
    return [inner for inner in found if hasattr(inner, "eqns")]


def _suspect(eqn: Any) -> str | None:
    primitive = eqn.primitive.name
    if not any(word in primitive for word in _SUSPECTS):
        return None
    inner = eqn.params.get("call_jaxpr") or eqn.params.get("fun_jaxpr")
    info = getattr(getattr(inner, "jaxpr", inner), "debug_info", None)
    where = getattr(info, "func_src_info", None) or eqn.params.get("name") or ""
    return f"{primitive} '{where}'" if where else primitive


def traced(program: Program, *args: Any) -> tuple[Any, int]:
    """The jaxpr of a program, and which of its inputs is the first leaf of its arguments: traced values that
    it closes over are inputs before these."""
    jaxpr = program.trace(*args).jaxpr
    return jaxpr, len(jaxpr.jaxpr.invars) - len(jax.tree.leaves(args))


def captured(jaxpr: Any) -> tuple[Any, ...]:
    """The values that a function closes over and that the caller's `grad` or `vmap` traces.

    As leaves of an operator they say that its values are out of reach. Within `jit` all are, anyway.

    Raises:
        StructureError: a value is left from a trace that has ended, and will never have numbers.
    """
    if trees.is_traced(()):
        return ()
    constants: list[Any] = jaxpr.consts
    found = tuple(x for x in constants if trees.is_tracer(x))
    for value in found:
        try:
            lax.expand_dims(value, (0,))
        except jax.errors.UnexpectedTracerError as error:
            places = (var for var, x in zip(jaxpr.jaxpr.constvars, constants, strict=True) if x is value)
            raise StructureError(
                f"the function {KEPT}{_line_that_reads(jaxpr.jaxpr, next(places))}: {WITHOUT_NUMBERS}"
            ) from error
    return found


def _line_that_reads(jaxpr: Jaxpr, var: Any) -> str:
    """Where a variable is computed with first, as `line_of`."""
    for eqn in jaxpr.eqns:
        for place, read in enumerate(eqn.invars):
            if read is var:
                inner = _inner(eqn)
                return line_of(eqn) if inner is None else _line_that_reads(inner, inner.invars[place])
    return ""


def line_of(eqn: Any) -> str:
    """The line of the user's file that an operation comes from, in parentheses after a space; or nothing."""
    frames = getattr(eqn.source_info.traceback, "frames", ())
    own = (f for f in frames if not any(other in f.file_name for other in (_HERE, *_OTHERS)))
    return next((f" ({Path(f.file_name).name}:{f.line_num})" for f in own), "")


def scanned_inputs(jaxpr: Any, first: int, chosen: tuple[int, ...]) -> dict[int, tuple[Any, ...]]:
    """The scans, of one length, that run over each chosen input, counted from the first; without those that
    anything else uses."""
    scans: dict[int, set[tuple[int, int]]] = {i: set() for i in chosen}
    elsewhere: set[int] = set()
    _follow_names(jaxpr.jaxpr, {id(jaxpr.jaxpr.invars[first + i]): i for i in chosen}, scans, elsewhere)
    alone = {i: sorted(found) for i, found in scans.items() if found and i not in elsewhere}
    return {i: tuple(found) for i, found in alone.items() if len({length for _, length in found}) == 1}


def _follow_names(jaxpr: Any, names: dict[int, int], scans: dict[int, set[Any]], elsewhere: set[int]) -> None:
    for eqn in jaxpr.eqns:
        places = {place: names[id(var)] for place, var in enumerate(eqn.invars) if id(var) in names}
        if not places:
            continue
        inner = _inner(eqn)
        if eqn.primitive.name == "convert_element_type":
            names[id(eqn.outvars[0])] = places[0]
        elif eqn.primitive.name == "scan":
            consts, carry = scan_parts(eqn)
            for place, name in places.items():
                if place >= consts + carry:
                    scans[name].add((id(eqn), eqn.params["length"]))
                elif place >= consts:
                    elsewhere.add(name)
            constant = {id(inner.invars[place]): name for place, name in places.items() if place < consts}
            _follow_names(inner, constant, scans, elsewhere)
        elif inner is not None:
            _follow_names(inner, {id(inner.invars[p]): name for p, name in places.items()}, scans, elsewhere)
        else:
            elsewhere.update(places.values())
    elsewhere.update(names[id(var)] for var in jaxpr.outvars if id(var) in names)


def _inner(eqn: Any) -> Any:
    """The body of a call, whose arguments are those of the equation."""
    for value in eqn.params.values():
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns") and len(inner.invars) == len(eqn.invars):
            return inner
    return None
