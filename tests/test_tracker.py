"""The tracker: right numbers, compiled once, within its budget, on disk at every step."""

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import warnings

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import Ridge
from children import environment
from flax import nnx
from jax.flatten_util import ravel_pytree

import spectra
from benchmarks import spikes
from spectra.training import tracker as tracker_module

X = np.random.default_rng(3).standard_normal((40, 6))
BATCH = (jnp.asarray(X, jnp.float32), jnp.asarray(X[:, 0], jnp.float32))
RATE = 0.05


def loss_fn(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["a"]) @ params["b"] - y) ** 2)


def start():
    rng = np.random.default_rng(4)
    return {
        name: jnp.asarray(rng.standard_normal(shape), jnp.float32) / 2
        for name, shape in {"a": (6, 8), "b": (8,)}.items()
    }


def factory(params):
    return spectra.HessianOperator(loss_fn, params, BATCH)


@jax.jit
def descend(params):
    return jax.tree.map(lambda p, g: p - RATE * g, params, jax.grad(loss_fn)(params, BATCH))


def train(tracker, steps, first=0):
    params = start()
    for step in range(first, steps):
        tracker(step, params, loss=loss_fn(params, BATCH), learning_rate=RATE)
        params = descend(params)
    return params


def test_every_snapshot_has_the_eigenvalues_of_the_dense_hessian():
    tracker = spectra.SpectrumTracker(factory, 5, num_eigenvalues=2, tol=1e-3, num_steps=20, num_probes=4)
    params = start()
    for step in range(16):
        snapshot = tracker(step, params)
        if snapshot is None:
            assert step % 5
        else:
            exact = np.linalg.eigvalsh(np.asarray(factory(params).as_matrix(), float))
            scale = np.abs(exact).max()
            # A residual r bounds the error by r; float32 products add 32 eps |H|.
            slack = 1e-3 * scale + 32 * np.finfo(np.float32).eps * scale
            np.testing.assert_allclose(snapshot.eigenvalues, exact[-2:][::-1], atol=slack)
            assert snapshot.largest.lower <= exact[-1] <= snapshot.largest.upper
            assert abs(snapshot.smallest.estimate - exact[0]) <= 0.05 * scale
            # 4 probes of one sphere: five standard errors are missed once in a million.
            assert abs(snapshot.trace.value - exact.sum()) <= 5 * snapshot.trace.stderr
        params = descend(params)
    history = tracker.history
    np.testing.assert_array_equal(history.steps, [0, 5, 10, 15])
    assert history.eigenvalues.shape == (4, 2)
    assert "steps 0 to 15" in repr(history)


@pytest.mark.slow
def test_nothing_is_compiled_after_the_first_snapshot():
    compiled = []

    def listen(name, *_, **__):
        if name == "/jax/core/compile/backend_compile_duration":
            compiled.append(name)

    def own_loss(params, batch):  # of which no other test has compiled anything
        return loss_fn(params, batch)

    points = [start()]
    for _ in range(4):
        points.append(descend(points[-1]))
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        tracker = spectra.SpectrumTracker(
            lambda params: spectra.HessianOperator(own_loss, params, BATCH), every=1
        )
        tracker(0, points[0])
        assert compiled
        compiled.clear()
        for step, params in enumerate(points[1:], 1):
            tracker(step, params)
        assert not compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.slow
def test_warm_starts_need_fewer_products_than_cold_ones():
    tracker = spectra.SpectrumTracker(factory, 1)
    train(tracker, 8)
    products = [s.num_matvecs - s.quadrature.num_matvecs for s in tracker.history]
    assert max(products[1:]) < products[0]


@pytest.mark.slow
def test_an_eigenvalue_that_overtakes_in_an_orthogonal_direction_is_seen():
    """Vectors of the old leading eigenvalue lie in an invariant space without the new one."""
    bulk = np.linspace(0.0, 0.1, 60)

    def diagonal(step):
        return spectra.MatrixOperator(jnp.diag(jnp.asarray([2.0, 1.0 + step, *bulk], jnp.float32)))

    tracker = spectra.SpectrumTracker(diagonal, 1)
    for step in range(5):
        snapshot = tracker(step, float(step))
        # tol = 1e-2 |H|, squared over the gap.
        np.testing.assert_allclose(snapshot.sharpness, max(2.0, 1.0 + step), rtol=1e-3)


