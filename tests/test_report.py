"""Reports, pictures and the command line, as a user meets them."""

import itertools
import json
import os
import subprocess
import sys

import jax
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from cases import diagonal, runs_of
from typer.testing import CliRunner

import spectra
from spectra.cli import commands
from spectra.report.spectrum import beyond, share_near_zero

VALUES = np.concatenate([np.linspace(-0.5, 1, 395), [5.0, 10, 20, 40, 80]])

PROBLEM = """
import jax.numpy as jnp
import spectra

def loss_fn(params, batch):
    return 0.5 * jnp.mean((batch @ params["w"]) ** 2)

def problem():
    x = jnp.diag(jnp.arange(1.0, 31.0))
    return spectra.Problem(loss_fn, {"w": jnp.ones(30)}, x, name="a quadratic")
"""


@pytest.fixture(scope="module")
def report():
    op = diagonal(VALUES, "float32")
    return spectra.spectrum(op, key=jax.random.key(0), num_steps=80, exact=False, name="a test")


@pytest.mark.parametrize("zero_tol", [-1e-3, float("nan")])
def test_a_share_of_the_norm_is_no_negative_number(zero_tol):
    with pytest.raises(spectra.SpectraError, match="zero_tol"):
        spectra.spectrum(diagonal(VALUES, "float32"), key=jax.random.key(0), zero_tol=zero_tol)


@pytest.mark.slow
def test_counts_are_of_the_thresholds_that_are_printed():
    """Of |H| = 2.449, a tenth is 0.2449 and printed as 0.24: 0.242 is above that."""
    values = np.array([2.449, 0.242, 0.02445, *np.zeros(17)])
    report = spectra.spectrum(diagonal(values, "float32"), key=jax.random.key(0))
    assert "1 above 1.2, 2 above 0.24, 3 above 0.024" in repr(report)


@pytest.mark.slow
def test_shares_of_a_norm_in_doubt_hold_for_all_that_it_may_be():
    """Ritz values after 6 steps are up to 2 % inside of the edges, and half of the largest may be on
    the other side of what lies just below half of |H|: 1 in 6 of all were said to be beyond it, with all
    keys."""
    edge = np.linspace(0.7, 1.0, 500)
    values = np.concatenate([edge, np.zeros(500), np.full(200, 0.4985)])
    held = []
    for seed in range(6):
        q = spectra.slq(diagonal(values, "float32"), key=jax.random.key(seed), num_steps=6, num_probes=8)
        below, above = beyond(q, 0.5)
        near = share_near_zero(q, 0.5)
        held.append(
            below.lower <= np.mean(values < -0.5) <= below.upper
            and above.lower <= np.mean(values > 0.5) <= above.upper
            and near.lower <= np.mean(np.abs(values) <= 0.5) <= near.upper
        )
    assert sum(held) >= 5


def short_run(values, num_probes):
    """12 steps, of operators of one order: the compiled code is shared."""
    return spectra.slq(
        diagonal(values, "float32"), key=jax.random.key(0), num_steps=12, num_probes=num_probes
    )


@pytest.fixture(autouse=True)
def headless():
    mpl.use("Agg")
    yield
    plt.close("all")


@pytest.mark.slow
def test_report_states_the_extremes_within_their_intervals(report):
    # Float32 products: the intervals take in the noise floor, which is about eps |H|.
    assert report.largest.lower <= 80 <= report.largest.upper
    assert report.smallest.lower <= -0.5 <= report.smallest.upper
    assert report.largest.upper - report.largest.lower < 1e-3


@pytest.mark.slow
def test_report_shares_and_trace_lie_in_their_intervals(report):
    n = len(VALUES)
    negative = np.sum(-report.noise_floor > VALUES) / n
    assert report.negative.lower <= negative <= report.negative.upper
    near = np.sum(np.abs(VALUES) <= report.zero_tol * 80) / n
    assert report.near_zero.lower <= near <= report.near_zero.upper
    # Five standard errors: a normal law leaves them with probability 6e-7.
    assert abs(report.trace.value - VALUES.sum()) < 5 * report.trace.stderr


def test_condition_number_is_a_lower_bound(report):
    true = 80 / np.abs(VALUES).min()
    assert 1 <= report.condition_lower_bound <= true * (1 + 1e-3)


@pytest.mark.slow
def test_trace_error_is_covered_at_its_rate():
    """|error| < 2 stderr in 95 % of 100 runs; fewer than 88 hits has probability 0.3 %."""
    estimates = [spectra.report.spectrum.trace_estimate(q) for q in runs_of(8, short_run(VALUES, 8 * 100))]
    errors = np.array([estimate.value - VALUES.sum() for estimate in estimates])
    stderr = np.array([estimate.stderr for estimate in estimates])
    assert np.sum(np.abs(errors) < 2 * stderr) >= 88
    # A probe that is uniform on the sphere gives n vᵀHv the variance 2 n² Var(λ) / (n + 2). The square of the
    # error stated varies with the shares of five outliers, by less than a third over eight probes.
    n = len(VALUES)
    ideal = n * np.sqrt(2 * np.var(VALUES) / (n + 2) / 8)
    assert 0.9 <= np.sqrt(np.mean(stderr**2)) / ideal <= 1.1


