"""What a training run is told: the edge of stability, warnings before spikes, and what cheap readings cost.

    python -m benchmarks.training

Figures are ratios, steps and counts, no times. Everything is seeded.
"""

import argparse
from datetime import date
from pathlib import Path

import jax
import jax.numpy as jnp

import spectra
from benchmarks import edge, spikes

HELD_BACK = (2, 3)
"""Seeds of the spikes reported; the rule was looked at with 0 and 1."""
EVERY, STEPS = 200, 2000
AFTER = (0, 30, 60, 90, 120, 150)
MOVED = (
    ("attention", "momentum", (12.0, 20.0, 26.0)),
    ("mlp", "rmsprop", (0.6,)),
    ("convolutional", "adamw", (4.6,)),
    ("mlp", "muon", (12.0,)),
)
"""Networks, optimizers and multiples at which the edge moves within the steps that are watched."""


REST = [
    "At rest, after 10,000 further steps on all examples (`Run.rest`), the curvature of gradient descent and",
    "of momentum stands still, and what is predicted is where training turns. Adam has no such state: at a",
    "minimum its averages of squared gradients vanish, and with them what its updates are divided by.",
]
ALONG = [
    "What moves is seen along runs that stay below where they turn. `stable_step` speaks of the point where",
    "it is asked, and training goes on from there. The threshold of such a run is where the edge, which",
    "moves meanwhile, meets the multiple before the steps watched are over.",
]


def stable_steps(optimizers: dict, rest: bool = False) -> list[str]:
    """`stable_step` against the bisected threshold, for networks x optimizers."""
    rows = [
        "| network | optimizer | `stable_step` before | products | unstable from | ratio "
        "| at the end | ratio |",
        "|" + "---|" * 8,
    ]
    for name, (optimizer, rate) in optimizers.items():
        for network in edge.NETWORKS:
            run = edge.Run(network, optimizer, rate)
            run.prepare()
            if rest:
                run.rest()
            found = run.stable_step()
            run.move()
            low, high = run.threshold(float(found))
            middle = (low * high) ** 0.5
            run.stay(low)
            late = float(run.stable_step())
            rows.append(
                f"| {network} | {name} | {float(found):.4g} | {found.num_matvecs} | {middle:.4g} | "
                f"{float(found) / middle:.2f} | {late:.4g} | {late / middle:.2f} |"
            )
            print(rows[-1], flush=True)
    return rows


def along() -> list[str]:
    """`stable_step` at points of runs that stay stable, just below where they turn."""
    rows = [
        "| network | optimizer | updates times | " + " | ".join(f"after {i}" for i in AFTER) + " |",
        "|" + "---|" * (3 + len(AFTER)),
    ]
    for network, name, multiples in MOVED:
        run = edge.Run(network, *(edge.OPTIMIZERS | edge.OTHERS)[name])
        run.prepare()
        run.move()
        for multiple in multiples:
            edges = " | ".join(f"{x:.3g}" for x in run.along(multiple, AFTER))
            rows.append(f"| {network} | {name} | {multiple:g} | {edges} |")
            print(rows[-1], flush=True)
    return rows


def overhead() -> list[str]:
    """Forward passes of readings that take no gradient, as a share of those of training."""
    rows = [
        "| network | training steps | readings | evaluations each | share of training |",
        "|" + "---|" * 5,
    ]
    for network in edge.NETWORKS:
        run = edge.Run(network, *edge.OPTIMIZERS["sgd"])
        step, counts = 1.0, []
        for _ in range(STEPS // EVERY):
            run.params, run.state, _ = run.go(1.0, EVERY)
            gradient = jax.grad(run.loss_fn)(run.params, run.batch)
            update = jax.tree.map(jnp.negative, gradient)  # the step that is taken anyway
            found = spectra.critical_sharpness(run.loss_fn, run.params, run.batch, update, step=step, tol=0.5)
            step = found.step
            counts.append(found.num_evaluations)
        # A step of training is a forward and a backward pass, which is two.
        share = sum(counts[1:]) / (3 * EVERY * (len(counts) - 1))
        rows.append(
            f"| {network} | {STEPS:,} | {len(counts)} | {', '.join(map(str, counts))} | {100 * share:.2g} % |"
        )
        print(rows[-1], flush=True)
    return rows


def main() -> list[str]:
    """The page."""
    return [
        f"# Along training, {date.today()}",
        "",
        "Made by `python -m benchmarks.training`: digits, networks of some thousand parameters, float32.",
        "",
        "## The largest stable step",
        "",
        *(edge.__doc__ or "").strip().splitlines(),
        "",
        *stable_steps(edge.OPTIMIZERS | edge.OTHERS),
        "",
        "The goal is a first ratio between 0.9 and 1.1 for gradient descent, momentum and Adam. Where it is",
        "off and the second is not, curvature or the optimizer's averages moved within the steps: those of",
        "RMSProp are a hundred steps long, and the curvature of the network with attention more than doubles",
        "near the edge of momentum. Muon divides by the gradient itself, which bounds an oscillation where",
        "it begins to grow: its edge is no more than a scale.",
        "",
        *REST,
        "",
        *stable_steps({name: edge.OPTIMIZERS[name] for name in ("sgd", "momentum")}, rest=True),
        "",
        *ALONG,
        "",
        *along(),
        "",
        "## Warnings before a spike",
        "",
        *(spikes.__doc__ or "").strip().splitlines(),
        "",
        f"Seeds {HELD_BACK}; the rule was looked at with seeds 0 and 1 only. Steps ahead are those from the",
        "last warning before the spike.",
        "",
        *spikes.table(spikes.PROVOKED, HELD_BACK),
        "",
        *spikes.table(spikes.QUIET, HELD_BACK),
        "",
        "## What readings without gradients cost",
        "",
        f"`critical_sharpness` along the update every {EVERY} steps to a factor of 1.5 (tol=0.5), from the",
        "step found last, on the batch of training. A step of training counts as three forward passes; the",
        "first reading, which looks for the scale, is left out of the share. The goal is at most 1 %.",
        "",
        *overhead(),
        "",
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).with_name("results") / "training.md"
    parser.add_argument("-o", "--output", type=Path, default=default)
    output = parser.parse_args().output
    output.write_text("\n".join(main()))