@pytest.mark.slow
def test_a_network_that_has_grown_is_begun_anew():
    """Vectors of the network before are no start for it; and a count of tokens is a step, too."""
    small = start()
    grown = {"a": jnp.concatenate([small["a"], small["a"] / 2], axis=1), "b": jnp.ones(16) / 4}
    tracker = spectra.SpectrumTracker(factory, 1, tol=1e-3, num_steps=8)
    for step, params in ((0, small), (1, grown), (2**33, small)):
        snapshot = tracker(step, params)
        matrix = np.asarray(factory(params).as_matrix(), np.float64)
        np.testing.assert_allclose(snapshot.eigenvalues[0], np.linalg.eigvalsh(matrix)[-1], rtol=1e-4)
    assert list(tracker.history.steps) == [0, 1, 2**33]


def test_scalars_callbacks_and_time():
    seen = []
    tracker = spectra.SpectrumTracker(factory, 4, callbacks=[seen.append])
    train(tracker, 9)
    assert [s.step for s in seen] == [0, 4, 8]
    history = tracker.history
    np.testing.assert_allclose(history.scalar("learning_rate"), RATE)
    assert (np.diff(history.scalar("loss")) < 0).all()
    assert np.isnan(history.scalar("accuracy")).all()
    assert (np.diff([s.trained for s in history]) > 0).all()
    assert all(s.seconds > 0 for s in history)


@pytest.mark.slow
def test_numbers_of_any_library_are_recorded_and_others_named():
    tracker = spectra.SpectrumTracker(
        factory, np.int64(2), num_steps=4, measures={"norm": [np.int32(2), lambda p: np.ones((1, 1))]}
    )
    params = start()
    numbers = {"a": jnp.ones(1), "b": np.float32(2), "c": jnp.bfloat16(3), "d": None, "e": 5}
    found = tracker(jnp.int32(0), params, **numbers)
    assert found is not None
    assert found.scalars == {"norm": 1.0, "a": 1.0, "b": 2.0, "c": 3.0, "e": 5.0}
    with pytest.raises(spectra.SpectraError, match=r"loss= is an array of shape \(2,\)"):
        tracker(2, params, loss=jnp.ones(2))
    with pytest.raises(spectra.SpectraError, match=r"loss= is 'low'"):
        tracker(2, params, loss="low")
    for step in (2.5, np.nan):
        with pytest.raises(spectra.SpectraError, match="not the number of a training step"):
            tracker(step, params)
    with pytest.raises(spectra.SpectraError, match="step is None"):
        tracker(None, params)  # pyright: ignore
    with pytest.raises(spectra.SpectraError, match="outside jit"):
        jax.jit(lambda step: tracker(step, params))(2)
    with pytest.raises(spectra.SpectraError, match="outside jit"):
        jax.jit(lambda params: tracker(2, params))(params)
    tracker = spectra.SpectrumTracker(factory, measures={"none": (1, lambda p: None)})
    with pytest.raises(spectra.SpectraError, match="the measure 'none' returned is None"):
        tracker(0, params)


@pytest.mark.slow
def test_a_preconditioned_operator_takes_the_optimizer_state_along():
    optimizer = optax.adam(1e-2)
    params = start()
    _, state = optimizer.update(jax.grad(loss_fn)(params, BATCH), optimizer.init(params))
    tracker = spectra.SpectrumTracker(
        lambda params, state: spectra.PreconditionedOperator(factory(params), state, rule="adam", b2=0.999),
        1,
        tol=1e-3,
    )
    snapshot = tracker(0, params, state)
    exact = np.linalg.eigvalsh(
        np.asarray(
            spectra.PreconditionedOperator(factory(params), state, rule="adam", b2=0.999).as_matrix(), float
        )
    )
    np.testing.assert_allclose(snapshot.sharpness, exact[-1], rtol=1e-3)


def test_an_nnx_loop():
    model = nnx.Linear(6, 1, rngs=nnx.Rngs(0))
    graph, _ = nnx.split(model)

    def loss(params, batch):
        x, y = batch
        return jnp.mean((nnx.merge(graph, params)(x)[:, 0] - y) ** 2)

    tracker = spectra.SpectrumTracker(lambda params: spectra.HessianOperator(loss, params, BATCH), 1)
    ones = np.column_stack([np.ones(40), X])
    exact = np.linalg.eigvalsh(2 * ones.T @ ones / 40)
    snapshot = tracker(0, nnx.state(model, nnx.Param))
    np.testing.assert_allclose(snapshot.sharpness, exact[-1], rtol=1e-5)


@pytest.mark.slow
def test_streamed_data():
    ridge = Ridge()
    tracker = spectra.SpectrumTracker(lambda _: ridge.operator(ridge.parts(4)), 1)
    exact = np.linalg.eigvalsh(ridge.hessian())
    np.testing.assert_allclose(tracker(0, None).sharpness, exact[-1], rtol=1e-5)


class Clock:
    """Time that passes as the test says."""

    now = 0.0

    def perf_counter(self):
        return self.now

    def slow(self, params):
        """A measure that takes half a second."""
        self.now += 0.5
        return 1.0


