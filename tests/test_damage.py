"""Files from anywhere: each is read, or refused in words, in bounded memory and time, and runs nothing."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import damage
import numpy as np
import pytest
from children import environment
from test_pictures import density, history, pairs, plane, quadrature

import spectra
from spectra import Interval, Status, bridge
from spectra.report.encode import CLASSES
from spectra.report.fields import _RULES, checked

ROOT = Path(spectra.__file__).parents[1]


def condition(size=500):
    rest = {"is_lower_bound": False, "shift": 0.0, "rank_tol": 1e-6, "num_matvecs": 64, "method": "krylov"}
    return spectra.ConditionNumber(
        12.0, 11.5, 11.0, 0.95, size, 0, Interval(0, 0, 3), 1e-6, size=size, status=Status.COMPLETE, **rest,
        largest_interval=Interval(10.9, 11.0, 11.1), smallest_interval=Interval(0.9, 0.95, 0.96),
        effective_interval=Interval(11.3, 11.5, 12.4),
    )  # fmt: skip


def report():
    q = quadrature()
    ends = Interval(10.9, 11.0, 11.4), Interval(-0.2, -0.012, -0.011)
    share = Interval(0.1, 0.2, 0.3)
    trace = spectra.Estimate(50.0, 1.5, 72, "slq", dof=2.0)
    facts = {
        "spectra": "0.1.0",
        "jax": "0.10.2",
        "seconds": 1.5,
        "key": "[0, 3]",
        "date": "2026-11-01T00:00:00",
    }
    return spectra.SpectrumReport(
        "net", q, density(), *ends, trace, share, share, 1e-3, 90.0, 1e-6, facts, 0.99
    )


def results():
    """One of every class, made of NumPy numbers."""
    line = np.linspace(0.1, 1.0, 6)
    tree = {"a": {"kernel": np.ones((3, 2))}, "b": [np.zeros(4), np.ones(1)]}
    number = spectra.Estimate(1.0, 0.1, 9, "x")
    return {
        "report": report(),
        "quadrature": quadrature(),
        "pairs": pairs(),
        "history": history(3),
        "plane": plane(),
        "blocks": {f"a/layer_{i}": quadrature(seed=i) for i in range(2)},
        "moments": spectra.Moments(
            line[None] / 2, np.array([-1.0, 2.0]), 9, 12, 1e-7, Status.COMPLETE
        ),
        "lanczos": spectra.Tridiagonal(line, line[1:], 0.1, 6, 1e-7, 0, (), None, Status.COMPLETE),
        "diagonal": spectra.Estimate(tree, tree, 9, "exact"),
        "groups": spectra.Estimate({"a": 1.0}, {"a": 0.1}, 9, "hutchinson", total=number),
        "condition": condition(),
        "layers": spectra.LayerConditions({"a/b": condition(), "c": condition(5)}),
        "plan": spectra.Plan(500, 24, 3, 1, 4000, 96_000, 12_000, 0, 0, None, 72),
        "spread": spectra.DataVariability(
            line.reshape(3, 2), line.reshape(3, 2), line[:3], line[:3], line[:2], line[:2], 1.0, 9
        ),
        "sharpness": spectra.Sharpness(2.0, 1.9, 2.1, True, 0.7, 12, Status.CONVERGED),
        "comparison": spectra.OperatorComparison(
            *[Interval(0.1, 0.2, 0.3)] * 4, line.reshape(2, 3), line.reshape(2, 3),
            {"a/b": Interval(0.1, 0.2, 0.3)}, 9, 40, 0.95, Status.COMPLETE,
        ),
        "noise": spectra.NoiseScale(
            2.0, 0.1, 0, "jackknife", dof=9.0, noise=2.0, signal=1.0, covariance=np.eye(2), num_examples=10
        ),
        "population": spectra.Population(
            *[line[:2]] * 6, Interval(1.0, 2.0, 3.0), 0.1, 0.1, Interval(line[:2], line[:2], line[:2]),
            9, 80, 8, 300, 40, 9.5, 0.95, Status.COMPLETE,
        ),
        "perturbation": spectra.Perturbation(
            ("a", "b"), line[:2], np.eye(2), line[:2], 0.7, 2, measured=line[:2]
        ),
        "classes": spectra.ClassSplit(
            line[:3], line[:2], line[:2], line[:3], line[:3], 1.0, 2.0, number, number, np.eye(2), 2, 40,
            Status.CONVERGED,
        ),
        "step": spectra.StepQuality(-1.0, 0.5, 0.3, 0.7, np.nan),
        "overlap": spectra.GradientOverlap(line[:2] / 2, 1.5),
        "stable": spectra.StableStep(1.4, 1.3, 1.5, 0.14, 12, Status.CONVERGED),
        "summary": spectra.Summary({"a": quadrature(), "b/c": quadrature(seed=1)}),
        "singular": spectra.SingularTriplets(
            line[:2], {"out": np.ones((2, 3))}, {"w": np.ones((2, 4))}, line[:2], np.ones(2, bool), "LM",
            (3, 4), 12, 1.0, 1e-7, 1e-4, Status.CONVERGED,
        ),
        "interval": {"curve": Interval(line, line, line)},
    }  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A folder of sound files for each kind, by `export` where PyTorch is there."""
    folder = tmp_path_factory.mktemp("sound")
    for kind in ("npz", "jsonl", "graph"):
        (folder / kind).mkdir()
    for name, result in results().items():
        spectra.save(result, folder / "npz" / name)
    file = spectra.report.growing.HistoryFile(folder / "jsonl" / "run.jsonl", {"name": "H", "seconds": 1.0})
    for snapshot in history(4):
        file.add(snapshot)
    file.skip(9)
    return folder


