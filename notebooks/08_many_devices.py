# %% [markdown]
# # 8. Many devices: a mesh, a plan, and a run that survives
#
# The same lines run on a laptop, on eight GPUs and on a TPU slice: vectors and the Krylov basis are sharded as the
# parameters are. This notebook simulates four devices on a CPU, so it shows where things lie and that the answers agree; it
# says nothing about speed.

# %%
import os
import shutil
import signal

# Before JAX is imported.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import spectra
from spectra.demos import digits

print(jax.device_count(), "devices")
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

# %% [markdown]
# ## Three layouts of one network
#
# The digits network, on one device; with parameters replicated and data spread (data parallel); and with parameters
# spread, too (FSDP). A layout is a matter of `jax.device_put`: the operator takes what it gets.

# %%
images, labels = (jnp.asarray(x[:512]) for x in digits.load_digits())
params = digits.MODEL.init(jax.random.key(0), images[:1])["params"]


def put(tree, spec):
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec(x))), tree)


def spread(x):
    """Along the first axis that four divides; replicated if there is none."""
    axis = next((i for i, length in enumerate(x.shape) if length % 4 == 0), None)
    return P() if axis is None else P(*[None] * axis, "data")


data = put((images, labels), lambda x: P("data"))
layouts = {
    "one device": (params, (images, labels)),
    "data parallel": (put(params, lambda x: P()), data),
    "FSDP": (put(params, spread), data),
}
operators = {name: spectra.HessianOperator(digits.loss_fn, *layout) for name, layout in layouts.items()}
kernel = layouts["FSDP"][0]["Dense_1"]["kernel"]
print("a kernel of shape", kernel.shape, "is held in pieces of", kernel.addressable_shards[0].data.shape)

# %% [markdown]
# ## Plan before you run
#
# Bytes on each device, from shapes and the compiler, before anything is allocated. A basis of m vectors is m times the
# parameters: this is what one has to shard. `basis="sharded"` spreads it even where the parameters are replicated.

# %%
plans = {name: spectra.plan(op, num_steps=30, num_probes=2) for name, op in operators.items()}
plans["data parallel, basis spread"] = spectra.plan(
    operators["data parallel"], num_steps=30, num_probes=2, basis="sharded"
)
for name, plan in plans.items():
    print(f"{name:28s} vector {plan.vector / 1e6:.2f} MB, basis {plan.basis / 1e6:.2f} MB a device")
assert plans["data parallel"].basis == plans["one device"].basis
assert plans["FSDP"].basis < plans["one device"].basis / 3
assert plans["data parallel, basis spread"].basis < plans["one device"].basis / 3
plans["FSDP"]

# %% [markdown]
# ## Same key, same answer

# %%
run = {"key": jax.random.key(1), "num_steps": 30, "num_probes": 2}
results = {name: spectra.slq(op, **run) for name, op in operators.items()}
results["data parallel, basis spread"] = spectra.slq(operators["data parallel"], **run, basis="sharded")
reference = results["one device"]
scale = max(map(abs, reference.range))
for name, quadrature in results.items():
    difference = abs(quadrature.range[1] - reference.range[1]) / scale
    low, high = reference.cdf(0.01 * scale).estimate, quadrature.cdf(0.01 * scale).estimate
    print(f"{name:28s} largest eigenvalue {quadrature.range[1]:.5f}; share below 1 % of it {high:.5f}")
    assert difference < 1e-5, "to rounding"
    assert abs(low - high) < 1e-3

# %% [markdown]
# Probe $i$ depends on the key and on $i$ alone, not on the devices: what differs is the order of sums.
#
# ## A run that survives
#
# With a `checkpoint` every finished probe is recorded, and the basis of the running one in intervals. A scheduler that takes
# the machine away sends SIGTERM first: the run saves what it has and raises `PreemptedError`, and the same call goes on from
# there. Here a run on *one* device gets the signal from its data source, in the middle of the run, and four devices take
# over: vectors are stored without the mesh. Data that are streamed are read once for each Lanczos step
# of both probes, so counting the readings counts the steps.

# %%
readings, stop_at = 0, 24


def source():
    global readings
    readings += 1
    if readings == stop_at:
        signal.raise_signal(signal.SIGTERM)
    yield images, labels


streamed = spectra.HessianOperator(digits.loss_fn, params, source)
with tempfile.TemporaryDirectory() as folder:
    saved = spectra.Checkpoint(Path(folder) / "run", steps=5)
    try:
        spectra.slq(streamed, **run, checkpoint=saved)
        raise AssertionError("the run was to be interrupted")
    except spectra.PreemptedError as error:
        print("PreemptedError:", str(error).replace(folder, "FOLDER"))
    shutil.copytree(Path(folder) / "run", Path(folder) / "copy")
    before = readings
    resumed = spectra.slq(streamed, **run, checkpoint=saved)
    rest = readings - before
    elsewhere = spectra.slq(operators["FSDP"], **run, checkpoint=Path(folder) / "copy")

uninterrupted = spectra.slq(streamed, **run)
same = np.array_equal(resumed.nodes, uninterrupted.nodes)
moved = np.abs(elsewhere.nodes - uninterrupted.nodes)[:, [0, -1]].max() / scale
print(f"the resumed run read the data {rest} times, a run from the start {readings - before - rest} times")
print("on one device again, bit for bit the result of a run without interruption:", same)
print("on four devices, both ends of the spectrum equal to rounding:", bool(moved < 1e-5))
assert rest < 0.8 * (readings - before - rest)
assert same
assert moved < 1e-5

# %% [markdown]
# A folder that belongs to another run is refused:

# %%
with tempfile.TemporaryDirectory() as folder:
    spectra.slq(operators["one device"], key=jax.random.key(1), num_steps=5, num_probes=1, checkpoint=folder)
    try:
        spectra.slq(
            operators["one device"], key=jax.random.key(2), num_steps=5, num_probes=1, checkpoint=folder
        )
        raise AssertionError("another key is another run")
    except spectra.CheckpointError as error:
        print("CheckpointError:", str(error).replace(folder, "FOLDER"))

# %% [markdown]
# ## What to try next
#
# * A mesh of two axes, `("data", "model")`, with a sharding of your own: the operator takes what `jax.device_put` gives.
# * `basis="host"` keeps the basis in the memory of the host: one device, and a network that fills it.
# * `basis_dtype="bfloat16"`: half the memory; compare the CDFs.
# * `spectra.plan(op, ..., measure=True)` also states how long a run will take on these devices.