@pytest.mark.slow
@pytest.mark.parametrize("budget", [0.1, 0.5])
def test_a_budget_bounds_the_share_of_training_time(budget, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(tracker_module, "time", clock)

    def slow(params):
        clock.now += 2.0  # seconds a snapshot
        return factory(params)

    tracker = spectra.SpectrumTracker(slow, 2, budget=budget)
    params, taken = start(), []

    def run():
        for step in range(100):
            if tracker(step, params) is not None:
                taken.append(step)
            clock.now += 1.0  # and a step of training

    with pytest.warns(UserWarning, match="is left out: snapshots and measures have taken") as caught:
        run()
    assert len(caught) == 1
    assert caught[0].filename == __file__  # the line of the training loop
    assert taken[0] == 0
    # Of the first, which compiles, nothing is counted; the second is taken before its cost is known.
    assert 2.0 * (len(taken) - 1) <= budget * 100 + 2.0
    assert len(taken) - 1 >= budget * 100 / 2.0 - 1  # and it is used
    assert sorted([*taken, *tracker.history.skipped]) == list(range(0, 100, 2))
    assert "left out for the budget" in repr(tracker.history)
    assert tracker.history[1].trained >= 2.0


def test_without_a_budget_every_snapshot_is_taken():
    tracker = spectra.SpectrumTracker(factory, 2)
    train(tracker, 11)
    np.testing.assert_array_equal(tracker.history.steps, np.arange(0, 11, 2))
    assert tracker.history.skipped == ()


def same(a, b):
    assert repr(a) == repr(b)
    assert list(a.steps) == list(b.steps)
    for one, other in zip(a, b, strict=True):
        assert one.scalars == other.scalars
        assert one.largest == other.largest
        assert one.trace == other.trace
        np.testing.assert_array_equal(one.quadrature.nodes, other.quadrature.nodes)
        np.testing.assert_array_equal(one.eigenvalues, other.eigenvalues)
        assert one.quadrature.status is other.quadrature.status


def test_the_file_is_whole_after_every_snapshot(tmp_path):
    path = tmp_path / "runs" / "spectrum.jsonl"
    read = []
    tracker = spectra.SpectrumTracker(
        factory, 3, path=path, callbacks=[lambda _: read.append(len(spectra.load(path)))], name="tiny"
    )
    train(tracker, 10)
    assert read == [1, 2, 3, 4]
    same(spectra.load(path), tracker.history)
    same(spectra.load(spectra.save(tracker.history, tmp_path / "all")), tracker.history)
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    path = tmp_path_factory.mktemp("history") / "spectrum.jsonl"
    tracker = spectra.SpectrumTracker(factory, 3, path=path, num_steps=4)
    train(tracker, 7)
    return path.read_bytes(), tracker.history


def test_a_file_torn_at_any_byte_reads_as_what_was_whole(recorded, tmp_path):
    content, history = recorded
    path = tmp_path / "torn.jsonl"
    ends = [i for i, byte in enumerate(content) if byte == ord("\n")]
    # Every byte near an end of line, and a sample of the rest.
    cuts = {0, len(content), *range(0, len(content), 97)}
    cuts |= {cut for end in ends for cut in (end - 1, end, end + 1)}
    for cut in sorted(cuts):
        path.write_bytes(content[:cut])
        whole = content[:cut].count(b"\n") - 1
        if whole < 0:
            with pytest.raises(spectra.ResultFileError):
                spectra.load(path)
        else:
            loaded = spectra.load(path)
            assert list(loaded.steps) == list(history.steps[:whole])


def test_a_run_goes_on_where_a_crash_has_torn_the_file(recorded, tmp_path):
    content, _ = recorded
    path = tmp_path / "torn.jsonl"
    path.write_bytes(content[:-20])
    tracker = spectra.SpectrumTracker(factory, 3, path=path, num_steps=4)
    assert list(tracker.history.steps) == [0, 3]
    train(tracker, 13)
    assert list(spectra.load(path).steps) == [0, 3, 6, 9, 12]
    again = spectra.SpectrumTracker(factory, 3, path=path, num_steps=4)
    train(again, 13)
    assert list(spectra.load(path).steps) == [0, 3, 6, 9, 12]
    assert (np.diff([s.trained for s in spectra.load(path)]) > 0).all()


def test_a_torn_header_is_written_anew(recorded, tmp_path):
    content, _ = recorded
    path = tmp_path / "torn.jsonl"
    path.write_bytes(content[:30])
    train(spectra.SpectrumTracker(factory, 3, path=path, num_steps=4), 4)
    assert list(spectra.load(path).steps) == [0, 3]


def test_of_a_damaged_file_all_is_read_that_is_whole(recorded, tmp_path):
    content, history = recorded
    path = tmp_path / "bad.jsonl"
    lines = content.splitlines(keepends=True)
    rng = np.random.default_rng(0)
    for number, line in enumerate(lines):
        for at in rng.integers(0, len(line) - 1, 12):
            changed = line[:at] + bytes([line[at] ^ int(rng.choice([1, 2, 64, 128]))]) + line[at + 1 :]
            path.write_bytes(b"".join([*lines[:number], changed, *lines[number + 1 :]]))
            with pytest.warns(
                UserWarning, match=r"is damaged in line \d.*2 snapshots are whole|is damaged in line 1,"
            ):
                loaded = spectra.load(path)
            rest = [s for i, s in enumerate(history, 1) if i != number]
            assert [repr(s) for s in loaded] == [repr(s) for s in rest]
            assert loaded.provenance == (history.provenance if number else {})


def test_a_line_that_a_full_disk_has_run_into_the_next_costs_only_itself(recorded, tmp_path):
    """As earlier versions left it: a torn line, then a whole one behind it, on one line."""
    content, history = recorded
    path = tmp_path / "torn.jsonl"
    lines = content.splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], lines[1][:300], *lines[2:]]))
    with pytest.warns(UserWarning, match="is damaged in line 2, which is left out; 2 snapshots"):
        assert list(spectra.load(path).steps) == list(history.steps[1:])


