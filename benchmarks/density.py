"""SLQ density end to end, beside the tools that people would use instead.

80 Lanczos steps (20 on the CNN, 10 on the network of 25M parameters), from a problem that is set up to
nodes, weights and, where the tool makes one, the smoothed curve. A turn is one probe: the time is
proportional to the probes (section `scaling`), and what a tool does once a call, such as a linearisation,
counts at every probe. Compiled code is warm; compilation is in the section `startup`. Tools that take minutes
run in the first round only. The floor is that of `floor.py`.

Accuracy is compared by what a tool controls: orthogonality of its basis; its largest Ritz values against
converged eigenvalues in float64; and, at a size where all eigenvalues are known, the Wasserstein-1 distance
of its quadrature to the weighted measure of its own probes, in units of the spectral range. The distance to
the spectrum itself is mostly the noise of eight probes, the same for all.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse.linalg import LinearOperator, eigsh

from benchmarks import floor, peers
from benchmarks.settings import Goal, Report, Settings, table
from benchmarks.timing import alternate, median_ms, ratio, spread

COLORS = {
    "spectra": "#0072B2",
    "matfree": "#E69F00",
    "matfree, linearised": "#F0C45C",
    "hessian-eigenthings": "#009E73",
    "curvlinops": "#D55E00",
    "PyHessian": "#CC79A7",
    "CoLA": "#666666",
    "google/spectral-density": "#999999",
}
SLOW = ("curvlinops", "PyHessian", "CoLA", "google/spectral-density")
SIZES = {"mlp": (80, 15), "transformer": (80, 5), "cnn": (20, 1), "large": (10, 1)}
"""Steps and rounds."""
TINY = {"mlp": (4, 1), "transformer": (4, 1)}
RATIOS = {"mlp": (0.62, 0.42), "transformer": (0.65, 0.45)}
"""Goals: of matfree's time, and of hessian-eigenthings'."""


def main(settings: Settings) -> Report:
    report, times = Report([]), {}
    sizes = settings.choose(SIZES, TINY)
    for name, (steps, rounds) in sizes.items():
        times[name] = measure(name, steps, rounds, settings, report)
    report.lines += ["", "### Accuracy where all 1,210 eigenvalues are known", ""]
    report.lines += accuracy(settings, report)
    figure(times, settings.results / "density.png")
    report.lines += ["", "![Milliseconds a Lanczos step, tool by tool](density.png)"]
    return report


def measure(name: str, steps: int, rounds: int, settings: Settings, report: Report):
    """One table: time of a step, shares, orthogonality and extreme Ritz values."""
    problem = settings.problem(name)
    n = sum(x.size for x in jax.tree.leaves(problem[1]))
    classes = peers.DENSITY if name == "mlp" else peers.DENSITY[:5]
    if name == "large":
        classes = peers.DENSITY[:3]
    tools, notes = peers.build((peers.Spectra, *classes), name, problem, settings)
    tools = {tool.label: tool for tool in tools}
    nodes = {}

    def run(label):
        nodes[label] = tools[label].density(steps, 1)[0]

    runs = {label: functools.partial(run, label) for label in tools}
    # What compiles its whole loop does so for a number of steps and probes; two steps wake up the others.
    short = [label for label, tool in tools.items() if tool.order == "torch" or label in SLOW]
    warm = {label: lambda tool=tools[label]: tool.density(2, 1)[0] for label in short}
    times = alternate(runs, rounds=rounds, warm=warm, once=SLOW)
    times = {label: [t / steps for t in own] for label, own in times.items()}  # a step
    lowest, lines = None, []
    if name in ("mlp", "transformer", "large"):
        matmuls, rate = floor.product_ms(name, settings.choose(5, 1))
        sweep, bandwidth = floor.basis_ms(n, steps)
        lowest = matmuls + sweep
        lines = [
            "",
            f"Floor of {name}: {matmuls:.2f} ms of matrix products ({rate:.0f} GFLOP/s) and {sweep:.2f} ms "
            f"of reading the filled basis ({bandwidth:.1f} GB/s).",
        ]
    exact = None if name == "large" else extremes(problem, settings.choose(5, 1))
    rows, figures = [], {}
    for label, tool in tools.items():
        own = times[label]
        share = f"{ratio(times, 'spectra', label):.2f}" if label != "spectra" else ""
        figures[label] = (
            ("", "") if exact is None else (orthogonality(tool, steps), ritz_error(nodes[label], exact))
        )
        to_floor = f"{median_ms(own) / lowest:.2f}" if lowest else ""
        rows.append(
            [
                label,
                f"{median_ms(own):.1f}",
                f"{spread(own):.0%}" if len(own) > 1 else "once",
                share,
                to_floor,
                *figures[label],
            ]
        )
    head = [
        "tool",
        "ms a step",
        "spread",
        "spectra / this",
        "/ floor",
        "max abs(QQᵀ − I)",
        "top 5, worst error",
    ]
    report.lines += ["", f"### {name}: {n:,} parameters, {steps} steps", ""]
    report.lines += [*table(head, rows), *lines, "", "; ".join(notes) + "."]
    goals(name, times, lowest, figures["spectra"] if steps >= 80 else None, report)
    return times


def goals(name, times, lowest, figures, report: Report) -> None:
    if name in RATIOS:
        ours, theirs = RATIOS[name]
        free = [label for label in ("matfree", "matfree, linearised") if label in times]
        if free:
            for label in free:
                share = ratio(times, "spectra", label)
                report.goals.append(Goal(f"density of {name}, of the time of {label}", share, ours))
        if "hessian-eigenthings" in times:
            share = ratio(times, "spectra", "hessian-eigenthings")
            report.goals.append(Goal(f"density of {name}, of the time of hessian-eigenthings", share, theirs))
    if name == "mlp" and lowest:
        report.goals.append(Goal("density of mlp, of the floor", median_ms(times["spectra"]) / lowest, 1.15))
    if figures is not None:
        basis, error = map(float, figures)
        report.goals.append(Goal(f"largest eigenvalues of {name}, relative error", error, 1e-6))
        report.goals.append(Goal(f"orthogonality of the basis, {name}", basis, 1e-5))


def orthogonality(tool, steps: int) -> str:
    if not hasattr(tool, "basis"):
        return "no basis"
    q = tool.basis(steps).astype(np.float64)
    return f"{np.abs(q @ q.T - np.eye(len(q))).max():.1e}"


def ritz_error(nodes, exact: np.ndarray) -> str:
    """Largest relative error of the five largest Ritz values of one probe: ghosts repeat an eigenvalue."""
    nodes = np.sort(np.asarray(nodes[0], np.float64))[::-1][: len(exact)]
    return f"{np.max(np.abs(nodes - exact[: len(nodes)]) / exact[: len(nodes)]):.1e}"


def in_float64(problem):
    """Flat product and order of the problem's Hessian in float64; call it under x64."""
    from jax.flatten_util import ravel_pytree

    loss_fn, (params, batch) = problem[0], _cast(problem[1:])
    flat, unravel = ravel_pytree(params)
    linear = jax.jit(lambda x: jax.linearize(jax.grad(lambda y: loss_fn(unravel(y), batch)), x)[1])(flat)
    return jax.jit(lambda linear, v: linear(v)), linear, flat.size


