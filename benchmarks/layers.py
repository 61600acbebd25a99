"""Condition number of a layer against the explicit loop over backward passes, as n grows to 100,000.

The first fully connected layer of a network w - h - 10 (tanh, 200 examples, float32) has n = w h parameters.
Every tool ends at the same number, |λ|max / |λ|min over the numerical range: the explicit ones by LAPACK from
their matrix, `spectra` by itself (dense up to n = 5,000, matrix-free beyond, a lower bound where it says ≥).
Each entry is a process of its own, given 20 s; seconds include compilation, as a user
waits for them, and memory is the peak beyond imports and data.
"""

import json
import sys
import time

from benchmarks.dense import measure
from benchmarks.settings import Settings

METHODS = ("spectra", "loop of backward passes (torch)", "torch.func.hessian", "jax.hessian")
SHAPES = ((10, 10), (20, 50), (50, 60), (100, 100), (200, 500))
CODE = "import sys; from benchmarks import layers; layers.one(*sys.argv[1:])"
TIMEOUT = 20


def one(method: str, inputs: str, hidden: str) -> None:
    """Measure one method in this process and print the figures as JSON."""
    import resource

    import numpy as np

    rng = np.random.default_rng(0)
    shapes = ((int(inputs), int(hidden)), (int(hidden), 10))
    arrays = [(rng.standard_normal(s) / s[0] ** 0.5).astype(np.float32) for s in shapes]
    x = rng.standard_normal((200, int(inputs))).astype(np.float32)
    y = rng.standard_normal((200, 10)).astype(np.float32)
    uses_torch = "torch" in method
    if uses_torch:
        import torch

        torch.set_num_threads(2)
        weights, (x, y) = [torch.tensor(a) for a in arrays], map(torch.tensor, (x, y))
        tanh, mean = torch.tanh, torch.mean
    else:
        import jax
        import jax.numpy as jnp

        weights, (x, y) = [jnp.asarray(a) for a in arrays], map(jnp.asarray, (x, y))
        tanh, mean = jnp.tanh, jnp.mean

    def loss(first, last):
        return mean((tanh(x @ first) @ last - y) ** 2)

    def from_matrix(matrix):
        sizes = np.sort(np.abs(np.linalg.eigvalsh(np.asarray(matrix, np.float64))))
        n = len(sizes)
        kept = sizes[sizes > n * np.finfo(np.float32).eps * sizes[-1]]
        return sizes[-1] / kept[0], ""

    def run():
        n = weights[0].shape[0] * weights[0].shape[1]
        if method == "spectra":
            import spectra

            params = {"first": weights[0], "last": weights[1]}
            op = spectra.HessianOperator(lambda p, batch: loss(p["first"], p["last"]), params, None)
            result = spectra.condition_number(op.block("first"), key=jax.random.key(0))
            return result.effective, "≥ " if result.is_lower_bound else ""
        if method == "jax.hessian":
            return from_matrix(jax.jit(jax.hessian(loss))(*weights).reshape(n, n))
        if method == "torch.func.hessian":
            return from_matrix(torch.func.hessian(loss)(*weights).reshape(n, n))
        first = weights[0].requires_grad_()
        (gradient,) = torch.autograd.grad(loss(first, weights[1]), first, create_graph=True)
        rows = [torch.autograd.grad(g, first, retain_graph=True)[0].ravel() for g in gradient.ravel()]
        return from_matrix(torch.stack(rows))

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    value, sign = run()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"value": float(value), "sign": sign, "seconds": seconds, "mib": peak / 1024}))


def main(settings: Settings) -> list[str]:
    lines = ["| n | tool | condition number | s | peak memory, MiB |", "|---|---|---|---|---|"]
    for inputs, hidden in settings.choose(SHAPES, SHAPES[:1]):
        n = inputs * hidden
        for method in METHODS:
            print(lines[-1], file=sys.stderr, flush=True)
            if method != "spectra" and n > 50_000:
                text = f"out of reach: the matrix alone is {4 * n * n / 2**30:.0f} GiB"
                lines.append(f"| {n:,} | {method} | {text} | | |")
                continue
            result = measure(CODE, method, str(inputs), str(hidden), timeout=TIMEOUT)
            if isinstance(result, str):
                lines.append(f"| {n:,} | {method} | {result} | | |")
                continue
            number = f"{result['sign']}{result['value']:.4g}"
            lines.append(f"| {n:,} | {method} | {number} | {result['seconds']:.2f} | {result['mib']:.0f} |")
    return lines


if __name__ == "__main__":
    print("\n".join(main(Settings())))