def test_files_without_checksums_are_read(recorded, tmp_path):
    content, history = recorded
    path = tmp_path / "old.jsonl"
    path.write_bytes(re.sub(rb', "crc32": "[0-9a-f]{8}"', b"", content))
    same(spectra.load(path), history)
    tracker = spectra.SpectrumTracker(factory, 3, path=path, num_steps=4)
    train(tracker, 10)
    assert list(spectra.load(path).steps) == [0, 3, 6, 9]


def test_what_is_no_history_is_refused(recorded, tmp_path):
    content, _ = recorded
    path = tmp_path / "bad.jsonl"
    lines = content.splitlines(keepends=True)
    path.write_bytes(lines[0].replace(b'"schema": 1', b'"schema": 9'))
    with pytest.raises(spectra.ResultFileError, match="schema 9"):
        spectra.load(path)
    path.write_bytes(b'{"format": "something else"}\n')
    with pytest.raises(spectra.ResultFileError, match="not a spectra result"):
        spectra.load(path)
    with pytest.raises(spectra.ResultFileError, match="not a spectra result"):
        spectra.SpectrumTracker(factory, path=path)
    assert path.read_bytes() == b'{"format": "something else"}\n'


def test_a_full_disk_costs_no_snapshot_and_ends_no_training(tmp_path):
    """The limit on the size of a file stands for the disk: writing fails within a line."""
    path, limits = tmp_path / "full.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    tracker = spectra.SpectrumTracker(factory, 1, path=path, num_steps=4)
    params, handler = start(), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        tracker(0, params)
        whole = path.read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 500, limits[1]))
        with pytest.warns(UserWarning, match=r"full\.jsonl' cannot be written .*Training goes on") as caught:
            tracker(1, params)
        assert caught[0].filename == __file__
        tracker(2, params)  # without another warning, which would be an error
        assert path.read_bytes() == whole
        assert list(spectra.load(path).steps) == [0]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tracker.history.steps) == [0, 1, 2]
    tracker(3, params)
    same(spectra.load(path), tracker.history)


@pytest.mark.parametrize("content", [b'{"rate": 0.1}', b"words", bytes(range(11, 200))], ids=str)
def test_a_file_of_another_kind_is_left_as_it_is(content, tmp_path):
    """Also one without an end of line, which a torn first line has not either."""
    path = tmp_path / "settings.json"
    path.write_bytes(content)
    with pytest.raises(spectra.ResultFileError, match="stays as it is"):
        spectra.SpectrumTracker(factory, path=path)
    assert path.read_bytes() == content


@pytest.mark.slow
def test_a_file_that_was_removed_is_written_anew_with_all_that_is_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracker = spectra.SpectrumTracker(doubling, 1, path="run/h.jsonl", num_steps=4, name="tiny")
    tracker(0, 0.0)
    shutil.rmtree("run")
    monkeypatch.chdir("/")
    tracker(1, 0.0)
    tracker(2, 0.0)
    same(spectra.load(tmp_path / "run/h.jsonl"), tracker.history)
    assert spectra.load(tmp_path / "run/h.jsonl").provenance["name"] == "tiny"


