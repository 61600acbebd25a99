"""Sentences and numbers in print: what is printed holds as printed, and says no more than the result."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import diagonal

import spectra
from spectra.results import text

KEY = jax.random.key(0)


def test_printed_intervals_contain_those_that_are_stated():
    rng = np.random.default_rng(0)
    for _ in range(3000):
        value = rng.choice([-1, 1]) * 10 ** rng.uniform(-30, 30)
        error = abs(value) * 10 ** rng.uniform(-14, 2)
        printed, half = map(float, text.within(value, error).split(" ± "))
        slack = 4 * np.finfo(float).eps * abs(value)  # of two ends in float64
        assert printed - half - slack <= value - error
        assert value + error <= printed + half + slack
        assert half <= 1.25 * error + slack  # two digits, rounded up
        digits = int(rng.integers(1, 5))
        low, high = map(float, text.span(value, value + error, digits)[1:-1].split(", "))
        assert low <= value < value + error <= high
        # The number beside an error is off by no more than the second digit of it.
        printed, _ = map(float, text.measured(value, error).split(" ± "))
        assert abs(printed - value) <= 0.06 * error + slack


def test_bounds_that_need_no_rounding_are_not_moved():
    for value in (70.1, 0.29, -1.1, 1e-7, 3.0):
        assert float(text.directed(value, True, 3)) == float(text.directed(value, False, 3)) == value
    assert text.enclosed(1 / 3, 1 / 3, 1 / 3) == "0.333"
    assert text.enclosed(14.5, 11.96, 17.31) == "14.5 [11.9, 17.4]"


@pytest.mark.slow
def test_what_a_report_prints_holds_as_printed():
    values = np.r_[np.linspace(-0.3, 1.0, 3000), 5.0, 7.0]
    for report in (
        spectra.spectrum(diagonal(values), key=KEY, num_steps=30, num_probes=4),
        spectra.spectrum(diagonal(values[::20]), key=KEY),  # exact
    ):
        rows = dict(report.rows())
        value, error = map(float, rows["trace"].split(" ± "))
        # The trace is printed up to the second digit of its standard error.
        assert abs(value - report.trace.value) <= 0.06 * error
        counts = re.findall(r"([\d.,]+)(?: \[([\d,]+), ([\d,]+)\])? above (\S+?)(?:, |$)", rows["counts"])
        assert len(counts) == 3
        for count, low, high, threshold in counts:
            stated = report.count_above(float(threshold))
            ends = (int(x.replace(",", "")) for x in ((low, high) if low else (count, count)))
            assert tuple(ends) == (math.floor(stated.lower), math.ceil(stated.upper))
        for name, share in (("negative eigenvalues", report.negative), ("near zero", report.near_zero)):
            found = re.match(r"(\S+) %(?: \[(\S+), (\S+)\])?", rows[name])
            low, high = (float(x or found[1]) for x in (found[2], found[3]))
            half = 0 if found[2] else 0.006 * high  # without ends: half a unit of the third digit
            assert low - half <= 100 * share.lower
            assert 100 * share.upper <= high + half


@pytest.mark.slow
def test_a_summary_prints_intervals_that_contain_its_own():
    blocks = {"a": np.linspace(-0.3, 1.0, 400), "b": np.geomspace(1e-3, 1, 300)}
    runs = spectra.slq({k: diagonal(v) for k, v in blocks.items()}, key=KEY, num_steps=20, num_probes=2)
    table = spectra.summary(runs)
    for row, record in zip(table.table()[1:], table.records(), strict=True):
        value, half = map(float, row[4].split(" ± "))
        assert value - half <= record["trace_lower"] < record["trace_upper"] <= value + half
        low, high = map(float, re.search(r"\[(\S+), (\S+)\]", row[6]).groups())
        assert low <= record["stable_rank_lower"] < record["stable_rank_upper"] <= high


@pytest.mark.slow
def test_a_double_eigenvalue_is_not_called_a_single_one(tmp_path, x64):
    op, shown = diagonal(np.r_[np.linspace(0.0, 1.0, 2000), 5.0, 5.0, 7.0]), 0
    for seed in range(6):
        quadrature = spectra.slq(op, key=jax.random.key(seed), num_steps=12, num_probes=1 + 3 * (seed > 1))
        density = spectra.spectral_density(quadrature)
        simple = density.outliers[density.single]
        # Of two probes and more the directions tell; one probe cannot.
        np.testing.assert_allclose(simple, [7.0] if seed > 1 else [], rtol=1e-4)
        page = spectra.write_report(quadrature, tmp_path / "page").read_text()
        assert ("λ = 7: a single eigenvalue" in page) == (seed > 1)
        assert "λ = 5: a single eigenvalue" not in page
        if np.isclose(density.outliers, 5.0, rtol=1e-4).any():
            shown += 1
            assert "λ = 5: an eigenvalue that stands alone, or several equal ones" in page
            assert "places where eigenvalues stand alone" in page
            labels = {artist.get_label() for artist in spectra.plot_density(density).collections}
            assert "isolated eigenvalues" in labels
            loaded = spectra.load(spectra.save(density, tmp_path / "density"))
            assert loaded.num_single == density.num_single
    assert shown >= 2


@pytest.mark.slow
def test_a_page_says_which_kernel_it_drew(tmp_path):
    op = diagonal(np.linspace(-1.0, 3.0, 300))
    quadrature = spectra.slq(op, key=KEY, num_steps=20, num_probes=2)
    for held, words in (
        (quadrature, "whose width grows with the distance from zero"),
        (spectra.spectral_density(quadrature, bandwidth=0.25), "smoothed by a kernel of the width 0.25"),
        (spectra.kpm(op, key=KEY, num_moments=40, num_probes=2), "narrower near both ends of the axis"),
    ):
        page = spectra.write_report(held, tmp_path / "page").read_text()
        assert words in page
        assert ("grows with the distance" in page) == ("grows" in words)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"exact": False, "zero_tol": 0.01},
        {"num_steps": 12, "basis": "none"},
    ],
    ids=str,
)
def test_the_command_on_a_page_does_the_same_again(options, tmp_path):
    op = diagonal(np.linspace(-1.0, 3.0, 90))
    report = spectra.spectrum(op, key=KEY, **options)
    page = spectra.write_report(report, tmp_path / "page").read_text()
    command = re.search(r"report = spectra\.spectrum\(op, key=key, (.*?)\)\n?</pre>", page)[1]
    again = spectra.spectrum(op, key=KEY, **eval(f"dict({command.replace('&quot;', chr(34))})"))
    assert again.status is report.status
    np.testing.assert_array_equal(again.quadrature.nodes, report.quadrature.nodes)
    assert again.near_zero == report.near_zero
    exact = report.status is spectra.Status.EXACT
    assert ("All of them were computed" in page) == exact
    assert ("Lanczos steps leave open" in page) != exact


def test_bounds_in_the_table_of_layers_are_rounded_to_their_side():
    part = spectra.condition_number(diagonal(np.linspace(0.05, 1.0, 200)), key=KEY)
    interval = spectra.Interval
    few = {
        "value": 1234.56789,
        "effective": 999.96,
        "largest": 1.00006,
        "smallest_nonzero": 0.00123449,
        "rank": 190,
        "nullity": 10,
        "nullity_interval": interval(3.0, 10.0, 20.0),
        "is_lower_bound": True,
        "largest_interval": interval(0.99996, 1.00006, 1.2),
    }
    found = spectra.LayerConditions({"layer": part.__class__(**{**part.__dict__, **few})})
    assert found.table()[1] == [
        "layer",
        "200",
        "190 [180, 197]",
        "≥ 0.9999",
        "≤ 0.001235",
        "≥ 999.9",
        "≥ 1234",
    ]
    assert dict(found["layer"].rows())["rank"] == "190 [180, 197] of 200"


@pytest.mark.slow
def test_a_snapshot_that_has_not_converged_says_at_least_everywhere(tmp_path):
    tracker = spectra.SpectrumTracker(
        lambda t: diagonal((1 + t) * np.r_[np.linspace(0, 1, 499), 1.002]), 1, num_steps=3, tol=0.02
    )
    for step in range(2):
        snapshot = tracker(step, float(step))
    told = dict(snapshot.rows())["largest eigenvalue"]
    assert "residual" in told
    stated = re.match(r"at least ([\d.]+) ", told)
    assert float(stated[1]) <= float(snapshot.largest.lower)
    rows = dict(tracker.history.rows())
    page = spectra.write_report(tracker.history, tmp_path / "page").read_text()
    for text_ in (rows["largest eigenvalue"], rows["at its largest"], page):
        assert f"≥ {stated[1]}" in text_
    assert float(stated[1]) == pytest.approx(2.004, rel=0.02)


@pytest.mark.slow
def test_all_data_of_subsets_may_be_the_ones_that_have_not_converged():
    def small(batch):
        # Each subset has one eigenvalue apart from a bulk, and all data have many close ones.
        return diagonal(np.r_[np.full(60, 0.1), jnp.asarray(batch, float)])

    batches = [np.where(np.arange(12) == i, 9.0 + 0.01 * i, 0.1) for i in range(4)]
    found = spectra.data_variability(small, batches, key=KEY, num_steps=3, num_probes=1)
    assert found.whole_largest_residuals.shape == found.whole_largest.shape
    told = dict(line.strip().split("  ", 1) for line in repr(found).splitlines()[1:])["largest eigenvalue"]
    wary = found.whole_largest_residuals[0] > 0.01 * found.whole_largest[0]
    assert ("all data at least" in told) == wary


@pytest.mark.slow
def test_a_rank_of_which_the_probes_see_too_little_is_not_certain():
    """With these keys the shares of the largest eigenvalue end the interval below 1, which no rank is."""
    values = np.r_[np.linspace(-0.2, 0.2, 19), 1.0]
    for seed in (2, 6, 21, 60):
        run = spectra.slq(diagonal(values), key=jax.random.key(seed), num_steps=6, num_probes=2)
        (record,) = spectra.summary({"a": run}).records()
        low, value, high = (record[f"stable_rank{end}"] for end in ("_lower", "", "_upper"))
        assert 1 <= low <= value < high
        assert low <= np.sum(values**2) <= high
