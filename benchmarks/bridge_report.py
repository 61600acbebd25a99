"""Errors and times of the PyTorch bridge; writes benchmarks/results/bridge.md and bridge-functions.md.

Run from the root of the repository, with the packages of the `test` extra: `taskset -c 0 python -m
benchmarks.bridge_report`; with the argument `functions`, the sweep over PyTorch's functions alone.

Errors are relative, in the Euclidean norm over all entries, and the larger one of batch sizes 2 and 5 of a
model exported at 3; the truth is PyTorch's double backward in the same precision.

A product is one Hessian-vector product in float32 at a fixed point, batch 8. Four ways: a compiled `jvp` of
`grad`, the linear part alone of a re-used `linearize` (what the operators do by default), PyTorch's eager
double backward with its gradient graph, and PyTorch's retained gradient graph alone. They run in turn, and
the figures are medians over rounds of processor time on one core, so that other work on the machine counts
little.
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
sys.path.insert(0, str(ROOT / "tests" / "bridge"))

import bridge_reference as reference  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from bridge_cases import CASES, Case, minilm  # noqa: E402
from model_families import inputs_of, prepare  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from benchmarks import bridge_functions  # noqa: E402
from spectra import bridge  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
BATCHES = (2, 5)
ERRORS = "| model | operators (kinds) | output f32 | gradient | product | output f64 | gradient | product |"
TIMES = "| model | parameters | jvp of grad | double backward | ratio | linear part | retained | ratio |"


def errors(case: Case, dtype: torch.dtype) -> tuple[list[float], bridge.TorchModel]:
    """The largest errors over the batch sizes of outputs, gradient and product; the model."""
    worst = [0.0, 0.0, 0.0]
    with jax.enable_x64(dtype == torch.float64), reference.precision(dtype, case.heavy):
        torch.manual_seed(0)
        module, example = prepare(case, dtype, 3)
        model = bridge.from_torch(module, example, **case.options)
        rng = np.random.default_rng(0)
        vector = {k: rng.standard_normal(p.shape).astype(p.dtype) for k, p in model.params.items()}
        for batch in BATCHES:
            inputs = inputs_of(case, dtype, batch)
            theirs = reference.torch_derivatives(copy.deepcopy(module), inputs, vector, case.twin)
            ours = reference.jax_derivatives(model, reference.numpy_tree(inputs), vector)
            found = [max(map(reference.relative, ours[0], theirs[0]))]
            found += map(reference.relative, ours[1:], theirs[1:])
            worst = list(map(max, worst, found))
    return worst, model


def timed() -> dict[str, Case]:
    """Two layers of width 128 on 64 tokens: large enough for arithmetic to outweigh dispatch."""

    def build(model: str, config: str, inputs: Callable[[int], Any], **settings: Any) -> Case:
        return Case(lambda: getattr(transformers, model)(getattr(transformers, config)(**settings)), inputs)

    def text(**extra: Any) -> Callable[[int], Any]:
        def inputs(batch: int) -> dict[str, Any]:
            ids = torch.randint(3, 1000, (batch, 64))
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **extra}

        return inputs

    def pairs(batch: int) -> dict[str, Any]:
        ids = {k: torch.randint(3, 1000, (batch, 64)) for k in ("input_ids", "decoder_input_ids")}
        return {**ids, "use_cache": False}

    wide = {"vocab_size": 1000, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 512, "max_position_embeddings": 64}  # fmt: skip
    plain = text(use_cache=False)
    tokens = {"bos_token_id": 0, "eos_token_id": 1}
    pretrained = minilm()
    return {
        "resnet": CASES["resnet"],
        "vit": build("ViTForImageClassification", "ViTConfig",
                     lambda b: {"pixel_values": torch.randn(b, 3, 64, 64)}, image_size=64, patch_size=8,
                     hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512),
        "bert": build("BertForSequenceClassification", "BertConfig", text(), **wide),
        "distilbert": build("DistilBertForSequenceClassification", "DistilBertConfig", text(),
                            vocab_size=1000, dim=128, n_layers=2, n_heads=4, hidden_dim=512,
                            max_position_embeddings=64),
        "gpt2": build("GPT2LMHeadModel", "GPT2Config", plain, vocab_size=1000, n_embd=128, n_layer=2,
                      n_head=4, n_positions=64, **tokens),
        "gpt_neox": build("GPTNeoXForCausalLM", "GPTNeoXConfig", plain, **wide),
        "llama": build("LlamaForCausalLM", "LlamaConfig", plain, **wide, num_key_value_heads=2),
        "t5": build("T5ForConditionalGeneration", "T5Config", pairs, vocab_size=1000, d_model=128, d_kv=32,
                    d_ff=512, num_layers=2, num_heads=4),
        **({} if pretrained is None else {"minilm (pretrained)": pretrained}),
    }  # fmt: skip


def alternate(functions: list[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Milliseconds of processor time of each function, called in turn after two unmeasured rounds."""
    times: list[list[float]] = [[] for _ in functions]
    for index in range(rounds + 2):
        for record, function in zip(times, functions, strict=True):
            start = time.process_time()
            function()
            if index >= 2:
                record.append(1e3 * (time.process_time() - start))
    return times


