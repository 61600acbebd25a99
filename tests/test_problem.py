"""Problems for the command line: every operator, one block, all blocks."""

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import pytest
from cases import relative_error
from networks import Network, cross_entropy, model_fn
from typer.testing import CliRunner

import spectra
from spectra.cli import commands

PROBLEM = """
import jax, jax.numpy as jnp
import spectra

def model_fn(params, x):
    return jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"]) @ params["out"]["kernel"]

def loss_fn(outputs, targets):
    return 0.5 * jnp.mean(jnp.sum((outputs - targets) ** 2, -1))

def problem():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "hidden": {"kernel": jax.random.normal(keys[0], (3, 4)), "bias": jnp.zeros(4)},
        "out": {"kernel": jax.random.normal(keys[1], (4, 2))},
    }
    data = jax.random.normal(keys[2], (9, 3)), jax.random.normal(keys[3], (9, 2))
    return spectra.Problem(loss_fn, params, data, model_fn=model_fn, name="regression")
"""


@pytest.fixture
def run(tmp_path):
    mpl.use("Agg")
    file = tmp_path / "p.py"
    file.write_text(PROBLEM)
    out = tmp_path / "out"

    def run(*options):
        done = CliRunner().invoke(
            commands.app, ["run", str(file), "--probes", "2", "--out", str(out), *options]
        )
        return done, out

    return run


@pytest.mark.slow
def test_every_operator_of_a_problem(x64):
    net = Network()
    data = (jnp.asarray(net.x), jnp.asarray(net.labels))
    params = net.params()
    problem = spectra.Problem(cross_entropy, params, data, model_fn=model_fn)
    args = (model_fn, cross_entropy, params, data)
    key = jax.random.key(3)

    def loss_fn(params, batch):
        return cross_entropy(model_fn(params, batch[0]), batch[1])

    direct = {
        "hessian": spectra.HessianOperator(loss_fn, params, data),
        "ggn": spectra.GGNOperator(*args),
        "fisher": spectra.FisherOperator(*args),
        "mc-fisher": spectra.FisherOperator(*args, kind="mc", key=key),
        "empirical-fisher": spectra.FisherOperator(*args, kind="empirical"),
        "covariance": spectra.GradientCovarianceOperator(loss_fn, params, data),
    }
    for kind, op in direct.items():
        got = problem.operator(kind, key=key).as_matrix()
        assert relative_error(got, op.as_matrix()) <= 32 * np.finfo(float).eps
    with pytest.raises(spectra.SpectraError, match="'kfac' is not known"):
        problem.operator("kfac")
    with pytest.raises(spectra.SpectraError, match="model_fn"):
        spectra.Problem(loss_fn, params, data).operator("ggn")


def test_one_block_from_the_shell(run):
    done, out = run("--operator", "ggn", "--block", "out")
    assert done.exit_code == 0, done.output
    assert "regression, ggn, out, 8 parameters" in done.output
    report = spectra.load(out / "spectrum.npz")
    assert report.quadrature.size == 8
    # Positive semi-definite, up to the rounding of float32 products.
    assert report.smallest.estimate >= -1e-6 * report.largest.estimate


@pytest.mark.slow
def test_all_blocks_from_the_shell(run):
    done, out = run("--blocks", "layer", "--steps", "10")
    assert done.exit_code == 0, done.output
    assert (out / "spectrum.png").stat().st_size > 0
    results = spectra.load(out / "spectrum.npz")
    assert {name: q.size for name, q in results.items()} == {"hidden": 16, "out": 8}
    shown = CliRunner().invoke(commands.app, ["show", str(out / "spectrum.npz")])
    assert shown.exit_code == 0
    assert "hidden" in shown.output
    plotted = CliRunner().invoke(commands.app, ["plot", str(out / "spectrum.npz"), "-o", str(out / "b.pdf")])
    assert plotted.exit_code == 0
    assert (out / "b.pdf").exists()


@pytest.mark.slow
def test_wrong_options_are_explained(run):
    for options, message in (
        (("--operator", "kfac"), "is not one of"),
        (("--block", "head"), "no parameter"),
    ):
        done, _ = run(*options)
        assert done.exit_code != 0
        assert message in done.output + str(done.exception)