def test_two_runs_at_one_path_lose_no_snapshot_and_are_noticed(tmp_path):
    path = tmp_path / "shared.jsonl"
    one, other = (spectra.SpectrumTracker(doubling, 1, path=path, num_steps=4) for _ in range(2))
    one(0, 0.0)
    for step, tracker in ((1, other), (2, one)):  # each has one warning
        with pytest.warns(UserWarning, match="changed by something else"):
            tracker(step, 0.0)
    for step in range(3, 7):
        (one if step % 2 == 0 else other)(step, 0.0)
    np.testing.assert_array_equal(spectra.load(path).steps, range(7))


ADDING = """
import sys
from pathlib import Path
from spectra.report.growing import _append
for i in range(400):
    _append(Path(sys.argv[1]), [b"%d\\n" % i])
"""


@pytest.mark.slow
def test_processes_that_add_lines_wait_for_each_other(tmp_path):
    pytest.importorskip("fcntl")
    path = tmp_path / "lines"
    path.touch()
    command = [sys.executable, "-c", ADDING, str(path)]
    running = [subprocess.Popen(command, env=environment()) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert sorted(map(int, path.read_text().split())) == sorted([*range(400)] * 3)


def test_another_run_with_the_path_of_one_is_noticed_by_its_numbers(tmp_path):
    path = tmp_path / "run.jsonl"
    first = spectra.SpectrumTracker(doubling, 1, path=path, num_steps=4)
    for step in range(3):
        first(step, 0.0, loss=2.0 - step, rate=0.1)
    again = spectra.SpectrumTracker(doubling, 1, path=path, num_steps=4)
    again(0, 0.0, loss=2.001, rate=None)  # of a sum in another order
    with pytest.warns(
        UserWarning, match=r"step 1 is in '.*run\.jsonl' already .* loss was 1 there and is 1\.5"
    ):
        again(1, 0.5, loss=1.5)
    again(2, 0.5, loss=1.4)  # one warning is enough
    memory = spectra.SpectrumTracker(doubling, 1, num_steps=4)
    memory(0, 0.0, loss=np.nan)
    memory(0, 0.0, loss=jnp.nan)
    with pytest.warns(UserWarning, match="step 0 is in the history already"):
        memory(0, 0.0, loss=1.0)


def doubling(t):
    return spectra.MatrixOperator((1 + t) * jnp.diag(jnp.linspace(0.0, 1.0, 6)))


def test_a_run_that_goes_back_and_looks_more_often_leaves_a_history_in_order(tmp_path):
    path = tmp_path / "run.jsonl"
    tracker = spectra.SpectrumTracker(doubling, 4, path=path, num_steps=6)
    for step in range(17):
        tracker(step, step / 16)
    tracker = spectra.SpectrumTracker(doubling, 2, path=path, num_steps=6)
    for step in range(9, 15):  # from the checkpoint of step 8
        tracker(step, step / 16)
    for history in (tracker.history, spectra.load(path)):
        np.testing.assert_array_equal(history.steps, [0, 4, 8, 10, 12, 14, 16])
        np.testing.assert_allclose(history.sharpness, 1 + history.steps / 16, rtol=1e-5)
        assert "7, steps 0 to 16" in str(history)
        assert history.cost > 0  # the time trained is that of both runs, whatever was recorded last


def test_a_step_that_was_left_out_twice_counts_once_and_one_taken_later_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "run.jsonl"
    tracker = spectra.SpectrumTracker(doubling, 2, path=path, num_steps=6, budget=0.5)
    monkeypatch.setattr(tracker, "_exceeds_budget", lambda *_: True)
    tracker(0, 0.0)
    with pytest.warns(UserWarning, match="left out"):
        tracker(2, 0.0)
    tracker(2, 0.0)
    tracker(4, 0.0)
    assert tracker.history.skipped == (2, 4)
    again = spectra.SpectrumTracker(doubling, 2, path=path, num_steps=6)
    again(2, 0.0)
    for history in (again.history, spectra.load(path)):
        assert history.skipped == (4,)
        np.testing.assert_array_equal(history.steps, [0, 2])


@pytest.mark.parametrize("name", ["", "a" * 300 + ".jsonl"], ids=["folder", "long"])
def test_a_place_that_cannot_be_written_is_refused_before_training(name, tmp_path):
    with pytest.raises(spectra.SpectraError, match="cannot be written"):
        spectra.SpectrumTracker(factory, path=tmp_path / name)


def test_a_loss_that_diverged_is_recorded_as_it_is(tmp_path):
    path = tmp_path / "spectrum.jsonl"
    tracker = spectra.SpectrumTracker(factory, path=path)
    tracker(0, start(), loss=np.inf, other=jnp.nan)
    assert spectra.load(path)[0].scalars["loss"] == np.inf
    assert np.isnan(spectra.load(path).scalar("other")).all()
    assert "NaN" not in path.read_text()


def test_parameters_that_are_not_numbers_are_an_error():
    tracker = spectra.SpectrumTracker(factory, 1)
    with pytest.raises(spectra.NonFiniteError, match="holds NaN"):
        tracker(0, jax.tree.map(lambda x: x * jnp.nan, start()))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"every": 0}, "every=0"),
        ({"every": 2.5}, r"every=2\.5"),
        ({"budget": 0.0}, r"budget=0\.0"),
        ({"op_factory": 3}, "op_factory is a int"),
    ],
)
def test_bad_arguments(options, match):
    with pytest.raises(spectra.SpectraError, match=match):
        spectra.SpectrumTracker(**({"op_factory": factory} | options))


