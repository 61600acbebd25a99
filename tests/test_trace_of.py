"""Functions of an operator: brackets that hold for certain, errors that hold at their rate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import SHARP, planted, slow_but

import spectra

KEY = jax.random.key(0)
N = 120
LOW, HIGH = 0.02, 2.0
EIGENVALUES = np.linspace(LOW, HIGH, N)
FUNCTIONS = {
    "log": np.log,
    "inverse": lambda x: 1 / x,
    "square root": np.sqrt,
    "power 1.5": lambda x: x**1.5,
    "power -0.5": lambda x: x**-0.5,
    "exp": np.exp,
    "effective dimension": lambda x: x / (x + 0.1),
}


def diagonal_operator(entries):
    entries = jnp.asarray(entries)
    return spectra.FunctionOperator(lambda v: entries * v, entries)


@pytest.fixture(scope="module")
def quadratures():
    with jax.enable_x64(True):
        op = diagonal_operator(EIGENVALUES)
        return {m: spectra.slq(op, key=KEY, num_steps=m, num_probes=3) for m in (1, 2, 5, 12, 30)}


@pytest.mark.parametrize("num_steps", [1, 2, 5, 12, 30])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_bracket_holds_for_the_probes_drawn(name, num_steps, quadratures, x64):
    f = FUNCTIONS[name]
    truth = 0.0
    for i in range(3):
        v = np.asarray(jax.random.normal(jax.random.fold_in(jax.random.fold_in(KEY, i), 0), (N,)))
        truth += N / 3 * np.sum(f(EIGENVALUES) * v**2) / np.sum(v**2)
    got = spectra.trace_of(quadratures[num_steps], f, bounds=(LOW, HIGH))
    rounding = 100 * N * np.finfo(float).eps * np.abs(f(EIGENVALUES)).max()
    assert got.lower - rounding <= truth <= got.upper + rounding
    assert got.lower <= got.value <= got.upper
    assert "given bounds" in got.reason
    if num_steps == 30:
        # Gauss converges like ((sqrt(κ) - 1) / (sqrt(κ) + 1))^2m = 0.82^60 = 6e-6 for κ = 100.
        assert got.upper - got.lower <= 1e-3 * abs(truth)


RATES = ["log", "inverse", "effective dimension", "rank one", "rank deficient log"]


@pytest.mark.parametrize("name", slow_but(RATES, "log", "rank one"))
def test_intervals_hold_at_their_rate(name, x64):
    entries, f = {
        "log": (EIGENVALUES, np.log),
        "inverse": (EIGENVALUES, FUNCTIONS["inverse"]),
        "effective dimension": (0.9 ** np.arange(N), lambda x: x / (x + 1e-3)),
        "rank one": (np.append(3.0, np.zeros(N - 1)), lambda x: x),
        "rank deficient log": (np.append(np.arange(1.0, 6.0), np.zeros(N - 5)), lambda x: np.log(x + 0.1)),
    }[name]
    op, held = diagonal_operator(entries), 0
    quadrature = spectra.slq(op, key=KEY, num_steps=25, num_probes=800, probe_batch=800)
    for i in range(200):  # four probes each
        rows = slice(4 * i, 4 * i + 4)
        part = spectra.results.Quadrature(
            *(
                getattr(quadrature, field)[rows]
                for field in ("nodes", "weights", "residuals", "lengths", "asymmetry")
            ),
            size=N,
            num_matvecs=80,
            precision=quadrature.precision,
            status=quadrature.status,
        )
        lower, _, upper = spectra.trace_of(part, f).interval()
        held += lower <= f(entries).sum() <= upper
    assert held >= 0.92 * 200


@SHARP
def test_the_log_determinant_of_half_the_identity_is_exact(dtype):
    got = spectra.logdet(spectra.MatrixOperator(0.5 * jnp.eye(N, dtype=dtype)), key=KEY)
    assert got.value == pytest.approx(N * np.log(0.5), rel=4 * float(jnp.finfo(dtype).eps))
    # A node may be off by the noise floor, 4 eps |H|, which moves the logarithm by 4 eps.
    assert got.stderr <= 4.001 * N * float(jnp.finfo(dtype).eps)
    assert got.upper - got.lower <= got.stderr


def test_the_exponential_of_a_rank_deficient_matrix():
    exponents = np.append(np.arange(1.0, 6.0) / 2, np.zeros(95))
    op = spectra.MatrixOperator(planted(exponents))
    got = spectra.trace_of(op, np.exp, key=KEY, num_probes=16)
    lower, _, upper = got.interval(0.999)
    assert lower <= np.exp(exponents).sum() <= upper
    assert got.stderr <= 0.1 * got.value


def test_rank_deficient_operators_need_a_shift_and_get_advice():
    eigenvalues = np.append(np.arange(1.0, 6.0), np.zeros(95))
    op = spectra.MatrixOperator(planted(eigenvalues))
    got = spectra.logdet(op, 1e-2, key=KEY)
    lower, _, upper = got.interval(0.999)
    assert lower <= np.log(eigenvalues + 1e-2).sum() <= upper
    with pytest.raises(spectra.SpectraError, match=r"op.shift\(delta\)"):
        spectra.logdet(op, key=KEY)
    with pytest.raises(spectra.SpectraError, match="not finite"):
        spectra.effective_dimension(spectra.MatrixOperator(-jnp.eye(5)), 0.5, key=KEY)
    dimension = spectra.effective_dimension(op, 1e-2, key=KEY, bounds=(0, None))
    lower, _, upper = dimension.interval(0.999)
    assert lower <= np.sum(eigenvalues / (eigenvalues + 1e-2)) <= upper


def test_bounds_are_checked_and_poles_are_noticed(quadratures, x64):
    q = quadratures[5]
    with pytest.raises(spectra.SpectraError, match="do not hold the spectrum"):
        spectra.trace_of(q, np.log, bounds=(0.5, None))
    estimated = spectra.trace_of(q, np.exp)
    assert "likely but not certain" in estimated.reason
    for f in (np.sin, lambda x: np.where(x > 9, 1.0, 0.0)):
        got = spectra.trace_of(q, lambda x, f=f: f(9 * x))
        assert (got.lower, got.upper) == (None, None)
        assert got.reason.startswith("no bracket")
    beyond = spectra.trace_of(q, lambda x: 1 / x)  # the residual reaches across the pole at zero
    assert np.isfinite([beyond.lower, beyond.upper]).all()
    assert "not certain" in beyond.reason
    with pytest.raises(spectra.SpectraError, match="key=None"):
        spectra.trace_of(diagonal_operator(EIGENVALUES), np.log)
    with pytest.raises(spectra.SpectraError, match="tol="):
        spectra.trace_of(q, np.log, tol=-1)


def test_a_tolerance_adds_probes_or_says_that_the_budget_ended(x64):
    op = diagonal_operator(EIGENVALUES)
    loose = spectra.trace_of(op, np.sqrt, key=KEY, num_steps=20, num_probes=200, tol=0.02)
    assert loose.status is spectra.Status.CONVERGED
    assert loose.num_matvecs < 200 * 20
    assert abs(loose.value - np.sqrt(EIGENVALUES).sum()) <= 5 * loose.stderr
    tight = spectra.trace_of(op, np.sqrt, key=KEY, num_steps=20, num_probes=8, tol=1e-5)
    assert tight.status is spectra.Status.BUDGET_EXHAUSTED
    # Three steps leave a bracket that no number of probes can narrow: it ends at the first look.
    coarse = spectra.trace_of(op, np.log, key=KEY, num_steps=3, num_probes=64, tol=0.01, bounds=(LOW, HIGH))
    assert coarse.status is spectra.Status.BUDGET_EXHAUSTED
    assert coarse.num_matvecs == 12


@pytest.mark.parametrize("threshold", slow_but([-0.5, 0.0, 2.0, 2.9, 2.985], 0.0, 2.985))
def test_counts_hold_at_their_rate(threshold, x64):
    eigenvalues = np.linspace(-1.0, 3.0, 400)
    op = diagonal_operator(eigenvalues)
    truth, held = np.sum(eigenvalues > threshold), 0
    for i in range(60):
        q = spectra.slq(op, key=jax.random.fold_in(KEY, i), num_steps=60, num_probes=4)
        got = spectra.count_above(q, threshold)
        lower, _, upper = got.interval()
        held += lower <= truth <= upper
        assert got.lower <= got.value <= got.upper
    # 92 % of 60 keys, less two standard deviations of the count.
    assert held >= 51
    assert got.num_matvecs == 240


def test_share_of_negative_curvature():
    op = diagonal_operator(np.linspace(-1.0, 3.0, 400, dtype=np.float32))
    lower, _, upper = spectra.negative_share(op, key=KEY).interval()
    assert lower <= 0.25 <= upper
    assert upper - lower < 0.1
    positive = spectra.negative_share(spectra.MatrixOperator(planted(np.append(1.0, np.zeros(59)))), key=KEY)
    assert positive.value == 0.0


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_estimates_are_equivariant_under_scaling(scale, x64):
    one, other = (diagonal_operator(c * EIGENVALUES) for c in (1.0, scale))
    options = {"key": KEY, "num_steps": 10, "num_probes": 2}
    a = spectra.logdet(one, **options)
    b = spectra.trace_of(other, lambda x: np.log(x / scale), **options)
    assert b.value == pytest.approx(a.value, rel=1e-9)
    assert b.stderr == pytest.approx(a.stderr, rel=1e-6)
    counts = [spectra.count_above(op, c, **options) for op, c in ((one, 1.0), (other, scale))]
    assert counts[1].value == pytest.approx(counts[0].value, rel=1e-6)


def test_inside_jit_functions_are_refused_with_a_reason():
    op = diagonal_operator(EIGENVALUES)
    with pytest.raises(spectra.SpectraError, match="outside of jit"):
        jax.jit(lambda key: spectra.trace_of(op, jnp.log, key=key).value)(KEY)
