"""A run that was ended goes on as if it had not been; a checkpoint is never worse than none."""

import errno
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import pytest
from cases import slow_but
from children import environment
from typer.testing import CliRunner

import spectra
from spectra.base.files import tree_digest
from spectra.cli import commands
from spectra.density import recorder as module
from spectra.krylov import basis
from spectra.operators import accumulate
from spectra.runs import saver
from spectra.runs.checkpoint import differences
from spectra.runs.saver import Records

KEY = jax.random.key(3)
OPTIONS = {"key": KEY, "num_steps": 30, "num_probes": 3}


def operator(scale=1.0, n=200):
    return spectra.MatrixOperator(scale * jnp.diag(jnp.linspace(-1.0, 3.0, n, dtype=jnp.float32)))


NOTHING = {"alpha": [], "beta": [], "length": 0, "asymmetry": 0.0}


class Killed(Exception):
    """Stands for the end of the process."""


def end_after(patch, count):
    """End a run after so many looks at the clock."""
    original, seen = module.Recorder.after, []

    def look(self, *args):
        seconds = original(self, *args)
        seen.append(seconds)
        if len(seen) == count:
            raise Killed
        return seconds

    patch.setattr(module.Recorder, "after", look)


@pytest.fixture
def interrupt(monkeypatch):
    yield functools.partial(end_after, monkeypatch)
    monkeypatch.undo()


def interrupted(interrupt, monkeypatch, folder, count, **options):
    monkeypatch.setattr(saver, "PACE", 0.0)  # one step at a time
    interrupt(count)
    with pytest.raises(Killed):
        spectra.slq(operator(), **OPTIONS | options, checkpoint=spectra.Checkpoint(folder, steps=4))
    monkeypatch.undo()


