"""A run that was ended goes on as if it had not been; a checkpoint is never worse than none."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectra
from spectra import checkpoint as module
from spectra.density import run as density_run
from spectra.krylov import storage

KEY = jax.random.key(3)
OPTIONS = {"key": KEY, "num_steps": 30, "num_probes": 3}


def operator(scale=1.0, n=200):
    return spectra.MatrixOperator(scale * jnp.diag(jnp.linspace(-1.0, 3.0, n, dtype=jnp.float32)))


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def interrupt(monkeypatch):
    """End a run after so many looks at the clock."""

    def after(count):
        original, seen = module.Recorder.after, []

        def look(self, *args):
            seconds = original(self, *args)
            seen.append(seconds)
            if len(seen) == count:
                raise Killed
            return seconds

        monkeypatch.setattr(module.Recorder, "after", look)

    yield after
    monkeypatch.undo()


def interrupted(interrupt, monkeypatch, folder, count, **options):
    monkeypatch.setattr(density_run, "PACE", 0.0)  # one step at a time
    interrupt(count)
    with pytest.raises(Killed):
        spectra.slq(operator(), **OPTIONS | options, checkpoint=spectra.Checkpoint(folder, steps=4))
    monkeypatch.undo()


@pytest.mark.parametrize("count", [5, 25, 40])
@pytest.mark.parametrize(
    "options", [{}, {"probe_batch": 2}, {"basis_dtype": "bfloat16"}, {"tol": 0.02, "num_probes": 6}], ids=str
)
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(
    count, options, interrupt, monkeypatch, tmp_path
):
    whole = spectra.slq(operator(), **OPTIONS | options)
    interrupted(interrupt, monkeypatch, tmp_path, count, **options)
    again = spectra.slq(operator(), **OPTIONS | options, checkpoint=tmp_path)
    np.testing.assert_array_equal(again.nodes, whole.nodes)
    np.testing.assert_array_equal(again.weights, whole.weights)
    assert again.status == whole.status
    assert again.num_matvecs == whole.num_matvecs


def test_finished_probes_cost_nothing_again_and_more_can_be_added(tmp_path):
    calls = []

    def mv(v):
        jax.debug.callback(lambda: calls.append(1))
        return v * jnp.linspace(-1.0, 3.0, 200, dtype=jnp.float32)

    op = spectra.FunctionOperator(mv, jnp.zeros(200))
    first = spectra.slq(op, **OPTIONS, checkpoint=tmp_path)
    jax.effects_barrier()
    done = len(calls)
    again = spectra.slq(op, **OPTIONS, checkpoint=tmp_path)
    jax.effects_barrier()
    assert len(calls) == done + 1  # the product that tells whether the operator is the same
    np.testing.assert_array_equal(again.nodes, first.nodes)
    more = spectra.slq(op, **OPTIONS | {"num_probes": 4}, checkpoint=tmp_path)
    jax.effects_barrier()
    assert len(calls) == done + 2 + 30
    np.testing.assert_array_equal(more.nodes[:3], first.nodes)


@pytest.mark.parametrize(
    ("op", "options", "what"),
    [
        (operator(1.001), {}, "product"),
        (operator(n=201), {}, "operator"),
        (operator(), {"key": jax.random.key(4)}, "key"),
        (operator(), {"num_steps": 31}, "num_steps"),
        (operator(), {"basis_dtype": "bfloat16"}, "basis_dtype"),
    ],
    ids=["scaled", "larger", "key", "steps", "dtype"],
)
def test_a_checkpoint_of_another_run_is_refused(op, options, what, interrupt, monkeypatch, tmp_path):
    interrupted(interrupt, monkeypatch, tmp_path, 9)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(spectra.CheckpointError, match=what):
        spectra.slq(op, **OPTIONS | options, checkpoint=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_other_parameters_are_refused_though_the_product_is_the_same(tmp_path):
    def loss_fn(params, x):  # its Hessian does not depend on the parameters
        return jnp.mean((x @ params) ** 2)

    x = jnp.asarray(np.random.default_rng(0).standard_normal((20, 5)), jnp.float32)
    options = {"key": KEY, "num_steps": 3, "num_probes": 1, "checkpoint": tmp_path}
    spectra.slq(spectra.HessianOperator(loss_fn, jnp.ones(5), x), **options)
    with pytest.raises(spectra.CheckpointError, match="parameters"):
        spectra.slq(spectra.HessianOperator(loss_fn, jnp.zeros(5), x), **options)


@pytest.mark.parametrize("damage", ["half a record", "a missing item", "a stray file"])
def test_a_half_written_checkpoint_is_ignored_for_the_one_before(damage, interrupt, monkeypatch, tmp_path):
    whole = spectra.slq(operator(), **OPTIONS)
    interrupted(interrupt, monkeypatch, tmp_path, 40)
    records = sorted(tmp_path.glob("record-*.json"))
    assert len(records) == 2
    if damage == "half a record":
        text = records[-1].read_text()
        records[-1].write_text(text[: len(text) // 2])
    elif damage == "a missing item":
        last = json.loads(records[-1].read_text())["flight"]["items"][-1]
        (tmp_path / last).rename(tmp_path / "gone")
    else:
        (tmp_path / "record-999999.part").write_text("{")
        (tmp_path / "probe-00000-rows-009-008.orbax-checkpoint-tmp-1").mkdir()
    again = spectra.slq(operator(), **OPTIONS, checkpoint=tmp_path)
    np.testing.assert_array_equal(again.nodes, whole.nodes)


def test_a_full_disk_costs_a_warning_and_nothing_that_was_finished(interrupt, monkeypatch, tmp_path):
    whole = spectra.slq(operator(), **OPTIONS)
    interrupted(interrupt, monkeypatch, tmp_path, 40)
    original = storage.write
    writes = []

    def full(path, tree):
        writes.append(path)
        if len(writes) > 1:
            path.mkdir()
            raise OSError(errno.ENOSPC, "No space left on device")
        original(path, tree)

    monkeypatch.setattr(storage, "write", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        result = spectra.slq(operator(), **OPTIONS, checkpoint=spectra.Checkpoint(tmp_path, steps=4))
    np.testing.assert_array_equal(result.nodes, whole.nodes)
    monkeypatch.undo()
    again = spectra.slq(operator(), **OPTIONS, checkpoint=tmp_path)
    np.testing.assert_array_equal(again.nodes, whole.nodes)


def test_only_what_is_new_is_written(monkeypatch, tmp_path):
    written = []
    original = storage.write

    def write(path, tree):
        written.append(path.name)
        original(path, tree)

    monkeypatch.setattr(storage, "write", write)
    monkeypatch.setattr(density_run, "PACE", 0.0)
    options = OPTIONS | {"num_probes": 1}
    spectra.slq(operator(), **options, checkpoint=spectra.Checkpoint(tmp_path, steps=8))
    rows = [name for name in written if "rows" in name]
    assert len(rows) == len(set(rows))
    assert rows == [f"probe-00000-rows-{i:03d}-008" for i in range(3)]


def test_blocks_have_a_checkpoint_each(tmp_path):
    blocks = {"a/b": operator(n=40), "c": operator(n=50)}
    first = spectra.slq(blocks, **OPTIONS, checkpoint=tmp_path)
    again = spectra.slq(blocks, **OPTIONS, checkpoint=tmp_path)
    for name in blocks:
        np.testing.assert_array_equal(first[name].nodes, again[name].nodes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a_b", "c"]


SCRIPT = """
import sys, jax, jax.numpy as jnp, numpy as np, spectra

