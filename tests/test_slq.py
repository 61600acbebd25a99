"""Quadratures: exact where an exact answer exists, equivariant, and of the stated degree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import OPERATORS, SHARP, SPECTRA, N, planted, slow_but
from test_lanczos import BREAKDOWNS

import spectra

KEY = jax.random.key(0)


jitted_slq = jax.jit(
    lambda op, key, steps: spectra.slq(op, key=key, num_steps=steps, num_probes=2),
    static_argnums=2,
)
# Inside `jit` a breakdown is found by the size of one residual alone, (10 + √n / 2) eps |H|. From a random
# start the residual of an exhausted space of dimension six is 1 to 1e4 eps |H|: each step amplifies by
# |H| / beta what rounding put outside. Nodes and weights stay exact; extra nodes repeat an eigenvalue.


def exact_weights(entries, i):
    """Mass of probe i, drawn as slq documents it, on each distinct entry of a diagonal matrix."""
    draw = jax.random.normal(jax.random.fold_in(jax.random.fold_in(KEY, i), 0), (len(entries),))
    v = np.asarray(draw, np.float64)
    return np.array([np.sum(v[entries == x] ** 2) for x in np.unique(entries)]) / np.sum(v**2)


QUICK = [
    name
    for name in BREAKDOWNS
    if name not in ("thirty ones and thirty fives", "three pairs", "rank five of sixty")
]


@SHARP
@pytest.mark.parametrize("name", slow_but(BREAKDOWNS, *QUICK))
def test_breakdown_gives_exact_nodes_and_nothing_else(name, dtype):
    entries = BREAKDOWNS[name]
    values = np.unique(entries)
    n, eps, size = len(entries), float(jnp.finfo(dtype).eps), np.abs(entries).max()
    steps = min(n, len(values) + 3)
    op = spectra.MatrixOperator(np.diag(entries))
    eager = spectra.slq(op, key=KEY, num_steps=steps, num_probes=2)
    for q in (eager, jitted_slq(op, KEY, steps)):
        assert (np.asarray(q.lengths) >= len(values)).all()
        nodes, weights = np.asarray(q.nodes, np.float64), np.asarray(q.weights, np.float64)
        assert np.isfinite(nodes).all()
        for i in range(2):
            distance = np.abs(nodes[i][:, None] - values)
            # n roundings of |H| for a node; weights of values a fifth of |H| apart move by at most
            # five times as much. A node that is no eigenvalue must have no weight.
            spurious = distance.min(axis=1) > n * eps * size
            assert weights[i][spurious].sum() <= n * eps
            assert weights[i][: int(q.lengths[i])].sum() >= 1 - n * eps  # nothing dead is among the nodes
            mass = [weights[i][distance.argmin(axis=1) == j].sum() for j in range(len(values))]
            np.testing.assert_allclose(mass, exact_weights(entries, i), rtol=0, atol=5 * n * eps)


@SHARP
@pytest.mark.parametrize("name", slow_but(BREAKDOWNS, *QUICK))
def test_breakdown_from_random_probes_has_the_true_length(name, dtype):
    entries = BREAKDOWNS[name]
    count = len(np.unique(entries))
    op = spectra.MatrixOperator(np.diag(entries))
    q = spectra.slq(op, key=KEY, num_steps=min(len(entries), count + 3), num_probes=8)
    assert (q.lengths == count).all()
    assert (q.residuals == 0).all()
    assert q.status is spectra.Status.INVARIANT


@pytest.mark.parametrize("name", BREAKDOWNS)
def test_cdf_is_a_finite_step_function_after_breakdown(name):
    entries = BREAKDOWNS[name]
    op = spectra.MatrixOperator(np.diag(entries))
    q = spectra.slq(op, key=KEY, num_steps=min(8, len(entries)), num_probes=3)
    gap = 0.1 * (np.abs(entries).max() or 1.0)
    lower, estimate, upper = q.cdf(np.array([entries.min() - gap, entries.max() + gap]))
    for curve in (lower, estimate, upper):
        np.testing.assert_allclose(curve, [0, 1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SPECTRA)
def test_moments_up_to_degree_2m_minus_1_are_those_of_the_probes(name, x64):
    eigenvalues = np.sort(SPECTRA[name])
    a, m = planted(eigenvalues), 6
    q = spectra.slq(spectra.MatrixOperator(a), key=KEY, num_steps=m, num_probes=2)
    size = np.abs(eigenvalues).max() or 1.0
    for i in range(2):
        # The probe is drawn as slq documents it: from the key and its number alone.
        draw = jax.random.normal(jax.random.fold_in(jax.random.fold_in(KEY, i), 0), (N,))
        v = np.asarray(draw / jnp.linalg.norm(draw))
        w = v
        for degree in range(2 * m):
            exact = v @ w
            got = np.sum(q.weights[i] * (q.nodes[i] / size) ** degree)
            # A degree costs one product and one power: N roundings each.
            assert abs(got - exact) <= (degree + 1) * N * np.finfo(float).eps
            w = a @ w / size


@pytest.mark.parametrize("name", slow_but(OPERATORS, "preconditioned"))
def test_a_full_run_on_every_operator_finds_its_spectrum(name):
    op, dense = OPERATORS[name]()
    exact, n = np.linalg.eigvalsh(dense), len(dense)
    q = spectra.slq(op, key=KEY, num_steps=n, num_probes=1)
    # n steps reach every eigenvalue; a rounding of a product is precision * |H|, and there are n.
    bound = n * n * op.precision * np.abs(exact).max()
    live = q.nodes[0, : q.lengths[0]]
    assert np.abs(live[:, None] - exact).min(axis=1).max() <= bound
    assert np.abs(live[:, None] - exact).min(axis=0).max() <= bound
    assert q.status in (spectra.Status.COMPLETE, spectra.Status.INVARIANT)


# Powers of two: others round `scale * a`, and the bracket of a CDF takes every coefficient at its word.
@pytest.mark.parametrize("scale", [2.0**-20, 2.0**20])
@pytest.mark.parametrize("name", list(SPECTRA))
def test_every_function_is_equivariant_under_scaling(name, scale, x64):
    a = planted(SPECTRA[name])
    reports = [
        spectra.spectrum(spectra.MatrixOperator(c * a), key=KEY, num_steps=24, num_probes=2)
        for c in (1.0, scale)
    ]
    one, other = reports
    size = np.abs(SPECTRA[name]).max()
    np.testing.assert_array_equal(one.quadrature.lengths, other.quadrature.lengths)
    # Interior Ritz values and weights may amplify the rounding of scale * a, by at most 1e6 here
    # (1 / the relative gaps of the decaying spectrum); distributions and densities are stable.
    tol = 1e6 * np.finfo(float).eps * N
    x = np.linspace(-1.03, 1.07, 40) * size  # between eigenvalues, where the CDF does not jump
    for got, want in zip(other.quadrature.cdf(scale * x), one.quadrature.cdf(x), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=tol)
    for field in ("largest", "smallest"):
        got, want = getattr(other, field), getattr(one, field)
        np.testing.assert_allclose(np.array(got) / scale, np.array(want), rtol=0, atol=tol * size)
    assert abs(other.trace.value / scale - one.trace.value) <= tol * size * N
    assert abs(other.trace.stderr / scale - one.trace.stderr) <= np.sqrt(tol) * size * N
    for field in ("negative", "near_zero"):
        np.testing.assert_allclose(getattr(other, field), getattr(one, field), rtol=0, atol=tol)
    if size == 0:
        return  # H = 0 has no scale: its density is drawn with a unit width
    assert other.density.linear_scale / scale == pytest.approx(one.density.linear_scale, rel=1e-3)
    grid = np.linspace(-1.6, 1.6, 200) * size
    fixed = spectra.spectral_density(one.quadrature, grid=grid, bandwidth=0.1 * size)
    scaled = spectra.spectral_density(other.quadrature, grid=scale * grid, bandwidth=scale * 0.1 * size)
    peak = fixed.density.max()
    np.testing.assert_allclose(scaled.density * scale, fixed.density, rtol=0, atol=tol * peak)
    np.testing.assert_allclose(scaled.upper * scale, fixed.upper, rtol=1e-3, atol=tol * peak)


def test_more_probes_extend_a_run():
    op = spectra.MatrixOperator(planted(SPECTRA["indefinite"]))
    two = spectra.slq(op, key=KEY, num_steps=10, num_probes=2)
    four = spectra.slq(op, key=KEY, num_steps=10, num_probes=4)
    np.testing.assert_array_equal(four.nodes[:2], two.nodes)
    together = spectra.slq(op, key=KEY, num_steps=10, num_probes=4, probe_batch=3)
    np.testing.assert_allclose(together.nodes, four.nodes, rtol=0, atol=N * 1e-7 * 3)
    assert four.num_matvecs == together.num_matvecs == 40


def test_tolerance_stops_early_or_says_that_the_budget_ended():
    op = spectra.MatrixOperator(np.diag(np.linspace(0.0, 1.0, 400)))
    loose = spectra.slq(op, key=KEY, num_steps=40, num_probes=8, tol=0.2)
    assert loose.status is spectra.Status.CONVERGED
    assert loose.band_width() <= 0.2
    assert loose.num_matvecs < 320
    tight = spectra.slq(op, key=KEY, num_steps=20, num_probes=2, tol=1e-3)
    assert tight.status is spectra.Status.BUDGET_EXHAUSTED
    assert tight.band_width() > 1e-3


def test_known_moments_of_the_spectrum_lie_within_the_standard_error():
    eigenvalues = np.linspace(-1.0, 3.0, 2000)
    op = spectra.FunctionOperator(lambda v: jnp.linspace(-1.0, 3.0, 2000) * v, jnp.zeros(2000))
    report = spectra.spectrum(op, key=KEY, num_steps=30, num_probes=4)
    # The law of vᵀHv on the sphere: standard deviation sqrt(2 var(λ) / (n + 2)) a probe.
    stderr = 2000 * np.sqrt(2 * eigenvalues.var() / 2002 / 4)
    assert report.trace.stderr == pytest.approx(stderr, rel=0.1)
    assert abs(report.trace.value - eigenvalues.sum()) <= 4 * stderr


def test_a_bulk_that_breakdown_cuts_off_stays_within_the_band():
    # Outliers 5e5 times the bulk's radius: the coupling within the bulk is 10 eps |T|, below
    # the test for a breakdown, and all of the bulk becomes one node, half a width from its edge.
    entries = np.concatenate([np.linspace(-0.5, 0.5, 3995), 5e4 * np.arange(1, 6)])
    entries = jnp.asarray(entries, jnp.float32)
    op = spectra.FunctionOperator(lambda v: entries * v, entries)
    q = spectra.slq(op, key=KEY, num_steps=100, num_probes=2)
    x = np.array([-0.25, 0.0, 0.25])
    lower, _, upper = q.cdf(x)
    truth = np.mean(np.asarray(entries) <= x[:, None], axis=1)
    assert ((lower <= truth) & (truth <= upper)).all()


def test_nothing_of_a_zero_operator_is_negative():
    op = spectra.MatrixOperator(np.zeros((N, N)))
    report = spectra.spectrum(op, key=KEY, num_steps=6, num_probes=2)
    np.testing.assert_array_equal(report.negative, 0)
    assert spectra.negative_share(report.quadrature).value == 0
    np.testing.assert_array_equal(report.largest, 0)


def test_the_distribution_at_no_number_is_none():
    q = spectra.slq(
        spectra.MatrixOperator(planted(SPECTRA["indefinite"])), key=KEY, num_steps=6, num_probes=2
    )
    for curve in q.cdf(np.array([np.nan, -3.0])):
        assert np.isnan(curve[0])
        assert np.isfinite(curve[1])
    assert all(np.isnan(part) for part in q.cdf(np.nan))
