"""A saturated loss whose products are all zero, or nearly: nothing claims that its eigenvalues are."""

import html
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectra
from spectra.operators.data import DataOperator

KEY = jax.random.key(0)
rng = np.random.default_rng(0)
X = jnp.asarray(rng.standard_normal((16, 4)), jnp.float32) + jnp.asarray([5.0, 0, 0, 0])
PARAMS = jnp.zeros((4, 3)).at[0, 0].set(40.0)


def underflows(params, x):
    """Margins of 100 to 300: probabilities of 1e-44 and less, which float32 has not."""
    return -jnp.mean(jax.nn.log_softmax(x @ params)[:, 0])


def rounds_to_one(params, x):
    """σ(m) of margins from 20 on is one, and 1 - σ(m) zero; exactly it is 2e-9 and less."""
    return -jnp.mean(jnp.log(jax.nn.sigmoid((x @ params)[:, 0] / 6)))


def below_float32(params, x):
    """All eigenvalues are 3.3e-39, and the trace 4e-38; float32 has nothing below 1.2e-38, moved or not."""
    return 0.5 * jnp.sum((5.75e-20 * params) ** 2)


def hessian(loss, dtype=jnp.float32):
    return spectra.HessianOperator(loss, PARAMS.astype(dtype), X.astype(dtype))


LOSSES = pytest.mark.parametrize(
    "loss", [pytest.param(underflows, marks=pytest.mark.slow), rounds_to_one, below_float32]
)


@pytest.mark.slow
@pytest.mark.parametrize("loss", [underflows, rounds_to_one, below_float32])
def test_every_error_holds_the_matrix_that_was_not_resolved(loss):
    with jax.enable_x64(True):
        matrix = np.asarray(hessian(loss, jnp.float64).as_matrix())
    op = hessian(loss)
    norm = np.linalg.norm(matrix, 2)
    assert norm > 0
    assert not np.any(op @ jnp.ones(op.size))
    report = spectra.spectrum(op, key=KEY, num_steps=3, num_probes=2)
    assert report.noise_floor > norm
    assert report.smallest.lower <= -norm
    assert norm <= report.largest.upper
    assert report.trace.interval().upper >= np.trace(matrix)
    assert report.count_above(0.0).upper == op.size
    assert spectra.slq(op, key=KEY, num_steps=3, num_probes=2).noise_floor > norm
    pairs = spectra.eigsh(op, 1, key=KEY)
    assert pairs.residuals[0] + pairs.noise_floor > norm
    largest = spectra.condition_number(op, key=KEY).largest_interval
    assert largest.lower <= norm <= largest.upper
    for method in ("hutchinson", "xtrace", "exact"):
        assert spectra.trace(op, key=KEY, method=method, num_matvecs=6).interval().upper >= np.trace(matrix)
    assert spectra.frobenius_norm(op, key=KEY, num_matvecs=6).interval().upper >= np.linalg.norm(matrix)


def test_an_eigenvalue_that_rounding_hides_is_within_the_errors_of_the_largest(tmp_path, monkeypatch):
    """1 - σ(17.5) is 2.5e-8, which float32 rounds to zero; beside it softplus has 2.1e-9 and less."""
    params = {"hidden": jnp.full(1, 17.5, jnp.float32), "rest": jnp.linspace(20, 30, 29, dtype=jnp.float32)}

    def loss(p, _):
        return jnp.sum(jax.nn.softplus(-p["rest"])) - jnp.log(jax.nn.sigmoid(p["hidden"][0]))

    op = spectra.HessianOperator(loss, params, None)
    assert op.mv({"hidden": jnp.ones(1), "rest": jnp.zeros(29)})["hidden"] == 0
    pairs = spectra.eigsh(op, 1, which="LA", key=KEY)
    assert pairs.status is spectra.Status.NOISY
    assert abs(pairs.values[0] - np.exp(-17.5)) <= pairs.residuals[0] + pairs.noise_floor
    report = spectra.spectrum(op, key=KEY, num_steps=3, num_probes=2)
    assert report.status is spectra.Status.NOISY
    assert report.largest.lower <= np.exp(-17.5) <= report.largest.upper
    count = spectra.count_above(report.quadrature, 0.0)
    for made in (report.density, spectra.trace_of(report.quadrature, np.square), count):
        assert made.status is spectra.Status.NOISY
    assert repr(report.quadrature).endswith("noisy)")
    page = spectra.write_report(report, tmp_path / "page.html").read_text()
    assert f"The run ended as {html.escape(str(spectra.Status.NOISY))}" in page
    snapshot = spectra.SpectrumTracker(lambda: op, every=1, num_steps=3)(0)
    assert snapshot.status is spectra.Status.NOISY
    assert snapshot.largest.lower <= np.exp(-17.5) <= snapshot.largest.upper
    found = spectra.condition_number(op, key=KEY)  # its matrix is that of float64
    curvatures = 1 / (2 + 2 * np.cosh([17.5, *np.asarray(params["rest"], np.float64)]))
    interval = found.effective_interval
    assert interval.lower <= curvatures.max() / curvatures.min() <= interval.upper < 1.1 * interval.lower
    monkeypatch.setattr(DataOperator, "known_in_double", False)
    found = spectra.condition_number(op, key=KEY)
    assert found.status is spectra.Status.NOISY
    assert found.largest_interval.lower >= 0
    assert "0 ± " in str(found)