@pytest.fixture(scope="module")
def exported(sound):
    torch = pytest.importorskip("torch")
    layers = [torch.nn.Conv2d(1, 2, 3), torch.nn.MaxPool2d(2), torch.nn.Flatten(), torch.nn.Linear(8, 3)]
    bridge.export(torch.nn.Sequential(*layers), (torch.zeros(4, 1, 6, 6),), sound / "graph")
    return sound / "graph"


@pytest.mark.slow
def test_every_class_has_a_rule_for_each_of_its_fields_and_is_among_the_sound_files(sound):
    for cls in CLASSES.values():
        names = cls._fields if cls is Interval else [field.name for field in dataclasses.fields(cls)]
        assert set(_RULES[cls]) == set(names), cls
    for name, result in results().items():
        loaded = spectra.load(sound / "npz" / f"{name}.npz")
        assert repr(loaded) == repr(result)


@pytest.mark.parametrize(
    ("value", "residual"), [(1e300, 1e-300), (np.inf, 1.0), (1.0, np.inf), (np.nan, np.nan)]
)
def test_a_history_prints_whatever_numbers_it_holds(value, residual):
    (snapshot,) = history(1)
    snapshot = dataclasses.replace(snapshot, eigenvalues=np.array([value]), residuals=np.array([residual]))
    assert str(snapshot)
    assert str(spectra.SpectrumHistory([snapshot], {}))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("value", None, "value"),
        ("stderr", {"a": 0.1}, "stderr"),
        ("upper", np.ones(2), "another form than the value"),
        ("covariance", -np.eye(2), "a variance is negative"),
    ],
)
def test_a_noise_scale_without_an_interval_is_refused(field, value, message):
    noise = spectra.NoiseScale(
        2.0, 0.1, 0, "jackknife", dof=9.0, noise=2.0, signal=1.0, covariance=np.eye(2), num_examples=10
    )
    assert str(checked(spectra.NoiseScale, vars(noise)))
    with pytest.raises(ValueError, match=message):
        checked(spectra.NoiseScale, vars(noise) | {field: value})


def test_an_estimate_has_an_error_for_each_of_its_numbers():
    with pytest.raises(ValueError, match="another form than the value"):
        checked(spectra.Estimate, vars(spectra.Estimate(1.0, 0.1, 9, "x")) | {"stderr": None})


def check(counts, count):
    assert counts["wrong"] == []
    assert counts["ran"] == []
    assert counts["slowest"] < damage.SECONDS
    assert counts["loaded"] + counts["refused"] == count
    assert counts["refused"] > count // 20  # of a history whose lines are damaged the others are read


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["npz", "jsonl"])
def test_a_few_damaged_results(kind, sound):
    check(damage.run(kind, 0, 80, sound / kind), 80)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [("npz", 2000), ("jsonl", 1000)])
def test_damaged_results(kind, count, sound):
    check_alone(kind, count, sound / kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["graph", "weights"])
@pytest.mark.parametrize("seed", [1, 2])
def test_damaged_models(kind, seed, exported):
    """In this process: `test_bridge_files`."""
    check_alone(kind, 1000, exported, seed)


def check_alone(kind, count, folder, seed=1):
    """The same in a process of its own, whose peak of memory is known."""
    command = [sys.executable, str(ROOT / "tests" / "damage.py"), kind, str(seed), str(count), str(folder)]
    path = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment() | path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    print(kind, counts)
    check(counts, count)
    assert counts["peak"] < 1024  # MiB, the interpreter and JAX included
