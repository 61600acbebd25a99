"""eigsh, trace, diagonal, kpm, solve and funm go on to the same bits, whatever moment they were ended at."""

import dataclasses
import random
import signal
import subprocess
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow_but
from children import environment

import spectra
from spectra.krylov import function_run, nystrom, wanted
from spectra.krylov.eigen_run import EigenRun
from spectra.runs import saver

KEY = jax.random.key(3)
N = 200
VALUES = np.concatenate([np.linspace(-1.0, 3.0, N - 2, dtype=np.float32), [9.0, 9.0]])
EIGSH = {"k": 3, "which": "LA", "num_basis": 12, "tol": 1e-4}
SIDES = np.random.default_rng(0).standard_normal((3, N)).astype(np.float32)
PROBES = {"num_matvecs": 20, "probe_batch": 4}
CALLS = {
    "eigsh": lambda op, **more: spectra.eigsh(op, **EIGSH, key=KEY, **more),
    "eigsh, blocks": lambda op, **more: spectra.eigsh(
        op, **EIGSH | {"num_basis": 16, "block_size": 2}, key=KEY, **more
    ),
    "eigsh, rounded rows": lambda op, **more: spectra.eigsh(
        op, **EIGSH | {"tol": 0.01}, basis_dtype="bfloat16", key=KEY, **more
    ),
    "eigsh, all copies": lambda op, **more: spectra.eigsh(op, **EIGSH, verify=True, key=KEY, **more),
    "trace": lambda op, **more: spectra.trace(op, method="hutchinson", key=KEY, **PROBES, **more),
    "trace, tol": lambda op, **more: spectra.trace(
        op, key=KEY, method="hutchinson", probes="normal", tol=0.2, **PROBES | {"num_matvecs": 90}, **more
    ),
    "xtrace": lambda op, **more: spectra.trace(op, key=KEY, **PROBES, **more),
    "hutch++": lambda op, **more: spectra.trace(op, method="hutch++", key=KEY, **PROBES, **more),
    "trace, exact": lambda op, **more: spectra.trace(op, method="exact", key=None, probe_batch=50, **more),
    "diagonal": lambda op, **more: spectra.diagonal(op, method="hutchinson", key=KEY, **PROBES, **more),
    "xdiag": lambda op, **more: spectra.diagonal(op, key=KEY, **PROBES, **more),
    "kpm": lambda op, **more: spectra.kpm(op, key=KEY, num_moments=21, num_probes=3, probe_batch=2, **more),
}
SYSTEM = {"shift": 1.5, "tol": 1e-4, "method": "cg"}
CALLS |= {
    "solve": lambda op, **more: spectra.solve(op, SIDES[:2], **SYSTEM, **more),
    "solve, minres": lambda op, **more: spectra.solve(op, SIDES[0], **SYSTEM | {"method": "minres"}, **more),
    "solve, nystrom": lambda op, **more: spectra.solve(
        op, SIDES[0], preconditioner="nystrom", key=KEY, **SYSTEM, **more
    ),
}
CALLS["funm"] = lambda op, **more: spectra.funm(op, "exp", SIDES, bounds=(-1.0, 9.0), num_steps=12, **more)
DEFAULT = ("eigsh", "trace", "funm")
ANY = ("eigsh", "solve", "funm")
"""Whose bits do not depend on whether they are saved, and which look at the clock after every step."""


def operator():
    return spectra.MatrixOperator(jnp.diag(jnp.asarray(VALUES)))


def halved(v):
    return v / 2


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def looks(monkeypatch):
    """Save at every look at the clock, and do something at one of them."""
    original = saver.Saver.due

    def install(at, what):
        seen = []

        def due(self, done, seconds):
            seen.append(done)
            if len(seen) == at:
                what()
            return original(self, done, seconds)

        monkeypatch.setattr(saver.Saver, "due", due)
        return seen

    monkeypatch.setattr(saver, "PACE", 0.0)
    yield install
    monkeypatch.undo()


def kill():
    raise Killed


def nothing():
    pass


def assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)
    assert one.status == other.status
    assert one.num_matvecs == other.num_matvecs


@pytest.mark.parametrize("name", slow_but(CALLS, *DEFAULT))
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(name, looks, monkeypatch, tmp_path):
    """At some look at the clock; each start computes what the last checkpoint does not hold.

    Estimates come batch by batch where they are saved: the bits are those of a run with a checkpoint. Those
    of eigsh and solve do not depend on it.
    """
    call, op = CALLS[name], operator()
    monkeypatch.setattr(function_run, "WIDEST", 2)  # funm: a block, and a vector by itself
    whole = call(op) if name.startswith(ANY) else call(op, checkpoint=tmp_path / "whole")
    saved, starts = spectra.Checkpoint(tmp_path / "killed", steps=1), 0
    while True:
        starts += 1
        # Around a restart eigsh looks at the clock without a product in between.
        looks(9 if name == "funm" else 13 if name.startswith(ANY) else 3, kill)
        try:
            again = call(op, checkpoint=saved)
            break
        except Killed:
            continue
    assert starts > 1
    assert_same(whole, again)


@pytest.mark.slow
def test_a_search_for_copies_that_is_killed_goes_on_with_the_rows_that_it_has(monkeypatch, tmp_path):
    """No copy is there: the search ends by its count of rows, and the bound that it leaves rests on them."""
    values = np.concatenate([np.linspace(-1.0, 3.0, N - 3, dtype=np.float32), [7.0, 8.0, 9.0]])
    op = spectra.MatrixOperator(jnp.diag(jnp.asarray(values)))
    # The memory of a whole search, so that it is the goal that ends it.
    arguments = {**EIGSH, "num_basis": 60, "verify": True, "key": KEY}
    whole = spectra.eigsh(op, **arguments)
    pause, done = EigenRun.pause, []

    def dies(run):
        pause(run)
        if run.search is not None and len(run.search.rows) >= 4 and not done:
            done.append(run.search.rows)
            raise Killed

    monkeypatch.setattr(EigenRun, "pause", dies)
    saved = spectra.Checkpoint(tmp_path, steps=1)
    with pytest.raises(Killed):
        spectra.eigsh(op, **arguments, checkpoint=saved)
    again = spectra.eigsh(op, **arguments, checkpoint=saved)
    assert done
    assert_same(whole, again)
    assert again.missed == whole.missed == 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eigsh", "xtrace", "kpm"])
def test_a_signal_saves_and_the_same_call_computes_the_rest_only(name, looks, tmp_path):
    call, op = CALLS[name], operator()
    every = looks(0, nothing)
    whole = call(op, checkpoint=tmp_path / "whole")
    looks(3, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(spectra.PreemptedError, match=r"\(SIGTERM\).*after \d+ products.*resumes from there"):
        call(op, checkpoint=tmp_path / "ended")
    rest = looks(0, nothing)
    again = call(op, checkpoint=tmp_path / "ended")
    assert_same(whole, again)
    assert len(rest) <= len(every) - 2, "the products before the third look are not taken again"


@pytest.mark.slow
def test_a_run_whose_products_ran_out_goes_on_with_more(tmp_path):
    op, few = operator(), {"max_matvecs": 14}
    short = CALLS["eigsh"](op, checkpoint=tmp_path, **few)
    assert short.status == spectra.Status.NOT_CONVERGED
    pairs = CALLS["eigsh"](op, checkpoint=tmp_path)
    assert pairs.status == spectra.Status.CONVERGED
    # Residual ball: an eigenvalue of H lies within the residual of each value, and float32 rounding of H.
    margin = pairs.residuals.max() + 9 * np.finfo("f").eps
    np.testing.assert_allclose(pairs.values, np.sort(VALUES)[-3:], atol=margin)


def test_a_search_whose_products_ran_out_goes_on_with_more(tmp_path):
    """Copies were found, and the products ended while more of them were looked for."""
    op = operator()
    call = partial(spectra.eigsh, **EIGSH | {"num_basis": 60}, verify=True, key=KEY)
    whole = call(op)
    assert whole.missed <= wanted.CERTAIN
    short = call(op, checkpoint=tmp_path, max_matvecs=whole.num_matvecs - 5)
    assert short.status == spectra.Status.CONVERGED
    assert short.missed > wanted.CERTAIN
    pairs = call(op, checkpoint=tmp_path)
    assert pairs.missed <= wanted.CERTAIN
    assert_same(dataclasses.replace(pairs, num_matvecs=0), dataclasses.replace(whole, num_matvecs=0))
    assert pairs.num_matvecs <= whole.num_matvecs + 1  # two at a time, from where it ended


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more", "differs"),
    [
        ("trace", {"by": "leaf"}, "by"),
        ("funm", {"tol": 1e-3}, "tol"),
        ("eigsh", {"verify": False}, "verify"),
        ("kpm", {"bounds": (-2, 10)}, "bounds"),
        ("solve", {"preconditioner": halved}, "preconditioner"),
    ],
)
def test_a_checkpoint_of_other_arguments_or_another_function_is_refused(name, more, differs, tmp_path):
    op = operator()
    CALLS[name](op, checkpoint=spectra.Checkpoint(tmp_path, steps=1))
    with pytest.raises(spectra.CheckpointError, match=rf"these differ: {differs}\. "):
        CALLS[name](op, checkpoint=tmp_path, **more)
    with pytest.raises(spectra.CheckpointError, match=r"belongs to another run; these differ: .*function"):
        spectra.slq(op, key=KEY, num_steps=5, num_probes=1, checkpoint=tmp_path)


