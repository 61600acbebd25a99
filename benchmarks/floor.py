"""The least that a Lanczos step can cost: its matrix products and one sweep over the filled basis.

A gradient needs three matrix products for each product of the model (one forward, two backward); the
linear part of a Hessian product, with everything saved that does not depend on the vector, needs six: each
of the three is bilinear, and its derivative along v has two terms. Each shape is timed by itself as a plain
product in XLA and in PyTorch, and the faster one counts: that is the machine's own rate. The basis is read
twice up to the current row (coefficients, then the update) at the bandwidth of a matrix-vector product.

That rate is of operands that stay in the cache from call to call. `all_products` is what XLA needs for the
same matrix products in one program, each with operands of its own, as in a real one.
"""

import itertools

import jax
import jax.numpy as jnp

from benchmarks import problems
from benchmarks.timing import alternate, median_ms

Shape = tuple[int, int, int, int]  # batch, rows, contracted, columns


def products(name: str) -> list[tuple[Shape, int]]:
    """Matrix products of one application of the linear part: shape, and how often."""
    if name == "mlp":
        rows, widths = 1797, (64, 256, 256, 10)
        shapes = [(1, rows, a, b) for a, b in itertools.pairwise(widths)]
        return [*_first(shapes[0]), *(part for shape in shapes[1:] for part in _six(shape))]
    model = {"transformer": problems.DECODER, "large": problems.LARGE}[name]
    batch, length = (16, 64) if name == "transformer" else (4, 64)
    tokens, d, depth = batch * length, model.width, model.depth
    pairs, head = batch * model.heads, d // model.heads
    layer = [(1, tokens, d, d)] * 4 + [(1, tokens, d, 4 * d), (1, tokens, 4 * d, d)]
    layer += [(pairs, length, head, length), (pairs, length, length, head)]
    shapes = layer * depth + [(1, tokens, d, model.vocabulary)]
    return [part for shape in shapes for part in _six(shape)]


def _six(shape: Shape) -> list[tuple[Shape, int]]:
    """Y = X W: two terms each of dY = X W, dX = dY Wᵀ and dW = Xᵀ dY."""
    b, m, k, n = shape
    return [((b, m, k, n), 2), ((b, m, n, k), 2), ((b, k, m, n), 2)]


def _first(shape: Shape) -> list[tuple[Shape, int]]:
    """The first layer's inputs are data: X dW forward and Xᵀ dY backward."""
    b, m, k, n = shape
    return [((b, m, k, n), 1), ((b, k, m, n), 1)]


def product_ms(name: str, rounds: int = 5) -> tuple[float, float]:
    """(milliseconds of all matrix products of one Hessian product, their rate in GFLOP/s)."""
    counts: dict[Shape, int] = {}
    for shape, count in products(name):
        counts[shape] = counts.get(shape, 0) + count
    total = flops = 0.0
    for shape, count in counts.items():
        total += count * _gemm_ms(shape, rounds)
        b, m, k, n = shape
        flops += count * 2 * b * m * k * n
    return total, flops / total / 1e6


_matmul = jax.jit(lambda a, b: jnp.matmul(a, b, precision="highest"))


def _gemm_ms(shape: Shape, rounds: int) -> float:
    b, m, k, n = shape
    inner = 8 if rounds > 1 else 1  # calls a measurement
    left, right = jnp.ones((b, m, k)), jnp.ones((b, k, n))
    if b == 1:
        left, right = left[0], right[0]

    def xla():
        for _ in range(inner):
            out = _matmul(left, right)
        return out

    functions = {"xla": xla}
    try:
        import torch

        x, y = torch.ones(left.shape), torch.ones(right.shape)
        functions["torch"] = lambda: [x @ y for _ in range(inner)] and None
    except ImportError:
        pass
    times = alternate(functions, rounds=rounds, quiet=True, burst=0.05)
    return min(min(t) for t in times.values()) * 1e3 / inner


def all_products(name: str):
    """A call of one program of all matrix products of one Hessian product, each with operands of its own."""
    shapes = [shape for shape, count in products(name) for _ in range(count)]
    keys = jax.random.split(jax.random.key(0), 2 * len(shapes)).reshape(len(shapes), 2)
    batches = [(b,) if b > 1 else () for b, *_ in shapes]
    pairs = [
        (jax.random.normal(left, (*batch, m, k)), jax.random.normal(right, (*batch, k, n)))
        for (left, right), batch, (_, m, k, n) in zip(keys, batches, shapes, strict=True)
    ]
    run = jax.jit(lambda pairs: [jnp.matmul(*pair, precision="highest") for pair in pairs])
    return lambda: run(pairs)


def basis_ms(n: int, steps: int, rounds: int = 7) -> tuple[float, float]:
    """(milliseconds a step, mean over a run, to read the filled rows twice, bandwidth in GB/s)."""
    matrix, x = jnp.ones((steps, n)), jnp.ones(n)
    times = alternate({"gemv": lambda: _matmul(matrix, x)}, rounds=rounds, quiet=True)["gemv"]
    bandwidth = 4 * n * steps / median_ms(times) / 1e6
    return 2 * 4 * n * (steps + 1) / 2 / bandwidth / 1e6, bandwidth