def _cast(tree):
    """A copy in float64, made under x64."""
    arrays = jax.tree.map(np.asarray, tree)
    floats = lambda x: x.astype(np.float64) if np.issubdtype(x.dtype, np.floating) else x  # noqa: E731
    return jax.tree.map(lambda x: jnp.asarray(floats(x)), arrays)


def extremes(problem, k: int = 5) -> np.ndarray:
    """The k largest eigenvalues to 1e-10 by ARPACK with a product in float64."""
    with jax.enable_x64(True):
        apply, linear, n = in_float64(problem)
        op = LinearOperator(
            (n, n), matvec=lambda v: np.asarray(apply(linear, jnp.asarray(v.ravel()))), dtype=float
        )  # pyright: ignore
        return np.sort(eigsh(op, k, which="LA", tol=1e-10, return_eigenvectors=False))[::-1]


def accuracy(settings: Settings, report: Report) -> list[str]:
    """Quadratures against the exact spectrum, and against the exact weighted measure of their own probes."""
    problem = settings.problem("small")
    steps, probes = settings.choose((80, 8), (6, 1))
    with jax.enable_x64(True):
        apply, linear, n = in_float64(problem)
        matrix = np.asarray(jax.vmap(lambda v: apply(linear, v))(jnp.eye(n)))
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    tools, notes = peers.build((peers.Spectra, *peers.DENSITY), "small", problem, settings)
    to_torch = torch_order(problem)
    rows, span = [], values[-1] - values[0]
    for tool in tools:
        nodes, weights = (np.asarray(x, np.float64) for x in tool.density(steps, probes))
        starts = tool.starts(probes).astype(np.float64)
        starts /= np.linalg.norm(starts, axis=1, keepdims=True)
        basis = vectors if tool.order == "jax" else vectors[to_torch]
        own = (starts @ basis) ** 2
        inner = [
            wasserstein(nodes[i], weights[i] / weights[i].sum(), values, own[i]) / span for i in range(probes)
        ]
        outer = wasserstein(
            nodes.ravel(),
            (weights / weights.sum(1, keepdims=True)).ravel() / probes,
            values,
            np.full(n, 1 / n),
        )
        exact = values[::-1][:5]
        top = np.sort(nodes[0])[::-1][:5]
        rows.append(
            [
                tool.label,
                f"{np.mean(inner):.1e}",
                f"{outer / span:.1e}",
                f"{np.max(np.abs(top - exact) / exact):.1e}",
                orthogonality(tool, steps),
            ]
        )
        if tool.label == "spectra" and steps >= 80:
            report.goals.append(
                Goal("largest eigenvalues of small, relative error", float(rows[-1][3]), 1e-6)
            )
    head = [
        "tool",
        "W1 to its probes' measure",
        "W1 to the spectrum",
        "top 5, worst error",
        "max abs(QQᵀ − I)",
    ]
    return [*table(head, rows), "", f"{steps} steps, {probes} probes. " + "; ".join(notes) + "."]