@pytest.mark.slow
def test_a_function_that_refuses_numbers_beyond_the_spectrum_is_told_from_another(tmp_path):
    def function(factor):
        def scaled_root(x):
            if np.min(x) < -2:
                raise ValueError("below -2")
            return factor * np.sqrt(x + 2)

        return scaled_root

    def call(factor):
        return spectra.funm(operator(), function(factor), SIDES[0], bounds=(-1.0, 9.0), checkpoint=tmp_path)

    assert_same(call(1.0), call(1.0))
    with pytest.raises(spectra.CheckpointError, match=r"these differ: f\. "):
        call(2.0)


def test_functions_that_differ_within_the_spectrum_alone_are_told_apart(looks, tmp_path):
    """Between two points of a coarse set, as filters of an interval do; and not by their last bits."""

    def call(edge, last=0.0, **more):
        def beyond(x):
            return np.where(x > edge, np.nextafter(np.sqrt(np.abs(x)), last), 0.0)

        return spectra.funm(operator(), beyond, SIDES[0], bounds=(-1.0, 9.0), num_steps=20, **more)

    first = call(2.03, checkpoint=tmp_path)
    assert_same(call(2.03, np.inf, checkpoint=tmp_path), first)
    with pytest.raises(spectra.CheckpointError, match=r"these differ: f\. "):
        call(2.12, checkpoint=tmp_path)
    looks(5, kill)
    with pytest.raises(Killed):
        call(2.03, checkpoint=spectra.Checkpoint(tmp_path / "ended", steps=1))
    looks(0, nothing)
    with pytest.raises(spectra.CheckpointError, match=r"these differ: f\. "):
        call(2.12, checkpoint=tmp_path / "ended")
    assert_same(call(2.03, checkpoint=tmp_path / "ended"), first)


def test_a_checkpoint_of_another_system_is_refused(tmp_path):
    def quarter(v):
        return v / 4

    op, saved = operator(), spectra.Checkpoint(tmp_path, steps=1)
    own = SYSTEM | {"preconditioner": spectra.FunctionOperator(halved, op.like)}
    spectra.solve(op, SIDES[0], **own, checkpoint=saved)
    other = spectra.MatrixOperator(op.matrix.at[0, 0].set(-0.9))
    for matrix, b, more, differs in (
        (op, SIDES[1], {}, "b"),
        (op, SIDES[0], {"x0": SIDES[1]}, "x0"),
        (op, SIDES[0], {"shift": 1.6}, "data, shift"),
        (op, SIDES[0], {"preconditioner": spectra.FunctionOperator(quarter, op.like)}, "preconditioner"),
        (other, SIDES[0], {}, "parameters, data"),
    ):
        with pytest.raises(spectra.CheckpointError, match=rf"these differ: {differs}"):
            spectra.solve(matrix, b, **own | more, checkpoint=saved)