def timings(case: Case, batch: int = 8, rounds: int = 7) -> tuple[int, list[list[float]]]:
    """The number of parameters, and the times of the four products of the module docstring."""
    torch.manual_seed(0)
    module, inputs = prepare(case, torch.float32, batch)
    model = bridge.from_torch(module, inputs)
    arrays = reference.numpy_tree(inputs)
    vector = jax.tree.map(np.ones_like, jax.tree.map(np.asarray, model.params))

    def loss(params):
        return reference.scalar(reference.floating(reference.apply(model, params, arrays)))

    gradient = jax.grad(loss)
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

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        kept = graph()
        functions = [
            lambda: jax.block_until_ready(fresh(model.params, vector)),
            lambda: product(graph(), False),
            lambda: jax.block_until_ready(linear(vector)),
            lambda: product(kept, True),
        ]
        return sum(p.size for p in model.params.values()), alternate(functions, rounds)


def compiled_by_torch() -> str:
    """What `torch.compile` says to a double backward."""
    module = torch.compile(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh()))
    try:
        params = list(module.parameters())
        grads = torch.autograd.grad(module(torch.ones(2, 3)).square().sum(), params, create_graph=True)
        torch.autograd.grad(sum(g.sum() for g in grads), params)
    except Exception as error:
        return f"`torch.compile` has no column: {str(error).strip().splitlines()[0]}"
    return "`torch.compile` takes a double backward here, but was not timed."


def write(lines: list[str]) -> None:
    """Print the last line and write all: an interrupted run leaves what it measured."""
    print(lines[-1], flush=True)
    (RESULTS / "bridge.md").write_text("\n".join(lines) + "\n")


def rule(head: str) -> str:
    return "|" + "---|" * (head.count("|") - 1)


def main() -> None:
    torch.set_num_threads(1)
    about = (
        f"jax {jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{platform.machine()}, {len(os.sched_getaffinity(0))} core."
    )
    bridge_functions.write(RESULTS / "bridge-functions.md", about)
    if sys.argv[1:] == ["functions"]:
        return
    lines = ["# PyTorch bridge: errors and times", "", about, "", (__doc__ or "").split("\n\n", 2)[2].strip()]
    lines += ["", f"## Products in milliseconds\n\n{TIMES}", rule(TIMES)]
    for name, case in timed().items():
        size, times = timings(case)
        fresh, backward, linear, kept = map(statistics.median, times)
        ratios = [
            statistics.median(a / b for a, b in zip(*pair, strict=True)) for pair in (times[:2], times[2:])
        ]
        lines.append(
            f"| {name} | {size:,} | {fresh:.1f} | {backward:.1f} | {ratios[0]:.2f} | {linear:.1f} | "
            f"{kept:.1f} | {ratios[1]:.2f} |"
        )
        write(lines)
    lines += ["", compiled_by_torch(), "", f"## Errors\n\n{ERRORS}", rule(ERRORS)]
    cases, pretrained = dict(CASES), minilm()
    if pretrained is not None:
        cases["minilm (pretrained)"] = pretrained
    for name, case in cases.items():
        single, model = errors(case, torch.float32)
        double, _ = errors(case, torch.float64)
        counts = model.operators
        cells = " | ".join(f"{e:.1e}" for e in single + double)
        lines.append(f"| {name} | {sum(counts.values())} ({len(counts)}) | {cells} |")
        write(lines)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
