"""A Hessian product through causal attention: memory as the compiler plans it, and time, by sequence length.

One sequence, width 64, four heads, projections of query, key and value as parameters, float32. Both forms
run the same program but for the attention: JAX's `dot_product_attention`, whose logits fill a square, and
`spectra.attention`, which forgets them block by block.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

import spectra
from benchmarks.settings import Goal, Report, Settings, table
from benchmarks.timing import alternate
from spectra.operators.jaxprs import inner_jaxprs

WIDTH, HEADS = 64, 4
FORMS = {"plain": jax.nn.dot_product_attention, "spectra.attention": spectra.attention}


def products(attend):
    """The gradient of a loss of attention, and its Hessian product, compiled."""

    def loss(params, x):
        query, key, value = ((x @ w).reshape(1, -1, HEADS, WIDTH // HEADS) for w in params)
        return jnp.mean(attend(query, key, value, is_causal=True) ** 2)

    def product(params, v, x):
        return jax.jvp(lambda p: jax.grad(loss)(p, x), (params,), (v,))[1]

    return jax.jit(jax.grad(loss)), jax.jit(product)


def flops(jaxpr) -> float:
    """Operations of the matrix products of a program; of a branch those of its dearer side.

    XLA's own count takes the body of a loop for one turn.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        turns = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        inner = [flops(body) for body in inner_jaxprs(eqn)]
        total += max(inner) if eqn.primitive.name == "cond" else turns * sum(inner)
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
    return total


def counted(length: int) -> list[float]:
    """Operations of a product, plain and ours."""
    params, v, x = jax.eval_shape(functools.partial(arrays, length))
    return [flops(products(attend)[1].trace(params, v, x).jaxpr.jaxpr) for attend in FORMS.values()]


def arrays(length: int):
    keys = jax.random.split(jax.random.key(0), 3)
    params, v = (list(jax.random.normal(key, (3, WIDTH, WIDTH)) / 8) for key in keys[:2])
    return params, v, jax.random.normal(keys[2], (1, length, WIDTH))


def planned(length: int) -> dict[str, tuple[float, float]]:
    """MiB of temporaries of the gradient and of the product."""
    params, v, x = jax.eval_shape(functools.partial(arrays, length))
    found = {}
    for name, attend in FORMS.items():
        gradient, product = products(attend)
        programs = (gradient.lower(params, x), product.lower(params, v, x))
        sizes = [p.compile().memory_analysis().temp_size_in_bytes / 2**20 for p in programs]
        found[name] = (sizes[0], sizes[1])
    return found


def measured(length: int) -> tuple[dict[str, list[float]], float]:
    """Seconds a product, and the relative difference of the two."""
    args = arrays(length)
    run = {name: functools.partial(products(attend)[1], *args) for name, attend in FORMS.items()}
    plain, ours = (np.concatenate([np.ravel(x) for x in run[name]()]) for name in FORMS)
    return alternate(run, rounds=5), float(np.linalg.norm(ours - plain) / np.linalg.norm(plain))


def operations(lengths) -> list[str]:
    """A row for each length. The blocks that a causal mask hides are counted, and left out when it runs."""
    rows = []
    for length in lengths:
        plain, ours = counted(length)
        rows.append([f"{length:,}", f"{plain / 1e9:,.2f}", f"{ours / 1e9:,.2f}", f"{ours / plain:.2f}"])
    return table(["length", "plain", "ours, hidden blocks too", "ours / plain"], rows)


def main(settings: Settings) -> Report:
    lengths = settings.choose((512, 1024, 2048, 4096, 8192), (256, 512))
    memory = {length: planned(length) for length in lengths}
    rows = [
        [f"{length:,}"]
        + [f"{memory[length][name][i]:,.1f}" for name in FORMS for i in range(2)]
        + [f"1/{memory[length]['plain'][1] / memory[length]['spectra.attention'][1]:.0f}"]
        for length in lengths
    ]
    head = ["length", "gradient, plain", "product, plain", "gradient, ours", "product, ours", "ours / plain"]
    lines = ["## Memory of temporaries, MiB", "", *table(head, rows), "", "## Time of a product", ""]
    rows, ratios, worst = [], [], 0.0
    lines[-2:-2] = ["## Operations of the matrix products of a product, 1e9", "", *operations(lengths), ""]
    for length in settings.choose((1024, 2048, 4096), (256,)):
        times, difference = measured(length)
        plain, ours = (float(np.median(times[name])) for name in FORMS)
        ratios.append(ours / plain)
        worst = max(worst, difference)
        rows.append(
            [f"{length:,}", f"{plain:.3f}", f"{ours:.3f}", f"{ours / plain:.2f}", f"{difference:.0e}"]
        )
    lines += table(["length", "plain, s", "ours, s", "ours / plain", "relative difference"], rows)
    first, last = (memory[length]["spectra.attention"][1] for length in (lengths[-2], lengths[-1]))
    plain, ours = (memory[lengths[-1]][name][1] for name in FORMS)
    goals = [
        Goal(f"memory of a product at {lengths[-1]}, ours / plain", ours / plain, 0.01),
        Goal("slope of log memory in log length", math.log(last / first) / math.log(2), 1.1),
        Goal("time of a product, ours / plain, the longest", ratios[-1], 1.0),
        Goal("relative difference in float32", worst, 1e-6),
    ]
    return Report(lines, goals)


if __name__ == "__main__":
    print("\n".join(main(Settings(tiny=True)).lines))