def test_an_empty_history_says_so():
    history = spectra.SpectrumTracker(factory).history
    assert "none yet" in repr(history)
    assert len(history.steps) == 0


def test_measures_have_intervals_of_their_own_and_their_last_readings_are_saved(tmp_path):
    def length(params):
        return jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(params)))

    path = tmp_path / "run.jsonl"
    tracker = spectra.SpectrumTracker(factory, 6, path=path, measures={"length": (2, length)}, num_steps=4)
    seen = []
    params = start()
    for step in range(9):
        tracker(step, params)
        seen.append(float(length(params)))
        params = descend(params)
    steps, values = tracker.console.curve("length")
    np.testing.assert_array_equal(steps, [0, 2, 4, 6, 8])
    np.testing.assert_allclose(values, seen[::2], rtol=1e-6)
    np.testing.assert_allclose(spectra.load(path).scalar("length"), [seen[0], seen[6]], rtol=1e-6)
    tracker(8, params)  # a step that was measured is not measured again
    assert len(tracker.console.readings["length"]) == 5


def test_measures_share_the_budget(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(tracker_module, "time", clock)
    tracker = spectra.SpectrumTracker(
        factory, 10**6, budget=0.2, measures={"slow": (1, clock.slow)}, num_steps=4
    )
    params = start()
    for step in range(1, 101):  # no snapshot
        tracker(step, params)
        clock.now += 1.0
    taken, left_out = len(tracker.console.readings["slow"]), tracker.console.left_out["slow"]
    assert taken + left_out == 100
    # The first is not counted, of the second the cost is not known.
    assert 0.5 * (taken - 1) <= 0.2 * 100 + 0.5
    assert 0.5 * (taken - 1) >= 0.2 * 100 - 1.0


def test_no_measure_is_taken_where_another_has_spent_the_budget(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(tracker_module, "time", clock)
    measures = dict.fromkeys([f"slow {i}" for i in range(8)], (1, clock.slow))
    tracker = spectra.SpectrumTracker(factory, 10**6, budget=0.2, measures=measures, num_steps=4)
    for step in range(1, 11):
        tracker(step, start())
        clock.now += 1.0
    # The first of each is not counted; of the second of one alone the cost is not known.
    assert tracker.console.seconds <= 0.2 * 10 + 0.5


def test_a_reading_below_its_limit_warns_once():
    values = iter([2.0, 0.9, 0.8, 1.5, 0.7])
    tracker = spectra.SpectrumTracker(
        factory, 10**6, measures={"m": (1, lambda params: next(values))}, warn_below={"m": 1.0}
    )
    params, warned = start(), []
    for step in range(1, 6):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tracker(step, params)
        warned += [(step, str(w.message)) for w in caught]
        assert {w.filename for w in caught} <= {__file__}  # the line of the training loop
    assert [step for step, _ in warned] == [2, 5]
    assert "m = 0.9 has fallen below 1" in warned[0][1]


def warned(values, every=10, **options):
    """Steps and texts of the warnings about a measure that gives these values."""
    readings, found = iter(values), []
    tracker = spectra.SpectrumTracker(
        factory,
        10**6,
        measures={"m": (every, lambda params: next(readings))},
        warn_below={"m": 1.0},
        **options,
    )
    for step in range(every, every * (len(values) + 1), every):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tracker(step, None)
        found += [(step, str(w.message)) for w in caught]
    return found


def test_a_course_that_leads_below_the_limit_warns_ahead():
    falling = 4.0 * 0.8 ** np.arange(12)  # below 1 from the seventh reading on: log 4 / log 1.25 = 6.2
    [(step, text)] = warned(falling, warn_ahead=30)
    # In steps of ten the crossing is at 72.1: within 30 steps from the fifth reading on, at 50.
    assert step == 50
    assert "will fall below 1 in about 22 steps" in text
    assert [step for step, _ in warned(falling)] == [80]
    assert [step for step, _ in warned(-falling[::-1] + 2, warn_ahead=30)] != []  # numbers of any sign


def test_a_reading_is_shown_on_its_own_side_of_the_limit():
    [(_, text)] = warned([2.0, 0.99999])
    assert "m = 0.9999 has fallen below 1" in text  # and not 1


def test_no_course_no_warning():
    rng = np.random.default_rng(2)
    assert warned(1.5 + 2.5 * 0.8 ** np.arange(30), warn_ahead=30) == []  # levels out at 1.5
    assert warned(1.7 * np.exp(0.15 * rng.standard_normal(400)), warn_ahead=60) == []  # noise alone
    assert warned([3.0, 2.0, 1.1], warn_ahead=50) == []  # too few for a course
    # What hovers about the limit is one alarm; after as long as one looks ahead without, another is news.
    assert [step for step, _ in warned([0.9, 1.1] * 10 + [3.0] * 8 + [0.5], warn_ahead=30)] == [10, 290]
    assert warned([np.inf, np.inf, np.inf, np.inf, 5.0], warn_ahead=50) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", spikes.PROVOKED)
def test_a_spike_is_seen_20_steps_ahead(name):
    found = spikes.follow(spikes.PROVOKED[name], seed=2)
    assert found.spike is not None
    assert found.warned[-1] <= found.spike - 20


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) for n in spikes.QUIET])
def test_a_quiet_run_has_no_warning(name):
    found = spikes.follow(spikes.QUIET[name], seed=2)
    assert found.spike is None
    assert found.warned == []


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"warn_ahead": -1}, "warn_ahead=-1"),
        ({"measures": {"m": 3}}, "not a pair"),
        ({"measures": {"m": (0, float)}}, "every=0"),
        ({"warn_below": {"m": 1.0}}, "not among the measures"),
    ],
)
def test_measures_that_are_none_are_refused(options, match):
    with pytest.raises(spectra.SpectraError, match=match):
        spectra.SpectrumTracker(factory, **options)


