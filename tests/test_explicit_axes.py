"""Under `jax.set_mesh` with explicit axes, JAX's default: same numbers, on the user's mesh."""

import functools
import pathlib

import numpy as np
import pytest
from children import answer

pytestmark = pytest.mark.slow

EPS = float(np.finfo(np.float32).eps)
SUM = 2 * 32 * EPS
"""Two sums over 32 examples, each within 32 roundings of its terms, in orders of their own."""


PARTS = pytest.mark.parametrize("part", ["often", "rarely"])
ALL = [("often", "fsdp"), ("rarely", "replicated"), ("rarely", "written")]
LAYOUTS = pytest.mark.parametrize(("part", "layout"), ALL)


@functools.cache
def run(part):
    """What the program says."""
    program = pathlib.Path(__file__).with_name("explicit_axes.py")
    return answer("-W", "error", program, part, devices=8)


def assert_same(part, kind, layout, tolerances):
    one, many = run(part)[kind]["one"], run(part)[kind][layout]
    assert one.keys() == many.keys()
    for name, expected in one.items():
        error = tolerances.get(name, SUM) * np.abs(expected).max()
        np.testing.assert_allclose(many[name], expected, rtol=0, atol=error, err_msg=name)


@LAYOUTS
def test_arrays_are_those_of_one_device(part, layout):
    values, one = np.array(run(part)["eigenvalues"]), run(part)["arrays"]["one"]
    size, matrix = np.abs(values).max(), np.reshape(one["matrix"], (64, 64))
    start = np.reshape(one["function"], 64) / 3  # the parameters, at which Lanczos begins
    start /= np.linalg.norm(start)
    beta = np.linalg.norm(matrix @ start - (start @ matrix @ start) * start)
    # A vector of the basis is a product over beta; an eigenvector moves by the error over the gap.
    amplified = {"basis": SUM * size / beta, "eigenvector": SUM * size / (values[-1] - values[-2])}
    assert_same(part, "arrays", layout, amplified)


@PARTS
def test_numbers_are_those_of_one_device(part):
    assert_same(part, "numbers", "fsdp", {})


@LAYOUTS
def test_results_lie_on_the_users_mesh(part, layout):
    assert run(part)["elsewhere"][layout] == []


def test_the_users_own_code_runs_as_before():
    found = run("often")
    assert "Explicit" in found["kept"]
    assert found["own"] == pytest.approx(found["arrays"]["one"]["loss"][0], rel=SUM)


def test_moving_between_the_meshes_copies_nothing():
    assert not run("often")["moved"]


def test_inside_jit_with_automatic_axes():
    assert run("often")["inside"] == pytest.approx(run("often")["outside"], rel=SUM)


def test_errors_say_what_to_wrap():
    found = run("often")
    assert "explicit_axes(loss_fn, in_sharding=" in found["unwrapped"]
    assert found["in jit"].startswith("StructureError")
    assert "auto_axes(f, out_sharding=" in found["in jit"]