@pytest.fixture(scope="module")
def whole():
    """The run without interruption."""
    return spectra.slq(operator(), **OPTIONS)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """What a run saved that was ended after 40 looks at the clock."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        interrupted(functools.partial(end_after, patch), patch, folder, 40)
    return folder


@pytest.fixture
def saved(stopped, tmp_path):
    """A copy of it."""
    return shutil.copytree(stopped, tmp_path / "saved")


@pytest.mark.parametrize("count", slow_but([5, 25, 40], 25))
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"probe_batch": 2}, marks=pytest.mark.slow),
        pytest.param({"basis_dtype": "bfloat16"}, marks=pytest.mark.slow),
        {"tol": 0.02, "num_probes": 6},
    ],
    ids=str,
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


@pytest.mark.slow
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
        (operator(), {"basis_dtype": "bfloat16"}, "basis_dtype"),
    ],
    ids=["scaled", "larger", "key", "dtype"],
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
    with pytest.raises(spectra.CheckpointError, match=r"these differ: parameters\."):
        spectra.slq(spectra.HessianOperator(loss_fn, jnp.zeros(5), x), **options)


def cosine(top, sign=1.0):
    """n = 20,000: a single eigenvalue is invisible in one product with a random vector."""
    d = jnp.linspace(-0.1, 0.1, 20_000).at[-1].set(top)
    return spectra.FunctionOperator(lambda v: sign * d * v, jnp.zeros(20_000))


def sum_of_squares(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["w"]) - y) ** 2)


def sum_of_fourth_powers(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["w"]) - y) ** 4)


def regression(loss_fn=sum_of_squares, flipped=(), stream=False, **options):
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((40, 6), (40, 3)))
    for i in flipped:
        y = y.at[i].multiply(-1)
    batch = [(x[:20], y[:20]), (x[20:], y[20:])] if stream else (x, y)
    return spectra.HessianOperator(loss_fn, {"w": jnp.ones((6, 3)) / 4}, batch, **options)


OTHERS = {
    "an eigenvalue": (cosine(10.0), cosine(20.0)),
    "a sign": (cosine(10.0), cosine(10.0, -1.0)),
    "the loss": (regression(), regression(sum_of_fourth_powers)),
    "a label": (regression(), regression(flipped=[7])),
    "a label of the last batch": (regression(stream=True), regression(stream=True, flipped=[33])),
    "the kind of matrix": (
        regression(),
        spectra.GGNOperator(
            lambda p, x: jnp.tanh(x @ p["w"]),
            lambda z, y: jnp.mean((z - y) ** 2),
            regression().params,
            regression().data,
        ),
    ),
    "a shift": (regression(), regression().shift(1e-6)),
    "a block": (regression(), regression().block("w").shift(0.0)),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", OTHERS)
def test_a_changed_problem_is_noticed(what, tmp_path):
    mine, other = OTHERS[what]
    options = {"key": KEY, "num_steps": 3, "num_probes": 1, "checkpoint": tmp_path}
    spectra.slq(mine, **options)
    with pytest.raises(spectra.CheckpointError, match=r"data|program|product|operator"):
        spectra.slq(other, **options)
    spectra.slq(mine, **options)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["int4", "uint2", "float4_e2m1fn", "float8_e4m3fn"])
def test_data_of_any_dtype_are_told_apart(dtype):
    """Also those of quantised models, of which several numbers share a byte."""
    x = jnp.array([[1, 0, 1], [0, 0, 1]]).astype(dtype)
    assert tree_digest(x) == tree_digest(x + jnp.zeros_like(x))
    others = [x.at[1, 0].set(1), x.at[0, 2].set(0), x[::-1], x.T, x.astype("int8"), x[:1]]
    assert len({tree_digest(other) for other in [x, *others]}) == 1 + len(others)


def in_bfloat16(loss_fn=sum_of_squares, flipped=()):
    def coarse(params, batch):
        x, y = batch
        low = {"w": params["w"].astype(jnp.bfloat16)}
        return loss_fn(low, (x.astype(jnp.bfloat16), y)).astype(jnp.float32)

    return regression(coarse, flipped)


def test_a_coarse_model_is_told_from_another_elsewhere_too(monkeypatch, tmp_path):
    """By another version of JAX programs may differ, but neither data nor products by more than rounding."""
    options = {"key": KEY, "num_steps": 3, "num_probes": 1, "checkpoint": tmp_path}
    first = spectra.slq(in_bfloat16(), **options)
    monkeypatch.setattr(jax, "__version__", "0.0.1")
    for other, what in (
        (in_bfloat16(sum_of_fourth_powers), r"these differ: product"),
        (in_bfloat16(flipped=[7]), r"these differ: data\."),
    ):
        with pytest.raises(spectra.CheckpointError, match=what):
            spectra.slq(other, **options)
    np.testing.assert_array_equal(spectra.slq(in_bfloat16(), **options).nodes, first.nodes)


def test_a_key_of_another_generator_is_refused(tmp_path):
    """Its numbers may be the same, but not what is drawn with them."""
    options = {"num_steps": 3, "num_probes": 1, "checkpoint": tmp_path}
    spectra.slq(operator(), key=jax.random.key(5, impl="rbg"), **options)
    with pytest.raises(spectra.CheckpointError, match="draws"):
        spectra.slq(operator(), key=jax.random.key(5, impl="unsafe_rbg"), **options)


def test_products_of_large_operators_are_compared_in_length_too():
    """Along a random vector a sum of terms of either sign is as near to zero as their number says."""
    mine = {"product": [1e-5, 1.0], "leaves": [0.5, 0.5], "place": ["1", 1]}
    assert not differences(mine, {"product": [1.0001e-5, 1.0], "leaves": [0.5, 0.5], "place": ["2", 4]}, 1e-7)
    for other in (
        {"product": [1e-5, 1.001], "leaves": [0.5, 0.5]},
        {"product": [1e-5, 1.0], "leaves": [0.501, 0.499]},
    ):
        assert differences(mine, other | {"place": ["2", 4]}, 1e-7) == ["product (loss function or data)"]
    # An older version saved neither lengths of leaves nor draws.
    assert not differences(mine | {"draws": [1, 2]}, {"product": [1e-5, 1.0], "place": ["1", 1]}, 1e-7)


def changed(rng):
    """The regression with a small change of a random kind, and its name."""
    kind = rng.choice(["parameter", "input", "label", "constant", "exponent", "order", "weights", "fewer"])
    stream = bool(rng.integers(2)) or kind in ("order", "weights", "fewer")
    op = regression(stream=stream)
    params, data = op.params, op.data if op.stream is None else list(op.stream.source)
    options, exponent, constant = {}, 2, 0.0
    if kind == "parameter":
        place = tuple(rng.integers((6, 3)))
        params = {"w": params["w"].at[place].multiply(1 + 2.0**-20)}
    elif kind in ("input", "label"):
        batches = data if stream else [data]
        i, leaf = rng.integers(len(batches)), int(kind == "label")
        x = list(batches[i])
        x[leaf] = x[leaf].at[tuple(rng.integers(x[leaf].shape))].multiply(-1)
        batches[i] = tuple(x)
        data = batches if stream else batches[0]
    elif kind == "constant":
        constant = float(rng.choice([1e-3, 1e-6, -1e-6]))
    elif kind == "exponent":
        exponent = 4
    elif kind == "weights":
        options |= {"weight_fn": lambda batch: 1.0 + abs(float(batch[0][0, 0])), "check_data": False}
    elif kind == "fewer":
        data = data[:1]
    else:
        data = data[::-1]

    def loss_fn(params, batch):
        x, y = batch
        return jnp.mean((jnp.tanh(x @ params["w"]) - y) ** exponent) + constant * jnp.sum(params["w"] ** 2)

    return kind, stream, spectra.HessianOperator(loss_fn, params, data, **options)


@pytest.mark.slow
def test_a_hundred_changed_problems_are_noticed(tmp_path):
    rng = np.random.default_rng(0)
    options = {"key": KEY, "num_steps": 3, "num_probes": 1}
    for stream in (False, True):
        spectra.slq(regression(stream=stream), **options, checkpoint=tmp_path / str(stream))
    for _ in range(100):
        kind, stream, op = changed(rng)
        try:
            spectra.slq(op, **options, checkpoint=tmp_path / str(stream))
        except spectra.CheckpointError:
            continue
        pytest.fail(f"not noticed: {kind}")


@pytest.mark.slow
def test_how_data_are_cut_and_what_functions_are_called_makes_no_other_problem(tmp_path):
    def renamed(parameters, pair):
        return jnp.mean((jnp.tanh(pair[0] @ parameters["w"]) - pair[1]) ** 2)

    options = {"key": KEY, "num_steps": 3, "num_probes": 1, "checkpoint": tmp_path}
    first = spectra.slq(regression(), **options)
    for op in (regression(microbatch=8), regression(renamed), regression(linearize=False)):
        np.testing.assert_array_equal(spectra.slq(op, **options).nodes, first.nodes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "then",
    [
        {"num_probes": 2},
        {"num_steps": 20},
        {"num_steps": 40},
        {"tol": 0.3, "num_steps": 100},
        {"tol": 0.02, "num_steps": 100, "num_probes": 5},
    ],
    ids=str,
)
def test_with_other_steps_probes_or_tolerance_a_run_gives_what_a_fresh_one_does(then, tmp_path):
    spectra.slq(operator(), **OPTIONS | {"tol": 0.1, "num_steps": 100}, checkpoint=tmp_path)
    spectra.slq(operator(), **OPTIONS, checkpoint=tmp_path)
    fresh = spectra.slq(operator(), **OPTIONS | then)
    again = spectra.slq(operator(), **OPTIONS | then, checkpoint=tmp_path)
    assert again.status == fresh.status
    assert again.num_matvecs == fresh.num_matvecs
    # The basis is cut into segments by the number of steps, which orders sums otherwise.
    for power in (1, 2, 3):
        moments = [q.mean(lambda x, p=power: x**p) for q in (again, fresh)]
        assert abs(moments[0] - moments[1]) <= 64 * np.finfo("f").eps * 3.0**power


@pytest.mark.slow
def test_probes_that_end_by_themselves_serve_any_number_of_steps(tmp_path):
    op = spectra.MatrixOperator(jnp.diag(jnp.repeat(jnp.array([1.0, 2.0, 5.0]), 16)))
    options = {"key": KEY, "num_probes": 2, "checkpoint": tmp_path}
    first = spectra.slq(op, num_steps=8, **options)
    record = max(tmp_path.glob("record-*.json"))
    again = spectra.slq(op, num_steps=16, **options)
    assert max(tmp_path.glob("record-*.json")) == record  # nothing was computed
    assert again.lengths.tolist() == first.lengths.tolist() == [3, 3]
    assert again.status.code == "invariant"


def test_a_folder_in_use_is_refused_and_the_error_says_by_whom(tmp_path):
    pytest.importorskip("fcntl")
    refused = pytest.raises(spectra.CheckpointError, match=r"in use by process \d+ on")
    with Records(tmp_path).held(), refused:
        spectra.slq(operator(), **OPTIONS, checkpoint=tmp_path)
    spectra.slq(operator(), **OPTIONS, checkpoint=tmp_path)


def test_a_run_that_waited_for_another_writes_newer_records(tmp_path):
    early, other = Records(tmp_path), Records(tmp_path)
    record = {"description": {}, "rows": [], "flight": None}
    for _ in range(4):
        other.write(record)
    with early.held():
        early.write(record | {"rows": [{"probe": 7} | NOTHING]})
    assert early.read()[0][0]["rows"][0]["probe"] == 7


def emptied(path):
    path.write_bytes(b"")


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path, at=0.7):
    data = bytearray(path.read_bytes())
    if data:
        data[int(at * (len(data) - 1))] ^= 1
    path.write_bytes(bytes(data))


def without_a_field(path):
    record = json.loads(path.read_text())
    del record["record"]["flight"]
    path.write_text(json.dumps(record))


def contents(folder):
    """The files of the newest item that hold its numbers."""
    item = (
        folder / list(json.loads(max(folder.glob("record-*")).read_text())["record"]["flight"]["items"])[-1]
    )
    return [path for path in item.rglob("*") if path.is_file()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "damage", "warning"),
    [
        ("record", truncated, "cannot be used"),
        ("record", flipped, "cannot be used"),
        ("record", without_a_field, "it has no|checksum"),
        ("item", emptied, "is damaged"),
        ("item", truncated, "is damaged"),
        ("item", flipped, "is damaged"),
        ("item", lambda path: path.unlink(missing_ok=True), "is damaged"),
    ],
)
def test_damage_is_noticed_and_the_run_before_used(what, damage, warning, whole, saved):
    for path in [max(saved.glob("record-*"))] if what == "record" else contents(saved):
        damage(path)
    with pytest.warns(RuntimeWarning, match=warning):
        again = spectra.slq(operator(), **OPTIONS, checkpoint=saved)
    np.testing.assert_array_equal(again.nodes, whole.nodes)


def test_what_a_killed_run_leaves_does_no_harm(whole, saved):
    (saved / "record-999999.part").write_text("{")
    (saved / "probe-00000-rows-009-008.orbax-checkpoint-tmp-1").mkdir()
    again = spectra.slq(operator(), **OPTIONS, checkpoint=saved)
    np.testing.assert_array_equal(again.nodes, whole.nodes)
    assert not list(saved.glob("*.part")) + list(saved.glob("*-tmp-*"))


@pytest.mark.slow  # 200 random damages of two kinds of run
@pytest.mark.parametrize("stream", [False, True])
def test_no_damage_is_an_error_or_another_answer(stream, interrupt, monkeypatch, tmp_path):
    op = regression(stream=stream)
    options = {"key": KEY, "num_steps": 12, "num_probes": 2}
    whole = spectra.slq(op, **options)
    monkeypatch.setattr(saver, "PACE", 0.0)
    interrupt(17)
    with pytest.raises(Killed):
        spectra.slq(op, **options, checkpoint=spectra.Checkpoint(tmp_path / "saved", minutes=0))
    monkeypatch.undo()
    rng = np.random.default_rng(0)
    for _ in range(100):
        folder = tmp_path / "damaged"
        shutil.copytree(tmp_path / "saved", folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in rng.choice(np.array(files, object), rng.integers(1, 4), replace=False):
            kind = rng.choice(["empty", "truncate", "flip", "remove"])
            if kind == "empty":
                emptied(path)
            elif kind == "truncate":
                truncated(path)
            elif kind == "flip":
                flipped(path, rng.uniform())
            else:
                path.unlink()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # what is damaged is said
            again = spectra.slq(op, **options, checkpoint=folder)
        np.testing.assert_array_equal(again.nodes, whole.nodes)
        np.testing.assert_array_equal(again.weights, whole.weights)
        shutil.rmtree(folder)


@pytest.mark.slow
def test_a_full_disk_costs_a_warning_and_nothing_that_was_finished(whole, saved, monkeypatch):
    original = saver.write
    writes = []

    def full(path, tree):
        writes.append(path)
        if len(writes) > 1:
            path.mkdir()
            raise OSError(errno.ENOSPC, "No space left on device")
        original(path, tree)

    monkeypatch.setattr(saver, "write", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        result = spectra.slq(operator(), **OPTIONS, checkpoint=spectra.Checkpoint(saved, steps=4))
    np.testing.assert_array_equal(result.nodes, whole.nodes)
    monkeypatch.undo()
    again = spectra.slq(operator(), **OPTIONS, checkpoint=saved)
    np.testing.assert_array_equal(again.nodes, whole.nodes)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_disk_that_is_full_from_the_start_ends_no_run(whole, tmp_path):
    """The lock holds without the name of its holder, which could not be written."""
    (tmp_path / "lock").symlink_to("/dev/full")
    result = spectra.slq(operator(), **OPTIONS, checkpoint=tmp_path)
    np.testing.assert_array_equal(result.nodes, whole.nodes)


@pytest.mark.parametrize("name", ["a file", "n" * 300, "a file/in it", "a link", "a zero \0"])
def test_a_place_that_can_be_no_folder_is_named(name, tmp_path):
    (tmp_path / "a file").touch()
    (tmp_path / "a link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(spectra.CheckpointError, match=r"cannot be used as a folder: .*Pass one that"):
        spectra.slq(operator(), **OPTIONS, checkpoint=tmp_path / name)


@pytest.mark.slow
def test_only_what_is_new_is_written(monkeypatch, tmp_path):
    written = []
    original = saver.write

    def write(path, tree):
        written.append(path.name)
        original(path, tree)

    monkeypatch.setattr(saver, "write", write)
    monkeypatch.setattr(saver, "PACE", 0.0)
    monkeypatch.setattr(basis, "SMALL", 0)
    options = OPTIONS | {"num_probes": 1, "num_steps": 29}  # which no other test has: compiled with segments
    spectra.slq(operator(), **options, checkpoint=spectra.Checkpoint(tmp_path, steps=8))
    rows = [name for name in written if "rows" in name]
    assert len(rows) == len(set(rows))
    assert rows == [f"probe-00000-of-00029-rows-{i:03d}-008" for i in range(3)]


@pytest.mark.slow
def test_blocks_have_a_checkpoint_each(tmp_path):
    blocks = {"a/b": operator(n=40), "c": operator()}
    first = spectra.slq(blocks, **OPTIONS, checkpoint=tmp_path)
    again = spectra.slq(blocks, **OPTIONS, checkpoint=tmp_path)
    for name in blocks:
        np.testing.assert_array_equal(first[name].nodes, again[name].nodes)


def test_blocks_of_similar_names_share_no_folder_and_none_lies_elsewhere(tmp_path):
    saved = spectra.Checkpoint(tmp_path)
    folders = [saved.child(name).directory for name in ("a/b", "a_b", "a.b", "..", ".", "", "x" * 300, "A/b")]
    assert len(set(folders)) == len(folders)
    assert all(folder.parent == tmp_path and len(folder.name) < 100 for folder in folders)
    assert not {folder.name for folder in folders} & {"..", ".", ""}


def sine_loss(params, x):
    return jnp.mean(jnp.sin(x @ params["w"] + params["b"]) ** 2)


def streamed(kind):
    """An operator whose products read four batches, or twice four."""
    rng = np.random.default_rng(0)
    data = [jnp.asarray(rng.standard_normal((size, 6)), jnp.float32) for size in (9, 9, 9, 4)]
    params = {"w": jnp.asarray(rng.standard_normal((6, 5)) / 2, jnp.float32), "b": jnp.zeros(5)}
    if kind == "covariance":
        return spectra.GradientCovarianceOperator(sine_loss, params, data)
    op = spectra.HessianOperator(sine_loss, params, data)
    return op + spectra.HessianOperator(sine_loss, params, data[::-1]) if kind == "sum" else op


@pytest.mark.slow
@pytest.mark.parametrize("probe_batch", [1, 2])
@pytest.mark.parametrize(
    ("kind", "reads", "saved"),
    [
        ("hessian", 4, (1, 4)),
        ("sum", 8, (2, 6)),
        ("covariance", 4, (3, 5)),
    ],
    ids=["hessian", "sum", "covariance"],
)
def test_a_run_goes_on_within_a_pass_over_a_stream(kind, reads, saved, probe_batch, monkeypatch, tmp_path):
    """A product that was interrupted after k batches needs the others only, and gives the same to the bit."""
    options = {"key": KEY, "num_steps": 10, "num_probes": 2, "probe_batch": probe_batch}
    monkeypatch.setattr(basis, "SMALL", 0)  # more than one segment: no other test has these shapes
    whole = spectra.slq(streamed(kind), **options)
    steps = 10 * 2 // probe_batch
    counted = []
    original = accumulate.Passes.after

    def after(self, count, total):
        counted.append(count)
        if len(counted) == limit:
            raise Killed
        original(self, count, total)

    monkeypatch.setattr(accumulate.Passes, "after", after)
    monkeypatch.setattr(saver, "PACE", 0.0)  # a look at the clock after each batch
    for done in saved:  # batches of the second step, or with 5 of the third
        folder, limit = tmp_path / str(done), reads + done + 1
        with pytest.raises(Killed):
            spectra.slq(streamed(kind), **options, checkpoint=spectra.Checkpoint(folder, minutes=0))
        counted.clear()
        limit = None
        again = spectra.slq(streamed(kind), **options, checkpoint=folder)
        assert len(counted) == reads * steps - (reads + done)
        np.testing.assert_array_equal(again.nodes, whole.nodes)
        np.testing.assert_array_equal(again.weights, whole.weights)
        counted.clear()


HOST = """
import sys, jax, numpy as np, spectra
from spectra.operators import accumulate
from spectra.runs import saver
from spectra.runs.checkpoint import differences

