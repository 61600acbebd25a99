"""Slices of the loss along given directions: losses, slopes and curvature are those of NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Ridge

import spectra

RIDGE = Ridge()
X = np.column_stack([np.ones(13), RIDGE.inputs])
START = np.concatenate([[RIDGE.b], RIDGE.w])
GRADIENT = (X.T @ (2 * np.tanh(X @ START) * (1 - np.tanh(X @ START) ** 2))) / 13
OTHER = np.linspace(-1.0, 2.0, 6)


def loss(p):
    return np.mean(np.tanh(X @ p) ** 2)


def unit(v):
    return v / np.linalg.norm(v)


@pytest.mark.parametrize("streamed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_gradient_and_a_direction_of_ones_own(streamed, x64, tmp_path):
    op = RIDGE.operator(RIDGE.parts(4) if streamed else None)
    tree = {"b": jnp.asarray(OTHER[0]), "w": jnp.asarray(OTHER[1:])}
    plane = spectra.loss_slice(op, directions=["gradient", tree], extent=0.5, num_points=5)
    first = unit(GRADIENT)
    second = unit(OTHER - first * (first @ OTHER))
    hessian = RIDGE.hessian()
    close = {"rtol": 0, "atol": 1e-12}  # sums of 13 terms of size one
    expected = [[loss(START + a * first + b * second) for a in plane.x] for b in plane.y]
    np.testing.assert_allclose(plane.loss, expected, **close)
    np.testing.assert_allclose(plane.slope, [np.linalg.norm(GRADIENT), 0.0], **close)
    np.testing.assert_allclose(plane.eigenvalues, [v @ hessian @ v for v in (first, second)], **close)
    np.testing.assert_allclose(plane.cross, first @ hessian @ second, **close)
    np.testing.assert_allclose(plane.cosine, first @ unit(OTHER), **close)
    point = 0.5 * first + 0.25 * second  # the last column, the last row but one
    model = loss(START) + GRADIENT @ point + point @ hessian @ point / 2
    np.testing.assert_allclose(plane.quadratic[3, 4], model, **close)
    assert plane.names == ("the gradient", "direction 2")
    assert "along the gradient" in repr(plane)
    loaded = spectra.load(plane.save(tmp_path / "plane"))
    assert repr(loaded) == repr(plane)
    assert plane.plot().get_xlabel().startswith("along the gradient, curvature")


@pytest.mark.slow
def test_one_direction_is_a_curve(x64, tmp_path):
    op = RIDGE.operator()
    line = spectra.loss_slice(op, directions=[OTHER], num_points=7)
    assert line.loss.shape == (1, 7)
    v = unit(OTHER)
    np.testing.assert_allclose(line.loss[0], [loss(START + t * v) for t in line.x], rtol=0, atol=1e-12)
    # By default as far as the slope or the curvature alone doubles the loss.
    curvature = v @ RIDGE.hessian() @ v
    reach = min(np.sqrt(2 * loss(START) / abs(curvature)), loss(START) / abs(v @ GRADIENT))
    np.testing.assert_allclose(line.x[-1], reach, rtol=1e-10)
    assert line.plot().get_xlabel() == f"along direction 1, curvature {curvature:.4g}"
    assert "Dashed: the quadratic model" in spectra.write_report(line, tmp_path / "line").read_text()
    pairs = spectra.eigsh(op, 2, key=jax.random.key(0))
    leading = spectra.loss_slice(op, directions=pairs, num_points=3)
    values = np.linalg.eigvalsh(RIDGE.hessian())
    np.testing.assert_allclose(leading.eigenvalues, values[np.argmax(np.abs(values))], rtol=1e-8)


def flat_loss(w, x):
    return jnp.mean((x @ w) ** 2)


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        (["slope"], "direction 1 is 'slope'"),
        ([], "a list of one or two"),
        (None, "pass eigenpairs, or directions"),
        (["gradient"], "the gradient is zero: the parameters are a stationary point"),
        ([jnp.ones(3), -2 * jnp.ones(3)], "are parallel"),
        ([jnp.ones(4)], r"direction 1: leaf .* has shape \(4,\)"),
        ([jnp.array([1.0, jnp.nan, 0.0])], "direction 1 is NaN"),
    ],
)
def test_what_is_no_direction_is_said(directions, message):
    op = spectra.HessianOperator(flat_loss, jnp.zeros(3), jnp.eye(3))
    with pytest.raises(spectra.SpectraError, match=message):
        spectra.loss_slice(op, directions=directions)


def test_directions_are_no_eigenpairs():
    op = spectra.HessianOperator(flat_loss, jnp.zeros(3), jnp.eye(3))
    with pytest.raises(spectra.SpectraError, match="pairs is of type list"):
        spectra.loss_slice(op, [jnp.ones(3)])  # pyright: ignore[reportArgumentType]
