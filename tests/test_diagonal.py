"""Diagonals: exact where an exact answer exists, equal to a naive implementation, with errors that hold."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import OPERATORS, SPECTRA, N, Ridge, diagonal, planted, ridge_loss, slow_but
from scipy.stats import t as student

import spectra
from spectra.estimators import exact

KEY = jax.random.key(0)
BUDGET = 32  # one order and one budget wherever neither matters: the compiled code is shared
KEYS = jax.random.split(jax.random.key(7), 400)


def signs(i, n=N):
    """Probe i as documented: from the key, its number and the number of the leaf."""
    return np.asarray(jax.random.rademacher(jax.random.fold_in(jax.random.fold_in(KEY, i), 0), (n,), float))


@partial(jax.jit, static_argnums=2)
def mapped(op, keys, method):
    """An estimate for each key: one program for all operators."""
    return jax.vmap(lambda key: spectra.diagonal(op, key=key, method=method, num_matvecs=BUDGET))(keys)


def naive_xdiag(a, probes, keep, j):
    q = np.linalg.qr(a @ probes[:, keep])[0]
    omega = probes[:, j]
    image = a @ omega
    return np.diag(q @ q.T @ a) + omega * (image - q @ (q.T @ image)) / omega**2


@pytest.mark.parametrize("name", ["decaying", "indefinite"])
def test_xdiag_equals_a_naive_leave_one_out(name, x64):
    eigenvalues = {"decaying": 0.8 ** np.arange(N), "indefinite": np.linspace(-2, 3, N)}[name]
    a, m = planted(eigenvalues), 8
    probes = np.stack([signs(i) for i in range(m)], axis=1)
    one = partial(naive_xdiag, a, probes)
    single = np.array([one([i for i in range(m) if i != j], j) for j in range(m)])
    pairs = np.zeros((m, m, N))
    for i in range(m):
        for j in range(i):
            rest = [k for k in range(m) if k not in (i, j)]
            pairs[i, j] = pairs[j, i] = (single[i] - one(rest, i)) * (single[j] - one(rest, j))

    def mean_of_pairs(keep):
        return pairs[np.ix_(keep, keep)].sum(axis=(0, 1)) / (len(keep) * (len(keep) - 1))

    without = np.array([mean_of_pairs([i for i in range(m) if i != k]) for k in range(m)])
    jackknife = np.sqrt((m - 1) * without.var(axis=0))
    bound = np.abs(pairs).sum(axis=(0, 1)) / (m * (m - 1))
    covariance = np.minimum(np.maximum(mean_of_pairs(range(m)), 0) + jackknife, bound)
    stderr = np.sqrt(single.var(axis=0, ddof=1) / m + covariance)
    got = spectra.diagonal(spectra.MatrixOperator(a), key=KEY, method="xdiag", num_matvecs=2 * m)
    # Entries of m products of norm |H| sqrt(n), each with n roundings; the sketch amplifies by
    # |H| / λ_m = 5.
    tol = 100 * m * N * np.finfo(float).eps * np.abs(eigenvalues).max()
    np.testing.assert_allclose(got.value, single.mean(axis=0), rtol=0, atol=tol)
    np.testing.assert_allclose(got.stderr, stderr, rtol=1e-6, atol=tol)


def test_xnysdiag_equals_a_naive_leave_one_out(x64):
    a, m = planted(0.8 ** np.arange(N)), 8
    probes = np.stack([signs(i) for i in range(m)], axis=1)

    def one(keep, j):
        kept, omega = probes[:, keep], probes[:, j]
        image = a @ kept
        approximation = image @ np.linalg.solve(kept.T @ image, image.T)
        return np.diag(approximation) + omega * (a @ omega - approximation @ omega)

    single = np.array([one([i for i in range(m) if i != j], j) for j in range(m)])
    got = spectra.diagonal(spectra.MatrixOperator(a), key=KEY, method="xnysdiag", num_matvecs=m)
    # The core has eigenvalues from about N λ_8 = 0.2 N up: a condition of ten, times N roundings.
    np.testing.assert_allclose(got.value, single.mean(axis=0), rtol=0, atol=1e3 * N * np.finfo(float).eps)
    assert got.num_matvecs == m
    errors = [
        np.sqrt(
            np.mean((np.asarray(mapped(spectra.MatrixOperator(a), KEYS, method).value) - np.diag(a)) ** 2)
        )
        for method in ("xnysdiag", "xdiag")
    ]
    assert errors[0] <= errors[1]  # of the same 32 products
    with pytest.raises(spectra.SpectraError, match="xnysdiag needs a positive semi-definite operator"):
        spectra.diagonal(
            spectra.MatrixOperator(planted(np.linspace(-2, 3, N))),
            key=KEY,
            method="xnysdiag",
            num_matvecs=BUDGET,
        )


@pytest.mark.slow
def test_a_tolerance_below_the_rounding_that_is_measured_is_not_reached(monkeypatch):
    """Three vectors hold all of H, so that the stated precision is all there is, until it is measured."""
    root = jnp.asarray(np.random.default_rng(0).standard_normal((3, N)), jnp.float32)
    op, options = spectra.MatrixOperator(root.T @ root), {"key": KEY, "num_matvecs": 24, "tol": 1e-3}

    def run():
        return (
            spectra.diagonal(op, method="xnysdiag", **options),
            spectra.trace(op, method="xnystrace", **options),
        )

    assert [found.status for found in run()] == [spectra.Status.CONVERGED] * 2
    monkeypatch.setattr(exact, "measured_precision", lambda run: 1e-2)
    for found in run():
        assert found.status is spectra.Status.STAGNATED
        error, value = (np.linalg.norm(x) for x in (found.stderr, found.value))
        assert error > options["tol"] * value


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_rounding_of_a_sketch_of_much_of_the_space_is_stated(ratio):
    """32 of 48 directions hold all of H that float32 does: what is left is rounding of the smallest ones."""
    a = jnp.asarray(planted(ratio ** np.arange(N)), jnp.float32)
    found = mapped(spectra.MatrixOperator(a), KEYS, "xnysdiag")
    errors = np.abs(np.asarray(found.value, np.float64) - np.diag(np.asarray(a, np.float64)))
    stderr = np.asarray(found.stderr, np.float64)
    assert np.mean(errors <= 2 * stderr) >= 0.95
    # Rounding of |H| √n, which the core of 32 of 48 directions, of the condition
    # ((1 + √(2/3)) / (1 - √(2/3)))² = 98 of ΩΩᵀ, amplifies by its root.
    assert np.sqrt(np.mean(stderr**2)) <= 10 * np.sqrt(N) * float(jnp.finfo(jnp.float32).eps)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["covariance", "hessian"])
def test_auto_takes_the_nystrom_approximation_where_no_eigenvalue_is_negative(name, x64):
    ridge = Ridge(width=30)
    op = ridge.operator(None)
    if name == "covariance":
        op = spectra.GradientCovarianceOperator(ridge_loss, op.params, op.data)
    methods = [spectra.diagonal(op, key=KEY, num_matvecs=m, probe_batch=4) for m in (12, 24)]
    assert [one.method for one in methods] == ["hutchinson", "xnysdiag" if op.semidefinite else "xdiag"]
    assert op.semidefinite is (name == "covariance")
    assert "no eigenvalue is negative" in methods[1].reason or not op.semidefinite


@pytest.mark.slow
def test_hutchinson_equals_its_definition(x64):
    a = planted(np.linspace(-2, 3, N))
    samples = np.array([signs(i) * (a @ signs(i)) for i in range(10)])
    for batch in (1, 3, 10):
        got = spectra.diagonal(
            spectra.MatrixOperator(a), key=KEY, method="hutchinson", num_matvecs=10, probe_batch=batch
        )
        np.testing.assert_allclose(got.value, samples.mean(axis=0), rtol=0, atol=1e-14)
        # The score interval: 10 - 4 degrees of freedom in place of 10 - 1.
        np.testing.assert_allclose(got.stderr, samples.std(axis=0, ddof=4) / np.sqrt(10), rtol=1e-12)


@pytest.mark.parametrize(("method", "count"), [("xdiag", 16), ("xnysdiag", 8)])
def test_a_range_that_the_sketch_spans_leaves_rounding_as_it_is(method, count):
    """Of 8 probes of a matrix of rank 6 two are left out at a time: what the others miss is not the error."""
    a = jnp.asarray(planted(np.r_[5.0, 4.0, 3.0, 2.0, 1.5, 1.0, np.zeros(N - 6)]), jnp.float32)
    op, exact_, squares = spectra.MatrixOperator(a), np.diag(np.asarray(a, np.float64)), []
    for key in KEYS[:24]:
        found = spectra.diagonal(op, key=key, method=method, num_matvecs=count)
        errors = np.asarray(found.value, np.float64) - exact_
        assert np.mean(np.abs(errors) <= student.ppf(0.975, 7) * np.asarray(found.stderr)) >= 0.9
        squares.append([np.mean(np.square(found.stderr)), np.mean(errors**2)])
    stated, true = np.sqrt(np.mean(squares, axis=0))
    # Of 8 estimates with the variance v each, the mean has v / 8 or more; CHANCE v + v / 8 is stated at most,
    # the root of which is 9 times as much. Twice that for what 24 keys show of v; it was 60 and 110.
    assert stated <= 2 * 9 * true


@pytest.mark.parametrize("num_matvecs", [1, 2, 4, 7, 16])
def test_rows_of_two_entries_are_covered(num_matvecs, x64):
    """Every sample is 1 ± 1. Up to four often agree by chance; the spread of seven held for 88 %."""
    op = spectra.MatrixOperator(jnp.asarray(np.kron(np.eye(10), np.ones((2, 2)))))
    found = jax.vmap(lambda key: spectra.diagonal(op, key=key, method="hutchinson", num_matvecs=num_matvecs))(
        jax.random.split(KEY, 400)
    )
    half = student.ppf(0.975, max(num_matvecs - 1, 1)) * np.asarray(found.stderr)
    # 4,000 independent rows (two entries of a block have one error): the rate is at least that of a
    # binomial test at 95 %, 96.1 % of 16, and 0.93 is five standard errors below 0.95.
    assert np.mean(np.abs(np.asarray(found.value) - 1) <= half + 1e-12) >= 0.93


@pytest.mark.parametrize("method", slow_but(["hutchinson", "exact"], "exact"))
def test_a_diagonal_operator_has_its_diagonal(method, dtype):
    entries = jnp.asarray(np.linspace(-2, 3, N), dtype)
    got = spectra.diagonal(diagonal(entries), key=KEY, method=method, num_matvecs=3)
    np.testing.assert_allclose(got.value, entries, rtol=4 * float(jnp.finfo(dtype).eps))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"], indirect=True)
@pytest.mark.parametrize("method", ["xdiag", "xnysdiag"])
@pytest.mark.parametrize("name", ["zero", "rank deficient", "multiple of the identity", "two scales"])
def test_degenerate_operators_give_no_nan(name, method, dtype):
    eigenvalues = np.append([1e4, 1e-4], np.zeros(N - 2)) if name == "two scales" else SPECTRA[name]
    eigenvalues = np.abs(eigenvalues) if method == "xnysdiag" else eigenvalues
    a = planted(eigenvalues)
    op = spectra.MatrixOperator(jnp.asarray(a, dtype))
    got = spectra.diagonal(op, key=KEY, method=method, num_matvecs=BUDGET)
    traced = mapped(op, KEYS[:8], method)
    eps, size = float(jnp.finfo(dtype).eps), np.abs(eigenvalues).max()
    for found in (got, traced):
        error = np.abs(np.asarray(found.value, np.float64) - np.diag(a))
        assert np.isfinite(found.stderr).all()
        # Six standard errors of t with 15 degrees of freedom, 48 entries, 9 keys: 1e-2; n roundings of |H|.
        assert (error <= 6 * np.asarray(found.stderr) + 2 * 48 * eps * size).all()
    if name in ("zero", "rank deficient", "two scales"):
        assert np.abs(np.asarray(got.value) - np.diag(a)).max() <= 2 * 48 * eps * size
    assert traced.status is spectra.Status.TRACED


@pytest.mark.parametrize("name", slow_but(["flat", "polynomial", "exponential"], "flat", "polynomial"))
@pytest.mark.parametrize("method", ["hutchinson", "xdiag", "xnysdiag"])
def test_intervals_hold_at_their_rate(method, name, x64):
    index = np.arange(float(N))
    eigenvalues = {"flat": 3 - index / N, "polynomial": (index + 1) ** -2, "exponential": 0.8**index}[name]
    a = planted(eigenvalues)
    estimate = mapped(spectra.MatrixOperator(a), KEYS, method)
    errors, stderr = np.asarray(estimate.value) - np.diag(a), np.asarray(estimate.stderr)
    held = np.abs(errors) <= student.ppf(0.975, 15 if method == "xdiag" else 31) * stderr
    assert held.mean() >= 0.92
    # The error stated, beside the true one, over 400 keys and 48 entries; the mean square of one entry is
    # good to 7 %. What bounding a covariance costs XDiag is what it costs XTrace, see `leave_one_out`.
    ratio = np.sqrt(np.mean(stderr**2) / np.mean(errors**2))
    assert 0.9 <= ratio <= {"hutchinson": 1.1}.get(method, 4.0)
    if method == "hutchinson":
        assert held.mean() <= 0.98


@pytest.mark.parametrize("method", ["hutchinson", "xdiag", "exact"])
def test_the_batch_of_probes_changes_rounding_only(method, x64):
    op = spectra.MatrixOperator(jnp.asarray(planted(0.8 ** np.arange(N))))
    values = [
        spectra.diagonal(op, key=KEY, method=method, num_matvecs=BUDGET, probe_batch=batch).value
        for batch in (1, 7, BUDGET)
    ]
    assert np.ptp(values, axis=0).max() <= 10 * N * np.finfo(np.float64).eps


# One of each kind: what they share is tested by their dense matrices, in test_operators.
KINDS = ("matrix", "one batch", "preconditioned", "diagonal", "low rank", "kronecker product")


@pytest.mark.parametrize("name", slow_but(OPERATORS, *KINDS))
def test_every_operator_has_its_diagonal(name):
    op, dense = OPERATORS[name]()
    got = spectra.diagonal(op, key=KEY, num_matvecs=100)
    assert got.method == "exact"
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(got.value)])
    assert jax.tree.structure(got.value) == jax.tree.structure(op.structure)
    bound = len(dense) ** 2 * op.precision * np.linalg.norm(dense, 2)
    np.testing.assert_allclose(flat, np.diag(dense), rtol=0, atol=bound)


@pytest.mark.slow
def test_a_tolerance_and_a_stream_and_groups(x64, tmp_path):
    ridge = Ridge(width=30)
    op, dense = ridge.operator(ridge.parts(5)), ridge.hessian()
    got = spectra.diagonal(
        op, key=KEY, method="hutchinson", num_matvecs=100, tol=0.9, by="leaf", probe_batch=4
    )
    assert got.status is spectra.Status.CONVERGED
    assert got.num_matvecs < 100
    assert list(got.value) == ["b", "w"]
    assert (np.abs(got.value["w"] - np.diag(dense)[1:]) <= 6 * got.stderr["w"]).all()
    np.testing.assert_array_equal(got.total.value["w"], got.value["w"])
    assert "arrays" in repr(got)
    loaded = spectra.load(spectra.save(got.total, tmp_path / "diagonal"))
    np.testing.assert_array_equal(loaded.value["w"], got.value["w"])
    layers = spectra.diagonal(op, key=KEY, num_matvecs=24, by="layer", probe_batch=4)
    assert (layers.method, list(layers.value["w"])) == ("xdiag", ["w"])
    short = spectra.diagonal(op, key=KEY, num_matvecs=24, tol=1e-9, probe_batch=4)
    assert short.status in (spectra.Status.BUDGET_EXHAUSTED, spectra.Status.CONVERGED)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("method", ["hutchinson", "xdiag", pytest.param("xnysdiag", marks=pytest.mark.slow)])
def test_estimates_are_equivariant_under_scaling(method, scale, x64):
    a = planted(SPECTRA["rank deficient"])
    one, other = (
        spectra.diagonal(spectra.MatrixOperator(c * a), key=KEY, method=method, num_matvecs=BUDGET)
        for c in (1.0, scale)
    )
    np.testing.assert_allclose(other.value / scale, one.value, rtol=0, atol=1e-12)


def test_arguments_out_of_range_are_named(x64):
    op = spectra.MatrixOperator(np.eye(N))
    for options in ({"method": "none"}, {"num_matvecs": 3, "method": "xdiag"}, {"tol": 0.0}, {"key": None}):
        name = next(iter(options))
        with pytest.raises(spectra.SpectraError, match=f"{name}="):
            spectra.diagonal(op, **({"key": KEY, "num_matvecs": BUDGET} | options))
    overflowing = spectra.MatrixOperator(np.full((N, N), 1e308))
    for method in ("hutchinson", "xdiag"):
        with pytest.raises(spectra.NonFiniteError):
            spectra.diagonal(overflowing, key=KEY, method=method, num_matvecs=BUDGET)
    with pytest.raises(spectra.NonFiniteError):
        spectra.diagonal(diagonal(np.full(N, np.nan)), key=KEY, method="exact")


@partial(jax.jit, static_argnames=("count", "batch"))
def looped(op, key, count, batch):
    return spectra.diagonal(op, key=key, method="hutchinson", num_matvecs=count, probe_batch=batch)


@pytest.mark.slow
@pytest.mark.parametrize("count", [4, 10])
def test_inside_jit_probes_in_a_loop_are_those_outside(count, x64):
    """A batch alone, and two of them with a rest."""
    op = spectra.MatrixOperator(planted(np.linspace(-1, 2, N)))
    got = looped(op, KEY, count, 4)
    expected = spectra.diagonal(op, key=KEY, method="hutchinson", num_matvecs=count, probe_batch=4)
    # Samples are sums of N terms, with |H| = 2, in another order; an error is a norm of what they differ by.
    for one, other in ((got.value, expected.value), (got.stderr, expected.stderr)):
        np.testing.assert_allclose(one, other, rtol=0, atol=2 * N * np.finfo(float).eps)


def test_inside_jit_a_program_does_not_grow_with_the_probes():
    op = spectra.MatrixOperator(jnp.eye(N))
    short, long = (looped.lower(op, KEY, count, 1).as_text() for count in (4, BUDGET))
    assert short.count("\n") == long.count("\n")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["xdiag", "xnysdiag", "xtrace", "xnystrace"])
def test_inside_jit_a_program_with_a_sketch_does_not_grow_with_the_probes(method):
    op = spectra.MatrixOperator(jnp.eye(256))
    estimate = spectra.diagonal if "diag" in method else spectra.trace

    def lines(count):
        fn = jax.jit(lambda op, key: estimate(op, key=key, method=method, num_matvecs=count).value)
        return fn.lower(op, KEY).as_text().count("\n")

    assert lines(64) == lines(24)


@partial(jax.jit, static_argnums=2)
def few(matrices, keys, count):
    def one(a, key):
        op = spectra.MatrixOperator(a)
        return spectra.diagonal(op, key=key, method="hutchinson", num_matvecs=count)

    return jax.vmap(lambda a: jax.vmap(lambda key: one(a, key))(keys))(matrices)


@pytest.mark.parametrize(("n", "count"), [(2, 1), (3, 2), (5, 4)])
def test_few_products_of_small_operators_cover(n, count, x64):
    """Signs that agree are no evidence where few rows are alike: 49, 73 and 88 % of these keys at worst."""
    spike = planted(np.append(1.0, np.zeros(n - 1)))
    matrices = np.stack(
        [np.ones((n, n)), spike, np.eye(n), planted(np.linspace(-1, 1, n)), np.diag(spike[0])]
    )
    got = few(jnp.asarray(matrices), KEYS, count)
    half = student.ppf(0.975, got.dof) * np.asarray(got.stderr)
    truth = np.diagonal(matrices, axis1=1, axis2=2)[:, None]
    held = np.abs(np.asarray(got.value) - truth) <= half + 1e-12
    # Of a rate of 95 % among 400 keys 91.6 % is three standard errors off; entries of a key hang together.
    assert np.all(held.mean(axis=(1, 2)) >= 0.916)
    # The worst case of the law, an eigenvector, has the width of Student's quantile over the normal one.
    ratio = half[1].mean() / np.sqrt(np.mean((np.asarray(got.value)[1] - truth[1]) ** 2)) / 1.96
    assert ratio <= 1.5 * student.ppf(0.975, count) / 1.96
