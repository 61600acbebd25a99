"""Results are one family: plain values, tables, files, pictures and statuses, from every one of them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest

import spectra
from spectra.report.encode import CLASSES
from spectra.results import Named, Result

KEY = jax.random.key(0)
EIGENVALUES = np.linspace(-1.0, 3.0, 60)


def loss_fn(params, x):
    return jnp.mean((jnp.tanh(x @ params["hidden"]) @ params["out"]) ** 2)


def model_fn(params, x):
    return jnp.tanh(x @ params["hidden"]) @ params["out"]


def of_data(params, x):
    """Results about samples, updates, classes and compression."""
    loss = spectra.HessianOperator(loss_fn, params, x)
    moments = spectra.GradientCovarianceOperator(loss_fn, params, x)
    logits = spectra.GGNOperator(
        lambda w, x: x @ w,
        lambda logits, labels: -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels]),
        jnp.ones((4, 2)),
        (x, jnp.arange(len(x)) % 2),
    )
    sgd = optax.sgd(0.1)
    return [
        spectra.gradient_noise_scale(moments),
        spectra.population(loss, key=KEY, num_batches=8),
        spectra.perturbation(loss, spectra.pruning_deltas(loss)),
        spectra.class_split(logits, key=KEY, num_eigenvalues=1, num_matvecs=8),
        spectra.step_quality(loss, loss.gradient()),
        spectra.gradient_overlap(loss, spectra.eigsh(loss, 2, key=KEY)),
        spectra.stable_step(loss, sgd, sgd.init(params), key=KEY),
    ]


@pytest.fixture(scope="module")
def made():
    """One result of each class by name."""
    op = spectra.MatrixOperator(jnp.diag(jnp.asarray(EIGENVALUES)))
    x = jax.random.normal(KEY, (32, 4))
    params = {"hidden": jax.random.normal(KEY, (4, 3)), "out": jnp.ones(3)}
    loss = spectra.HessianOperator(loss_fn, params, x)
    report = spectra.spectrum(op, key=KEY, num_steps=20, num_probes=2)
    pairs = spectra.eigsh(loss, 2, key=KEY)
    tracker = spectra.SpectrumTracker(lambda params: spectra.HessianOperator(loss_fn, params, x), 1, key=KEY)
    for step in range(2):
        tracker(step, params, loss=0.5)
    results = [
        report,
        report.quadrature,
        report.density,
        report.trace,
        pairs,
        tracker.history,
        tracker.history[0],
        spectra.kpm(op, key=KEY, num_moments=20, num_probes=2),
        spectra.lanczos(op, jnp.ones(60), 5),
        spectra.condition_number(loss, key=KEY),
        spectra.condition_number(loss, key=KEY, per_layer=True),
        spectra.plan(loss, num_steps=5, num_probes=2),
        spectra.loss_slice(loss, pairs, num_points=3),
        spectra.data_variability(loss, key=KEY, num_steps=5),
        spectra.critical_sharpness(loss_fn, params, x, jax.grad(loss_fn)(params, x)),
        spectra.summary(loss, key=KEY),
        spectra.compare_operators(loss, loss.shift(0.1), key=KEY),
        *of_data(params, x),
        spectra.solve(op, jnp.ones(60), shift=2.0),
        spectra.funm(op, "exp", jnp.ones(60), num_steps=16),
        spectra.svds(spectra.JacobianOperator(model_fn, params, x), 2, key=KEY),
    ]
    return {type(result).__name__: result for result in results}


def test_what_holds_several_results_prints_as_a_table(made):
    several = [result for result in made.values() if isinstance(result, Named)]
    assert several
    for result in several:
        head, *lines = repr(result).splitlines()
        assert head.split() == " ".join(result.table()[0]).split()
        assert [line.split()[0] for line in lines] == list(result) == list(result.keys())
        assert dict(result.items()) == {name: result[name] for name in result}
        assert list(result.values()) == [result[name] for name in result]


def test_arrays_have_the_axes_that_their_fields_state(made):
    """And the names of axes mean the same in all fields of a result."""
    scope = {"Array": np.ndarray, "Bool": jaxtyping.Bool, "Float": jaxtyping.Float, "Int": jaxtyping.Int}
    checked = set()
    for name, result in made.items():
        with jaxtyping.jaxtyped("context"):
            for field in dataclasses.fields(result):
                value = getattr(result, field.name)
                if "[Array, " not in str(field.type) or value is None:
                    continue
                kind = eval(field.type, scope)
                assert isinstance(np.asarray(value), kind), (name, field.name, field.type, np.shape(value))
                checked.add(name)
    assert checked >= {"Quadrature", "Density", "Eigenpairs", "Tridiagonal", "Solution", "DataVariability"}


def test_metrics_are_the_numbers_of_the_records(made):
    report, table, history = (made[name] for name in ("SpectrumReport", "Summary", "SpectrumHistory"))
    assert report.metrics()["trace/value"] == report.trace.value
    rows = {row["layer"]: row for row in table.records()}
    assert table.metrics()["hidden/largest"] == rows["hidden"]["largest"]
    assert history[1].metrics()["largest"] == history[1].sharpness
    assert history.metrics()["1/loss"] == 0.5
    for result in made.values():
        found = result.metrics()
        assert all(type(value) is float for value in found.values())
        assert not any(name.endswith("status") for name in found)
    bare = dataclasses.replace(report.trace, stderr=np.inf)
    assert bare.metrics()["stderr"] == np.inf  # "inf" in the records


def test_what_training_recorded_replaces_no_other_number(made):
    snapshot = made["Snapshot"]
    recorded = {"trace": 7.0, "largest": 8.0, "seconds": 9.0, "loss": 0.5}
    row = dataclasses.replace(snapshot, scalars=recorded).records()[0]
    assert (row["trace"], row["largest"]) == (snapshot.trace.value, snapshot.sharpness)
    assert row["seconds"] == snapshot.seconds
    assert [row[f"scalar_{name}"] for name in ("trace", "largest", "seconds")] == [7.0, 8.0, 9.0]
    assert row["loss"] == 0.5


@pytest.mark.slow
def test_a_history_is_a_dataset(made):
    pytest.importorskip("xarray")
    history = made["SpectrumHistory"]
    first, second = history
    short = spectra.Quadrature(
        **{
            field.name: getattr(second.quadrature, field.name)[:, :-1]
            if field.name in ("nodes", "weights", "residuals")
            else None
            if field.name == "coefficients"
            else getattr(second.quadrature, field.name)
            for field in dataclasses.fields(second.quadrature)
        }
    )
    values = np.append(second.eigenvalues, -9.0)  # of a run continued with another k
    second = dataclasses.replace(
        second, quadrature=short, scalars={"trace": 3.0, "node": 4.0}, eigenvalues=values
    )
    data = dataclasses.replace(history, snapshots=(first, second)).to_xarray()
    assert data.sel(step=1)["largest"].sel(end="estimate") == second.sharpness
    assert data["scalar_trace"].values.tolist()[1] == 3.0
    assert data["scalar_node"].values.tolist()[1] == 4.0
    np.testing.assert_array_equal(data["trace"], history.trace)
    np.testing.assert_array_equal(data["loss"], [0.5, np.nan])
    np.testing.assert_array_equal(data["nodes"][0], first.quadrature.nodes)
    np.testing.assert_array_equal(data["nodes"][1, :, :-1], short.nodes)
    assert np.isnan(data["nodes"][1, :, -1]).all()
    assert not data["weights"][1, :, -1].any()
    np.testing.assert_array_equal(data["eigenvalues"], [[*first.eigenvalues, np.nan], values])
    assert dataclasses.replace(history, snapshots=()).to_xarray().sizes["step"] == 0


def test_there_is_one_of_every_class_that_files_hold(made):
    assert set(made) == set(CLASSES) - {"Interval"}


def test_every_result_is_a_frozen_pytree_with_a_status(made):
    for name, result in made.items():
        assert isinstance(result, Result), name
        assert isinstance(result.status, spectra.Status), name
        first = dataclasses.fields(result)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(result, first, None)
        leaves, treedef = jax.tree.flatten(result)
        assert repr(jax.tree.unflatten(treedef, leaves)) == repr(result), name


def test_every_result_is_json_that_any_reader_takes(made):
    for name, result in made.items():
        plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
        assert plain == result.to_dict(), name
        bulky = set(result._BULKY)
        assert set(plain) == {field.name for field in dataclasses.fields(result)} - bulky, name


def test_every_result_is_saved_and_comes_back(made, tmp_path):
    for name, result in made.items():
        loaded = spectra.load(result.save(tmp_path / name))
        assert repr(loaded) == repr(result), name
        assert loaded.status is result.status


def test_pictures_are_drawn_where_there_is_one(made):
    without = {
        *("Estimate", "Tridiagonal", "ConditionNumber", "LayerConditions", "Plan", "DataVariability"),
        "FunctionProduct",
        "SingularTriplets",
        "Sharpness",
        "OperatorComparison",
        *("Sharpness", "NoiseScale", "Population", "Perturbation", "ClassSplit"),
        *("StepQuality", "GradientOverlap", "StableStep"),
        "Solution",
    }
    import matplotlib.pyplot as plt

    for name, result in made.items():
        if name in without:
            with pytest.raises(spectra.SpectraError, match="has no picture"):
                result.plot()
        else:
            axes = np.ravel(result.plot())
            assert axes[0].has_data(), name
            plt.close(axes[0].figure)


def test_plain_values_are_those_of_the_fields(made):
    quadrature = made["Quadrature"]
    plain = quadrature.to_dict()
    np.testing.assert_array_equal(plain["nodes"], quadrature.nodes)
    assert plain["status"] == "complete"
    assert plain["size"] == 60
    report = made["SpectrumReport"].to_dict()
    assert report["largest"]["estimate"] == float(made["SpectrumReport"].largest.estimate)
    assert report["provenance"]["operator"] == "MatrixOperator"


def test_infinity_and_nan_have_a_plain_form():
    estimate = spectra.Estimate(np.inf, np.nan, 3, "slq", lower={"a": np.array([-np.inf, 1.0])})
    plain = estimate.to_dict()
    assert (plain["value"], plain["stderr"], plain["lower"]) == ("inf", "nan", {"a": ["-inf", 1.0]})
    assert float(plain["value"]) == np.inf


def test_a_result_inside_jit_has_no_plain_form_yet():
    op = spectra.MatrixOperator(jnp.diag(jnp.arange(4.0)))

    def traced(v):
        with pytest.raises(spectra.SpectraError, match="inside jit"):
            spectra.lanczos(op, v, 2).to_dict()
        return v

    jax.jit(traced)(jnp.ones(4))


def test_scalars_with_an_error_are_numbers(made):
    trace, condition = made["Estimate"], made["ConditionNumber"]
    assert float(trace) == trace.value
    assert f"{trace:.3g}" == f"{trace.value:.3g}"
    assert f"{trace}" == repr(trace)
    assert float(condition) == condition.value
    assert f"{made['Sharpness']:.2e}" == f"{made['Sharpness'].value:.2e}"
    diagonal = spectra.diagonal(spectra.MatrixOperator(jnp.eye(3)), key=KEY)
    with pytest.raises(TypeError, match="several numbers"):
        float(diagonal)


def test_every_result_prints_as_people_read_it(made):
    for name, result in made.items():
        text = str(result)
        assert "rray(" not in text, (name, text)
        assert max(map(len, text.splitlines())) <= 200, (name, text)
    for name in ("LayerConditions", "Summary"):
        head, *rows = str(made[name]).splitlines()
        assert head.split()[:2] == ["layer", "n"]
        assert [row.split()[0] for row in rows] == list(made[name])


def test_records_have_a_row_for_each_part(made):
    pandas = pytest.importorskip("pandas")
    rows = {"Eigenpairs": 2, "SpectrumHistory": 2, "LayerConditions": 2, "Summary": 2, "SpectrumReport": 1}
    for name, count in rows.items():
        records = made[name].records()
        assert len(records) == count, name
        json.dumps(records, allow_nan=False)
        frame = made[name].to_dataframe()
        assert isinstance(frame, pandas.DataFrame)
        assert list(frame.columns) == list(records[0])
    history = made["SpectrumHistory"].to_dataframe()
    assert history["loss"].tolist() == [0.5, 0.5]
    np.testing.assert_array_equal(history["largest"], made["SpectrumHistory"].sharpness)
    conditions = made["LayerConditions"].to_dataframe()
    assert conditions["value"].dtype == np.float64  # with its infinities


def test_records_of_every_result_are_json_whatever_numbers_they_hold(made):
    """JSON knows no infinity and no NaN: they are texts, as in `to_dict`."""
    for result in made.values():
        json.dumps(result.records(), allow_nan=False)
    comparison = dataclasses.replace(made["OperatorComparison"], frobenius=spectra.Interval(0.1, 0.2, np.inf))
    assert comparison.records()[0]["upper"] == "inf"
    assert comparison.metrics()["whole/upper"] == np.inf


@pytest.mark.slow
def test_a_summary_holds_the_truth_of_every_block():
    x = jax.random.normal(KEY, (32, 4))
    params = {"hidden": jax.random.normal(KEY, (4, 3)), "out": jnp.ones(3)}
    op = spectra.HessianOperator(loss_fn, params, x)
    for row in spectra.summary(op, key=KEY, num_probes=4).records():
        values = np.linalg.eigvalsh(np.asarray(op.block(row["layer"]).as_matrix(), np.float64))
        truths = {
            "largest": values[-1],
            "smallest": values[0],
            "trace": values.sum(),
            "stable_rank": np.sum(values**2) / np.max(np.abs(values)) ** 2,
            "negative": np.mean(values < -row["noise_floor"]),
        }
        assert row["n"] == len(values)
        rounding = 12 * np.finfo(np.float32).eps * np.abs(values).max() * len(values)
        for name, truth in truths.items():
            low, high = row[f"{name}_lower"] - rounding, row[f"{name}_upper"] + rounding
            assert low <= truth <= high, (row["layer"], name)
        sizes = np.abs(values)
        assert row["condition_at_least"] <= (1 + 1e-5) * sizes.max() / sizes[sizes > row["noise_floor"]].min()


def test_small_blocks_of_a_summary_are_known_exactly():
    """As `spectrum` and `condition_number` know them, for no more products than their order."""
    x = jax.random.normal(KEY, (64, 12))
    params = {"hidden": jax.random.normal(KEY, (12, 5)), "out": jnp.linspace(0.5, 1.5, 5)}
    op = spectra.HessianOperator(loss_fn, params, x)
    table = spectra.summary(op, key=KEY, num_steps=10, num_probes=2)
    sizes = {row["layer"]: (row["status"], row["num_matvecs"]) for row in table.records()}
    assert sizes == {"hidden": ("complete", 20), "out": ("exact", 5)}
    small = next(row for row in table.records() if row["layer"] == "out")
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda v: jnp.asarray(np.asarray(v), jnp.float64), (params, x))
        values = np.linalg.eigvalsh(spectra.HessianOperator(loss_fn, *wide).block("out").as_matrix())
    for name, truth in {"largest": values[-1], "smallest": values[0], "trace": values.sum()}.items():
        assert small[f"{name}_lower"] <= truth <= small[f"{name}_upper"]
        assert small[f"{name}_upper"] - small[f"{name}_lower"] <= 1e-5 * values[-1]
    low, high = small["condition_at_least"], small["condition_at_most"]
    assert low <= values[-1] / values[0] <= high <= 1.001 * low
    found = spectra.condition_number(op.block("out"), key=KEY)
    np.testing.assert_allclose((low, high), found.effective_interval[::2], rtol=1e-6)
    assert small["noise_floor"] == pytest.approx(found.noise_floor, rel=1e-12)
    report = spectra.spectrum(op.block("out"), key=KEY)
    assert report.noise_floor == small["noise_floor"]
    assert dict(report.rows())["effective condition number"] == found.text
    assert found.text in str(table)


def test_a_summary_of_results_costs_nothing_and_needs_names(made):
    table = spectra.summary({"a": made["Quadrature"], "b": made["SpectrumReport"]})
    assert list(table) == ["a", "b"]
    assert table["b"] is made["SpectrumReport"].quadrature
    with pytest.raises(spectra.SpectraError, match="key=None"):
        spectra.summary(spectra.MatrixOperator(jnp.eye(3)))


def test_functions_take_what_people_hold(made):
    report, quadrature = made["SpectrumReport"], made["Quadrature"]
    assert spectra.count_above(report, 0.5).value == spectra.count_above(quadrature, 0.5).value
    np.testing.assert_array_equal(
        spectra.spectral_density(report).density, spectra.spectral_density(quadrature).density
    )
    assert spectra.spectral_distances([report, quadrature])[0, 1] == 0
    with pytest.raises(spectra.SpectraError, match="pass the quadrature"):
        spectra.plot_cdf(made["Density"])
    with pytest.raises(spectra.SpectraError, match="a SpectrumHistory is needed"):
        spectra.plot_density_over_time(report)
    with pytest.raises(spectra.SpectraError, match="a LossSlice is needed"):
        spectra.plot_landscape(report)


def test_plots_draw_the_same_of_all_that_contains_it(made):
    import matplotlib.pyplot as plt

    report = made["SpectrumReport"]
    for held in (report, report.quadrature, report.density):
        line = spectra.plot_density(held).get_lines()[0]
        np.testing.assert_array_equal(line.get_xdata(), report.density.grid)
    assert len(spectra.plot_blocks(report)) == 1
    lines = spectra.plot_density({"a": report, "b": report.quadrature}).get_lines()
    assert [line.get_label() for line in lines] == ["a", "b"]
    ax = plt.subplots()[1]
    assert made["Summary"].plot(ax).tolist() == [ax]
    plt.close("all")
