"""What `plan` says that a run takes: of a stream as of a batch, and of the process that it runs in."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from children import environment

import spectra

OPTIONS = {"num_steps": 4, "num_probes": 1, "basis": "none"}


def loss_fn(params, x):
    return jnp.mean(jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]) ** 2)


def operators():
    params = {"a": jnp.ones((8, 64)), "b": jnp.ones((64, 8))}
    x = jax.random.normal(jax.random.key(0), (200, 8))
    batch = spectra.HessianOperator(loss_fn, params, x, linearize=False)
    return batch, spectra.HessianOperator(loss_fn, params, [x, x[:50]])


def test_the_workspace_of_a_stream_is_that_of_its_first_batch():
    batch, stream = (spectra.plan(op, **OPTIONS) for op in operators())
    assert stream.workspace == batch.workspace
    assert stream.workspace >= 200 * 64 * 4  # the hidden layer of one evaluation at least


def test_the_process_and_the_compiler_count_on_a_cpu():
    op, _ = operators()
    plan = spectra.plan(op, **OPTIONS)
    assert plan.process is not None
    assert plan.process_peak == plan.process + plan.total + plan.compiling
    assert plan.process > 50 * 2**20  # JAX alone is more
    needed = plan.total + plan.compiling
    assert dataclasses.replace(plan, available=needed).fits
    assert not dataclasses.replace(plan, available=needed - 1).fits
    assert "process at its peak" in repr(plan)
    elsewhere = dataclasses.replace(plan, process=None, available=plan.total)  # the compiler is on the host
    assert elsewhere.fits
    assert elsewhere.process_peak is None


PROGRAM = """
import json
from pathlib import Path
import jax, jax.numpy as jnp, spectra

def loss_fn(params, x):
    for w in params["layers"]:
        x = jnp.tanh(x @ w)
    return jnp.mean((x @ params["head"]) ** 2)

keys = jax.random.split(jax.random.key(0), 22)
params = {"layers": [0.04 * jax.random.normal(k, (600, 600)) for k in keys[:20]],
          "head": jax.random.normal(keys[20], (600, 8000)) / 30}
x = jax.random.normal(keys[21], (8, 600))
op = spectra.HessianOperator(loss_fn, params, [x[:4], x[4:]])
plan = spectra.plan(op, num_steps=4, num_probes=1, basis="none")
spectra.slq(op, key=keys[0], num_steps=4, num_probes=1, basis="none")
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(json.dumps([plan.process_peak, plan.total, 1024 * int(status["VmHWM"].split()[0])]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a process from /proc")
def test_a_process_peaks_where_the_plan_says():
    """Twelve million numbers in 21 arrays: not above, by 10 % for the allocator, and not below its half."""
    options = {"env": environment(optimised=True, cache=False), "capture_output": True, "text": True}
    run = subprocess.run([sys.executable, "-c", PROGRAM], check=True, **options)
    planned, total, peak = json.loads(run.stdout)
    assert total > 6 * 4 * 12_000_000
    assert planned / 2 <= peak <= 1.1 * planned