@pytest.mark.slow
def test_zeros_that_no_rounding_is_seen_in_are_not_noisy():
    """A loss that is linear has no curvature, and its products are exact."""
    op = spectra.HessianOperator(lambda p, x: jnp.mean(x @ p), jnp.ones(30), jnp.ones((4, 30)))
    assert spectra.eigsh(op, 2, key=KEY).status.ok
    assert spectra.spectrum(op, key=KEY, num_steps=3, num_probes=2).status.ok
    assert spectra.condition_number(op, key=KEY).status.ok


@pytest.mark.slow
@LOSSES
def test_errors_of_groups_and_entries_are_not_zero_either(loss):
    op = hessian(loss)
    parts = spectra.trace(op, key=KEY, method="xtrace", num_matvecs=6, by="leaf")
    assert min(parts.stderr.values()) > 0
    assert parts.total.stderr > 0
    assert np.min(spectra.diagonal(op, key=KEY, num_matvecs=6).stderr) > 0


@pytest.mark.slow
def test_a_matrix_of_zeros_is_zero():
    op = spectra.MatrixOperator(jnp.zeros((20, 20)))
    report = spectra.spectrum(op, key=KEY, num_steps=3, num_probes=2)
    assert report.noise_floor == report.trace.stderr == report.largest.upper == 0
    assert "-0" not in str(report)
    assert spectra.trace(op, key=KEY, num_matvecs=6).stderr == 0
    assert spectra.eigsh(op, 1, key=KEY).noise_floor == 0


@pytest.mark.parametrize("delta", [1e-3, 1e-5])
def test_a_dense_solve_bounds_what_saturation_hides(delta):
    """The error bound holds x of the exact matrix, or is infinite where its rounding exceeds the shift."""
    with jax.enable_x64(True):
        matrix = np.asarray(hessian(rounds_to_one, jnp.float64).as_matrix())
    op = hessian(rounds_to_one).shift(delta)
    b = rng.standard_normal(op.size).astype(np.float32)
    found = spectra.solve(op, op.as_vector(jnp.asarray(b), "b"), method="dense")
    exact = np.linalg.solve(matrix + float(np.float32(delta)) * np.eye(op.size), b.astype(float))
    error = np.linalg.norm(np.ravel(found.x) - exact)
    assert error <= found.error_bound
    assert delta < 1e-4 or found.error_bound <= 0.1 * np.linalg.norm(exact)
    assert found.rounding > np.linalg.norm(matrix @ exact)


def logistic(weights, inputs, dtype="float32"):
    logits = (inputs.astype(dtype) @ weights.astype(dtype)).astype("float32")
    return jnp.mean(jnp.logaddexp(0.0, logits) - (logits > 0) * logits)


