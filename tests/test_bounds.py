"""Condition numbers and extreme eigenvalues over spectra that are known: bounds bound, values are values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import Diagonal, rotation
from scipy.stats import binom

import spectra
from spectra.density.extremes import LEVEL, extreme
from spectra.results.text import directed, rounded

N = 400
EPS = float(np.finfo(np.float32).eps)


def _spectra() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    half = N // 2
    low, high = np.log(1e-3), 0.0
    return {
        "definite": np.linspace(1.0, 50.0, N),
        "negative": -np.linspace(2.0, 40.0, N),
        "gap around zero": np.r_[np.linspace(-2.0, -1.0, half), np.linspace(0.5, 3.0, N - half)],
        "symmetric": np.r_[np.linspace(1.0, 2.0, half), -np.linspace(1.0, 2.0, N - half)],
        "half zeros, both signs": np.r_[
            np.zeros(half), rng.uniform(0.1, 1, half) * rng.choice([-1, 1], half)
        ],
        "one zero, both signs": np.r_[0.0, rng.uniform(0.1, 1, N - 1) * rng.choice([-1, 1], N - 1)],
        "twenty zeros, three decades": np.r_[np.zeros(20), np.exp(rng.uniform(low, high, N - 20))],
        "three decades": np.exp(rng.uniform(low, high, N)),
        "close to the edge": np.r_[1e-3, np.full(half, 1.2e-3), rng.uniform(0.1, 1, N - half - 1)],
        "clustered": np.repeat([1.0, 2.0, 5.0, 9.0], N // 4) + 1e-3 * rng.uniform(-1, 1, N),
        "repeated": np.repeat([1.0, 2.0, 5.0, 9.0], N // 4),
        "sixteen decades": np.logspace(-12, 4, N),
        "near the noise": np.r_[3e-6, rng.uniform(0.1, 1, N - 1)],
        "decaying": np.arange(1, N + 1) ** -1.5,
        "outliers": np.r_[np.linspace(0.5, 1.5, N - 3), [-8e3, 9e3, 1e4]],
        "multiple of the identity": np.full(N, -0.7),
    }


SPECTRA = _spectra()


def check(result, eigenvalues):
    """All that a condition number says, against the eigenvalues."""
    sizes = np.abs(np.asarray(eigenvalues, np.float64))
    top = sizes.max()
    cut = result.rank_tol * result.largest
    kept, nonzero = sizes[sizes > cut], sizes[sizes > 0]
    low, effective, high = result.effective_interval
    assert low <= effective <= high
    assert low <= top / nonzero.min(), "a bound over the range of the matrix, whatever counts as zero"
    assert high >= top / kept.min()
    assert result.largest_interval.lower <= top <= result.largest_interval.upper
    if result.is_lower_bound:
        assert result.effective == low
    else:
        assert low <= top / kept.min() <= high
        assert result.effective == pytest.approx(top / kept.min(), rel=1e-2)
    if np.isfinite(result.value):
        kappa = top / sizes.min() if sizes.min() else np.inf
        assert result.value <= kappa if result.is_lower_bound else low <= kappa <= high
    else:
        assert sizes.min() <= cut
    nullity = int(np.sum(sizes <= cut))
    if result.nullity_interval.upper == 0:
        assert nullity == 0
    if nullity == 0 and top / sizes.min() <= 1e3:
        assert result.nullity == 0
        assert result.effective >= 0.9 * top / sizes.min()


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECTRA)
def test_without_a_matrix_bounds_bound_and_values_are_values(name):
    entries = np.asarray(SPECTRA[name], np.float32)
    for seed in range(5):
        key = jax.random.key(seed)
        check(spectra.condition_number(Diagonal(jnp.asarray(entries)), key=key, method="krylov"), entries)


@pytest.mark.parametrize("name", SPECTRA)
def test_a_dense_matrix_in_float32_is_within_its_error_of_the_one_in_float64(name):
    turn = rotation(N)
    matrix = (turn * SPECTRA[name]) @ turn.T
    op = spectra.MatrixOperator(jnp.asarray((matrix + matrix.T) / 2, jnp.float32))
    result = spectra.condition_number(op, key=jax.random.key(0))
    assert result.method == "dense"
    check(result, np.where(SPECTRA[name] == 0, 0.0, SPECTRA[name]))


@pytest.mark.slow
@pytest.mark.parametrize("n", [5, 6000])
def test_small_and_large_orders(n):
    rng = np.random.default_rng(n)
    cases = {
        "definite": (np.linspace(1.0, 20.0, n), 0),
        "a zero": (np.r_[0.0, rng.uniform(0.5, 1, n - 1)], 1),
    }
    for entries, nullity in cases.values():
        entries = np.asarray(entries, np.float32)
        result = spectra.condition_number(
            Diagonal(jnp.asarray(entries)), key=jax.random.key(1), method="krylov"
        )
        check(result, entries)
        assert result.nullity_interval.lower <= nullity <= result.nullity_interval.upper
        # What counts as zero is two shifts: each 4 floors of 4 eps |H|, and twice what a breakdown dropped,
        # (10 + √n / 2) eps |H|, at most 64.
        assert result.rank_tol <= 1.01 * 2 * (4 * 4 + 2 * min(10 + np.sqrt(n) / 2, 64)) * EPS


@pytest.mark.slow
def test_an_eigenvalue_that_is_alone_just_below_a_cluster_is_found():
    n = 6000
    rng = np.random.default_rng(0)
    entries = np.asarray(
        np.r_[1e-3, np.full(n // 2, 1.2e-3), rng.uniform(0.1, 1, n - n // 2 - 1)], np.float32
    )
    result = spectra.condition_number(Diagonal(jnp.asarray(entries)), key=jax.random.key(0))
    check(result, entries)
    assert not result.is_lower_bound


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_a_million_eigenvalues_far_from_zero():
    entries = np.linspace(0.05, 1.0, 10**6, dtype=np.float32)
    result = spectra.condition_number(Diagonal(jnp.asarray(entries)), key=jax.random.key(0))
    check(result, entries)
    assert result.value >= 19
    assert result.nullity_interval.upper == 0
    assert result.effective_interval.upper < 22


@pytest.mark.slow
def test_a_condition_number_of_1e4_in_float32_from_a_dense_matrix():
    n = 1500
    turn = rotation(n)
    sizes = np.exp(np.random.default_rng(1).uniform(np.log(1e-4), 0.0, n))
    sizes[:2] = 1e-4, 1.0
    matrix = (turn * sizes) @ turn.T
    op = spectra.MatrixOperator(jnp.asarray((matrix + matrix.T) / 2, jnp.float32))
    result = spectra.condition_number(op, key=jax.random.key(0))
    check(result, sizes)
    assert not result.is_lower_bound
    assert result.nullity_interval == (0, 0, 0)


EXTREMES = {
    "near zero with tails": np.concatenate(
        [
            np.random.default_rng(0).normal(0, 1e-3, 360),
            -np.geomspace(1e-3, 8e-2, 20),
            np.geomspace(0.1, 10, 20),
        ]
    ),
    "semicircle and outliers": np.r_[0.1 * np.cos(np.linspace(0, np.pi, 390)), np.linspace(1, 10, 10)],
    "one negative outlier": np.r_[
        np.random.default_rng(1).normal(0, 1e-2, 389), -0.5, np.linspace(1, 10, 10)
    ],
    "uniform": np.linspace(-1.0, 2.0, N),
}
ROWS = 200


def single_probes(entries, steps):
    """The quadratures of many probes, each on its own."""
    op = Diagonal(jnp.asarray(entries, jnp.float32))
    q = spectra.slq(op, key=jax.random.key(3), num_steps=steps, num_probes=ROWS)
    names = ("nodes", "weights", "residuals", "lengths", "asymmetry")
    for i in range(ROWS):
        yield dataclasses.replace(q, **{name: np.asarray(getattr(q, name))[i : i + 1] for name in names})


@pytest.mark.slow
@pytest.mark.parametrize("steps", [8, 30])
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes_have_a_bound_inside_and_a_limit_outside(name, steps):
    entries = np.asarray(EXTREMES[name], np.float32)
    ends = entries.min(), entries.max()
    misses = np.zeros(2)
    for quadrature in single_probes(entries, steps):
        low, high = extreme(quadrature, 0), extreme(quadrature, -1)
        assert ends[0] <= low.upper
        assert ends[1] >= high.lower
        misses += ends[0] < low.lower, ends[1] > high.upper
    # At most 1 % of the probes miss: more than this with probability 1e-4.
    assert misses.max() <= binom.isf(1e-4, ROWS, 1 - LEVEL)


@pytest.mark.slow
def test_extremes_are_as_sharp_as_the_steps_allow():
    """A unique outlier converges to rounding, and its limit with it; a dense edge leaves a few per cent."""
    report = spectra.spectrum(
        Diagonal(jnp.asarray(EXTREMES["one negative outlier"], jnp.float32)),
        key=jax.random.key(0),
        num_steps=40,
    )
    low, estimate, high = report.smallest
    # The inner side is the shift by rounding, 16 eps |H|, or more by the asymmetry; the outer ten times that.
    assert high - estimate <= 32 * EPS * 10
    assert estimate - low <= 320 * EPS * 10
    assert low <= -0.5 <= high
    edge = spectra.spectrum(
        Diagonal(jnp.asarray(EXTREMES["uniform"], jnp.float32)), key=jax.random.key(0), num_steps=40
    )
    assert 0 < edge.smallest.estimate - edge.smallest.lower < 0.03 * 3.0


@pytest.mark.slow
def test_what_has_not_converged_is_said_to_be_a_bound():
    quadrature = next(single_probes(EXTREMES["near zero with tails"], 8))
    report = spectra.spectrum(
        Diagonal(jnp.asarray(EXTREMES["near zero with tails"], jnp.float32)),
        key=jax.random.key(3),
        num_steps=8,
        num_probes=1,
    )
    assert report.smallest.upper == pytest.approx(extreme(quadrature, 0).upper, abs=1e-5)
    rows = dict(report.rows())
    assert rows["smallest eigenvalue"].startswith("at most ")
    assert rows["smallest eigenvalue"].endswith("not converged")
    bound = float(rows["smallest eigenvalue"].split()[2].rstrip(","))
    assert bound >= report.smallest.upper, "rounded to the side on which it is true"


@pytest.mark.slow
def test_a_history_does_not_hide_a_wrong_sign(tmp_path):
    def loss_fn(p, b):
        return jnp.mean((jnp.tanh(b[0] @ p["w"]) @ p["v"] - b[1]) ** 2)

    params = {"w": jax.random.normal(jax.random.key(0), (8, 32)), "v": jnp.ones(32) / 32}
    batch = (jax.random.normal(jax.random.key(1), (500, 8)), jnp.zeros(500))
    optimizer = optax.sgd(0.1)
    state = optimizer.init(params)
    path = tmp_path / "history.jsonl"
    make = lambda p: spectra.HessianOperator(loss_fn, p, batch)  # noqa: E731
    tracker = spectra.SpectrumTracker(make, every=10, path=path)
    exact = []
    for step in range(21):
        if tracker(step, params):
            exact.append(np.linalg.eigvalsh(np.asarray(make(params).as_matrix(), np.float64)))
        updates, state = optimizer.update(jax.grad(loss_fn)(params, batch), state)
        params = optax.apply_updates(params, updates)
    history = spectra.load(path)
    assert list(history.smallest_kind) == ["upper bound"] * 3
    assert "≤" in dict(history.rows())["smallest eigenvalue"]
    low, _, high = history.smallest_interval
    for i, values in enumerate(exact):
        assert low[i] <= values[0] <= high[i]
        assert history[i].largest.lower <= values[-1] <= history[i].largest.upper
    assert any(values[0] < 0 < history.smallest[i] for i, values in enumerate(exact)), "the case in question"


@pytest.mark.slow
def test_older_files_keep_what_they_said():
    new = spectra.SpectrumTracker(lambda _: Diagonal(jnp.linspace(-1.0, 3.0, 60)), 1)(0, None)
    old = dataclasses.replace(new, smallest=spectra.Interval(-1.1, -1.0, -0.9), level=None)
    assert old.smallest_kind == "residual"
    assert dict(old.rows())["smallest eigenvalue"] == "an eigenvalue within 0.1 of -1.00"


def test_digits_follow_the_error():
    assert rounded(-0.080013, 3e-4) == "-0.0800"
    assert rounded(1234.5, 200.0) == "1.2e+03"
    assert rounded(0.01, 0.5) == "0.01"
    for value in (-0.00616, 0.00616, 9.99, -9.99, 1.0):
        assert float(directed(value, up=True)) >= value >= float(directed(value, up=False))
