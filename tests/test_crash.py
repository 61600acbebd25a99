"""Runs that are ended at random moments go on to the same answer, to the bit."""

import errno
import logging
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from children import environment
from test_checkpoint import KEY, OPTIONS, SCRIPT, STREAM, operator
from test_distributed import finish, processes

import spectra
from spectra.base import host
from spectra.cli import commands
from spectra.density import run as density_run
from spectra.krylov import recurrence
from spectra.results import Estimate
from spectra.runs import saver


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("at", [0, 7, 29])
def test_a_signal_at_any_step_saves_and_says_how_to_resume(number, at, monkeypatch, tmp_path):
    whole = spectra.slq(operator(), **OPTIONS)
    original, steps = recurrence.advance, []

    def advance(*args, **options):
        steps.append(1)
        if len(steps) == at + 1:
            signal.raise_signal(number)
        return original(*args, **options)

    before = signal.getsignal(number)
    monkeypatch.setattr(saver, "PACE", 0.0)
    monkeypatch.setattr(recurrence, "advance", advance)
    name = signal.Signals(number).name
    with pytest.raises(spectra.PreemptedError, match=rf"\({name}\).*resumes from there") as caught:
        spectra.slq(operator(), **OPTIONS, checkpoint=tmp_path)
    assert caught.value.signal == number
    assert signal.getsignal(number) is before
    assert len(steps) == at + 1  # at once
    again = spectra.slq(operator(), **OPTIONS, checkpoint=tmp_path)
    assert len(steps) == 3 * 30  # nothing twice
    np.testing.assert_array_equal(again.nodes, whole.nodes)


def test_a_run_that_could_not_be_saved_does_not_say_that_it_was(monkeypatch, tmp_path):
    original = recurrence.advance

    def advance(*args, **options):
        signal.raise_signal(signal.SIGTERM)
        return original(*args, **options)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saver, "PACE", 0.0)
    monkeypatch.setattr(recurrence, "advance", advance)
    monkeypatch.setattr(saver, "write", full)
    words = r"\(SIGTERM\) and did, .*; but its last checkpoint could not be written to .*No space left"
    with (
        pytest.warns(RuntimeWarning, match="no checkpoint could be written"),
        pytest.raises(spectra.PreemptedError, match=words),
    ):
        spectra.slq(operator(), **OPTIONS, checkpoint=tmp_path)


