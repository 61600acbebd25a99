"""Two levels of samples: a parabola from probes of one step, and the rest of f from longer ones."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from scipy.stats import binom, norm

import spectra
from spectra.density import deflation, plans

N, LONG, SHORT, STEPS = 150, 4, 40, 8
KNOWN = np.array([30.0, 80.0])
VALUES = np.append(np.linspace(0.1, 4.0, N - 30), np.full(30, 0.1))
"""What is left beside the two that are known: log is far from a parabola on it."""
ROWS = "nodes", "weights", "residuals", "lengths", "asymmetry"


@functools.cache
def of_both(repeats=60):
    """Quadratures of long probes and some of one step, beside a known space; vᵀHv and |Hv|² of these."""
    op, many = spectra.DiagonalOperator(jax.numpy.asarray(VALUES)), LONG * repeats
    long = spectra.slq(op, key=jax.random.key(0), num_steps=STEPS, num_probes=many, probe_batch=many)
    squares = np.random.default_rng(0).standard_normal((repeats, SHORT, N)) ** 2
    squares /= squares.sum(axis=2, keepdims=True)
    alpha = squares @ VALUES
    beta = np.sqrt(squares @ VALUES**2 - alpha**2)
    found = []
    for i in range(repeats):
        first, mean = np.eye(1, STEPS), alpha[i][:, None]
        ones = (
            mean + 0 * first,
            first + 0 * mean,
            beta[i][:, None] * first,
            np.ones(SHORT, int),
            np.zeros(SHORT),
        )
        rows = {
            name: np.concatenate([np.asarray(getattr(long, name))[i * LONG : (i + 1) * LONG], part])
            for name, part in zip(ROWS, ones, strict=True)
        }
        bulk = dataclasses.replace(long, **rows, sketches=None)
        found.append(deflation.with_space(bulk, KNOWN, np.zeros(2), N + 2))
    return found, np.stack([alpha, squares @ VALUES**2], axis=2)


def exact_error():
    """√(var p / (k + s) + var (f - p) / k) of the fit to all eigenvalues, for vectors on the sphere."""
    logs = np.log(VALUES)
    p = np.polynomial.Polynomial.fit(VALUES, logs, 2)(VALUES)
    parts = np.var(p) / (LONG + SHORT) + np.var(logs - p) / LONG
    return N * np.sqrt(2 * parts / (N + 2))


def test_the_error_is_what_is_said(x64):
    truth = float(np.sum(np.log(np.append(VALUES, KNOWN))))
    found = [spectra.trace_of(q, np.log, bounds=(0.1, 80.0)) for q in of_both()[0]]
    repeats = len(found)
    stderr = np.array([x.stderr for x in found])
    # The largest of three rules for a mean of squares, each known to a few of n k = 600 normal numbers.
    assert 0.9 * exact_error() <= np.median(stderr) <= 1.25 * exact_error()
    off = (np.array([x.value for x in found]) - truth) / stderr
    # Eight steps leave a bias below the bracket, which is a fraction of the error; four standard errors.
    assert max(x.upper - x.lower for x in found) <= 0.3 * exact_error()
    assert abs(np.mean(off)) <= 0.3 + 4 / np.sqrt(repeats)
    assert 1 / 1.25**2 - 4 * np.sqrt(2 / repeats) <= np.mean(off**2) <= 1 + 0.3**2 + 4 * np.sqrt(2 / repeats)
    misses = sum(not x.interval()[0] <= truth <= x.interval()[2] for x in found)
    assert binom.sf(misses - 1, repeats, 0.05) > norm.sf(3)


def test_a_parabola_needs_one_step(x64):
    (q, *_), (short, *_) = of_both()
    found = spectra.trace_of(q, lambda x: 3 - x + x**2)
    # Of k + s probes alike, those of one step count as much as the others.
    forms = [
        np.sum(q.bulk.weights * (3 - q.bulk.nodes + q.bulk.nodes**2), axis=1)[:LONG],
        3 - short[:, 0] + short[:, 1],
    ]
    mean = np.mean(np.concatenate(forms))
    np.testing.assert_allclose(found.value, N * mean + np.sum(3 - KNOWN + KNOWN**2), rtol=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_no_split_is_cheaper(seed):
    rng = np.random.default_rng(seed)
    fixed, steps, least = rng.uniform(0, 0.8), int(rng.integers(2, 10)), int(rng.integers(1, 6))
    parts = plans.Parts(fixed, *(10 ** rng.uniform(-2, 1.5, 2)))

    def error(k, s):
        return fixed + np.sqrt(parts.ends / (k + s) + parts.middle / k)

    k, s = parts.split(steps, least)
    assert k >= least
    assert error(k, s) <= 1 + 1e-9
    costs = [
        steps * a + b
        for a in range(least, 2000)
        for b in range(steps * k + s - steps * a)
        if error(a, b) <= 1
    ]
    assert not costs
