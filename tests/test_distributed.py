"""Meshes and placement; several processes of one run on this machine, and their sudden end."""

import random
import socket
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from children import environment
from jax.sharding import PartitionSpec as P
from test_checkpoint import COMMAND, SCRIPT, in_this_process

import spectra
from spectra.distributed import make_mesh, shard_data, shard_params


@pytest.mark.parametrize(
    "axes", ["", "data", "data=3,model=1", "data=0", "data=-1,model=-1", "data=1;x", "data=1,data=1"]
)
def test_a_mesh_that_cannot_be_is_refused(axes):
    with pytest.raises(spectra.SpectraError, match="mesh"):
        make_mesh(axes)


def test_what_is_left_of_the_devices_takes_the_open_axis():
    assert dict(make_mesh("model=1, data=-1").shape) == {"model": 1, "data": jax.device_count()}


def test_a_partition_that_does_not_fit_names_the_leaf():
    with pytest.raises(spectra.StructureError, match="'layer/w'"):
        shard_params({"layer": {"w": jnp.ones(3)}}, make_mesh("data=1"), lambda path, leaf: P(None, "data"))


def test_a_partition_may_be_a_pytree_of_specs():
    params, mesh = {"w": jnp.ones((4, 2)), "b": jnp.ones(4)}, make_mesh("model=1")
    placed = shard_params(params, mesh, {"w": P("model", None), "b": P()})
    assert placed["w"].sharding.spec == P("model", None)
    assert placed["b"].sharding.spec == P()
    with pytest.raises(spectra.StructureError, match="each of b, w"):
        shard_params(params, mesh, {"w": P("model")})


def test_an_operator_on_one_device_has_nothing_to_spread():
    op = spectra.MatrixOperator(jnp.eye(20))
    with pytest.raises(spectra.SpectraError, match="device_put"):
        spectra.slq(op, key=jax.random.key(0), num_steps=4, basis="sharded")
    with pytest.raises(spectra.SpectraError, match="inherit"):
        spectra.slq(op, key=jax.random.key(0), num_steps=4, basis="disk")


def test_placed_data_stay_as_they_are():
    mesh = make_mesh("data=1")
    batch = shard_data((np.ones((6, 2)), np.zeros(6)), mesh)
    assert all(a is b for a, b in zip(shard_data(batch, mesh), batch, strict=True))
    assert [len(x) for x in shard_data([np.ones((6, 2)), np.ones((4, 2))], mesh)()] == [6, 4]


def processes(folder, count, *options, cache=True):
    """Start the same command `count` times, as one run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for index in range(count):
        variables = environment(cache=cache) | {
            "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(index),
        }
        with (folder / f"log-{index}").open("w") as log:
            started.append(
                subprocess.Popen(
                    [*COMMAND, "--distributed", *options],
                    cwd=folder,
                    env=variables,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    return started


def finish(folder, started, timeout=300):
    try:
        codes = [process.wait(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    logs = [(folder / f"log-{i}").read_text() for i in range(len(started))]
    return codes, logs


def quadrature(folder):
    return spectra.load(folder / "spectrum.npz").quadrature


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same command in this process."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "problem.py").write_text(SCRIPT)
    in_this_process(folder, "--steps", "12", "--out", str(folder / "alone"))
    return quadrature(folder / "alone")


@pytest.mark.parametrize(
    ("count", "mesh"),
    [
        (2, "data=2"),
        pytest.param(2, "data=1,model=2", marks=pytest.mark.slow),
        pytest.param(4, "data=2,model=2", marks=pytest.mark.slow),
        pytest.param(4, "fsdp=4", marks=pytest.mark.slow),
    ],
)
def test_processes_give_the_answer_of_one_and_one_of_them_tells_it(count, mesh, alone, tmp_path):
    (tmp_path / "problem.py").write_text(SCRIPT)
    options = ("--steps", "12", "--mesh", mesh, "--out", "together")
    codes, logs = finish(tmp_path, processes(tmp_path, count, *options))
    assert codes == [0] * count, logs
    assert ["largest eigenvalue" in log for log in logs] == [True] + [False] * (count - 1)
    together = quadrature(tmp_path / "together")
    # Sums over 67 examples and 800 parameters in another order: as on several devices of one process.
    size, eps = max(map(abs, alone.range)), np.finfo("f").eps
    assert abs(np.array(together.range) - np.array(alone.range)).max() <= 64 * eps * size
    for power in (1, 2):
        moments = [q.mean(lambda x, p=power: x**p) for q in (alone, together)]
        assert abs(moments[0] - moments[1]) <= 64 * eps * size**power


LONG = ("--steps", "300", "--mesh", "data=2")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "problem.py").write_text(SCRIPT)
    assert finish(folder, processes(folder, 2, *LONG, "--out", "whole"))[0] == [0, 0]
    return quadrature(folder / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))  # three sets of victims, at two kinds of moments
def test_killed_at_any_moment_the_same_command_completes_the_run(seed, uninterrupted, tmp_path):
    (tmp_path / "problem.py").write_text(SCRIPT)
    draw = random.Random(seed)
    options = (*LONG, "--checkpoint", "saved", "--checkpoint-minutes", "0.001")
    started = processes(tmp_path, 2, *options, "--out", "again", cache=False)
    if seed % 2:  # once something is saved; otherwise anywhere, imports and compilation included
        while not list((tmp_path / "saved").glob("record-*")) and started[0].poll() is None:
            time.sleep(0.01)
    try:
        started[0].wait(timeout=draw.uniform(0, 4 if seed % 2 else 20))
    except subprocess.TimeoutExpired:
        victims = ([0], [1], [0, 1])[seed % 3]
        for victim in victims:
            started[victim].kill()
        # The stated time: the heartbeat's 30 s, and what the last products of a survivor may take. Where the
        # processes have not met yet, as on a busy machine, JAX waits for the other one for 300 s.
        codes, logs = finish(tmp_path, started, timeout=60 if seed % 2 else 360)
        for survivor in {0, 1} - set(victims):
            assert codes[survivor] not in (0, -9)
            assert "lost" in logs[survivor] or "another task died" in logs[survivor]
    assert finish(tmp_path, processes(tmp_path, 2, *options, "--out", "again"))[0] == [0, 0]
    again = quadrature(tmp_path / "again")
    np.testing.assert_array_equal(uninterrupted.nodes, again.nodes)
    np.testing.assert_array_equal(uninterrupted.weights, again.weights)
