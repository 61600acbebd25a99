"""One Hessian product of a whole model beside curvlinops and hessian-eigenthings: processor time and memory.

    python -m benchmarks.real_models gpt2 --parts export --out FOLDER
    python -m benchmarks.real_peers gpt2 --out FOLDER

The same module and batch for all, in one piece. The vector is the signs of the parameters: its product
has the same norm in whatever order they are kept, and says whether all agree. Each is a process of its own,
and the second product is timed, after what the first compiles. PyTorch's attention is written out there: the
fused one has no second derivative.
`pip install curvlinops-for-pytorch hessian-eigenthings`.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import spectra
from benchmarks import real_models


def ours(args) -> Callable[[], float]:
    folder = Path(args.out)
    model = spectra.bridge.load(folder / "model")
    loss = spectra.bridge.make_loss(model, "cross_entropy")
    op = spectra.HessianOperator(loss, model.params, dict(np.load(folder / "batch.npz")))
    prepared = op.prepare()

    def product() -> float:
        leaves = jax.tree.leaves(prepared @ jax.tree.map(jnp.sign, model.params))
        return float(np.sqrt(sum(float(np.vdot(x, x)) for x in map(np.asarray, leaves))))

    return product


def torch_problem(args):
    """Module, criterion and (inputs, targets), whose inputs are the tokens alone."""
    import torch

    folder = Path(args.out)
    options = json.loads((folder / "options.json").read_text())
    module, _, batch = real_models.MODELS[args.model](options["sequence"], options["examples"])
    module.model.set_attn_implementation("eager")
    data = torch.tensor(batch["input_ids"]), torch.tensor(batch["labels"])
    return module, torch.nn.CrossEntropyLoss(), data


def eigenthings(args) -> Callable[[], float]:
    import hessian_eigenthings as he
    import torch

    module, criterion, data = torch_problem(args)
    op = he.HessianOperator(module, [data], he.supervised_loss(criterion))
    v = torch.cat([p.detach().sign().reshape(-1) for p in module.parameters()])
    return lambda: float(op.matvec(v).norm())


def curvlinops(args) -> Callable[[], float]:
    import curvlinops
    import torch

    module, criterion, data = torch_problem(args)
    params = list(module.parameters())
    op = curvlinops.HessianLinearOperator(module, criterion, params, [data], check_deterministic=False)
    v = torch.cat([p.detach().sign().reshape(-1) for p in params])
    return lambda: float((op @ v).norm())


PEERS = {"spectra": ours, "hessian-eigenthings": eigenthings, "curvlinops": curvlinops}


def measure(args) -> dict[str, float]:
    product = PEERS[args.peer](args)
    times = [time.process_time()]
    for _ in range(2):
        norm = product()
        times.append(time.process_time())
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(fields["VmHWM"].split()[0]) / 2**20
    return {"first": times[1] - times[0], "second": times[2] - times[1], "peak": peak, "norm": norm}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_peers", description=__doc__)
    parser.add_argument("model", choices=("gpt2",))
    parser.add_argument("--out", required=True, help="where real_models has exported the model")
    parser.add_argument("--peer", choices=PEERS, help="only this one, in this process")
    args = parser.parse_args()
    if args.peer:
        print(json.dumps(measure(args)))
        return
    for peer in PEERS:
        command = [sys.executable, "-m", "benchmarks.real_peers", args.model, "--out", args.out]
        run = subprocess.run([*command, "--peer", peer], check=True, capture_output=True, text=True)
        print(peer, run.stdout.strip().splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