def torch_order(problem) -> np.ndarray:
    """Position in JAX's flat vector of each entry of PyTorch's."""
    from jax.flatten_util import ravel_pytree

    from benchmarks import torch_problems

    flat, unravel = ravel_pytree(problem[1])
    index = unravel(jnp.arange(flat.size, dtype=jnp.float32))  # exact: fewer than 2^24
    model = torch_problems.build("small", index, problem[2])[0]
    return np.concatenate([p.detach().numpy().ravel() for p in model.parameters()]).astype(int)


def wasserstein(x, p, y, q) -> float:
    """∫ |F - G| of two discrete measures."""
    from scipy.stats import wasserstein_distance

    return float(wasserstein_distance(x, y, p, q))


def figure(times, path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    shown = {name: found for name, found in times.items() if name != "large"}
    fig, axes = plt.subplots(1, len(shown), figsize=(3.2 * len(shown), 2.6), dpi=200, layout="constrained")
    for ax, (name, found) in zip(np.atleast_1d(axes), shown.items(), strict=True):
        labels = sorted(found, key=lambda label: median_ms(found[label]), reverse=True)
        values = [median_ms(found[label]) for label in labels]
        ax.barh(labels, values, color=[COLORS.get(label, "#999999") for label in labels], height=0.7)
        for y, value in enumerate(values):
            ax.text(value, y, f" {value:.0f}" if value >= 10 else f" {value:.1f}", va="center", fontsize=7)
        ax.set_title(name, fontsize=9)
        ax.set_xlabel("ms a Lanczos step", fontsize=8)
        ax.set_xlim(0, 1.15 * max(values))
        ax.tick_params(labelsize=7, length=0)
        for side in ("top", "right", "left"):
            ax.spines[side].set_visible(False)
    fig.savefig(path)
    plt.close(fig)


if __name__ == "__main__":
    print("\n".join(main(Settings()).lines))
