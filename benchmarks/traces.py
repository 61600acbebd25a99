"""Trace estimators: error against products on known spectra, and beside other packages on one network.

The figure is Fig. 1 of Epperly, Tropp and Webber (arXiv:2301.07825): n = 1000, median relative error over 16
keys, normal probes. The tables are for an MLP 64-16-10 (1,210 parameters) on 1,797 digits, trained for 200
steps of Adam, with identical weights in every package and float32; errors are medians over 21 seeds, times
medians of a call after the first. Packages that are not installed are left out. Goals: at most the products
of the best other package for the same error, and less time.
"""

import argparse
import functools
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import spectra
from benchmarks import timing
from spectra.demos import digits

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
SEEDS = 21
RESULTS = Path(__file__).with_name("results")


@functools.partial(jax.jit, static_argnums=(2, 3))
def _many(op, keys, method, budget):
    def one(key):
        return spectra.trace(op, key=key, method=method, num_matvecs=budget, probes="normal").value

    return jax.lax.map(one, keys)


def errors(keys: int = 16) -> dict[str, dict[str, list[float]]]:
    """Median relative error of each method on each spectrum at each budget, in float64."""
    found: dict[str, dict[str, list[float]]] = {name: {m: [] for m in METHODS} for name in SPECTRA}
    with jax.enable_x64(True):
        many = jax.random.split(jax.random.key(0), keys)
        for name, eigenvalues in SPECTRA.items():
            op = spectra.MatrixOperator(np.diag(eigenvalues))
            for method in METHODS:
                for budget in BUDGETS:
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
            ax.loglog(BUDGETS, np.maximum(values, 1e-16), "o-", ms=3, lw=1, c=colors[method], label=method)
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


def network():
    """Loss, trained parameters and data of the MLP."""
    images, labels = map(jnp.asarray, digits.load_digits())

    def loss_fn(params, batch):
        inputs, targets = batch
        hidden = jnp.tanh(inputs @ params["w1"] + params["b1"])
        logits = hidden @ params["w2"] + params["b2"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    keys = jax.random.split(jax.random.key(0))
    params = {
        "w1": jax.random.normal(keys[0], (64, 16)) / 8,
        "b1": jnp.zeros(16),
        "w2": jax.random.normal(keys[1], (16, 10)) / 4,
        "b2": jnp.zeros(10),
    }
    optimizer = optax.adam(1e-2)

    @jax.jit
    def train(params, batch):
        def step(carry, _):
            params, state = carry
            update, state = optimizer.update(jax.grad(loss_fn)(params, batch), state, params)
            return (optax.apply_updates(params, update), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), length=200)[0][0]

    batch = (images.reshape(len(images), -1), labels)
    return loss_fn, train(params, batch), batch


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


def beside_peers(budgets=(32, 64, 128)) -> list[str]:
    problem = network()
    truth = spectra.trace(spectra.HessianOperator(*problem), key=None, method="exact").value
    runs, versions = own(problem), []
    for package, build in PEERS.items():
        try:
            runs |= build(problem)
            versions.append(f"{package} {version(package)}")
        except Exception as error:
            versions.append(f"{package} left out ({type(error).__name__}: {str(error)[:60]})")
    lines = [
        f"Exact trace {truth:.5g}. " + ", ".join(versions) + ".",
        "",
        "| method | " + " | ".join(f"error, {b} products | ms" for b in budgets) + " |",
        "|---" * (1 + 2 * len(budgets)) + "|",
    ]
    for name, run in runs.items():
        cells = []
        for budget in budgets:
            try:
                run(budget, 0)
                values, seconds = [], []
                for seed in range(1, SEEDS + 1):
                    start = time.perf_counter()
                    values.append(float(run(budget, seed)))
                    seconds.append(time.perf_counter() - start)
                error = statistics.median(abs(v - truth) / abs(truth) for v in values)
                cells.append(f"{error:.1e} | {1e3 * statistics.median(seconds):.1f}")
            except Exception as error:
                cells.append(f"failed ({type(error).__name__}) | ")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return lines


def main() -> list[str]:
    lines = beside_peers()
    found = errors()
    figure(found, RESULTS / "traces.png")
    lines += [
        "",
        "Median relative error of the figure:",
        "",
        "| spectrum | method | " + " | ".join(map(str, BUDGETS)) + " |",
    ]
    lines.append("|---" * (2 + len(BUDGETS)) + "|")
    for name, methods in found.items():
        for method, values in methods.items():
            lines.append(f"| {name} | {method} | " + " | ".join(f"{v:.1e}" for v in values) + " |")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    output = RESULTS / "traces.md"
    text = [
        "# Traces",
        "",
        timing.machine(),
        "",
        (__doc__ or "").strip(),
        "",
        "![Error against products](traces.png)",
        "",
    ]
    output.write_text("\n".join([*text, *main(), ""]))
    print(f"written to {output}")
