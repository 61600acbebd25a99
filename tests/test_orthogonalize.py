"""Gram-Schmidt to working precision: a second pass where one is not enough, and only there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import COARSE

from spectra.krylov import basis
from spectra.krylov.layout import Layout
from spectra.krylov.step import orthogonalize

N, ROWS = 96, 20


@pytest.fixture(autouse=True)
def _two_and_a_half_segments(monkeypatch):
    """As of a large basis: what is compiled here is called from here alone."""
    monkeypatch.setattr(basis, "SMALL", 0)


@jax.jit
def orthogonal(rows, vector):
    """`orthogonalize` against all rows of an array: the vector, its norm, Σ of coefficients, passes > 1."""
    layout = Layout.leafwise(jax.ShapeDtypeStruct(vector.shape, vector.dtype))
    kept = basis.zeros(layout, ROWS)
    for i in range(ROWS):
        kept = basis.put(kept, i, layout.pack(rows[i]), layout)
    new, norm, _, total, repeated = orthogonalize(kept, layout.pack(vector), ROWS, layout)
    return layout.unpack(new), norm, total, repeated


def case(part, dtype):
    """Rows, and a vector with a part of length one in their span and a `part` outside, as stored."""
    q = np.linalg.qr(np.random.default_rng(0).standard_normal((N, ROWS + 1)))[0].T
    inside = np.random.default_rng(1).standard_normal(ROWS)
    vector = inside / np.linalg.norm(inside) @ q[:ROWS] + part * q[ROWS]
    return jnp.asarray(q[:ROWS], dtype), jnp.asarray(vector, dtype)


@COARSE
def test_what_is_left_of_a_vector_almost_in_the_span_is_orthogonal(dtype):
    eps = float(jnp.finfo(dtype).eps)
    rows, vector = case(eps**0.5, dtype)
    new, norm, total, repeated = orthogonal(rows, vector)
    rows, vector, new = (np.asarray(x, np.float64) for x in (rows, vector, new))
    assert repeated
    # A pass leaves (n + rows) eps |w| along the rows: sums of n products, then one subtraction a row. Beside
    # a rest of sqrt(eps) |w| that is (n + rows) sqrt(eps); a second pass leaves (n + rows) eps of it.
    assert np.linalg.norm(rows @ new) <= 2 * (N + ROWS) * eps * np.linalg.norm(new)
    assert norm == pytest.approx(np.linalg.norm(new), rel=N * eps)
    np.testing.assert_allclose(total[:ROWS], rows @ vector, rtol=0, atol=(N + ROWS) * eps)


@pytest.mark.parametrize(("part", "second"), [(0.5, True), (1e3, False)])
def test_a_second_pass_runs_where_the_first_removed_most_and_not_where_it_removed_little(part, second, x64):
    """Half of |w|² removed asks for one (Daniel, Gragg, Kaufman and Stewart), a millionth does not."""
    rows, vector = case(part, "float64")
    new, norm, total, repeated = orthogonal(rows, vector)
    assert bool(repeated) is second
    # |w'|² comes from |w|² - |Qw|², in which a part of a half loses a factor of five.
    assert norm == pytest.approx(np.linalg.norm(new), rel=5 * N * np.finfo(float).eps)
    rounding = (N + ROWS) * np.finfo(float).eps * np.linalg.norm(vector)
    assert np.linalg.norm(np.asarray(rows) @ np.asarray(new)) <= 2 * rounding
    np.testing.assert_allclose(total[:ROWS], np.asarray(rows) @ np.asarray(vector), rtol=0, atol=rounding)


def test_under_vmap_a_second_pass_runs_where_one_lane_wants_it_and_changes_that_lane_alone(x64):
    """The conditionals of one vector are still there; a choice lane by lane would compute both sides."""
    lanes = [case(part, "float64") for part in (1e3, 0.5)]
    rows, vectors = map(jnp.stack, zip(*lanes, strict=True))
    together = jax.jit(jax.vmap(orthogonal)).lower(rows, vectors).compile()
    found = together(rows, vectors)
    assert found[3].tolist() == [False, True]
    for i, lane in enumerate(lanes):
        rounding = (N + ROWS) * np.finfo(float).eps * np.linalg.norm(lane[1])
        for got, expected in zip(found[:3], orthogonal(*lane)[:3], strict=True):
            np.testing.assert_allclose(got[i], expected, rtol=0, atol=rounding)
        assert np.linalg.norm(rows[i] @ found[0][i]) <= 2 * rounding
    one, both = (p.as_text().count(" conditional(") for p in (orthogonal.lower(*lane).compile(), together))
    assert both == one > 0
