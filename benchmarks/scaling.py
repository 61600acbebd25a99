"""How a density's time and memory grow with parameters, steps, probes and examples.

One of the four varies, the others stay: an MLP 64-h-h-10 with 85,002 parameters (h = 256), 40 steps, 1
probe, 1,797 images. Compiled code is warm. The exponent is the slope between the last two points on
logarithmic axes: 1 is proportional. Memory is what `spectra.plan` states, which the section `memory` checks.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

import spectra
from benchmarks.settings import Report, Settings, table
from benchmarks.timing import alternate, median_ms
from spectra.demos import digits

SWEEPS = {
    "parameters": (32, 64, 128, 256, 512, 1024),
    "steps": (10, 20, 40, 80, 160),
    "probes": (1, 2, 4, 8),
    "examples": (225, 449, 898, 1797, 3594),
}
TINY = {"parameters": (8, 16), "steps": (2, 4), "probes": (1, 2), "examples": (4, 8)}


BASE = {"width": 256, "steps": 40, "probes": 1, "examples": 1797}
TINY_BASE = {"width": 8, "steps": 2, "probes": 1, "examples": 4}


def problem(width: int, examples: int):
    images, labels = digits.load_digits()
    repeat = -(-examples // len(images))
    batch = (
        jnp.asarray(np.tile(images, (repeat, 1))[:examples]),
        jnp.asarray(np.tile(labels, repeat)[:examples]),
    )
    module = digits.MLP((width, width, 10))

    def loss_fn(params, batch):
        logits = module.apply({"params": params}, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    params = module.init(jax.random.key(0), batch[0][:1])["params"]
    return spectra.HessianOperator(loss_fn, params, batch)


def main(settings: Settings) -> Report:
    rounds = settings.choose(3, 1)
    base = settings.choose(BASE, TINY_BASE)
    found, rows = {}, []
    for sweep, values in settings.choose(SWEEPS, TINY).items():
        points = []
        for value in values:
            at = base | {"width" if sweep == "parameters" else sweep: value}
            op = problem(at["width"], at["examples"])
            options = {"num_steps": at["steps"], "num_probes": at["probes"]}

            def run(op=op, options=options):
                return spectra.slq(op, key=jax.random.key(0), **options).nodes

            ms = median_ms(alternate({"slq": run}, rounds=rounds)["slq"])
            x = op.size if sweep == "parameters" else value
            points.append((x, ms, spectra.plan(op, **options).total))
        found[sweep] = points
        (a, before, _), (b, after, _) = points[-2:]
        for i, (x, ms, memory) in enumerate(points):
            last = f"{math.log(after / before) / math.log(b / a):.2f}" if i == len(points) - 1 else ""
            rows.append([sweep, f"{x:,}", f"{ms:.0f}", f"{memory / 2**20:.0f}", last])
    figure(found, settings.results / "scaling.png")
    lines = table(["varied", "value", "ms", "planned memory, MiB", "exponent"], rows)
    return Report([*lines, "", "![Time against parameters, steps, probes and examples](scaling.png)"])


def figure(found, path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 4, figsize=(8.4, 2.3), dpi=200, layout="constrained")
    for ax, (sweep, points) in zip(axes, found.items(), strict=True):
        x, y = np.array([p[0] for p in points], float), np.array([p[1] for p in points])
        ax.loglog(x, y, "o-", ms=3.5, lw=1.2, c="#0072B2")
        ax.loglog(x, y[-1] * x / x[-1], lw=0.8, c="#bbbbbb", ls="--", zorder=0, label="proportional")
        ax.set_ylim(y.min() / 1.4, y.max() * 1.4)
        ax.set_xlabel(sweep, fontsize=8)
        ax.minorticks_off()
        shown = x[:: 2 if len(x) > 4 else 1]
        ax.set_xticks(
            shown, [f"{value / 1000:.0f}k" if value >= 10_000 else f"{value:.0f}" for value in shown]
        )
        ends = np.geomspace(y.min(), y.max(), 3)
        ax.set_yticks(ends, [f"{value:.0f}" if value >= 10 else f"{value:.1f}" for value in ends])
        ax.tick_params(labelsize=7)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    axes[0].set_ylabel("ms", fontsize=8)
    axes[0].legend(fontsize=6.5, frameon=False)
    fig.savefig(path)
    plt.close(fig)


if __name__ == "__main__":
    print("\n".join(main(Settings()).lines))