def sure_loss(params, batch):
    x, y = batch
    z = jnp.tanh(x @ params["a"]) @ params["b"]
    return jnp.mean(jax.nn.logsumexp(z, -1) - jnp.take_along_axis(z, y[:, None], 1)[:, 0])


def test_bounds_hold_where_a_classifier_is_sure_of_its_examples():
    """1 - p of a probability near one has few digits in float32: 2 of 13 bounds of λmax did not hold, as few
    steps show less asymmetry than rounding makes."""
    taken = 0
    with jax.enable_x64(True):
        dense = jax.jit(jax.hessian(lambda flat, x, y: sure_loss(unflatten(flat), (x, y))))
    for seed in (1, 3, 5, 8, 15, 17):
        rng = np.random.default_rng(seed)
        x, a = (rng.standard_normal(shape).astype(np.float32) for shape in ((64, 6), (6, 8)))
        params = {"a": a, "b": (8 * rng.standard_normal((8, 3))).astype(np.float32)}
        logits = np.tanh(x @ params["a"]) @ params["b"]
        ordered = np.sort(logits, axis=1)
        sure = np.argsort(ordered[:, 1] - ordered[:, 2])[:40]
        batch = x[sure], logits.argmax(axis=1)[sure].astype(np.int32)
        with jax.enable_x64(True):
            flat = np.concatenate([params[name].ravel() for name in ("a", "b")]).astype(float)
            values = np.linalg.eigvalsh(np.asarray(dense(flat, batch[0].astype(float), batch[1])))
        op = spectra.HessianOperator(sure_loss, *jax.tree.map(jnp.asarray, (params, batch)))
        try:
            snapshot = spectra.SpectrumTracker(lambda _, op=op: op, 1)(0, params)
        except spectra.NotSymmetricError:  # on some processors
            continue
        taken += 1
        assert snapshot.quadrature.rounding > 4 * snapshot.quadrature.precision
        assert snapshot.largest.lower <= values[-1]
        assert values[0] <= snapshot.smallest.upper
        assert np.abs(values - snapshot.eigenvalues[0]).min() <= (
            snapshot.residuals[0] + snapshot.quadrature.noise_floor
        )
    assert taken >= 2


def unflatten(flat):
    return {"a": flat[:48].reshape(6, 8), "b": flat[48:].reshape(8, 3)}


