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
from spectra.base import host

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


GIB = 2**30
LIMITS = {
    2: ("memory.max", "memory.current", "{}active_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_{}active_file"),
}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("path", "groups", "left"),
    [
        ("/", {"": (8, 3, 0)}, 5),  # a container's
        ("/job/step", {"job": (8, 7, 2), "job/step": (None, 7, 2)}, 3),  # a job's, around that of its step
        ("/job/step", {"job": (8, 7, 2), "job/step": (4, 4, 2)}, 2),  # pages of files are given back
        ("/docker/of-the-machine", {"": (8, 6, 1)}, 3),  # a path that is not to be seen from inside
        ("/job", {"job": (None, 6, 1)}, 16),  # no limit
        ("/job", {"job": (2, 2, 0)}, 0),
        ("/job", {}, 16),
        ("/job", {"job": (8, 3, None)}, 5),  # a sandbox that does not say what pages are of
    ],
)
def test_memory_that_is_left_is_what_every_control_group_leaves(
    tmp_path, monkeypatch, version, path, groups, left
):
    """Files as in Linux's Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst."""
    monkeypatch.setattr(host, "PROC", tmp_path / "proc")
    monkeypatch.setattr(host, "GROUPS", tmp_path / "groups")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: {GIB} kB\nMemAvailable: {16 * 2**20} kB\n")
    own = {1: f"5:cpu,cpuacct:/elsewhere\n4:memory:{path}\n0::/\n", 2: f"0::{path}\n"}
    (tmp_path / "proc/self/cgroup").write_text(own[version])
    limit, used, page = LIMITS[version]
    for name, (most, now, files) in groups.items():
        folder = tmp_path / "groups" / ("memory" if version == 1 else "") / name
        folder.mkdir(parents=True, exist_ok=True)
        unlimited = {1: "9223372036854771712", 2: "max"}[version]
        (folder / limit).write_text(unlimited if most is None else str(most * GIB))
        (folder / used).write_text(f"{now * GIB}\n")
        if files is None:
            continue
        pages = {
            "anon": (now - files) * GIB,
            page.format(""): GIB * files // 4,
            page.format("in"): GIB * files * 3 // 4,
        }
        (folder / "memory.stat").write_text("".join(f"{key} {value}\n" for key, value in pages.items()))
    assert host.available_bytes() == left * GIB // jax.local_device_count("cpu")


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
