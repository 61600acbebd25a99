"""`spectra export-torch`, and a spectrum of what it wrote, as from a shell."""

import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
import torch
from typer.testing import CliRunner

import spectra
from spectra.cli import commands

MODULE = """
import torch


def small():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)]
    return torch.nn.Sequential(*layers), torch.zeros(5, 3)


def only_module():
    return torch.nn.Linear(3, 4)


def of_width(width, *, seed):
    return torch.nn.Linear(3, width), torch.zeros(5, 3)


def randomly():
    return torch.nn.Linear(3, 4), (torch.zeros(5, 7),)


VALUE = 3
"""
PROBLEM = """
import numpy as np
import spectra


def problem():
    model = spectra.bridge.load({folder!r})
    batch = (np.cos(np.arange(36.0)).reshape(12, 3), np.arange(12) % 2)
    loss = spectra.bridge.make_loss(model, "cross_entropy", label_smoothing=0.1)
    return spectra.Problem(loss, model.params, batch, name="small")
"""


def invoke(*arguments: object):
    return CliRunner().invoke(commands.app, [str(a) for a in arguments])


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "small_module.py"
    path.write_text(MODULE)
    return path


def test_export_then_spectrum(file, tmp_path):
    out = tmp_path / "model"
    done = invoke("export-torch", f"{file}:small", "-o", out)
    assert done.exit_code == 0, done.output
    assert "26 parameters in 4 arrays" in done.output
    assert "batch size: any" in done.output
    again = invoke("export-torch", f"{file}:small", "-o", out)
    assert "graph.json' already exists" in str(again.exception)
    assert "--force replaces it" in str(again.exception)
    model = spectra.bridge.load(out)
    assert model.apply(model.params, jnp.ones((7, 3))).shape == (7, 2)
    problem = tmp_path / "problem_of_small.py"
    problem.write_text(PROBLEM.format(folder=str(out)))
    done = invoke("run", problem, "--out", tmp_path / "result", "--steps", 20, "--probes", 2)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "result" / "spectrum.npz").exists()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("{file}:nothing", r"no function nothing\(\) that returns \(module"),
        ("{file}:VALUE", r"no function VALUE\(\)"),
        ("{file}:only_module", "returned a Linear"),
        ("{file}:randomly", "the module itself rejects the example"),
        ("{file}:of_width", r"of_width\(\) in .* needs width, seed: it is called without arguments"),
        ("{folder}/absent.py:small", "no file"),
        ("{folder}/text.txt:small", "not a Python file"),
    ],
)
def test_errors(file, tmp_path, target, message):
    (tmp_path / "text.txt").write_text("small")
    done = invoke("export-torch", target.format(file=file, folder=tmp_path), "-o", tmp_path / "model")
    with pytest.raises((spectra.SpectraError, FileNotFoundError), match=message):
        raise done.exception
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("target", ["{file}", "{file}:"])
def test_a_file_without_a_function_is_a_wrong_argument(file, tmp_path, target):
    done = invoke("export-torch", target.format(file=file), "-o", tmp_path / "model")
    assert done.exit_code == 2
    assert "FILE.py:FUNCTION" in done.output
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("place", ["taken", "taken/deeper/still"])
def test_a_path_that_can_be_no_folder_is_named_before_the_module_is_made(file, tmp_path, place):
    (tmp_path / "taken").write_text("")
    file.write_text("raise AssertionError")
    done = invoke("export-torch", f"{file}:small", "-o", tmp_path / place)
    with pytest.raises(spectra.SpectraError, match=r"cannot be written to .*nothing has been computed"):
        raise done.exception


def test_without_torch(file, tmp_path, monkeypatch):
    (tmp_path / "plain.py").write_text("def small():\n    return 1, 2\n")
    monkeypatch.setitem(sys.modules, "torch", None)
    done = invoke("export-torch", f"{tmp_path / 'plain.py'}:small", "-o", tmp_path / "model")
    assert "needs PyTorch" in str(done.exception)


@pytest.mark.slow
def test_float64_modules_are_exported_whatever_the_flags(tmp_path):
    """Only whoever loads them needs x64."""
    spectra.bridge.export(torch.nn.Linear(2, 2).double(), torch.ones(3, 2, dtype=torch.float64), tmp_path)
    with pytest.raises(spectra.bridge.BridgeError, match="x64"):
        spectra.bridge.load(Path(tmp_path))


def test_an_interrupted_export_says_what_to_do(file, tmp_path, monkeypatch):
    def interrupt(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("spectra.bridge.export", interrupt)
    done = invoke("export-torch", f"{file}:small", "-o", tmp_path / "model")
    assert done.exit_code == 130
    assert "interrupted: the export is not complete. The same command starts it anew" in done.stderr
