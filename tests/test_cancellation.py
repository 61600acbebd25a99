"""Parts of an operator that cancel are each rounded relative to themselves; stated errors hold that.

Truth is the same combination of the float32 parts in float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectra
from spectra.base.errors import Status

N = 40
rng = np.random.default_rng(1)
TURN = np.linalg.qr(rng.standard_normal((N, N)))[0]
SPIKED = (TURN * np.append(np.linspace(0.5, 1.0, N - 1), 1e3)) @ TURN.T
SPIKED = np.asarray((SPIKED + SPIKED.T) / 2, np.float32)
TOP = np.asarray(TURN[:, -1], np.float32)[None]
NEAR = np.asarray(np.stack([TOP[0], TOP[0] + 1e-3 * TURN[:, 0]]), np.float32)


def deflated():
    """A spectrum without its outlier: a matrix less its leading pair."""
    op = spectra.MatrixOperator(SPIKED) - spectra.LowRankOperator(TOP, [1e3])
    return op, SPIKED.astype(float) - 1e3 * TOP.T.astype(float) @ TOP.astype(float)


def subtracted():
    """The same as two matrices, neither of which says what it depends on."""
    pair = np.asarray(1e3 * TOP.T @ TOP, np.float32)
    return spectra.MatrixOperator(SPIKED) - spectra.MatrixOperator(pair), SPIKED.astype(float) - pair


def projected():
    """The same by a projector on both sides."""
    project = spectra.MatrixOperator(np.eye(N, dtype=np.float32)) - spectra.LowRankOperator(TOP)
    dense = np.eye(N) - TOP.T.astype(float) @ TOP.astype(float)
    return project @ spectra.MatrixOperator(SPIKED) @ project, dense @ SPIKED.astype(float) @ dense


def parallel():
    """The difference of two directions that are nearly the same."""
    return spectra.LowRankOperator(NEAR, [1e3, -1e3]), NEAR.T.astype(float) * [1e3, -1e3] @ NEAR.astype(float)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "make",
    [
        subtracted,
        pytest.param(deflated, marks=SLOW),
        pytest.param(projected, marks=SLOW),
        pytest.param(parallel, marks=SLOW),
    ],
)
def test_what_is_stated_holds_the_rounding_of_the_parts(make):
    op, dense = make()
    eigenvalues = np.linalg.eigvalsh(dense)
    for key in jax.random.split(jax.random.key(0), 3):
        pairs = spectra.eigsh(op, 2, which="LA", key=key)
        away = np.abs(pairs.values[:, None] - eigenvalues).min(axis=1)
        assert (away <= pairs.residuals + pairs.noise_floor).all()
    # Not by being wide: a product of float32 with parts of this size is right to some sqrt(n) roundings.
    assert pairs.noise_floor <= 4 * np.sqrt(N) * 1e3 * float(jnp.finfo(jnp.float32).eps) * 3
    report = spectra.spectrum(op, key=jax.random.key(0))
    assert report.status is Status.EXACT
    assert report.largest.lower <= eigenvalues[-1] <= report.largest.upper
    low, _, high = report.trace.interval(0.9999)
    assert low <= np.trace(dense) <= high
    low, _, high = spectra.trace(op, key=jax.random.key(0)).interval(0.9999)
    assert low <= np.trace(dense) <= high


def test_a_shift_that_cancels_leaves_the_rounding_of_what_it_cancels():
    shift = 3e3
    for seed in range(20):
        noise = np.random.default_rng(seed).standard_normal((N, N)) / np.sqrt(N)
        matrix = np.asarray(shift * np.eye(N) + noise + noise.T, np.float32)
        eigenvalues = np.linalg.eigvalsh(matrix.astype(float)) - shift
        op = spectra.MatrixOperator(matrix).shift(-shift)
        pairs = spectra.eigsh(op, 3, which="LA", tol=1e-4, key=jax.random.key(seed))
        away = np.abs(pairs.values[:, None] - eigenvalues).min(axis=1)
        assert (away <= pairs.residuals + pairs.noise_floor).all()
        # Entries of a product are rounded by eps / 2 of the shift's share, in H v and with the shift.
        assert pairs.noise_floor <= 3 * float(jnp.finfo(jnp.float32).eps) * shift


def test_asymmetry_names_a_shift_that_cancels():
    noise = np.random.default_rng(0).standard_normal((60, 60)) / np.sqrt(60)
    op = spectra.MatrixOperator(np.asarray(1e5 * np.eye(60) + noise + noise.T, np.float32)).shift(-1e5)
    with pytest.raises(spectra.NotSymmetricError, match=r"The shift by -100000 may cancel .* float64"):
        spectra.eigsh(op, 3, which="LA", key=jax.random.key(0))
