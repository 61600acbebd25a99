"""Block-wise Hessian spectra of a transformer and of a CNN: how different are the blocks?

The protocol of Zhang et al., Why Transformers Need Adam (arXiv:2402.16788): one spectrum per weight
matrix, distances between all pairs. They find the blocks of transformers far more
different from each other than those of CNNs. Both networks are trained here, on real data: a
decoder on characters of Python's standard library, a CNN on scikit-learn's digits.

Pictures go to benchmarks/results/blocks-*.png.
"""

import argparse
import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from flax import linen as nn

import spectra
from benchmarks.problems import Decoder
from spectra.demos import digits

METRICS = ("jensen-shannon", "wasserstein")
RESULTS = Path(__file__).parent / "results"


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x.reshape(-1, 8, 8, 1)
        for width, stride in ((16, 1), (16, 1), (32, 2), (32, 1), (64, 2), (64, 1)):
            x = nn.relu(nn.Conv(width, (3, 3), strides=stride)(x))
        return nn.Dense(10)(x.mean((1, 2)))


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train(module, batches, steps: int, rate: float):
    """Parameters after Adam, and the loss on the last batch."""
    params = module.init(jax.random.key(0), next(batches)[0])["params"]
    optimizer = optax.adam(rate)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, batch):
        def loss(p):
            return cross_entropy(module.apply({"params": p}, batch[0]), batch[1])

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    value = jnp.nan
    for _ in range(steps):
        params, state, value = step(params, state, next(batches))
    return params, float(value)


def text() -> np.ndarray:
    """Characters of a few modules of the standard library, as integers below 64."""
    import argparse as a
    import ast as b
    import inspect as c
    import typing as d

    characters = np.frombuffer(
        "".join(map(inspect.getsource, (a, b, c, d))).encode("ascii", "ignore"), np.uint8
    )
    used, codes = np.unique(characters, return_inverse=True)
    frequent = np.argsort(-np.bincount(codes))[:63]  # the rarest share one code
    table = np.full(len(used), 63)
    table[frequent] = np.arange(63)
    return table[codes].astype(np.int32)


def transformer_problem(steps: int):
    tokens, rng = text(), np.random.default_rng(0)

    def batch(size=16, length=64):
        starts = rng.integers(0, len(tokens) - length - 1, size)
        rows = np.stack([tokens[s : s + length + 1] for s in starts])
        return rows[:, :-1], rows[:, 1:]

    module = Decoder(vocabulary=64, width=64, depth=2, heads=4)
    params, loss = train(module, iter(batch, None), steps, 1e-3)
    return module, params, tuple(x[:16] for x in batch(32)), loss


def cnn_problem(steps: int):
    images, labels = map(np.asarray, digits.load_digits())
    rng = np.random.default_rng(0)

    def batch(size=64):
        index = rng.integers(0, len(labels), size)
        return images[index], labels[index]

    module = CNN()
    params, loss = train(module, iter(batch, None), steps, 1e-3)
    return module, params, tuple(x[:256] for x in batch(512)), loss


def is_weight(path: str) -> bool:
    return path.endswith(("kernel", "embedding"))


def measure(name: str, problem, steps: int) -> tuple[str, float]:
    module, params, batch, loss = problem(steps)

    def loss_fn(params, batch):
        return cross_entropy(module.apply({"params": params}, batch[0]), batch[1])

    op = spectra.HessianOperator(loss_fn, params, batch).block(is_weight)
    results = spectra.slq(op.blocks(), key=jax.random.key(1), num_steps=80, num_probes=2)
    axes = spectra.plot_blocks(results)
    RESULTS.mkdir(exist_ok=True)
    axes[0].figure.savefig(RESULTS / f"blocks-{name}-{steps}.png", dpi=150)
    between = ~np.eye(len(results), dtype=bool)
    shannon, moved = (spectra.spectral_distances(results, metric=m)[between].mean() for m in METRICS)
    norms = [max(map(abs, q.range)) for q in results.values()]
    typical = [np.sqrt(q.mean(np.square)) for q in results.values()]
    state = "at initialisation" if not steps else f"after {steps} steps, loss {loss:.3f}"
    cells = [f"{name}, {state}", f"{op.size:,}", f"{len(results)}", f"{shannon:.3f}", f"{moved:.3f}"]
    cells += [f"{max(norms) / min(norms):.0f}", f"{max(typical) / min(typical):.0f}"]
    return "| " + " | ".join(cells) + " |", moved


def main(steps: int = 300) -> list[str]:
    mpl.use("Agg")
    head = [
        "| network | parameters | blocks | Jensen-Shannon | Wasserstein | largest / smallest norm | "
        "largest / smallest root mean square eigenvalue |",
        "|---|---|---|---|---|---|---|",
    ]
    rows, distances = [], {}
    for count in (0, steps):
        for name, problem in (("transformer", transformer_problem), ("cnn", cnn_problem)):
            row, distances[name, count] = measure(name, problem, count)
            rows.append(row)
    ratios = [distances["transformer", c] / distances["cnn", c] for c in (0, steps)]
    return [
        *head,
        *rows,
        "",
        f"Mean Wasserstein distance, transformer over CNN: {ratios[0]:.2f} at initialisation, "
        f"{ratios[1]:.2f} trained.",
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300, help="training steps")
    print("\n".join(main(parser.parse_args().steps)))
