"""Why JAX's gradient of the transformer costs more than three of its values on a CPU.

By counting matrix products a gradient is three values. Each compiled program is profiled operation by
operation (`jax.profiler`), and the time is split by what the operations are: matrix products (XLA's own and
those fused for its matrix library), loops that copy or transpose, loops over elements. "Operands" is how many
arrays the largest fused loop reads: the gradient of a residual stream is a sum over all later layers, and XLA
repeats that sum, read in transposed order, in the loop that prepares each layer's weight gradient.
"""

import collections
import functools
import gzip
import json
import re
import tempfile
from pathlib import Path

import jax
import optax
from flax import linen as nn

from benchmarks import problems
from benchmarks.settings import Report, Settings, table
from benchmarks.timing import alternate, median_ms, ratio

KINDS = ("matrix products", "copies and transposes", "other loops")


def main(settings: Settings) -> Report:
    rows, parts = [], []
    depths = settings.choose((1, 2, 4, 8), (1,))
    for depth in depths:
        loss_fn, params, batch = decoder(depth, settings.choose(16, 2))
        functions = {"value": loss_fn, "gradient": jax.grad(loss_fn)}
        compiled = {name: jax.jit(f).lower(params, batch).compile() for name, f in functions.items()}
        calls = {name: functools.partial(c, params, batch) for name, c in compiled.items()}
        times = alternate(calls, rounds=settings.choose(15, 1))
        rows.append(
            [
                str(depth),
                *(f"{median_ms(times[name]):.1f}" for name in functions),
                f"{ratio(times, 'gradient', 'value'):.2f}",
                str(widest_loop(compiled["gradient"].as_text())),
            ]
        )
        if depth == depths[-1] or depth == 4:
            for name, program in compiled.items():
                kinds = by_kind(calls[name], program.as_text(), settings.choose(10, 1))
                parts.append([f"{name}, {depth} layers", *(f"{kinds[kind]:.1f}" for kind in KINDS)])
    lines = table(["layers", "value, ms", "gradient, ms", "ratio", "operands"], rows)
    lines += ["", "Milliseconds by kind of operation, summed over two threads:", ""]
    return Report([*lines, *table(["program", *KINDS], parts), "", *formulations(settings)])


def decoder(depth: int, examples: int):
    module = problems.Decoder(depth=depth)

    def loss_fn(params, batch):
        logits = module.apply({"params": params}, batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    tokens = jax.random.randint(jax.random.key(1), (examples, 65), 0, module.vocabulary)
    return loss_fn, module.init(jax.random.key(0), tokens[:, :-1])["params"], tokens


def look_up(next_call, args, kwargs, context):
    """Flax interceptor: rows of an embedding by a product with one-hot vectors."""
    if not isinstance(context.module, nn.Embed) or context.method_name != "__call__":
        return next_call(*args, **kwargs)
    rows = context.module.variables["params"]["embedding"]
    return jax.nn.one_hot(args[0], len(rows)) @ rows


def formulations(settings: Settings) -> list[str]:
    """The weight gradient alone, and what two ways of writing the embedding do to the ratio."""
    loss_fn, params, batch = decoder(4, settings.choose(16, 2))

    def one_hot(params, batch):
        """The same network, with the table looked up by a matrix product."""
        with nn.intercept_methods(look_up):
            return loss_fn(params, batch)

    functions = {"value": jax.jit(loss_fn), "gradient": jax.jit(jax.grad(loss_fn))}
    functions |= {"gradient, embedding by a matrix product": jax.jit(jax.grad(one_hot))}
    times = alternate(
        {name: (lambda f=f: f(params, batch)) for name, f in functions.items()}, rounds=settings.choose(9, 1)
    )
    rows = [[name, f"{median_ms(t):.1f}", f"{ratio(times, name, 'value'):.2f}"] for name, t in times.items()]
    return table(["4 layers", "ms", "values"], rows)


def widest_loop(text: str) -> int:
    """Operands of the fused loop that reads most arrays."""
    loops = re.findall(r"= \S+ fusion\(([^)]*)\), kind=kLoop", text)
    return max((loop.count("%") for loop in loops), default=0)


def by_kind(call, text: str, rounds: int) -> dict[str, float]:
    """Milliseconds a call by kind of operation, from the profiler's events."""
    names = {}
    for name, operation in re.findall(r"%?([\w.-]+) = \S+ ([\w-]+)\(", text):
        names[name] = operation
    jax.block_until_ready(call())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(rounds):
                jax.block_until_ready(call())
        (path,) = Path(folder).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    total: dict[str, float] = collections.Counter(dict.fromkeys(KINDS, 0.0))
    for event in events:
        if event.get("ph") == "X" and event["name"] in names:
            total[kind_of(event["name"], names[event["name"]])] += event["dur"] / 1e3 / rounds
    return total


def kind_of(name: str, operation: str) -> str:
    if operation in ("dot", "convolution", "custom-call") or name.startswith(("ynn", "dot", "onednn", "xnn")):
        return KINDS[0]
    moves = r"(copy|transpose|wrapped_(copy|transpose|broadcast))"
    if operation in ("copy", "transpose") or re.match(moves, name):
        return KINDS[1]
    return KINDS[2]


if __name__ == "__main__":
    print("\n".join(main(Settings()).lines))
