"""The recipes of docs/logging.md, word for word, with the libraries that they are for."""

import json
import re
from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import pytest

import spectra

PAGE = Path(__file__).parent.parent / "docs" / "logging.md"


def recipe(heading):
    section = PAGE.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.search(r"```py\n(.*?)```", section, re.DOTALL)[1]


@pytest.fixture(scope="module")
def held():
    """What the recipes take: a snapshot of a tracker, and a table of blocks."""
    tracker = spectra.SpectrumTracker(
        lambda scale: spectra.MatrixOperator(scale * jnp.diag(jnp.linspace(-1.0, 3.0, 60))), 1, num_steps=20
    )
    for step in range(2):
        tracker(step, 1.0 + step, loss=0.5)
    table = spectra.summary({"hidden": tracker.history[0].quadrature, "out": tracker.history[1].quadrature})
    return {"tracker": tracker, "snapshot": tracker.history[1], "table": table}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    plt.close("all")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # those of other libraries
def test_weights_and_biases(held, tmp_path, monkeypatch):
    pytest.importorskip("wandb", exc_type=ImportError)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    names = dict(held)
    exec(recipe("Weights & Biases"), names)
    summary = dict(names["run"].summary)
    names["run"].finish()
    assert summary["largest"] == held["snapshot"].sharpness
    assert summary["loss"] == 0.5
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/density_*.png"))
    (layers,) = tmp_path.glob("wandb/offline-run-*/files/media/table/layers_*.json")
    assert json.loads(layers.read_text())["data"][0][0] == "hidden"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("package", ["torch.utils.tensorboard", "tensorboardX"])
def test_tensorboard(held, tmp_path, package):
    module = pytest.importorskip(package, exc_type=ImportError)
    written = []

    class Writer(module.SummaryWriter):
        def add_scalar(self, tag, value, *args, **kwargs):
            written.append((tag, value))
            return super().add_scalar(tag, value, *args, **kwargs)

    names = {**held, "SummaryWriter": Writer}
    exec(re.sub("^from .*", "", recipe("TensorBoard"), flags=re.MULTILINE), names)
    names["writer"].close()
    assert dict(written)["spectrum/largest"] == held["snapshot"].sharpness
    (events,) = tmp_path.glob("runs/events*")
    assert b"spectrum/largest" in events.read_bytes()
    assert b"density" in events.read_bytes()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_mlflow(held, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", exc_type=ImportError)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    with mlflow.start_run() as run:
        exec(recipe("MLflow"), dict(held))
    logged = mlflow.get_run(run.info.run_id).data.metrics
    assert logged["largest"] == held["snapshot"].sharpness
    assert {path.name for path in tmp_path.glob("store/*/*/artifacts/*")} == {
        "density-1.png",
        "snapshot-1.json",
    }


@pytest.mark.slow
def test_xarray(held):
    pytest.importorskip("xarray", exc_type=ImportError)
    names = dict(held)
    exec(recipe("xarray"), names)
    assert dict(names["data"].sizes)["step"] == 2
