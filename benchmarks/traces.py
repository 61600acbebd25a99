"""Trace estimators: error against products on known spectra, and beside other packages on one network.

The figure is Fig. 1 of Epperly, Tropp and Webber (arXiv:2301.07825): n = 1000, median relative error over 16
keys, normal probes. The tables are for an MLP 64-16-10 (1,210 parameters) on 1,797 digits, trained for 200
steps of Adam, with identical weights in every package and float32; errors are medians over 101 seeds, times
over 11 of them. Packages that are not installed are left out. Goals: at most the products
of the best other package for the same error, and less time.
"""

import functools
import statistics
import sys
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np

import spectra
from benchmarks import timing
from benchmarks.settings import Goal, Report, Settings, table

N = 1000
INDEX = np.arange(N)
SPECTRA = {
    "flat": 3 - 2 * INDEX / (N - 1),
    "polynomial": (INDEX + 1.0) ** -2,
    "exponential": 0.7**INDEX,
    "step": np.where(INDEX < 50, 1.0, 1e-3),
}
METHODS = ("hutchinson", "hutch++", "xtrace", "xnystrace")
BUDGETS = (16, 32, 64, 128, 256)
SEEDS, TIMED = 101, 11


@functools.partial(jax.jit, static_argnums=(2, 3))
def _many(op, keys, method, budget):
    def one(key):
        return spectra.trace(op, key=key, method=method, num_matvecs=budget, probes="normal").value

    return jax.lax.map(one, keys)


def errors(keys: int = 16, budgets=BUDGETS) -> dict[str, dict[str, list[float]]]:
    """Median relative error of each method on each spectrum at each budget, in float64."""
    found: dict[str, dict[str, list[float]]] = {name: {m: [] for m in METHODS} for name in SPECTRA}
    with jax.enable_x64(True):
        many = jax.random.split(jax.random.key(0), keys)
        for name, eigenvalues in SPECTRA.items():
            op = spectra.MatrixOperator(np.diag(eigenvalues))
            for method in METHODS:
                for budget in budgets:
                    values = np.asarray(_many(op, many, method, budget))
                    error = np.median(np.abs(values - eigenvalues.sum())) / eigenvalues.sum()
                    found[name][method].append(float(error))
    return found