def sure_of_all_but_one(seed):
    """Inputs, weights, and the eigenvalues of the mean of p (1 - p) x xᵀ; one logit is 1."""
    random = np.random.default_rng(seed)
    inputs = random.standard_normal((8, 12)).astype(np.float32)
    weights = (300 * random.standard_normal(12)).astype(np.float32)
    inputs[0] -= (inputs[0] @ weights - 1) / (weights @ weights) * weights
    sure = np.exp(-np.abs(inputs.astype(float) @ weights))
    factors = np.sqrt(sure / len(inputs)) / (1 + sure)
    return inputs, weights, np.linalg.svd(factors[:, None] * inputs, compute_uv=False) ** 2


@pytest.mark.parametrize("seed", range(3))
def test_samples_hold_what_a_loss_rounds_that_is_sure_of_all_but_one_example(seed):
    """The Hessian, the mean of p (1 - p) x xᵀ, is of rank one: samples of it leave no error. The one logit
    of 1 is a sum of hundreds, so that p (1 - p) is off by about a hundred times what a product rounds."""
    inputs, weights, exact = sure_of_all_but_one(seed)
    op = spectra.HessianOperator(logistic, jnp.asarray(weights), jnp.asarray(inputs))
    traces = [spectra.trace(op, key=KEY, method=method, num_matvecs=6) for method in ("hutch++", "xtrace")]
    norm = spectra.frobenius_norm(op, key=KEY, num_matvecs=6)
    for found, truth in [*((trace, exact.sum()) for trace in traces), (norm, np.linalg.norm(exact))]:
        low, value, high = found.interval()
        assert low <= truth <= high
        assert high - low < 1e-3 * value


@pytest.mark.parametrize("seed", range(3))
def test_samples_of_a_model_below_float32_hold_what_it_rounds(seed):
    """25,000 roundings of its products are more than any spread."""
    inputs, weights, exact = sure_of_all_but_one(seed)
    op = spectra.HessianOperator(
        partial(logistic, dtype="bfloat16"), jnp.asarray(weights), jnp.asarray(inputs)
    )
    for estimate, truth in [(spectra.trace, exact.sum()), (spectra.frobenius_norm, np.linalg.norm(exact))]:
        low, _, high = estimate(op, key=KEY, num_matvecs=6).interval()
        assert low <= truth <= high


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bound_of_a_function_holds_what_a_loss_rounds(dtype):
    for seed in range(3):
        inputs, weights, _ = sure_of_all_but_one(seed)
        op = spectra.HessianOperator(
            partial(logistic, dtype=dtype), jnp.asarray(weights), jnp.asarray(inputs)
        )
        sure = np.exp(-np.abs(inputs.astype(float) @ weights))
        values, vectors = np.linalg.eigh((inputs.T * (sure / (1 + sure) ** 2)) @ inputs.astype(float) / 8)
        v = np.random.default_rng(seed).standard_normal(12)
        for f in (lambda x: x, np.exp):
            found = spectra.funm(op, f, jnp.asarray(v, jnp.float32))
            error = np.linalg.norm(found.value - vectors @ (f(values) * (vectors.T @ np.float32(v))))
            assert error <= found.error_bound


def softmax_regression(weights, batch):
    inputs, labels = batch
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(inputs @ weights), labels[:, None], 1))


@pytest.mark.parametrize("seed", range(1, 5))
def test_a_nystrom_sketch_is_not_finer_than_products(seed):
    """Of a regression that is sure of its examples. With the stated precision the trace would be off by 2 to
    45 times what is stated, and 10 to 32 entries of the diagonal by more than stated."""
    random = np.random.default_rng(seed)
    inputs, weights = (
        x.astype(np.float32) for x in (random.standard_normal((12, 8)), 20 * random.standard_normal((8, 4)))
    )
    op = spectra.HessianOperator(softmax_regression, weights, (inputs, random.integers(0, 4, 12)))
    logits = inputs.astype(float) @ weights
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    exact = np.einsum("ia,ik->ak", inputs.astype(float) ** 2, p * (1 - p)) / 12
    options = {"key": jax.random.key(seed), "num_matvecs": 24}
    lower, _, upper = spectra.trace(op, method="xnystrace", **options).interval()
    assert lower <= exact.sum() <= upper
    lower, _, upper = spectra.diagonal(op, method="xnysdiag", **options).interval()
    assert np.all((lower <= exact) & (exact <= upper))