saver.PACE = 0.0
rng = np.random.default_rng(0)
draw = lambda *shape: jax.device_put(rng.standard_normal(shape).astype("f"), jax.devices()[1])
data = [draw(9, 6) for _ in range(4)]
op = spectra.HessianOperator(lambda w, x: jax.numpy.mean(jax.numpy.sin(x @ w) ** 2), draw(6, 5), data)
options = {"key": jax.random.key(3), "num_steps": 4, "num_probes": 1, "basis": "host"}
whole = spectra.slq(op, **options)
original, counted = accumulate.Passes.after, []

def after(self, count, total):
    counted.append(count)
    if len(counted) == 7:
        raise KeyboardInterrupt
    original(self, count, total)

accumulate.Passes.after = after
try:
    spectra.slq(op, **options, checkpoint=spectra.Checkpoint(sys.argv[1], minutes=0))
except KeyboardInterrupt:
    again = spectra.slq(op, **options, checkpoint=sys.argv[1])
    assert len(counted) == 7 + 4 * 4 - 6, counted
    assert (again.nodes == whole.nodes).all()
    assert (again.weights == whole.weights).all()
    print("resumed")
"""


@pytest.mark.slow
def test_a_pass_goes_on_where_the_operator_is_with_the_basis_elsewhere(tmp_path):
    command = [sys.executable, "-c", HOST, str(tmp_path)]
    process = subprocess.run(command, env=environment(2), capture_output=True, text=True, check=False)
    assert process.stdout.strip() == "resumed", process.stderr


@pytest.mark.slow
def test_sums_that_are_no_vectors_of_the_operator_are_not_saved(monkeypatch, tmp_path):
    """Then a product is the unit."""
    inner = streamed("hessian")

    class Restricted(spectra.LinearOperator):
        like = property(lambda self: jnp.zeros(4))
        on_host = True

        def mv(self, v):
            return (inner @ jnp.pad(v, (0, inner.size - 4)))[:4]

    monkeypatch.setattr(saver, "PACE", 0.0)
    options = {"key": KEY, "num_steps": 3, "num_probes": 1}
    whole = spectra.slq(Restricted(), **options)
    original = module.Recorder.save
    saved = []

    def save(self, *args):
        original(self, *args)
        saved.append(self.flight)
        if len(saved) == 6:
            raise Killed

    monkeypatch.setattr(module.Recorder, "save", save)
    with pytest.raises(Killed):
        spectra.slq(Restricted(), **options, checkpoint=spectra.Checkpoint(tmp_path, minutes=0))
    assert not any(flight["sums"] for flight in saved)
    monkeypatch.undo()
    np.testing.assert_array_equal(
        spectra.slq(Restricted(), **options, checkpoint=tmp_path).nodes, whole.nodes
    )


SCRIPT = """
import sys, jax, jax.numpy as jnp, numpy as np, spectra

