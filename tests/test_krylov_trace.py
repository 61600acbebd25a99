"""The trace from a Krylov space and samples outside of it: what it is made of, and that it holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow_but
from scipy.stats import binom

import spectra
from spectra.estimators import blocks, krylov_aware
from spectra.estimators.krylov_aware import Split
from spectra.krylov import explored
from spectra.krylov.layout import Layout
from spectra.krylov.rows import stack

N, BUDGET = 96, 40
KEY = jax.random.key(0)
RNG = np.random.default_rng(3)
SPECTRA = {
    "decaying": np.arange(1.0, N + 1) ** -1.5,
    "three equal spikes": np.append(1 + 0.1 * RNG.standard_normal(N - 3), np.full(3, 50.0)),
    "flat": np.linspace(-1.0, 1.0, N),
    "rank 12": np.append(np.zeros(N - 12), np.exp(RNG.standard_normal(12))),
}


def rotated(values, seed=5):
    q = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(values), len(values))))[0]
    a = (q * values) @ q.T
    return (a + a.T) / 2


def operator(name, scale=1.0):
    return spectra.MatrixOperator(jnp.asarray(scale * rotated(SPECTRA[name])))


def walked(a, steps=20):
    """A state after products of random and of waiting directions, the rows, and the numbers of each step."""
    op = spectra.MatrixOperator(jnp.asarray(a))
    layout = Layout.of(op.like)
    state, found, waiting = explored.empty(layout, 24), [], np.zeros(explored.WAITING)
    for i in range(steps):
        fresh = i % 6 == 0
        slot = int(np.argmin(waiting) if fresh else np.argmax(waiting))
        drawn = explored.draw(KEY, i, op) if fresh else None
        state, step = explored.grow(op, layout, state, slot, drawn)
        waiting = np.asarray(step.lengths)
        found.append(step)
    rows = np.asarray(stack(state.basis, layout, 0, steps))
    return state, rows, found


@pytest.mark.slow
def test_every_number_of_a_step_is_that_of_the_matrix(x64):
    a = rotated(SPECTRA["flat"])
    state, rows, found = walked(a)
    unit, size = float(state.unit), np.linalg.norm(a, 2)
    tolerance = 100 * np.finfo(float).eps * size  # some twenty roundings of a product of norm |H|
    np.testing.assert_allclose(rows @ rows.T, np.eye(len(rows)), rtol=0, atol=1e-13)
    for i, step in enumerate(found):
        w = a @ rows[i]
        outside = w - rows[: i + 1].T @ (rows[: i + 1] @ w)
        assert unit * float(step.form) == pytest.approx(rows[i] @ w, abs=tolerance)
        assert unit * float(step.outside) == pytest.approx(np.linalg.norm(outside), abs=tolerance)
        assert unit**2 * float(step.square) == pytest.approx(w @ w, abs=tolerance * size)
    assert unit * float(state.asymmetry) <= tolerance


def test_what_a_direction_takes_off_the_norm_outside_is_exact(x64):
    a = rotated(SPECTRA["decaying"])
    state, rows, found = walked(a)
    square, unit = np.sum(a**2), float(state.unit)
    for i, step in enumerate(found):
        rest = np.eye(N) - rows[: i + 1].T @ rows[: i + 1]
        square -= unit**2 * (float(step.form) ** 2 + 2 * float(step.outside) ** 2)
        assert square == pytest.approx(np.sum((rest @ a @ rest) ** 2), abs=1e-12 * np.sum(a**2))


def test_a_vector_almost_within_the_basis_becomes_orthogonal(x64):
    state, rows, _ = walked(rotated(SPECTRA["flat"]))
    op = operator("flat")
    layout = Layout.of(op.like)
    drawn = jnp.asarray(rows.sum(axis=0) + 1e-6 * RNG.standard_normal(N))
    slot = int(np.argmin(state.origin))
    state, _ = explored.grow(op, layout, state, slot, drawn)
    rows = np.asarray(stack(state.basis, layout, 0, len(rows) + 1))
    # What is left after one pass, 1e-5 of the vector, has the rounding of all of it along the rows: 1e-11.
    np.testing.assert_allclose(rows @ rows.T, np.eye(len(rows)), rtol=0, atol=1e-13)


@pytest.mark.slow
def test_a_direction_and_its_product_share_compiled_sweeps(x64):
    before = explored._orthogonal.cache_size()
    walked(np.diag(np.arange(1.0, 60.0)))  # an order that no other test has
    assert explored._orthogonal.cache_size() == before + 1


@pytest.mark.slow
def test_no_number_of_samples_has_a_program_of_its_own(x64):
    op, before = operator("flat"), blocks._products.cache_size()
    found = [
        spectra.trace(op, key=KEY, num_matvecs=BUDGET - i, method="krylov", probe_batch=1) for i in range(3)
    ]
    assert len({estimate.dof % krylov_aware.CHUNK for estimate in found}) == 3
    assert blocks._products.cache_size() == before


@pytest.mark.parametrize("name", slow_but(SPECTRA, "decaying"))
def test_intervals_hold_and_are_not_wide(name, x64):
    op, truth, keys = operator(name), SPECTRA[name].sum(), jax.random.split(KEY, 60)
    found = [spectra.trace(op, key=key, num_matvecs=BUDGET, method="krylov") for key in keys]
    ends = np.array([estimate.interval() for estimate in found])
    slack = 1e-12 * np.abs(SPECTRA[name]).sum()
    misses = int(np.sum((ends[:, 0] - slack > truth) | (ends[:, 2] + slack < truth)))
    assert binom.sf(misses - 1, len(keys), 0.05) > 1e-3
    error = np.sqrt(np.mean((ends[:, 1] - truth) ** 2))
    half = np.mean(ends[:, 2] - ends[:, 0]) / 2
    # Student's t of four samples is 1.42 times the normal law, the root mean square of 60 errors is known to
    # 9 %, and the mean of half widths that differ is above that of their squares' root by no more than 2.
    assert half <= 2 * 1.96 * error + slack
    assert all(estimate.num_matvecs == BUDGET for estimate in found)


@pytest.mark.slow
def test_it_beats_xtrace_where_eigenvalues_decay(x64):
    op, truth, keys = operator("decaying"), SPECTRA["decaying"].sum(), jax.random.split(KEY, 40)
    errors = {
        method: np.mean(
            [(spectra.trace(op, key=k, method=method, num_matvecs=BUDGET).value - truth) ** 2 for k in keys]
        )
        for method in ("krylov", "xtrace")
    }
    assert errors["krylov"] < errors["xtrace"]  # 0.3 of it is expected; both are known to a quarter


def test_the_rest_is_sampled_where_nothing_decays(x64):
    estimate = spectra.trace(operator("flat"), key=KEY, num_matvecs=BUDGET, method="krylov")
    assert estimate.dof >= BUDGET / 2  # a direction takes 1/n off, a sample 1/s


def test_copies_of_an_eigenvalue_are_found(x64):
    estimate = spectra.trace(operator("three equal spikes"), key=KEY, num_matvecs=60, method="krylov")
    # A spike outside of the basis would leave an error of 50 √(2 / s), some 10.
    assert estimate.value == pytest.approx(SPECTRA["three equal spikes"].sum(), abs=1.0)
    assert estimate.stderr < 1.0


def test_a_finite_rank_is_exact(x64):
    estimate = spectra.trace(operator("rank 12"), key=KEY, num_matvecs=BUDGET, method="krylov")
    assert estimate.value == pytest.approx(SPECTRA["rank 12"].sum(), rel=1e-11)


def test_decisions_do_not_see_the_samples():
    """The split rests on what it is told of the basis: no sample is among its arguments."""
    steps = [(0.1, 1.0), (0.5, 0.8), (0.2, 0.5), (0.1, 0.1), (0.0, 0.1), (0.0, 0.01), (0.0, 0.01)]
    split = Split(size=100, budget=40)
    for i, (form, outside) in enumerate(steps):
        split.take(form, outside, random=i == 0)
    assert split.square == pytest.approx(99 - sum((a - 0.1) ** 2 + 2 * b**2 for a, b in steps[1:]))
    assert split.doubtful  # the last four took off a thousandth of what is left
    assert split.random_next(np.ones(3))


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_does_not_matter(scale):
    plain, scaled = (
        spectra.trace(operator("decaying", c), key=KEY, num_matvecs=BUDGET) for c in (1.0, scale)
    )
    assert plain.method == "krylov"
    assert scaled.value / scale == pytest.approx(plain.value, rel=1e-5)
    assert scaled.stderr / scale == pytest.approx(plain.stderr, rel=1e-3)


def test_zero_has_no_error():
    estimate = spectra.trace(spectra.MatrixOperator(jnp.zeros((N, N))), key=KEY, num_matvecs=BUDGET)
    assert (estimate.value, estimate.stderr) == (0.0, 0.0)


@pytest.mark.slow
def test_a_tolerance_ends_it_early(x64):
    estimate = spectra.trace(operator("decaying"), key=KEY, num_matvecs=90, tol=0.02)
    assert estimate.status is spectra.Status.CONVERGED
    assert estimate.num_matvecs < 50
    assert abs(estimate.value - SPECTRA["decaying"].sum()) <= 4 * 0.02 * estimate.value
    short = spectra.trace(operator("flat"), key=KEY, num_matvecs=20, tol=1e-3)
    assert short.status is spectra.Status.BUDGET_EXHAUSTED


def test_what_is_not_symmetric_is_refused():
    a = rotated(SPECTRA["decaying"])
    a[3, 70] += 0.5
    op = spectra.FunctionOperator(lambda v: jnp.asarray(a, jnp.float32) @ v, jnp.zeros(N))
    with pytest.raises(spectra.NotSymmetricError):
        spectra.trace(op, key=KEY, num_matvecs=BUDGET)


@pytest.mark.slow
def test_where_xtrace_stays():
    op = operator("decaying")
    assert spectra.trace(op, key=KEY, num_matvecs=12).method == "xtrace"
    assert spectra.trace(op, key=KEY, num_matvecs=BUDGET, probes="rademacher").method == "xtrace"
    assert spectra.trace(op, key=KEY, num_matvecs=BUDGET, by="leaf").method == "xtrace"
    traced = jax.jit(lambda key: spectra.trace(op, key=key, num_matvecs=20).value)(KEY)
    assert float(traced) == pytest.approx(
        spectra.trace(op, key=KEY, num_matvecs=20, method="xtrace").value, rel=1e-4
    )
    with pytest.raises(spectra.SpectraError, match="inside jit"):
        jax.jit(lambda key: spectra.trace(op, key=key, method="krylov").value)(KEY)


@pytest.mark.slow
def test_products_that_share_a_pass_or_are_saved_stay_with_xtrace(tmp_path):
    batches = list(jax.random.normal(KEY, (2, 4, N)))
    stream = spectra.HessianOperator(lambda w, x: jnp.mean(jnp.cos(x @ w)), jnp.zeros(N), batches)
    assert spectra.trace(stream, key=KEY, num_matvecs=16).method == "xtrace"
    op = operator("decaying")
    assert spectra.trace(op, key=KEY, num_matvecs=20, checkpoint=tmp_path / "run").method == "xtrace"
    with pytest.raises(spectra.SpectraError, match=r"does not save its Krylov space.*Use 'xtrace'"):
        spectra.trace(op, key=KEY, method="krylov", checkpoint=tmp_path / "other")


def test_more_looks_at_a_tolerance_stay_within_the_budget(x64, monkeypatch):
    monkeypatch.setattr(krylov_aware, "MARGIN", 0.2)  # a first look so early that others follow
    estimate = spectra.trace(operator("flat"), key=KEY, num_matvecs=BUDGET, method="krylov", tol=1e-3)
    assert estimate.status is spectra.Status.BUDGET_EXHAUSTED
    assert estimate.num_matvecs == BUDGET


@pytest.mark.parametrize("values", [(-1.0, 1.0), (1.0, 2.0, 3.0), (0.0, 1.0, 5.0)])
def test_few_distinct_eigenvalues_leave_their_products_to_the_samples(values, x64):
    """Chains of two or three directions: nothing waits behind them, and the basis has to end all the same."""
    op = spectra.MatrixOperator(jnp.asarray(rotated(np.resize(values, N))))
    estimate = spectra.trace(op, key=KEY, num_matvecs=BUDGET, method="krylov")
    assert estimate.dof >= BUDGET / 2  # a direction takes 1/n off, a sample 1/s