@pytest.mark.slow
def test_the_width_of_a_sketch_is_that_before_where_memory_has_changed(looks, monkeypatch, tmp_path):
    call, op = CALLS["solve, nystrom"], operator()
    monkeypatch.setattr(nystrom, "_saved", lambda *args: np.inf)
    monkeypatch.setattr(nystrom, "_widest", lambda op: 40)
    whole = call(op)
    looks(6, kill)  # within the sketch
    with pytest.raises(Killed):
        call(op, checkpoint=spectra.Checkpoint(tmp_path, steps=1))
    looks(0, nothing)
    monkeypatch.setattr(nystrom, "_widest", lambda op: 20)
    assert_same(whole, call(op, checkpoint=tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["xtrace", "funm"])
def test_what_is_damaged_is_computed_anew_with_a_warning(name, looks, tmp_path):
    call, op = CALLS[name], operator()
    whole = call(op, checkpoint=tmp_path / "whole")
    looks(4, kill)
    with pytest.raises(Killed):
        call(op, checkpoint=spectra.Checkpoint(tmp_path / "ended", steps=1))
    newest = max((tmp_path / "ended").glob("item-*"))
    victim = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    victim.write_bytes(bytes(len(victim.read_bytes())))
    looks(0, nothing)
    with pytest.warns(RuntimeWarning, match=f"'{newest.name}'.* is damaged"):
        assert_same(whole, call(op, checkpoint=tmp_path / "ended"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eigsh", "trace", "funm"])
def test_progress_says_how_far_it_is(name, capsys):
    result = CALLS[name](operator(), progress=True)
    said = capsys.readouterr().err
    assert f"{name}: {result.num_matvecs}" in said
    assert name != "eigsh" or "3 of 3 pairs" in said


@pytest.mark.slow
def test_a_basis_on_the_host_gives_the_same_pairs(tmp_path):
    with pytest.raises(spectra.SpectraError, match="eigenvectors are sums"):
        CALLS["eigsh"](operator(), basis="none")
    ours, other = CALLS["eigsh"](operator(), basis="host"), CALLS["eigsh"](operator())
    # Products outside of the loop round differently: each pair is right to its own residual.
    margin = ours.residuals.max() + other.residuals.max() + 9 * np.finfo("f").eps
    np.testing.assert_allclose(ours.values, other.values, atol=margin)


SCRIPT = """
import os, signal, sys, jax, jax.numpy as jnp, numpy as np, spectra
from spectra.runs import saver

original, seen, at = saver.Saver.due, [], int(sys.argv[2])

def due(self, done, seconds):
    seen.append(done)
    if len(seen) == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, done, seconds)

saver.PACE, saver.Saver.due = 0.0, due
values = np.concatenate([np.linspace(-1.0, 3.0, 198, dtype=np.float32), [9.0, 9.0]])
op = spectra.MatrixOperator(jnp.diag(jnp.asarray(values)))
saved = spectra.Checkpoint(sys.argv[1], steps=1)
pairs = spectra.eigsh(op, 3, which="LA", num_basis=12, tol=1e-4, key=jax.random.key(3), checkpoint=saved)
np.savez(sys.argv[1] + ".npz", values=pairs.values, vectors=pairs.vectors, residuals=pairs.residuals)
"""


def child(folder, at):
    command = [sys.executable, "-c", SCRIPT, str(folder), str(at)]
    return subprocess.Popen(command, env=environment(cache=False), stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_eigsh_of_a_process_that_was_killed_goes_on_in_another(tmp_path):
    running = child(tmp_path / "saved", 9)
    _, said = running.communicate()
    assert running.returncode == -signal.SIGKILL, said
    assert sorted((tmp_path / "saved").glob("record-*.json"))
    assert_same(CALLS["eigsh"](operator()), CALLS["eigsh"](operator(), checkpoint=tmp_path / "saved"))


@pytest.mark.slow  # thirty kills at random moments
def test_eigsh_killed_at_random_moments_goes_on_to_the_same_bits(tmp_path):
    draw, kills, longest = random.Random(0), 0, 8.0
    whole = CALLS["eigsh"](operator())
    while kills < 30:
        folder = tmp_path / f"run-{kills}"
        while True:
            running, began = child(folder, 0), time.monotonic()
            while not (folder / "lock").exists() and running.poll() is None:
                time.sleep(0.005)
            end = time.monotonic() + draw.uniform(0, longest)
            while running.poll() is None and time.monotonic() < end:
                time.sleep(0.002)
            if running.poll() is None and kills < 30:
                running.kill()
                running.communicate()
                kills += 1
                continue
            _, said = running.communicate()
            assert running.returncode == 0, said
            longest = min(longest, time.monotonic() - began)
            break
        with np.load(f"{folder}.npz") as found:
            for name in found.files:
                np.testing.assert_array_equal(found[name], getattr(whole, name))


DEVICES = """
import sys, jax, jax.numpy as jnp, numpy as np, spectra
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from spectra.runs import saver

saver.PACE, original = 0.0, saver.Saver.due
mesh = Mesh(np.array(jax.devices()), ("d",))
keys = jax.random.split(jax.random.key(0), 2)
params = {"w": jax.random.normal(keys[0], (24, 8)), "b": jnp.ones(4)}
data = jax.random.normal(keys[1], (16, 24))


def loss(p, x):
    return jnp.mean(jnp.tanh(x @ p["w"]) ** 2) + jnp.sum(p["b"] ** 4)


def put(x, *names):
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*names)))


one = spectra.HessianOperator(loss, params, data)
many = spectra.HessianOperator(loss, {"w": put(params["w"], "d"), "b": put(params["b"])}, put(data))
key, batches = jax.random.key(2), {"num_matvecs": 20, "probe_batch": 2}
calls = [  # and the look at the clock at which they end
    (14, lambda op, s: spectra.eigsh(op, 3, which="LA", num_basis=12, key=key, checkpoint=s).values),
    (8, lambda op, s: spectra.trace(op, key=key, checkpoint=s, **batches).value),
    (7, lambda op, s: spectra.trace(op, method="hutch++", key=key, checkpoint=s, **batches).value),
    (9, lambda op, s: spectra.kpm(op, num_moments=21, num_probes=2, key=key, checkpoint=s).moments),
]


def ended(call, at, folder):
    seen = []

    def due(self, done, seconds):
        seen.append(done)
        if len(seen) == at:
            raise KeyboardInterrupt
        return original(self, done, seconds)

    saver.Saver.due = due
    try:
        call(many, spectra.Checkpoint(folder, steps=1))
        raise SystemExit("it was not ended")
    except KeyboardInterrupt:
        saver.Saver.due = original


for i, (at, call) in enumerate(calls):
    whole = np.asarray(call(many, f"{sys.argv[1]}/whole-{i}"))
    for op, name in ((many, "four"), (one, "one")):
        ended(call, at, f"{sys.argv[1]}/{name}-{i}")
        again = np.asarray(call(op, f"{sys.argv[1]}/{name}-{i}"))
        # Sums of 196 terms in another order, in moments of degree 20, which amplify them by its square.
        margin = 0 if op is many else 400 * 14 * np.finfo("f").eps * np.abs(whole).max()
        assert np.abs(again - whole).max() <= margin, (i, name, again - whole)
print("resumed")
"""


@pytest.mark.slow
def test_runs_go_on_with_the_devices_they_had_and_with_fewer(tmp_path):
    command = [sys.executable, "-c", DEVICES, str(tmp_path)]
    process = subprocess.run(command, env=environment(4), capture_output=True, text=True, check=False)
    assert process.stdout.strip() == "resumed", process.stderr