def loss_fn(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["w"] + params["b"]) @ params["v"] - y) ** 2)

def problem():
    rng = np.random.default_rng(0)
    draw = lambda *shape: (rng.standard_normal(shape) / 4).astype("float32")
    params = {"w": draw(16, 64), "b": draw(64), "v": draw(64, 8)}
    return spectra.Problem(loss_fn, params, (draw(67, 16), draw(67, 8)), name="small")
"""
COMMAND = [
    sys.executable,
    "-c",
    "from spectra.cli.commands import main; main()",
    "run",
    "problem.py",
    "--probes",
    "2",
]


def shell(folder, *options, devices=1):
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*COMMAND, *options], cwd=folder, env=environment(devices), **streams)


def in_this_process(folder, *options):
    """The same command, without the time that an interpreter takes to start."""
    mpl.use("Agg")
    done = CliRunner().invoke(commands.app, ["run", str(folder / "problem.py"), "--probes", "2", *options])
    assert done.exit_code == 0, done.output


def ended_after_its_first_record(folder, saved):
    """What a run says that gets SIGTERM then."""
    process = shell(folder, *saved)
    while not list((folder / "saved").glob("record-*.json")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 75, text
    return text


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
def test_sigterm_ends_with_code_75_and_the_same_command_goes_on_elsewhere(devices, tmp_path):
    """In another process, and on as many devices."""
    (tmp_path / "problem.py").write_text(textwrap.dedent(SCRIPT))
    steps = ("--steps", "32", "--probes", "24")  # few steps compile soon, many probes take a while
    saved = (*steps, "--checkpoint", str(tmp_path / "saved"))
    text = ended_after_its_first_record(tmp_path, (*saved, "--checkpoint-minutes", "0.001"))
    assert "resumes from there" in text
    if devices == 4:
        assert_same_on_four_devices(tmp_path, steps, saved)
    else:
        in_this_process(tmp_path, *saved, "--out", str(tmp_path / "resumed"))
        assert_same(tmp_path, steps)


def assert_same_on_four_devices(tmp_path, steps, saved):
    """The rest on four devices."""
    process = shell(tmp_path, *saved, "--mesh", "data=2,model=2", "--out", "resumed", devices=4)
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 0, text
    assert_same(tmp_path, steps)


def assert_same(tmp_path, steps):
    """As the whole in this process, without interruption."""
    in_this_process(tmp_path, *steps, "--out", str(tmp_path / "whole"))
    one, other = (spectra.load(tmp_path / name / "spectrum.npz").quadrature for name in ("whole", "resumed"))
    size = max(map(abs, one.range))
    assert abs(np.array(other.range) - np.array(one.range)).max() <= 64 * np.finfo("f").eps * size
    for power in (1, 2):
        moments = [q.mean(lambda x, p=power: x**p) for q in (one, other)]
        assert abs(moments[0] - moments[1]) <= 64 * np.finfo("f").eps * size**power


STREAM = """
import time
from spectra.runs import saver
from spectra.runs.checkpoint import differences

