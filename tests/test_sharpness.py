"""Critical sharpness against closed forms: quadratics, a quartic, and what cannot be bracketed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectra
from spectra.estimators import loss_errors

X = jnp.diag(jnp.array([1.0, 2.0, 5.0, 0.1]))
W = jnp.array([1.0, -2.0, 0.5, 3.0])


def quadratic(w, x):
    return jnp.sum((x @ w) ** 2) / 2


def along(d):
    """dᵀHd / |g · d|, in float64."""
    h, g = (np.asarray(a, float) for a in (X @ X, X @ X @ W))
    d = np.asarray(d, float)
    return d @ h @ d / abs(g @ d)


@pytest.mark.parametrize("step", [1e-4, 0.05, 1.0, 300.0])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_quadratic_has_the_curvature_along_the_direction(step, sign):
    d = -sign * jax.grad(quadratic)(W, X)
    found = spectra.critical_sharpness(quadratic, W, X, d, step=step, tol=1e-3)
    assert found.lower <= along(d) * (1 + 1e-5)
    assert found.upper >= along(d) * (1 - 1e-5)
    assert found.upper <= 1.0011 * found.lower
    assert found.lower <= float(found) <= found.upper
    assert found.descends == (sign > 0)
    assert found.status.code == "converged"


@pytest.mark.slow
def test_from_a_step_of_the_right_size_eight_evaluations_do_and_streams_agree():
    d = jnp.array([0.1, 0.2, -0.3, 0.0])
    first = spectra.critical_sharpness(quadratic, W, X, d)
    again = spectra.critical_sharpness(quadratic, W, X, d, step=first.step)
    assert again.num_evaluations <= 8

    def mean(w, x):
        return 2 * jnp.mean((x @ w) ** 2)  # four examples

    streamed = spectra.critical_sharpness(mean, W, [X[:2], X[2:]], d, microbatch=1)
    assert streamed.lower <= along(d) <= streamed.upper
    assert streamed.upper <= 1.051 * streamed.lower


@pytest.mark.slow
def test_relative_sharpness_is_that_of_one_task_along_the_update_of_another():
    """2 / s where the first loss is back at its value: dᵀH₁d / |g₁ · d| with d = -g₂, in float64."""
    x, y = (jnp.asarray(np.random.default_rng(i).standard_normal((6, 4)), jnp.float32) for i in (0, 1))
    update = -jax.grad(quadratic)(W, y)
    found = spectra.critical_sharpness(quadratic, W, x, update, tol=1e-3)
    h, d, w = np.float64(x).T @ np.float64(x), np.asarray(update, float), np.asarray(W, float)
    wanted = d @ h @ d / abs((h @ w) @ d)
    assert found.lower * (1 - 1e-4) <= wanted <= found.upper * (1 + 1e-4)
    assert found.descends == bool((h @ w) @ d < 0)
    quality = spectra.step_quality(spectra.HessianOperator(quadratic, W, x), update)
    np.testing.assert_allclose(quality.sharpness, wanted, rtol=1e-5)


@pytest.mark.slow
def test_readings_every_200_steps_take_one_hundredth_of_the_forward_passes():
    """Of a run whose curvature changes by a third between readings; a step of training is three passes."""
    counts, step = [], 1.0
    for scale in 1.3 ** np.array([0, 1, 2, 1, 0, -1, -2, -1, 0]):
        x = X * float(scale) ** 0.5
        found = spectra.critical_sharpness(quadratic, W, x, -jax.grad(quadratic)(W, x), step=step, tol=0.5)
        step = found.step
        counts.append(found.num_evaluations)
    assert np.mean(counts[1:]) <= 0.01 * 3 * 200


@pytest.mark.slow
def test_a_quartic_ends_where_it_is_back_at_its_value():
    # (1 - s)⁴ is back at 1 at s = 2: the curvature at the start, 12, would say 2 / s = 3.
    found = spectra.critical_sharpness(lambda w, _: jnp.sum(w**4), jnp.ones(1), None, -jnp.ones(1), tol=1e-4)
    assert found.lower <= 1.0001
    assert found.upper >= 0.9999


@pytest.mark.slow
def test_what_never_falls_or_never_rises_is_said():
    at_minimum = spectra.critical_sharpness(quadratic, 0 * W, X, W, max_evaluations=9)
    assert at_minimum.upper == float(at_minimum) == np.inf
    linear = spectra.critical_sharpness(lambda w, _: jnp.sum(w), W, None, -W, max_evaluations=9)
    assert linear.lower == float(linear) == 0.0
    for found in (at_minimum, linear):
        assert found.status.code == "budget_exhausted"
        assert found.num_evaluations <= 10


def shifted(w, batch):
    x, shift = batch
    return quadratic(w, x) + shift


@pytest.mark.parametrize("shift", [0.0, 1e2, 1e4, 1e6, -1e6, 1e8])
@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1.0, 1e4])
def test_brackets_hold_where_the_loss_is_rounded(shift, scale):
    """A step at which the loss does not move, or only by its rounding, says nothing of its curvature."""
    d = -jax.grad(quadratic)(W, X)
    truth = float(along(d)) * scale
    found = spectra.critical_sharpness(
        shifted, W, (X, jnp.float32(shift)), scale * d, max_evaluations=200, check_data=False
    )
    assert found.lower <= truth <= found.upper
    assert found.status.ok or abs(shift) >= 1e6
    assert np.isfinite(found.upper) or abs(shift) > 1e6
    if abs(shift) == 1e8:
        assert (found.status.code, found.upper) == ("stagnated", np.inf)


RNG = np.random.default_rng(0)
INPUTS, TRUE = RNG.standard_normal((50, 6)).astype(np.float32), RNG.standard_normal(6).astype(np.float32)
NEAR = (TRUE + 1e-4 * RNG.standard_normal(6)).astype(np.float32)
TARGETS = (np.asarray(INPUTS, float) @ TRUE).astype(np.float32)


def squared(w, batch):
    x, y = batch
    return jnp.mean((x @ w - y) ** 2)


@pytest.mark.slow
@pytest.mark.parametrize("slow_in_double", [False, True])
def test_brackets_hold_where_a_good_fit_is_rounded_as_its_outputs_are(slow_in_double, monkeypatch):
    """Residuals of 1e-4 of outputs near 1 are known to 1e-3 of themselves, and so is the loss."""
    if slow_in_double:
        monkeypatch.setattr(loss_errors, "doubled", lambda op: None)
    data = jnp.asarray(INPUTS), jnp.asarray(TARGETS)
    x, w, rng = np.asarray(INPUTS, float), np.asarray(NEAR, float), np.random.default_rng(1)
    slope = 2 * x.T @ (x @ w - TARGETS) / 50
    op = spectra.HessianOperator(squared, jnp.asarray(NEAR), data)
    for _ in range(12):
        d = (slope * (1 + rng.standard_normal(6))).astype(np.float32)
        edge = 2 * np.mean((x @ d) ** 2) / abs(slope @ d)
        found = spectra.critical_sharpness(squared, jnp.asarray(NEAR), data, jnp.asarray(d), tol=1e-5)
        assert found.lower <= edge * (1 + 1e-6)
        assert found.upper >= edge * (1 - 1e-6)
        update = (1e-3 * rng.standard_normal(6) * np.abs(slope).max()).astype(np.float32)
        quality = spectra.step_quality(op, jnp.asarray(update))
        exact = slope @ update + np.mean((x @ update) ** 2)
        assert abs(quality.measured - exact) <= quality.rounding


def test_a_loss_that_does_not_move_has_no_critical_sharpness():
    found = spectra.critical_sharpness(lambda w, _: 1.0 + 0 * jnp.sum(w), W, None, W, max_evaluations=9)
    assert (found.lower, found.upper, found.status.code) == (0.0, np.inf, "budget_exhausted")


def test_overflow_counts_as_rising_and_bad_input_is_refused():
    d = -jax.grad(quadratic)(W, X)
    assert (
        abs(
            float(spectra.critical_sharpness(quadratic, W, X, d, step=1e30, max_evaluations=300)) / along(d)
            - 1
        )
        < 0.03
    )
    with pytest.raises(spectra.SpectraError, match="direction is zero"):
        spectra.critical_sharpness(quadratic, W, X, 0 * d)
    with pytest.raises(spectra.NonFiniteError):
        spectra.critical_sharpness(quadratic, W * np.nan, X, d)
    with pytest.raises(spectra.NonFiniteError, match="direction holds NaN"):
        spectra.critical_sharpness(quadratic, W, X, d * np.nan)
    with pytest.raises(spectra.StructureError, match="direction"):
        spectra.critical_sharpness(quadratic, W, X, jnp.ones(3))
    with pytest.raises(spectra.SpectraError, match="tol"):
        spectra.critical_sharpness(quadratic, W, X, d, tol=2.0)


def test_a_result_is_saved_and_printed(tmp_path):
    found = spectra.critical_sharpness(quadratic, W, X, jnp.ones(4))
    assert spectra.load(spectra.save(found, tmp_path / "sharpness")) == found
    assert f"{found:.4g}" in repr(found)