def loss_fn(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["w"] + params["b"]) @ params["v"] - y) ** 2)

def problem():
    rng = np.random.default_rng(0)
    draw = lambda *shape: (rng.standard_normal(shape) / 4).astype("float32")
    params = {"w": draw(16, 32), "b": draw(32), "v": draw(32, 8)}
    return spectra.Problem(loss_fn, params, (draw(67, 16), draw(67, 8)), name="small")
"""
COMMAND = [sys.executable, "-c", "from spectra.cli import main; main()", "run", "problem.py", "--probes", "2"]


def shell(folder, *options, devices=1):
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*COMMAND, *options], cwd=folder, env=environment, **streams)


def test_sigterm_ends_with_code_75_and_the_same_command_goes_on_elsewhere(tmp_path):
    (tmp_path / "problem.py").write_text(textwrap.dedent(SCRIPT))
    steps = ("--steps", "400")
    saved = (*steps, "--checkpoint", "saved", "--checkpoint-minutes", "0.001")
    process = shell(tmp_path, *saved)
    while not list((tmp_path / "saved").glob("record-*.json")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 75, text
    assert "goes on from there" in text
    # The rest on four devices, and the whole on one without interruption.
    for options in ((*saved, "--mesh", "data=2,model=2", "--out", "resumed"), (*steps, "--out", "whole")):
        process = shell(tmp_path, *options, devices=4 if "--mesh" in options else 1)
        assert process.wait(timeout=300) == 0, process.stdout.read()
        process.stdout.close()
    one, other = (spectra.load(tmp_path / name / "spectrum.npz").quadrature for name in ("whole", "resumed"))
    size = max(map(abs, one.range))
    assert abs(np.array(other.range) - np.array(one.range)).max() <= 64 * np.finfo("f").eps * size
    for power in (1, 2):
        moments = [q.mean(lambda x, p=power: x**p) for q in (one, other)]
        assert abs(moments[0] - moments[1]) <= 64 * np.finfo("f").eps * size**power
