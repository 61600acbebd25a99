"""compare_operators: exact for small operators, and its intervals hold what they say."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Diagonal, diagonal, rotation, slow_but
from scipy.stats import binom

import spectra
from spectra.estimators import compared_spectra, comparison
from spectra.estimators.ratios import ratio

KEY = jax.random.key(0)
B = np.concatenate([np.linspace(0.1, 1.0, 95), [3.0, 5.0, 9.0, 14.0, 20.0]])
A = B * np.linspace(0.8, 1.3, 100)


def truth(a, b):
    return (
        np.linalg.norm(a - b) / np.linalg.norm(b),
        a.sum() / b.sum(),
        np.abs(np.sort(a) - b).mean() / b.mean(),
    )


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2])
def test_the_distance_of_spectra_is_held_after_a_step_or_two(steps):
    """Nodes of one step are means: eigenvalues lie far beyond them, up to the largest."""
    result = spectra.compare_operators(
        diagonal(A), diagonal(B), key=KEY, num_pairs=2, num_probes=4, num_steps=steps, by=None
    )
    low, _, high = result.wasserstein
    assert low <= truth(A, B)[2] <= high


def test_small_operators_are_compared_exactly(x64):
    q = rotation(30)
    a, b = (q * A[-30:]) @ q.T, np.diag(B[-30:])
    result = spectra.compare_operators(
        spectra.MatrixOperator(a), spectra.MatrixOperator(b), key=KEY, num_pairs=3, num_probes=30, by=None
    )
    rounding = 1e3 * np.finfo(float).eps
    np.testing.assert_allclose(result.frobenius, np.linalg.norm(a - b) / np.linalg.norm(b), rtol=rounding)
    np.testing.assert_allclose(result.trace, np.trace(a) / np.trace(b), rtol=rounding)
    rounding *= 10  # of eigenvalues relative to |A| + |B|, 20 times their mean; of vectors over the gap
    np.testing.assert_allclose(
        result.wasserstein, np.abs(np.sort(A[-30:]) - B[-30:]).mean() / B[-30:].mean(), rtol=rounding
    )
    np.testing.assert_allclose(
        result.overlap, np.sum(q[-3:, np.argsort(A[-30:])[-3:]] ** 2) / 3, rtol=rounding
    )
    np.testing.assert_allclose(result.eigenvalues[1], B[-1:-4:-1], rtol=rounding)
    assert result.status is spectra.Status.DENSE


@pytest.mark.slow
def test_exact_comparisons_hold_the_rounding_of_the_matrices():
    """In float32, against the same in float64; of six equal eigenvalues, three vectors are any."""
    q, values = rotation(30), np.r_[np.full(6, 1.0), np.linspace(0.1, 0.5, 24)]
    a, b = ((q * (scale * values)) @ q.T for scale in (1.1, 1.0))
    ops = [spectra.MatrixOperator(jnp.asarray(x, jnp.float32)) for x in (a, b)]
    for k, least in ((3, 0.0), (6, 1 - 1e-4)):
        found = spectra.compare_operators(*ops, key=KEY, num_pairs=k, by=None)
        assert found.overlap.lower == pytest.approx(least, abs=1e-4)
        assert found.overlap.upper == 1.0
        assert found.wasserstein.lower < 0.1 < found.wasserstein.upper
        assert found.wasserstein.upper - found.wasserstein.lower < 1e-5


def test_the_distance_of_spectra_is_within_that_of_the_matrices(x64):
    """The same matrix twice, and 1.5 times it: tr (A - B) and |A - B|_F leave open what the unit is, the mean
    of B by two probes. Between the bands of four steps there is room for all of it, and more."""
    values = np.linspace(1.0, 2.0, 100)
    for factor, width in ((1.0, 1e-12), (1.5, 0.5)):
        found = spectra.compare_operators(
            diagonal(factor * values),
            diagonal(values),
            key=KEY,
            num_pairs=2,
            num_probes=4,
            num_steps=4,
            by=None,
        )
        low, value, high = found.wasserstein
        assert low <= value <= high
        assert low <= factor - 1 <= high
        assert high - low <= width


@pytest.mark.slow
def test_intervals_of_large_operators_hold_the_truth(x64):
    frobenius, trace, distance = truth(A, B)
    result = spectra.compare_operators(diagonal(A), diagonal(B), key=KEY, num_pairs=4)
    for interval, value in (
        (result.frobenius, frobenius),
        (result.trace, trace),
        (result.wasserstein, distance),
    ):
        assert interval.lower <= value * (1 + 1e-12)
        assert value * (1 - 1e-12) <= interval.upper
    # one eigenspace in both: eigsh finds it to its tolerance
    assert result.overlap.lower > 1 - 1e-3
    np.testing.assert_allclose(result.eigenvalues, [np.sort(A)[-1:-5:-1], B[-1:-5:-1]], rtol=1e-4)
    assert "A in place of B, of order 100" in repr(result)
    assert result.records()[0]["layer"] == "whole"


@pytest.mark.slow
def test_the_level_is_printed_in_full(x64):
    result = spectra.compare_operators(diagonal(A[:9]), diagonal(B[:9]), key=KEY, num_pairs=2, level=0.999)
    assert dict(result.rows())["intervals"] == "99.9 %"  # and not 100


class TestIntervals:
    """Coverage over keys, from both sides."""

    KEYS = 150

    @pytest.mark.slow
    def test_of_the_frobenius_error(self, x64):
        q = rotation(100)
        # eigenvectors that are not the probes' axes: for diagonal matrices each probe of signs is exact
        a, b = (jnp.asarray((q * x) @ q.T) for x in (A, B))
        one, other = spectra.MatrixOperator(a), spectra.MatrixOperator(b)
        value = truth(A, B)[0]
        keys = map(jax.random.key, range(self.KEYS))
        found = [comparison._Seen(one, other, key, 16).ratios(0.95)[0] for key in keys]
        held = sum(low <= value <= high for low, _, high in found)
        assert binom.cdf(held, self.KEYS, 0.95) > 1e-3
        widths = [high - low for low, _, high in found]
        assert np.mean(widths) <= 6 * np.std([value for _, value, _ in found])  # 2 t, not many times that

    @pytest.mark.parametrize("error", ["rank one", "all of it", "other eigenvectors"])
    @pytest.mark.parametrize("probes", slow_but([8, 16], 8))
    def test_of_ratios_where_few_directions_count(self, error, probes):
        """An error of one direction is missed by probes that show a small mean with a small spread."""
        q, n = rotation(60), 60
        b = (q * np.arange(1.0, n + 1) ** -1.2) @ q.T
        steeper = np.arange(1.0, n + 1) ** -1.5
        a = {
            "rank one": b + 0.3 * np.outer(q[0], q[0]),
            "all of it": (q * steeper) @ q.T,
            "other eigenvectors": (rotation(60, seed=3) * steeper) @ rotation(60, seed=3).T,
        }[error]
        true = np.sum((a - b) ** 2) / np.sum(b**2), np.trace(a) / np.trace(b)
        z = np.random.default_rng(0).choice([-1.0, 1.0], (self.KEYS, probes, n))
        images = z @ (a - b), z @ b, z @ a
        held, finite = np.zeros(2), np.zeros(2)
        for signs, d, bz, az in zip(z, *images, strict=True):
            for i, forms in enumerate([(d @ d.T, bz @ bz.T), (signs @ az.T, signs @ bz.T)]):
                low, _, high = ratio(*forms, 0.95, precision=1e-15, positive=i == 0)
                held[i] += low <= true[i] <= high
                finite[i] += np.isfinite(high - low)
        assert (binom.cdf(held, self.KEYS, 0.95) > 1e-3).all(), held
        assert (finite >= 0.9 * self.KEYS).all()

    @pytest.mark.slow
    @pytest.mark.parametrize("width", [2, 3])
    def test_of_ratios_where_signs_agree_by_chance(self, width):
        """Off a diagonal there are a few rows of ones: all of 8 forms are equal for 1 or 10 % of the keys."""
        keys, n = 400, 20
        b = np.diag(np.linspace(1.0, 2.0, n))
        rows = np.zeros((n, n))
        rows[:width, :width] = 0.03
        a = 1.5 * b + rows
        true = np.sum((a - b) ** 2) / np.sum(b**2), np.trace(a) / np.trace(b)
        held = np.zeros(2)
        for z in np.random.default_rng(1).choice([-1.0, 1.0], (keys, 8, n)):
            d, az, bz = z @ (a - b), z @ a, z @ b
            for i, forms in enumerate([(d @ d.T, bz @ bz.T), (z @ az.T, z @ bz.T)]):
                low, _, high = ratio(*forms, 0.95, precision=1e-15, positive=i == 0)
                held[i] += low <= true[i] <= high
        assert (binom.cdf(held, keys, 0.95) > 1e-3).all(), held

    @pytest.mark.parametrize("change", ["one parameter", "a block", "of a trace near zero"])
    def test_of_ratios_where_operators_differ_in_few_parameters(self, change):
        """Signs see nothing of a diagonal, and the interval is about as wide as what they see."""
        n, probes, rng = 60, 16, np.random.default_rng(2)
        x = rng.standard_normal((n, 2 * n))
        b, d = x @ x.T / n, np.zeros((n, n))
        if change == "one parameter":
            d[7, 7] = b[7, 7]
        elif change == "a block":
            d[:8, :8] = 0.1 + 0.9 * np.eye(8)
            d += np.diag(rng.standard_normal(n))
            b = np.diag(np.linspace(0.5, 2.0, n))
        else:  # two standard errors of it
            b -= np.diag(np.diagonal(b))
            b += 2 * math.sqrt(2 / probes) * np.linalg.norm(b) / n * np.eye(n)
            d = np.diag(0.3 * rng.standard_normal(n))
        true = np.sum(d**2) / np.sum(b**2), np.trace(b + d) / np.trace(b)
        z = rng.choice([-1.0, 1.0], (self.KEYS, probes, n))
        found = np.zeros((2, self.KEYS, 3))
        for key, (signs, dz, bz) in enumerate(zip(z, z @ d, z @ b, strict=True)):
            for i, forms in enumerate([(dz @ dz.T, bz @ bz.T), (signs @ (dz + bz).T, signs @ bz.T)]):
                found[i, key] = ratio(*forms, 0.95, precision=1e-15, positive=i == 0)
        for (low, value, high), truth in zip(found.transpose(0, 2, 1), true, strict=True):
            assert binom.cdf(np.sum((low <= truth) & (truth <= high)), self.KEYS, 0.95) > 1e-3
            if change != "of a trace near zero":  # t_15 of the error of 12 degrees of freedom, and skewness
                assert np.median(high - low) <= 2 * 2 * 1.96 * np.sqrt(np.mean((value - truth) ** 2))

    @pytest.mark.slow
    def test_of_the_distance_of_spectra_holds_the_error_of_its_unit(self, x64):
        """One eigenvalue is half of the mean of B, which two probes know badly, and all of the distance."""
        values, keys = np.arange(1.0, 101.0) ** -1.5, 16
        moved = 0.3 * np.eye(1, 100)[0]
        held = 0
        for key in jax.random.split(KEY, keys):
            a, b = (compared_spectra._Curve(diagonal(x), key, 2, 12, 0.975) for x in (values + moved, values))
            low, _, high = compared_spectra._wasserstein(a, b, (0.0, 1.3), (0.0, np.inf))
            held += low <= 0.3 / values.sum() <= high
        assert binom.cdf(held, keys, 0.95) > 1e-3


@pytest.mark.slow
def test_all_pairs_of_a_large_operator_span_everything(x64):
    result = spectra.compare_operators(
        diagonal(A), diagonal(B), key=KEY, num_pairs=200, num_probes=4, num_steps=4, by=None
    )
    np.testing.assert_allclose(result.eigenvalues, [np.sort(A)[::-1], B[::-1]], rtol=1e-10)
    # Two orthonormal bases of the same space: a hundred cosines, each right to some roundings.
    np.testing.assert_allclose(result.overlap, 1.0, rtol=1e4 * np.finfo(float).eps)


@pytest.mark.parametrize("probes", [16, 20])  # a sample of signs, and all columns
def test_the_ratio_of_a_trace_that_cancels_holds_its_rounding(probes):
    """Rounding is relative to |B|, of which the trace is some millionths, and the ratio multiplies it."""
    rng, n = np.random.default_rng(0), 20
    ones = Diagonal(jnp.ones(n, jnp.float32))
    for _ in range(3):
        half = rng.standard_normal(n // 2)
        b = np.float32(np.r_[half, 1e-6 - half])  # a diagonal: all signs show the whole trace
        seen = comparison._Seen(ones, Diagonal(jnp.asarray(b)), KEY, probes)
        low, _, high = seen.ratios(0.95)[1]
        assert low <= n / np.sum(b, dtype=np.float64) <= high
    alike = comparison._Seen(*2 * [Diagonal(jnp.asarray(np.r_[half, -half], jnp.float32))], KEY, probes)
    assert alike.ratios(0.95)[1][::2] == (-math.inf, math.inf)  # 0 / 0, for all that is known


def test_a_layer_called_whole_does_not_replace_the_whole():
    half, none = spectra.results.Interval(0.5, 0.5, 0.5), spectra.results.Interval(0.0, 0.0, 0.0)
    values = np.ones((2, 1))
    result = spectra.OperatorComparison(
        half, half, half, half, values, values, {"whole": none}, 9, 40, 0.95, spectra.Status.COMPLETE
    )
    assert [(row["layer"], row["frobenius"]) for row in result.records()] == [
        ("(whole)", 0.5),
        ("whole", 0.0),
    ]
    assert result.metrics()["(whole)/frobenius"] == 0.5


def test_operators_on_other_vectors_are_refused():
    with pytest.raises(spectra.StructureError, match="the first operator"):
        spectra.compare_operators(diagonal(A[:5]), diagonal(B), key=KEY)
    with pytest.raises(spectra.SpectraError, match="num_probes=2"):
        spectra.compare_operators(diagonal(A), diagonal(B), key=KEY, num_probes=2)


@pytest.mark.slow
def test_one_operator_is_equal_to_itself(x64):
    result = spectra.compare_operators(Diagonal(jnp.asarray(B)), diagonal(B), key=KEY, num_pairs=2)
    # What is left is the rounding of both products, eps |Bz| each: eps √n |B| / tr B of the trace, whose
    # two ends are rounded themselves.
    rounding = 2 * np.finfo(float).eps
    share = len(B) ** 0.5 * np.linalg.norm(B) / B.sum()
    assert result.frobenius[:2] == (0.0, 0.0)
    # 2 eps |B| over (1 - eps) |B|: the denominator is itself rounded.
    assert rounding <= result.frobenius.upper <= rounding * (1 + rounding)
    assert result.trace.estimate == 1.0
    assert max(1 - result.trace.lower, result.trace.upper - 1) <= (share + 1) * rounding
    assert result.wasserstein.lower == result.wasserstein.estimate == 0.0
