"""H and c H have the same answer up to c, where squares of float32 under- and overflow.

Scales are powers of two, so that c H is H with other exponents: each number of a run is the same times c, bit
for bit, but for those that fall below the least float32, tiny. Of those at most N add up to one result.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import SPECTRA, N, diagonal, slow_but

import spectra

KEY = jax.random.key(0)
SCALES = [2.0**-99, 2.0**-66, 2.0**66, 2.0**99]  # 1.6e-30, 1.4e-20, 7e19, 6e29
FEW = {"key": KEY, "num_matvecs": 24}
LANCZOS = jax.jit(lambda op: spectra.lanczos(op, jnp.ones(N), 20))
SLQ = jax.jit(lambda op: spectra.slq(op, key=KEY, num_steps=20, num_probes=2))
TRACE = jax.jit(lambda op: spectra.trace(op, method="hutchinson", **FEW))
NORM = jax.jit(lambda op: spectra.frobenius_norm(op, **FEW))


LARGE = np.r_[0.01, 0.02, 0.03, np.linspace(0.5, 1.0, 2097)].astype(np.float32)


def pair(estimate):
    return jax.tree.leaves((estimate.value, estimate.stderr))


def coefficients(run):
    return run.alpha, run.beta, run.asymmetry * run.alpha[0]


def ends(report):
    return *report.largest, *report.smallest, report.trace.value, report.trace.stderr, report.noise_floor


ALGORITHMS = {
    "lanczos": lambda op: coefficients(spectra.lanczos(op, jnp.ones(N), 20)),
    "lanczos without a basis": lambda op: coefficients(
        spectra.lanczos(op, jnp.ones(N), 20, reorthogonalize="none")
    ),
    "lanczos in jit": lambda op: coefficients(LANCZOS(op)),
    "slq": lambda op: [spectra.slq(op, key=KEY, num_steps=20, num_probes=2).nodes],
    "slq in jit": lambda op: [SLQ(op).nodes, SLQ(op).residuals],
    "spectrum": lambda op: ends(spectra.spectrum(op, key=KEY, num_steps=20, num_probes=2)),
    "eigsh": lambda op: [spectra.eigsh(op, 3, which="BE", key=KEY).values],
    "eigsh, smallest": lambda op: [spectra.eigsh(op, 3, which="SM", key=KEY).values],
    "eigsh, filtered": lambda op: [
        spectra.eigsh(diagonal(op.entries[-1] * LARGE), 2, which="SM", key=KEY).values
    ],
    "kpm": lambda op: [spectra.kpm(op, key=KEY, num_moments=20, num_probes=2).bounds],
    "condition_number": lambda op: [spectra.condition_number(op, key=KEY).largest_interval],
    "trace": lambda op: pair(spectra.trace(op, **FEW)),
    "trace, hutchinson": lambda op: pair(spectra.trace(op, method="hutchinson", **FEW)),
    "trace in jit": lambda op: pair(TRACE(op)),
    "trace, hutch++": lambda op: pair(spectra.trace(op, method="hutch++", **FEW)),
    "trace, xnystrace": lambda op: pair(
        spectra.trace(op.shift(3 * op.entries[-1]), method="xnystrace", **FEW)
    ),
    "trace, exact": lambda op: pair(spectra.trace(op, method="exact", key=None)),
    "frobenius_norm": lambda op: pair(spectra.frobenius_norm(op, **FEW)),
    "frobenius_norm in jit": lambda op: pair(NORM(op)),
    "frobenius_norm, exact": lambda op: pair(spectra.frobenius_norm(op, key=None)),
    "diagonal": lambda op: pair(spectra.diagonal(op, **FEW)),
    "diagonal, hutchinson": lambda op: pair(spectra.diagonal(op, method="hutchinson", **FEW)),
    "diagonal, exact": lambda op: pair(spectra.diagonal(op, method="exact", key=None)),
}


SELDOM = (
    *("lanczos without a basis", "lanczos in jit", "eigsh, smallest", "eigsh, filtered", "trace in jit"),
    *("frobenius_norm in jit", "frobenius_norm, exact", "diagonal, hutchinson"),
    *("eigsh", "trace", "slq in jit", "kpm", "diagonal", "frobenius_norm"),
)
OFTEN = [name for name in ALGORITHMS if "trace, " not in name and name not in SELDOM]


@pytest.mark.parametrize("name", slow_but(ALGORITHMS, *OFTEN))
def test_the_answer_follows_the_scale(name):
    def numbers(scale):
        found = ALGORITHMS[name](diagonal(scale * SPECTRA["indefinite"], jnp.float32))
        return np.concatenate([np.ravel(np.asarray(x, float)) for x in found])

    expected = numbers(1.0)
    size, tiny = np.abs(expected).max(), float(jnp.finfo(jnp.float32).tiny)
    assert np.isfinite(expected).all()
    for scale in SCALES:
        limit = 1e-12 * size + N * tiny / scale
        np.testing.assert_allclose(numbers(scale) / scale, expected, rtol=0, atol=limit)


def saturated(params, batch):
    inputs, labels = batch
    return jnp.mean(jax.nn.softplus(-labels * (inputs @ params)))


@pytest.mark.slow
def test_a_saturated_classifier(x64):
    """Every example is classified with a margin of 45 at least: what curvature is left is 1e-21."""
    inputs = np.random.default_rng(0).standard_normal((200, 10))
    params = np.linspace(-1.0, 1.0, 10)
    inputs = inputs[np.abs(inputs @ params) > 1]
    margins = 45 * np.abs(inputs @ params)
    share = np.exp(-margins) / (1 + np.exp(-margins)) ** 2
    exact = np.linalg.eigvalsh((inputs.T * share) @ inputs / len(inputs))
    single = (jnp.asarray(x, jnp.float32) for x in (45 * params, inputs, np.sign(inputs @ params)))
    params, *data = single
    op = spectra.HessianOperator(saturated, params, tuple(data))
    report = spectra.spectrum(op, key=KEY, num_probes=2)
    assert exact[-1] < 1e-20
    # exp(-m) is off by what the margin m is, a sum of ten terms. The least, 45, counts most.
    limit = 10 * 45 * float(jnp.finfo(jnp.float32).eps)
    assert report.largest.estimate == pytest.approx(exact[-1], rel=limit)
    assert spectra.frobenius_norm(op, key=KEY).value == pytest.approx(np.linalg.norm(exact), rel=limit)


def small_square(params, batch):
    return jnp.mean((batch[0] @ params) ** 2) / 2


WORDS = "float32 has zero alone.*Multiply the loss by a power of two"


def holds_or_says_why(call, holds):
    try:
        found = call()
    except spectra.NotSymmetricError as error:
        return re.search(WORDS, str(error)) is not None
    return holds(found)


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["one batch", "stream"])
def test_underflow_is_in_what_is_stated_or_is_said_to_be_the_reason(cut):
    """Of data at 1e-18 the terms of a product are 1e-37, of which float32 has no digits below 1e-38.

    Where a processor keeps those all the same there is nothing to say.
    """
    x = (1e-18 * np.random.default_rng(0).standard_normal((40, 3))).astype(np.float32)
    values = np.linalg.eigvalsh(x.astype(float).T @ x / len(x))
    data = [(x[:20],), (x[20:],)] if cut == "stream" else (jnp.asarray(x),)
    op = spectra.HessianOperator(small_square, jnp.ones(3), data)
    assert holds_or_says_why(
        lambda: spectra.eigsh(op, 1, key=KEY),
        lambda found: np.abs(values - found.values[0]).min() <= found.residuals[0] + found.noise_floor,
    )
    assert holds_or_says_why(
        lambda: spectra.trace(op, key=KEY, method="exact").interval(1 - 1e-6),
        lambda found: found.lower <= values.sum() <= found.upper,
    )


@pytest.mark.slow
def test_of_a_loss_that_underflows_nothing_else_is_said():
    """What values of 1e-36 differ by may be what their terms lose, and says nothing of means: here of a sum,
    which differs on every processor."""
    x = jnp.full((8, 3), 1e-18)
    with pytest.raises(spectra.DataError, match=f"too small for its type.*{WORDS}"):
        spectra.HessianOperator(lambda p, b: jnp.sum((b[0] @ p) ** 2), jnp.ones(3), (x,), microbatch=4)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_a_start_vector_of_any_size(size):
    op = diagonal(SPECTRA["indefinite"], jnp.float32)
    start = jnp.linspace(1.0, 2.0, N)
    expected = spectra.lanczos(op, start, 20)
    # Rows are normalised: the start is rounded once.
    got = spectra.lanczos(op, size * start, 20)
    np.testing.assert_allclose(got.alpha[0], expected.alpha[0], rtol=10 * N * 1.2e-7)
    pairs = spectra.eigsh(op, 1, which="LA", key=KEY, v0=size * start)
    assert pairs.values[0] == pytest.approx(3.0, rel=1e-5)  # `tol`


@pytest.mark.slow
@pytest.mark.parametrize("scale", [2.0**-530, 2.0**530])
def test_residuals_of_eigenpairs_whose_squares_are_no_numbers(x64, scale):
    """At 1e-160 the residuals were zero, and four wrong values had converged."""
    entries = np.linspace(-1, 2, 30)
    expected, found = (
        spectra.eigsh(spectra.DiagonalOperator(jnp.asarray(c * entries)), 4, which="LM", key=KEY)
        for c in (1.0, scale)
    )
    np.testing.assert_allclose(found.values / scale, expected.values, rtol=1e-12)
    np.testing.assert_allclose(found.residuals / scale, expected.residuals, rtol=1e-3, atol=1e-12)
    assert np.abs(found.values / scale - entries[-4:]).max() <= np.max(found.residuals) / scale


def bands(op, scale):
    """What is computed from a quadrature and from moments, in units of the scale."""
    found = spectra.slq(op, key=KEY, num_steps=10, num_probes=2)
    moments = spectra.kpm(op, key=KEY, num_moments=20, num_probes=2)
    grid = scale * np.linspace(-2.0, 6.0, 9)
    curves = (spectra.spectral_density(source, grid=grid) for source in (found, moments))
    return np.concatenate(
        [
            np.ravel(found.cdf(scale * np.array([0.5, 1.5]))),
            *(np.ravel([curve.lower, curve.density, curve.upper]) * scale for curve in curves),
            spectra.count_above(found, 1.5 * scale).interval(),
            np.array(spectra.trace_of(found, np.abs).interval()) / scale,
        ]
    )


@pytest.mark.slow
def test_bands_in_float64_know_no_scale_up_to_1e90_and_are_refused_beyond(x64):
    values = np.linspace(-1.0, 3.0, N)
    base = bands(diagonal(values), 1.0)
    for scale in (2.0**-296, 2.0**296):
        np.testing.assert_allclose(bands(diagonal(scale * values), scale), base, rtol=1e-9, atol=1e-12)
    for scale in (2.0**-350, 2.0**350):
        found = spectra.slq(diagonal(scale * values), key=KEY, num_steps=10, num_probes=2)
        moments = spectra.kpm(diagonal(scale * values), key=KEY, num_moments=20, num_probes=2)
        for refused in (
            lambda q=found: q.cdf(0.0),
            lambda q=found: spectra.spectral_density(q),
            lambda q=found, s=scale: spectra.count_above(q, s),
            lambda q=found: spectra.trace_of(q, np.abs),
            lambda m=moments: spectra.spectral_density(m),
        ):
            with pytest.raises(spectra.SpectraError, match="multiply the operator by a power of two"):
                refused()
