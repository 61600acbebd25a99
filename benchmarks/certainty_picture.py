"""The same 800 products of the demo's network, before and after: `python -m benchmarks.certainty_picture`.

Before: plain stochastic Lanczos quadrature, 8 probes of 100 steps, and Student's interval of the values of
the probes, which is what its users compute. After: the intervals of the report on the same quadrature, and of
`trace` with as many products of its own.
"""

from pathlib import Path

import jax
import numpy as np
from scipy.stats import t as student

import spectra
from benchmarks.settings import RESULTS
from spectra.demos import digits

LAMBDA = 1e-2
"""Damping of the log-determinant, in units of |H|."""


def before(q: spectra.Quadrature, f) -> tuple[float, float, float]:
    """Mean of n Σ w f(θ) over probes, with Student's interval."""
    values = q.size * np.sum(np.asarray(q.weights) * f(np.asarray(q.nodes)), axis=1)
    half = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    mean = float(np.mean(values))
    return mean - half, mean, mean + half


def measure() -> list[tuple[str, list[tuple[str, tuple[float, float, float]]]]]:
    """For each figure its intervals, before and after."""
    problem = digits.problem()
    op = spectra.HessianOperator(problem.loss_fn, problem.params, problem.data)
    report = spectra.spectrum(op, key=jax.random.key(0), num_steps=100, num_probes=8)
    q, n = report.quadrature, op.size
    scale = max(map(abs, q.range))
    direct = spectra.trace(op, key=jax.random.key(1), num_matvecs=800)
    below, _ = report.beyond(1e-3)
    damped = spectra.trace_of(q, lambda x: np.log1p(x / (LAMBDA * scale)), one_signed=True)
    share = before(q, lambda x: 100 * (x < -1e-3 * scale) / n)
    return [
        (
            "trace",
            [
                ("plain SLQ", before(q, lambda x: x)),
                ("report", tuple(report.trace.interval())),
                ("trace(...)", tuple(direct.interval())),
            ],
        ),
        (
            "eigenvalues above 0.1",
            [("plain SLQ", before(q, lambda x: x > 0.1)), ("report", tuple(report.count_above(0.1)))],
        ),
        ("share below -|H|/1000, %", [("plain SLQ", share), ("report", tuple(100 * np.array(below)))]),
        (
            "log det(1 + 100 H/|H|)",
            [
                ("plain SLQ", before(q, lambda x: np.log1p(np.maximum(x / (LAMBDA * scale), -0.99)))),
                ("report", tuple(damped.interval())),
            ],
        ),
    ]


def draw(found, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = {"plain SLQ": "#999999", "report": "#0072B2", "trace(...)": "#009E73"}
    heights = [len(rows) for _, rows in found]
    _, axes = plt.subplots(
        len(found), figsize=(6.3, 4.2), dpi=200, layout="constrained", height_ratios=heights
    )
    for ax, (name, rows) in zip(axes, found, strict=True):
        for y, (label, (low, middle, high)) in enumerate(rows):
            ax.plot([low, high], [-y, -y], "|-", c=colors[label], lw=2, ms=8)
            ax.plot([middle], [-y], "o", c=colors[label], ms=4)
        ax.set_yticks([-y for y in range(len(rows))], [label for label, _ in rows], fontsize=8)
        ax.set_ylim(0.6 - len(rows), 0.6)
        ax.set_title(name, fontsize=8, loc="left")
        ax.tick_params(labelsize=8)
        for side in ("top", "right", "left"):
            ax.spines[side].set_visible(False)
    plt.savefig(path)
    plt.close()


def main() -> None:
    found = measure()
    for name, rows in found:
        print(
            name,
            *(f"{label} [{low:.5g}, {middle:.5g}, {high:.5g}]" for label, (low, middle, high) in rows),
            sep="; ",
        )
    draw(found, RESULTS / "certainty.png")


if __name__ == "__main__":
    main()