def figure(found, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = {"hutchinson": "#999999", "hutch++": "#E69F00", "xtrace": "#0072B2", "xnystrace": "#009E73"}
    _, axes = plt.subplots(2, 2, figsize=(6.3, 4.8), dpi=200, layout="constrained", sharex=True)
    for ax, (name, lines) in zip(axes.flat, found.items(), strict=True):
        for method, values in lines.items():
            ax.loglog(
                BUDGETS[: len(values)],
                np.maximum(values, 1e-16),
                "o-",
                ms=3,
                lw=1,
                c=colors[method],
                label=method,
            )
        ax.set_title(name, fontsize=8)
        ax.tick_params(labelsize=7)
        ax.set_xticks(BUDGETS, [str(b) for b in BUDGETS])
        ax.minorticks_off()
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    for ax in axes[1]:
        ax.set_xlabel("products", fontsize=8)
    for ax in axes[:, 0]:
        ax.set_ylabel("relative error", fontsize=8)
    axes[0, 0].legend(fontsize=7, frameon=False)
    plt.savefig(path)
    plt.close()


def own(problem):
    loss_fn, params, batch = problem
    op = spectra.HessianOperator(loss_fn, params, batch)

    def run(method):
        return lambda budget, seed: (
            spectra.trace(op, key=jax.random.key(seed), method=method, num_matvecs=budget).value
        )

    return {f"spectra {method}": run(method) for method in ("hutchinson", "hutch++", "xtrace")}


def with_matfree(problem):
    from matfree import stochtrace

    loss_fn, params, batch = problem

    def matvec(v, params, batch):
        return jax.jvp(lambda p: jax.grad(loss_fn)(p, batch), (params,), (v,))[1]

    def run(construct, integrand, sampler, cost):
        @functools.cache
        def compiled(budget):
            estimate = construct(integrand, sampler=sampler(params, num=budget // cost))
            return jax.jit(lambda key, params, batch: estimate(matvec, key, params, batch))

        return lambda budget, seed: compiled(budget)(jax.random.key(seed), params, batch)

    return {
        "matfree Hutchinson": run(
            stochtrace.estimator_monte_carlo, stochtrace.monte_carlo_trace(), stochtrace.sampler_signs, 1
        ),
        "matfree XTrace": run(
            stochtrace.estimator_leave_one_out,
            stochtrace.leave_one_out_xtrace(),
            stochtrace.sampler_sphere,
            2,
        ),
    }


def with_traceax(problem):
    import lineax
    import traceax

    loss_fn, params, batch = problem
    flat, unravel = jax.flatten_util.ravel_pytree(params)

    def run(estimator):
        @functools.partial(jax.jit, static_argnums=0)
        def estimate(budget, key, flat, batch):
            gradient = jax.grad(lambda x: loss_fn(unravel(x), batch))
            op = lineax.FunctionLinearOperator(
                lambda v: jax.jvp(gradient, (flat,), (v,))[1],
                jax.ShapeDtypeStruct(flat.shape, flat.dtype),
                tags=lineax.symmetric_tag,
            )
            return estimator.estimate(key, op, budget)[0]

        return lambda budget, seed: estimate(budget, jax.random.key(seed), flat, batch)

    sphere = traceax.SphereSampler()  # the default, RademacherSampler, draws integers, which raise
    return {
        "traceax Hutchinson": run(traceax.HutchinsonEstimator(sphere)),
        "traceax Hutch++": run(traceax.HutchPlusPlusEstimator(sphere)),
        "traceax XTrace": run(traceax.XTraceEstimator(sphere)),
    }


def torch_problem(problem):
    """The same network as a PyTorch module with the same weights."""
    import torch

    _, params, (inputs, targets) = problem
    model = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.Tanh(), torch.nn.Linear(16, 10))
    with torch.no_grad():
        for layer, index in ((model[0], "1"), (model[2], "2")):
            layer.weight.copy_(torch.tensor(np.asarray(params["w" + index]).T.copy()))
            layer.bias.copy_(torch.tensor(np.asarray(params["b" + index]).copy()))
    data = (torch.tensor(np.asarray(inputs)), torch.tensor(np.asarray(targets), dtype=torch.int64))
    return torch, model, torch.nn.CrossEntropyLoss(), data


def with_pyhessian(problem):
    from pyhessian import hessian

    torch, model, loss, data = torch_problem(problem)

    def run(budget, seed):
        torch.manual_seed(seed)
        # tol=0 keeps it from stopping when a sample happens to lie near the mean.
        return np.mean(hessian(model, loss, data=data, cuda=False).trace(maxIter=budget, tol=0))

    return {"PyHessian": run}


def with_curvlinops(problem):
    import curvlinops

    torch, model, loss, data = torch_problem(problem)
    op = curvlinops.HessianLinearOperator(model, loss, list(model.parameters()), [data])

    def run(estimate, multiple):
        def call(budget, seed):
            torch.manual_seed(seed)
            return float(estimate(op, num_matvecs=budget - budget % multiple))

        return call

    return {
        "curvlinops Hutchinson": run(curvlinops.hutchinson_trace, 1),
        "curvlinops Hutch++": run(curvlinops.hutchpp_trace, 3),
        "curvlinops XTrace": run(curvlinops.xtrace, 2),
    }


def with_torch_secorder(problem):
    from torch_secorder.core import hvp

    torch, model, loss, data = torch_problem(problem)

    def run(budget, seed):
        torch.manual_seed(seed)
        return hvp.hessian_trace(
            lambda: loss(model(data[0]), data[1]), list(model.parameters()), num_samples=budget
        )

    return {"torch-secorder": run}


PEERS = {
    "matfree": with_matfree,
    "traceax": with_traceax,
    "PyHessian": with_pyhessian,
    "curvlinops-for-pytorch": with_curvlinops,
    "torch-secorder": with_torch_secorder,
}


def beside_peers(settings: Settings, report: Report, budgets=(32, 64, 128)) -> list[str]:
    """Error and time of every method, seed by seed in turn."""
    problem = settings.problem("small")
    truth = spectra.trace(spectra.HessianOperator(*problem), key=None, method="exact").value
    runs, versions = own(problem), []
    for package, build in PEERS.items():
        try:
            runs |= build(problem)
            versions.append(f"{package} {version(package)}")
        except Exception as error:
            versions.append(f"{package} left out ({type(error).__name__}: {str(error)[:60]})")
    cells: dict[str, list[str]] = {name: [] for name in runs}
    points: dict[str, list[tuple[int, float, float]]] = {name: [] for name in runs}
    budgets = settings.choose(budgets, budgets[:1])
    for budget in budgets:
        errors, times = compare(runs, budget, truth, settings.choose(SEEDS, 1))
        for name in runs:
            if name not in times:
                cells[name] += ["failed", ""]
                continue
            error, ms = statistics.median(errors[name]), timing.median_ms(times[name])
            points[name].append((budget, error, ms))
            cells[name] += [f"{error:.1e}", f"{ms:.1f}"]
        for peer in ("matfree XTrace", "traceax XTrace"):
            if peer in times:
                share = timing.ratio(times, "spectra xtrace", peer)
                report.goals.append(
                    Goal(f"trace by XTrace, {budget} products, of the time of {peer}", share, 1.0)
                )
    peers_figure(points, settings.results / "traces-peers.png")
    head = ["method", *(title for b in budgets for title in (f"error, {b} products", "ms"))]
    rows = [[name, *parts] for name, parts in cells.items()]
    picture = "![Error against products and against time](traces-peers.png)"
    return [f"Exact trace {truth:.5g}. " + ", ".join(versions) + ".", "", *table(head, rows), "", picture]


def compare(runs, budget: int, truth: float, seeds: int):
    """Relative errors and seconds of each method that works, over seeds, one method after another."""
    errors: dict[str, list[float]] = {}
    times: dict[str, list[float]] = {}
    for name, run in runs.items():
        try:
            run(budget, 0)
            errors[name], times[name] = [], []
        except Exception as error:
            print(f"{name}, {budget} products: {type(error).__name__}", file=sys.stderr)
    for seed in range(1, seeds + 1):
        for name in errors:
            call = functools.partial(runs[name], budget, seed)
            errors[name].append(abs(float(call()) - truth) / abs(truth))
            if seed <= TIMED:
                times[name].append(timing.seconds(call))
    return errors, times


def peers_figure(points, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    colors = {"spectra": "#0072B2", "matfree": "#E69F00", "traceax": "#009E73", "curvlinops": "#D55E00"}
    styles = {"Hutchinson": ":", "hutchinson": ":", "Hutch++": "--", "hutch++": "--"}
    fig, axes = plt.subplots(1, 2, figsize=(7.2, 2.9), dpi=200, layout="constrained", sharey=True)
    for name, found in points.items():
        package, _, method = name.partition(" ")
        color, style = colors.get(package, "#999999"), styles.get(method, "-")
        for ax, index in zip(axes, (0, 2), strict=True):
            ax.loglog(
                [p[index] for p in found],
                [p[1] for p in found],
                ls=style,
                marker="o",
                ms=3,
                lw=1,
                c=color,
                label=name,
            )
    axes[0].set_xlabel("products", fontsize=8)
    axes[1].set_xlabel("ms", fontsize=8)
    axes[0].set_ylabel("median relative error", fontsize=8)
    axes[0].set_xticks([32, 64, 128], ["32", "64", "128"])
    for ax in axes:
        ax.tick_params(labelsize=7)
        ax.minorticks_off()
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    axes[1].legend(fontsize=5.5, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    fig.savefig(path)
    plt.close(fig)


def main(settings: Settings) -> Report:
    report = Report([])
    report.lines += beside_peers(settings, report)
    found = errors(settings.choose(16, 1), settings.choose(BUDGETS, BUDGETS[:1]))
    figure(found, settings.results / "traces.png")
    report.lines += [
        "",
        "![Error against products](traces.png)",
        "",
        "Median relative error of the figure:",
        "",
    ]
    rows = [
        [name, method, *(f"{v:.1e}" for v in values)]
        for name, methods in found.items()
        for method, values in methods.items()
    ]
    report.lines += table(["spectrum", "method", *map(str, BUDGETS[: len(rows[0]) - 2])], rows)
    return report


if __name__ == "__main__":
    print("\n".join(main(Settings()).lines))