saver.PACE = 0.05

class Batches:
    slow = False
    def __iter__(self):
        rng = np.random.default_rng(0)
        for size in (20, 20, 20, 8):
            time.sleep(0.2 * self.slow)
            yield rng.standard_normal((size, 16)).astype("f") / 4, rng.standard_normal((size, 8)).astype("f")

def problem():
    rng = np.random.default_rng(1)
    draw = lambda *shape: (rng.standard_normal(shape) / 4).astype("float32")
    params = {"w": draw(16, 64), "b": draw(64), "v": draw(64, 8)}
    return spectra.Problem(loss_fn, params, Batches(), name="stream")
"""


@pytest.mark.slow  # the parts are tested above: the signal, and going on within a pass
def test_sigterm_between_the_batches_of_a_slow_product(tmp_path):
    script = textwrap.dedent(SCRIPT).split("def problem")[0] + STREAM
    problem = tmp_path / "problem.py"
    problem.write_text(script.replace("slow = False", "slow = True"))
    steps = ("--steps", "20")
    saved = (*steps, "--checkpoint", "saved", "--checkpoint-minutes", "0.005")
    text = ended_after_its_first_record(tmp_path, saved)
    assert re.search(
        r"after step \d+ of probe 1 and [1-4] batches of the next step", " ".join(text.split())
    ), text
    problem.write_text(script)
    assert_same_on_four_devices(tmp_path, steps, saved)
