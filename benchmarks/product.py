"""One Hessian-vector product, in gradients of its own framework, beside every tool's product.

Same weights and data, float32, compiled code warm. "Asymmetry" is |uᵀHv − vᵀHu| relative to |u| |Hv|, by
which a wrong product shows. A step of a run adds the orthogonalisation to the product: there the linear part
is the body of a compiled loop, and XLA hoists nothing any more because everything constant is an argument.
The "matrix products alone" are those of one product, in one program, each with operands of its own.
"""

import jax
import numpy as np

import spectra
from benchmarks import floor, peers, problems
from benchmarks.settings import Goal, Report, Settings, table
from benchmarks.timing import alternate, median_ms, ratio, spread

GOALS = {"mlp": 1.65, "transformer": 1.0}


def main(settings: Settings) -> Report:
    report = Report([])
    for name in settings.choose(("mlp", "cnn", "transformer"), ("mlp",)):
        report.lines += ["", f"### {name}", "", *measure(name, settings, report)]
    return report


def measure(name: str, settings: Settings, report: Report) -> list[str]:
    loss_fn, params, batch = problem = settings.problem(name)
    gradient = jax.jit(jax.grad(loss_fn))
    naive = jax.jit(lambda p, b, v: jax.jvp(lambda q: jax.grad(loss_fn)(q, b), (p,), (v,))[1])
    reverse = jax.jit(lambda p, b, v: jax.vjp(lambda q: jax.grad(loss_fn)(q, b), p)[1](v)[0])
    v = problems.vector(params)
    functions = {
        "JAX gradient": lambda: gradient(params, batch),
        "JAX, jvp of grad": lambda: naive(params, batch, v),
        "JAX, reverse over reverse": lambda: reverse(params, batch, v),
    }
    if name in GOALS:
        functions["JAX, matrix products alone"] = floor.all_products(name)
    tools, notes = peers.build((peers.Spectra, *peers.PRODUCT), name, problem)
    asymmetry = {}
    for tool in tools:
        label = "spectra, linearised" if tool.label == "spectra" else tool.label
        functions[label] = lambda tool=tool: tool.product(tool.vector)
        asymmetry[label] = f"{skewness(tool):.0e}"
    first = next((tool for tool in tools if tool.order == "torch"), None)
    if first is not None:

        def torch_gradient():
            first.torch.autograd.grad(first.loss(), first.weights)

        functions["torch gradient"] = torch_gradient
    times = alternate(functions, rounds=settings.choose(15, 1))
    steps = settings.choose(40, 2)
    op = spectra.HessianOperator(*problem)
    label = f"spectra, step of a run of {steps}"
    run = alternate({label: lambda: spectra.lanczos(op, v, steps).alpha}, rounds=settings.choose(3, 1))
    times[label] = [t / steps for t in run[label]]
    torch_labels = {tool.label for tool in tools if tool.order == "torch"} | {"torch gradient"}
    rows = []
    for label, own in times.items():
        base = "torch gradient" if label in torch_labels else "JAX gradient"
        rows.append(
            [
                label,
                f"{median_ms(own):.2f}",
                f"{spread(own):.0%}",
                f"{median_ms(own) / median_ms(times[base]):.2f}",
                f"{ratio(times, 'spectra, linearised', label):.2f}",
                asymmetry.get(label, ""),
            ]
        )
    if name in GOALS:
        share = ratio(times, "spectra, linearised", "JAX gradient")
        report.goals.append(Goal(f"repeated product on {name}, in gradients", share, GOALS[name]))
    head = ["what", "ms", "spread", "/ own framework's gradient", "spectra / this", "asymmetry"]
    return [*table(head, rows), "", "; ".join(notes) + "."]


def flat(tool, product) -> np.ndarray:
    if tool.order == "torch":
        parts = product if isinstance(product, list | tuple) else [product]
        return np.concatenate([part.detach().numpy().ravel() for part in parts])
    return np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(product)])


def skewness(tool) -> float:
    """|uᵀHv − vᵀHu| / (|u| |Hv|), in float64 from the tool's two products."""
    v = tool.vector
    u = jax.tree.map(lambda x: -x[::-1] + 0.5, v) if tool.order == "jax" else -v.flip(0) + 0.5
    hv, hu = (flat(tool, tool.product(x)).astype(np.float64) for x in (v, u))
    u, v = (flat(tool, x).astype(np.float64) for x in (u, v))
    return abs(u @ hv - v @ hu) / (np.linalg.norm(u) * np.linalg.norm(hv))


if __name__ == "__main__":
    print("\n".join(main(Settings()).lines))