def test_orbax_logs_no_traces_of_what_it_raises(monkeypatch, tmp_path):
    """A limit on the size of files is as a full disk is."""
    resource = pytest.importorskip("resource")
    logged, limits = [], resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(logging.getLogger("absl"), "callHandlers", logged.append)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
    try:
        with pytest.raises((OSError, ValueError)):
            saver.write(tmp_path / "item", {"x": np.zeros(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [record.getMessage() for record in logged if record.levelno >= logging.WARNING] == []


def test_what_cannot_be_written_is_named(tmp_path):
    resource = pytest.importorskip("resource")
    path, limits = tmp_path / "trace.npz", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
    try:
        with pytest.raises(OSError, match="too large") as full:
            spectra.save(Estimate(1.0, 0.1, 64, "slq"), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(OSError, match="too long") as long:
        spectra.save(Estimate(1.0, 0.1, 64, "slq"), tmp_path / f"{'a' * 300}.npz")
    assert (full.value.filename, Path(long.value.filename).name) == (str(path), f"{'a' * 300}.npz")
    assert list(tmp_path.iterdir()) == []


def test_a_second_interrupt_ends_at_once(monkeypatch, tmp_path):
    def advance(*_, **__):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(recurrence, "advance", advance)
    with pytest.raises(KeyboardInterrupt):
        spectra.slq(operator(), **OPTIONS, checkpoint=tmp_path)


def test_a_signal_that_is_ignored_stays_so(tmp_path):
    """As Ctrl-C by what a shell has put into the background, where it would end the run of another."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with host.watching():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            signal.raise_signal(signal.SIGINT)
            assert host.pending() == 0
            signal.raise_signal(signal.SIGTERM)
            assert host.pending() == signal.SIGTERM
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_a_signal_between_blocks_is_heeded(monkeypatch, tmp_path):
    blocks = {"a": operator(n=40), "b": operator()}
    options = {"key": KEY, "num_steps": 30, "num_probes": 1}
    whole = spectra.slq(blocks, **options)
    original, calls = density_run.ProbeRun.result, []

    def result(self, *args):
        calls.append(1)
        if len(calls) == 1:  # the first block is done
            signal.raise_signal(signal.SIGTERM)
        return original(self, *args)

    monkeypatch.setattr(density_run.ProbeRun, "result", result)
    with pytest.raises(spectra.PreemptedError, match="before its first step"):
        spectra.slq(blocks, **options, checkpoint=tmp_path)
    again = spectra.slq(blocks, **options, checkpoint=tmp_path)
    for name, quadrature in whole.items():
        np.testing.assert_array_equal(again[name].nodes, quadrature.nodes)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_before_the_first_product_is_answered_in_words(number, code, monkeypatch, tmp_path, capsys):
    """While the problem is loaded there is nothing to save, and its own `except Exception` stops nothing."""
    (tmp_path / "problem.py").write_text(
        f"import signal\ntry:\n    signal.raise_signal({int(number)})\nexcept Exception:\n    pass\n"
    )
    command = ["spectra", "run", str(tmp_path / "problem.py"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*command, "--checkpoint", str(tmp_path / "saved")])
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended:
        commands.main()
    assert ended.value.code == code
    said = capsys.readouterr().err
    assert f"({number.name}) and did, before its first product" in said
    assert "Start the same command again." in said
    assert signal.getsignal(number) is before


KINDS = {  # what the command is given besides, and what the problem is
    "memory": ((), SCRIPT),
    "stream": ((), textwrap.dedent(SCRIPT).split("def problem")[0] + STREAM),
    "blocks": (("--blocks", "layer"), SCRIPT),
    "processes": (("--mesh", "data=2"), SCRIPT),
}
SIGNALS = {signal.SIGKILL: 10, signal.SIGTERM: 5, signal.SIGINT: 5}
CODES = {signal.SIGKILL: {-9}, signal.SIGTERM: {75, 0}, signal.SIGINT: {130, 0}}
COMMAND = [sys.executable, "-c", "from spectra.cli.commands import main; main()", "run", "problem.py"]


@pytest.mark.slow  # 40 kills, 20 terminations, 20 interrupts
@pytest.mark.parametrize("kind", KINDS)
def test_ended_at_random_moments_a_run_goes_on_to_the_same_bits(kind, tmp_path, monkeypatch):
    more, script = KINDS[kind]
    (tmp_path / "problem.py").write_text(textwrap.dedent(script))
    options = ("--steps", "200", "--probes", "6", *more)
    saved = (*options, "--checkpoint", "saved", "--checkpoint-minutes", "0.001")
    assert set(finish(tmp_path, started(tmp_path, kind, *options, "--out", "whole"))[0]) == {0}
    # From here on compiled programs are read only: a killed process would leave torn ones.
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1e9")
    draw = random.Random(kind)
    left = [number for number, count in SIGNALS.items() for _ in range(count)]
    draw.shuffle(left)
    completed, longest = 0, 2.0
    while left or not completed:
        running, out = started(tmp_path, kind, *saved, "--out", f"again-{completed}"), f"again-{completed}"
        began = wait_for_its_lock(tmp_path / "saved", running[0])
        if left:
            wait(running[0], draw.uniform(0, longest))
            if running[0].poll() is None:
                number = left.pop()
                for process in running:
                    process.send_signal(number)
                codes, logs = finish(tmp_path, running, timeout=120)
                assert set(codes) <= CODES[number], logs
                if 0 not in codes:
                    assert number == signal.SIGKILL or "resumes from there" in "".join(logs)
                    continue
        codes, logs = finish(tmp_path, running, timeout=120)
        assert set(codes) == {0}, logs
        longest = min(longest, time.time() - began)
        same_bits(
            spectra.load(tmp_path / "whole/spectrum.npz"), spectra.load(tmp_path / out / "spectrum.npz")
        )
        completed += 1
        for path in sorted((tmp_path / "saved").rglob("*"), reverse=True):  # begin anew
            path.rmdir() if path.is_dir() else path.unlink()


def started(folder, kind, *options):
    if kind == "processes":
        return processes(folder, 2, *options)
    with (folder / "log-0").open("w") as log:
        command = [*COMMAND, *options]
        return [subprocess.Popen(command, cwd=folder, env=environment(), stdout=log, stderr=log)]


def wait_for_its_lock(folder, process):
    """Until the run works in its folder: from its first product on."""
    began = time.time()
    while process.poll() is None:
        locks = [path for path in (folder / "lock", *folder.glob("*/lock")) if path.exists()]
        if any(path.stat().st_mtime >= began for path in locks):
            break
        time.sleep(0.005)
    return time.time()


def wait(process, seconds):
    end = time.time() + seconds
    while process.poll() is None and time.time() < end:
        time.sleep(0.002)


def same_bits(one, other):
    pairs = zip(one.values(), other.values(), strict=True) if isinstance(one, dict) else [(one, other)]
    for a, b in pairs:
        a, b = (getattr(x, "quadrature", x) for x in (a, b))
        np.testing.assert_array_equal(a.nodes, b.nodes)
        np.testing.assert_array_equal(a.weights, b.weights)