@pytest.mark.slow
def test_report_prints_and_shows_itself(report):
    text, page = repr(report), report._repr_html_()
    for label, value in report.rows():
        assert label in text
        assert value in text
    assert page.startswith("<table>")
    assert "&lt;" in page  # a value contains "<"


@pytest.mark.slow
def test_report_survives_a_round_trip(report, tmp_path):
    path = report.save(tmp_path / "result")
    again = spectra.load(path)
    assert repr(again) == repr(report)
    np.testing.assert_array_equal(again.quadrature.nodes, report.quadrature.nodes)
    with np.load(path, allow_pickle=False) as file:
        fields = json.loads(str(file["header"]))["result"]["fields"]
    provenance = fields["provenance"]["dict"]
    assert {"spectra", "jax", "device", "key", "seconds", "date"} <= set(provenance)


@pytest.mark.slow
def test_density_picture_is_readable(report, tmp_path):
    ax = report.plot()
    figure = ax.figure
    figure.canvas.draw()
    assert figure.get_size_inches()[0] * 2.54 == pytest.approx(8.0, abs=0.01)
    assert ax.get_xscale() == "symlog"
    assert ax.get_yscale() == "log"
    renderer = figure.canvas.get_renderer()
    low, high = ax.get_xlim()
    labels = [
        label.get_window_extent(renderer)
        for label, tick in zip(ax.get_xticklabels(), ax.get_xticks(), strict=True)
        if low <= tick <= high and label.get_text()
    ]
    assert len(labels) >= 3
    for left, right in itertools.pairwise(labels):
        assert left.x1 < right.x0
    figure.savefig(tmp_path / "picture.png")
    assert plt.imread(tmp_path / "picture.png").std() > 0.01


@pytest.mark.slow
def test_narrow_spectra_get_a_linear_axis():
    q = short_run(np.linspace(1.0, 2.0, 400), 8)
    ax = spectra.plot_density(spectra.spectral_density(q), learning_rate=0.5)
    assert ax.get_xscale() == "linear"
    assert any(line.get_label() == "2 / learning rate" for line in ax.get_lines())
    assert ax.get_xlim()[1] > 4


@pytest.mark.slow
def test_plots_draw_into_given_axes(report):
    _, axes = plt.subplots(1, 2)
    assert spectra.plot_density(report.density, axes[0]) is axes[0]
    assert spectra.plot_eigenvalues(report.quadrature, axes[1]) is axes[1]
    with pytest.raises(spectra.SpectraError, match="xscale"):
        spectra.plot_density(report.density, xscale="log")


@pytest.mark.slow
def test_a_null_operator_can_be_drawn():
    q = short_run(np.zeros(400), 8)
    spectra.plot_density(spectra.spectral_density(q)).figure.canvas.draw()


@pytest.mark.slow
def test_command_line_runs_a_problem_shows_and_plots_it(tmp_path):
    file = tmp_path / "quadratic.py"
    file.write_text(PROBLEM)
    runner = CliRunner()
    done = runner.invoke(commands.app, ["run", str(file), "--steps", "20", "--out", str(tmp_path / "o")])
    assert done.exit_code == 0, done.output
    report = spectra.load(tmp_path / "o" / "spectrum.npz")
    # H = X² / 30, largest 30; 20 of 30 steps, and the residual interval says how far it converged.
    assert report.largest.lower <= 30.0 <= report.largest.upper + 1
    assert (tmp_path / "o" / "spectrum.png").stat().st_size > 10_000
    shown = runner.invoke(commands.app, ["show", str(tmp_path / "o" / "spectrum.npz")])
    assert "a quadratic" in shown.output
    picture = tmp_path / "density.pdf"
    plot = runner.invoke(commands.app, ["plot", str(tmp_path / "o" / "spectrum.npz"), "-o", str(picture)])
    assert plot.exit_code == 0
    assert picture.read_bytes()[:4] == b"%PDF"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["show", "empty.npz"], "truncated"),
        (["show", "missing.npz"], "missing.npz"),
        (["run", "none.py"], "none.py"),
        (["run", "lacking.py"], "problem()"),
        (["run", "wrong.py"], "spectra.Problem"),
    ],
)
def test_command_line_errors_are_one_message(tmp_path, arguments, word):
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "lacking.py").write_text("x = 1\n")
    (tmp_path / "wrong.py").write_text("def problem():\n    return 1\n")
    done = subprocess.run(
        [sys.executable, "-c", "from spectra.cli.commands import main; main()", *arguments],
        cwd=tmp_path,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert word in done.stderr
    assert "Traceback" not in done.stderr


def test_importing_does_not_load_the_slow_packages():
    code = "import sys, spectra; print([m for m in ('scipy', 'matplotlib.pyplot', 'torch', 'flax', "
    code += "'optax', 'sklearn') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"


def test_public_names_of_results_are_frozen(report):
    with pytest.raises(AttributeError):
        report.quadrature.nodes = 0
