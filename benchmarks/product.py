"""One product inside a run (80 steps x 8 probes) against a jitted jvp-of-grad product.

Goals: at most 0.75 on the demo's MLP, at most 0.65 on the transformer.
"""

import jax

import spectra
from benchmarks import problems
from benchmarks.timing import alternate, median_ms, ratio, spread


def measure(name: str, steps: int = 80, rounds: int = 9) -> list[str]:
    loss_fn, params, batch = getattr(problems, name)()
    op = spectra.HessianOperator(loss_fn, params, batch)
    v = jax.tree.map(lambda x: jax.random.normal(jax.random.key(2), x.shape), params)
    naive = jax.jit(lambda p, b, v: jax.jvp(lambda q: jax.grad(loss_fn)(q, b), (p,), (v,))[1])
    gradient = jax.jit(jax.grad(loss_fn))
    prepared = op.prepare()
    product = jax.jit(lambda op, v: op.mv(v))

    def in_run():
        return spectra.lanczos(op, v, steps).alpha

    times = alternate(
        {
            "gradient": lambda: gradient(params, batch),
            "jvp of grad": lambda: naive(params, batch, v),
            "linearised product": lambda: product(prepared, v),
        },
        rounds=rounds,
    )
    run = alternate({"step of a run": in_run, "jvp of grad": lambda: naive(params, batch, v)}, rounds=3)
    step = [t / steps for t in run["step of a run"]]
    rows = [
        f"| {name} | {label} | {median_ms(t):.2f} | {spread(t):.0%} | "
        f"{ratio(times, label, 'jvp of grad'):.2f} | {ratio(times, label, 'gradient'):.2f} |"
        for label, t in times.items()
    ]
    share = median_ms(step) / median_ms(times["jvp of grad"])
    rows.append(
        f"| {name} | Lanczos step, product and reorthogonalisation | {median_ms(step):.2f} | "
        f"{spread(step):.0%} | {share:.2f} | |"
    )
    return rows


def main() -> list[str]:
    head = [
        "| network | what | ms | spread | / jvp of grad | / gradient |",
        "|---|---|---|---|---|---|",
    ]
    return head + measure("mlp") + measure("transformer")


if __name__ == "__main__":
    print("\n".join(main()))
