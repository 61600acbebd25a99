"""Histories of runs that other programs have copied: ends of lines and marks of text files."""

import codecs
import subprocess
import sys

import jax.numpy as jnp
import pytest

import spectra


def _operator(params):
    return spectra.MatrixOperator(jnp.diag(params))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    path = tmp_path_factory.mktemp("history") / "run.jsonl"
    track = spectra.SpectrumTracker(_operator, every=1, path=path)
    for step in range(2):
        track(step, jnp.arange(1.0, 4.0) * (1 + step))
    return path


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_history_that_was_copied_as_text_is_whole(mark, end, recorded, tmp_path):
    """Warnings are errors here: no line is said to be damaged."""
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(mark + recorded.read_bytes().replace(b"\n", end))
    assert [s.largest.estimate for s in spectra.load(copy)] == [
        s.largest.estimate for s in spectra.load(recorded)
    ]
    assert spectra.load(copy).provenance == spectra.load(recorded).provenance


@pytest.mark.slow
def test_a_warning_of_a_command_is_one_line_without_the_file_of_a_package(recorded, tmp_path):
    twice = tmp_path / "twice.jsonl"
    twice.write_bytes(2 * recorded.read_bytes())
    command = [sys.executable, "-m", "spectra", "show", str(twice)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert (
        done.stderr == f"warning: '{twice}' is damaged in line 4, which is left out; 4 snapshots are whole.\n"
    )
