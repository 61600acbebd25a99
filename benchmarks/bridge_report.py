"""Write benchmarks/results/bridge.md: every model of the registry against PyTorch.

Run from the root of the repository: `python benchmarks/bridge_report.py`. Errors are relative, in
the Euclidean norm over all entries, at batch size 5 of a model exported at 3. A product is one
Hessian-vector product at a fixed point: compiled `jvp` of `grad`, the linear part alone of a
re-used `linearize`, PyTorch's eager double backward (gradient graph included) and its retained
graph alone. The four run in turn, three rounds after two unmeasured ones; the table has the
medians.
"""

import copy
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import bridge_reference as reference  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from bridge_cases import CASES, Case, minilm  # noqa: E402
from test_bridge_models import inputs_of, prepare  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from spectra import bridge  # noqa: E402

TIMED = ("mlp", "resnet", "vit", "bert", "distilbert", "gpt2", "gpt_neox", "llama", "t5")
HEAD = (
    "| model | operators (kinds) | output f32 | gradient f32 | product f32 | output f64 | "
    "gradient f64 | product f64 |\n|---|---|---|---|---|---|---|---|"
)


def errors(case: Case, dtype: torch.dtype) -> tuple[list[float], bridge.TorchModel]:
    """Return the errors of outputs, gradient and product, and the model."""
    with jax.enable_x64(dtype == torch.float64), reference.precision(dtype, case.heavy):
        torch.manual_seed(0)
        module, example = prepare(case, dtype, 3)
        model = bridge.from_torch(module, example, **case.options)
        rng = np.random.default_rng(0)
        vector = {k: rng.standard_normal(p.shape).astype(p.dtype) for k, p in model.params.items()}
        inputs = inputs_of(case, dtype, 5)
        theirs = reference.torch_derivatives(copy.deepcopy(module), inputs, vector, case.twin)
        ours = reference.jax_derivatives(model, reference.numpy_tree(inputs), vector)
    output = max(map(reference.relative, ours[0], theirs[0]))
    return [output, *map(reference.relative, ours[1:], theirs[1:])], model


def medians(functions: list[Callable[[], Any]], rounds: int) -> list[float]:
    """Return the median milliseconds of each function, called in turn."""
    times: list[list[float]] = [[] for _ in functions]
    for index in range(rounds + 2):
        for record, function in zip(times, functions, strict=True):
            start = time.process_time()
            function()
            if index >= 2:
                record.append(1e3 * (time.process_time() - start))
    return [statistics.median(t) for t in times]


def timings(case: Case, batch: int) -> list[float]:
    """Time the four products of the module docstring, in float32."""
    torch.manual_seed(0)
    module, inputs = prepare(case, torch.float32, batch)
    model = bridge.from_torch(module, inputs)
    arrays = reference.numpy_tree(inputs)
    vector = jax.tree.map(np.ones_like, jax.tree.map(np.asarray, model.params))
    gradient = jax.grad(lambda p: reference.jax_loss(model, p, arrays))
    fresh = jax.jit(lambda p, v: jax.jvp(gradient, (p,), (v,))[1])
    linear = jax.jit(jax.linearize(gradient, model.params)[1])
    params = dict(module.named_parameters())
    tangents = [torch.ones_like(p) for p in params.values()]

    def graph() -> Any:
        total = reference.torch_loss(reference.torch_outputs(module, inputs))
        return torch.autograd.grad(total, list(params.values()), create_graph=True, materialize_grads=True)

    def product(grads: Any, retain: bool) -> Any:
        pairs = [(g, t) for g, t in zip(grads, tangents, strict=True) if g.requires_grad]
        return torch.autograd.grad(
            [g for g, _ in pairs],
            list(params.values()),
            [t for _, t in pairs],
            retain_graph=retain,
            allow_unused=True,
        )

    with sdpa_kernel(SDPBackend.MATH):
        kept = graph()
        return medians(
            [
                lambda: jax.block_until_ready(fresh(model.params, vector)),
                lambda: jax.block_until_ready(linear(vector)),
                lambda: product(graph(), False),
                lambda: product(kept, True),
            ],
            rounds=5,
        )


def write(lines: list[str]) -> None:
    """Print the last line and write all: an interrupted run leaves what it measured."""
    print(lines[-1], flush=True)
    target = ROOT / "benchmarks" / "results" / "bridge.md"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n".join(lines) + "\n")


def main() -> None:
    cases = dict(CASES)
    if (pretrained := minilm()) is not None:
        cases["minilm (pretrained)"] = pretrained
    lines = [
        "# PyTorch bridge: errors and times",
        "",
        (
            f"jax {jax.__version__}, torch {torch.__version__}, {platform.machine()}, "
            f"{torch.get_num_threads()} PyTorch threads on {len(os.sched_getaffinity(0))} cores, "
            f"load average at the start {os.getloadavg()[0]:.1f}."
        ),
        "",
        __doc__.split("\n\n", 1)[1].strip() if __doc__ else "",
        "",
        HEAD,
    ]
    for name, case in cases.items():
        single, model = errors(case, torch.float32)
        double, _ = errors(case, torch.float64)
        counts = model.operators
        cells = " | ".join(f"{e:.1e}" for e in single + double)
        lines.append(f"| {name} | {sum(counts.values())} ({len(counts)}) | {cells} |")
        write(lines)
    lines += [
        "",
        (
            "Products in milliseconds, batch 8. The ratio is compiled `jvp` of `grad` over eager "
            "double backward, both from the parameters; in brackets the linear part over the "
            "retained graph."
        ),
        "",
        "| model | jvp of grad | linear part | double backward | retained | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for name in [n for n in cases if n in TIMED or n.startswith("minilm")]:
        t = timings(cases[name], 8)
        cells = " | ".join(f"{x:.2f}" for x in t)
        lines.append(f"| {name} | {cells} | {t[0] / t[2]:.2f} ({t[1] / t[3]:.2f}) |")
        write(lines)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