# Of two classifiers along their training, whose products are as symmetric as float32 says.
QUIET = {
    13: (
        [[-5.62100267, -1.83941495, 9.81947231, 4.98053503], [1.9759016, -2.19075155, -4.7082305, 4.92055988],
         [-3.73984885, -2.0969367, -4.180264, -6.13238955], [-0.750674427, -0.292623699, -4.16236877,
         -4.64498186], [1.21271884, -2.68700624, -2.77775884, 0.453991085]],
        [[1.81116927, 3.48548627, 0.772700846], [-1.97266543, 0.573505104, -1.02448559],
         [3.61432767, -1.75475574, -2.5516417], [-0.949819684, 5.67083836, -1.50888324]],
    ),
    17: (
        [[4.97650385, 4.548666, -0.854567885, -5.89427519], [-2.43773961, 0.177029759, -7.19110918,
         -1.51716399], [-1.96748793, -5.10500288, 7.36672306, 1.71514368], [-1.25187612, -1.025267,
         -0.108462505, 4.00183582], [-3.89022899, 0.385206103, 0.11081697, -5.25272322]],
        [[4.13661575, -4.05504465, -0.67576623], [2.06397319, -0.959014714, -7.37783623],
         [-0.261394292, -6.76483297, 3.05878258], [-1.16775131, 0.61391896, -2.58856893]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("seed", QUIET)
def test_bounds_hold_where_asymmetry_does_not_show_what_a_loss_rounds(seed):
    """λmax was 18 units of rounding off, of which the bound took 16 into account."""
    rng = np.random.default_rng(seed)
    rng.uniform()
    x = rng.standard_normal((40, 5)).astype(np.float32)
    batch = x, x[:, :3].argmax(axis=1).astype(np.int32)
    params = dict(zip("ab", (np.array(part, np.float32) for part in QUIET[seed]), strict=True))
    with jax.enable_x64(True):
        flat = np.concatenate([part.ravel() for part in params.values()]).astype(float)
        dense = jax.hessian(
            lambda v: sure_loss(
                {"a": v[:20].reshape(5, 4), "b": v[20:].reshape(4, 3)}, (x.astype(float), batch[1])
            )
        )
        values = np.linalg.eigvalsh(np.asarray(dense(flat)))
    op = spectra.HessianOperator(sure_loss, *jax.tree.map(jnp.asarray, (params, batch)))
    tracker = spectra.SpectrumTracker(lambda _: op, 1, key=jax.random.key(seed), num_probes=2, num_steps=20)
    snapshot = tracker(0, params)
    assert snapshot.largest.lower <= values[-1] <= snapshot.largest.upper
    assert snapshot.smallest.lower <= values[0] <= snapshot.smallest.upper
    # Four floors of 256 units: what was measured is less, up to 104 of them.
    assert snapshot.largest.estimate - snapshot.largest.lower <= 4.01 * 256 * np.finfo("f").eps * values[-1]


def deep_loss(params, batch):
    x, y = batch
    for w in params[:-1]:
        x = jax.nn.relu(x @ w.astype(x.dtype))
    z = (x @ params[-1].astype(x.dtype)).astype(y.dtype)
    return jnp.mean(jax.nn.logsumexp(z, -1) - jnp.sum(y * z, -1))


def deep(seed):
    """Parameters, data, and the eigenvalues of the Hessian in float64, of a network of six layers."""
    rng = np.random.default_rng(seed)
    params = [(4 * rng.standard_normal(s) / s[0] ** 0.5).astype("f") for s in [(4, 6), *3 * [(6, 6)], (6, 2)]]
    x, y = rng.standard_normal((40, 4)).astype("f"), np.eye(2, dtype="f")[rng.integers(0, 2, 40)]
    with jax.enable_x64(True):
        wide = [jnp.asarray(w, float) for w in params]
        flat, unflat = ravel_pytree(wide)
        batch = x.astype(float), y.astype(float)
        values = np.linalg.eigvalsh(np.asarray(jax.hessian(lambda v: deep_loss(unflat(v), batch))(flat)))
    return jax.tree.map(jnp.asarray, (params, (x, y))), values


def test_bounds_hold_of_a_deep_network_whose_products_are_symmetric():
    """λmax was 265 to 395 units of rounding off, with an asymmetry below four of them.

    At first |H| is small, so that products in float64 are asked for at no later step.
    """
    tracker = spectra.SpectrumTracker(lambda op: op, 1)
    for step, seed in enumerate((26, 178, 200)):
        (params, batch), values = deep(seed)
        if step == 0:
            tracker(0, spectra.HessianOperator(tiny_loss, params, batch))
        snapshot = tracker(step + 1, spectra.HessianOperator(deep_loss, params, batch))
        assert snapshot.largest.lower <= values[-1] <= snapshot.largest.upper
        assert values[0] <= snapshot.smallest.upper


def tiny_loss(params, _):
    return 1e-9 * sum(jnp.sum(x**2) for x in jax.tree.leaves(params))


def test_rounding_is_measured_of_a_network_in_bfloat16():
    """256 of its roundings would be twice |H|, and the bound of λmax negative."""
    (params, (x, y)), _ = deep(0)
    op = spectra.HessianOperator(deep_loss, params, (x.astype(jnp.bfloat16), y))
    snapshot = spectra.SpectrumTracker(lambda _: op, 1)(0, params)
    assert 0 < snapshot.quadrature.rounding < 0.25
