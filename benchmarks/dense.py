"""The exact Hessian: products, time and memory against `jax.hessian` and `torch.func.hessian`.

tanh networks of three layers on 256 examples, float32, all on the CPU. Every measurement is a process of its
own, whose peak memory beyond what importing and the data take is the last column; times are of the second
call, after compilation. "Entries" is the share of the n² entries that is differentiated.
"""

import json
import subprocess
import sys
import time

from benchmarks.settings import Settings

METHODS = ("spectra", "jax.hessian", "torch.func.hessian")
WIDTHS = (6, 15, 34, 56)
CODE = "import sys; from benchmarks import dense; dense.one(*sys.argv[1:])"
TIMEOUT = 90


def network(width: int):
    import numpy as np

    rng = np.random.default_rng(0)
    sizes = (width, width, width, width)
    params = {}
    for i in range(3):
        shape = (sizes[i], sizes[i + 1])
        kernel = rng.standard_normal(shape).astype(np.float32) / np.float32(width) ** 0.5
        params[f"fc{i}"] = {"kernel": kernel, "bias": np.zeros(width, np.float32)}
    return params, rng.standard_normal((256, width)).astype(np.float32)


def one(method: str, width: str) -> None:
    """Measure one method in this process and print the figures as JSON."""
    import resource

    params, inputs = network(int(width))
    if method == "torch.func.hessian":
        import torch

        torch.set_num_threads(2)
        params = {k: {n: torch.tensor(x) for n, x in layer.items()} for k, layer in params.items()}
        inputs, tanh, module = torch.tensor(inputs), torch.tanh, torch
    else:
        import jax
        import jax.numpy as jnp

        params, inputs = jax.tree.map(jnp.asarray, params), jnp.asarray(inputs)
        tanh, module = jnp.tanh, jnp

    def loss(params, x):
        for name in ("fc0", "fc1", "fc2"):
            x = tanh(x @ params[name]["kernel"] + params[name]["bias"])
        return module.mean(x**2)

    entries = 1.0
    if method == "spectra":
        import spectra
        from spectra.operators.hessian import _groups

        op = spectra.HessianOperator(loss, params, inputs)
        ends = [end - begin for _, _, begin, end in _groups(op)]
        entries = (op.size**2 + sum(n * n for n in ends)) / 2 / op.size**2

        def function():
            return op.as_matrix().block_until_ready()
    elif method == "jax.hessian":
        hessian = jax.jit(jax.hessian(loss))

        def function():
            return jax.block_until_ready(hessian(params, inputs))
    else:

        def function():
            return torch.func.hessian(loss)(params, inputs)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    function()
    first = time.perf_counter() - start
    start = time.perf_counter()
    function()
    second = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"first": first, "second": second, "mib": peak / 1024, "entries": entries}))


def measure(code: str, *arguments: str, timeout: int = TIMEOUT) -> dict | str:
    """The figures that a fresh process prints, or why there are none."""
    try:
        out = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return f"over {timeout} s"
    if out.returncode:
        last = (out.stderr.strip().splitlines() or ["killed"])[-1]
        return "out of memory" if out.returncode < 0 or "emory" in last else f"fails: {last[:60]}"
    return json.loads(out.stdout.strip().splitlines()[-1])


def main(settings: Settings) -> list[str]:
    lines = [
        "| n | tool | products (columns) | entries | first call, s | second call, s | peak memory, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for width in settings.choose(WIDTHS, WIDTHS[:1]):
        n = 3 * width * (width + 1)
        for method in METHODS:
            print(lines[-1], file=sys.stderr, flush=True)
            result = measure(CODE, method, str(width))
            if isinstance(result, str):
                lines.append(f"| {n:,} | {method} | {n:,} | | {result} | | |")
                continue
            lines.append(
                f"| {n:,} | {method} | {n:,} | {result['entries']:.0%} | {result['first']:.2f} | "
                f"{result['second']:.3f} | {result['mib']:.0f} |"
            )
    return lines


if __name__ == "__main__":
    print("\n".join(main(Settings())))
