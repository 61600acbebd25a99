"""Derivatives of estimates are those of their values, where a sketch or a Krylov space has an end, too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow_but

import spectra

N, KEY, STEP = 40, jax.random.key(0), 1e-4
RNG = np.random.default_rng(0)
SYMMETRIC = (lambda a: a + a.T)(RNG.standard_normal((N, N)))
RANK_FIVE = (lambda a: a @ a.T)(RNG.standard_normal((N, 5)))
RAMP = np.diag(np.arange(N) * 1.0)


def compare(f, at):
    """The gradient with a central difference, of errors h² and eps / h for f smooth on the scale of 1.

    Values are those outside of programs. The gradient is one program: outside it is a hundred small ones.
    """
    gradient, difference = jax.jit(jax.grad(f))(at), (f(at + STEP) - f(at - STEP)) / (2 * STEP)
    assert gradient == pytest.approx(float(difference), rel=1e-5, abs=1e-6)
    return gradient


@pytest.mark.slow
@pytest.mark.parametrize("method", ["auto", "hutch++", "hutchinson"])
def test_the_gradient_of_a_trace(method, x64):
    def f(t):
        op = spectra.MatrixOperator(SYMMETRIC + t * RAMP)
        return spectra.trace(op, key=KEY, method=method, num_matvecs=12).value

    gradient = compare(f, 0.0)
    if method == "hutchinson":  # signs see a diagonal exactly: Σ i
        assert gradient == pytest.approx(N * (N - 1) / 2, rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["xtrace", "xnystrace"])
def test_the_gradient_of_a_sketch_that_is_too_wide(method, x64):
    def f(t):
        op = spectra.MatrixOperator(t * RANK_FIVE)
        return spectra.trace(op, key=KEY, method=method, num_matvecs=24).value

    assert jax.jit(jax.grad(f))(1.0) == pytest.approx(np.trace(RANK_FIVE), rel=1e-8)


@pytest.mark.slow
def test_the_gradient_of_a_norm(x64):
    def f(t):
        return spectra.frobenius_norm(
            spectra.MatrixOperator(SYMMETRIC + t * RAMP), key=KEY, num_matvecs=12
        ).value

    compare(f, 0.0)


SMALL = SYMMETRIC[:6, :6]
KRYLOV = {
    "all steps": (SMALL, np.diag(np.arange(6.0)), 0.1),
    "repeated eigenvalues": (np.diag([1.0, 1.0, 2.0, 2.0, 3.0, 3.0]), np.eye(6), 0.1),
    "a multiple of the identity": (np.eye(6), np.eye(6), 0.1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KRYLOV)
def test_the_gradient_of_a_quadrature_that_ends(name, x64):
    a, b, at = KRYLOV[name]

    def f(t):
        q = spectra.slq(spectra.MatrixOperator(a + t * b), key=KEY, num_steps=6, num_probes=2)
        return jnp.mean(jnp.sum(q.weights * q.nodes**2, axis=1))

    compare(f, at)


@pytest.mark.slow
def test_the_gradient_of_lanczos_with_n_steps(x64):
    def f(t):
        op = spectra.MatrixOperator(SMALL + t * np.diag(np.arange(6.0)))
        return spectra.lanczos(op, jnp.ones(6), 6).alpha.sum()

    gradient = compare(f, 0.1)
    assert gradient == pytest.approx(15.0, rel=1e-8)  # the trace: 15 t
    assert jax.grad(f)(0.1) == pytest.approx(float(gradient), rel=1e-12)  # outside of a program, too


@pytest.mark.slow
def test_the_gradient_of_a_logdet_and_of_a_trace_of(x64):
    """Of n steps: d log det A = tr A⁻¹ dA for the mean over all directions; here, of the value itself."""
    positive = SMALL @ SMALL + np.eye(6)

    def logdet(t):
        op = spectra.MatrixOperator(positive + t * np.diag(np.arange(6.0)))
        return spectra.logdet(op, 0.5, key=KEY, num_steps=6, num_probes=2).value

    compare(logdet, 0.1)

    def exponential(t):
        op = spectra.MatrixOperator(positive + t * np.eye(6))
        return spectra.trace_of(op, np.exp, key=KEY, num_steps=6, num_probes=2).value

    value, gradient = jax.jit(jax.value_and_grad(exponential))(0.0)
    assert gradient == pytest.approx(float(value), rel=1e-8)  # d tr exp(A + t I) = tr exp(A)


ENDS = {
    "all rows": (SMALL[:4, :4], "inherit"),
    "all rows of a multiple of the identity": (2 * np.eye(4), "inherit"),
    "no rows": (2 * np.eye(4), "none"),
}


@pytest.mark.parametrize("name", slow_but(ENDS, "all rows of a multiple of the identity"))
def test_the_gradient_where_nothing_is_left_in_float32(name):
    """What is left of a vector may be zero exactly, and the root of zero has no derivative."""
    matrix, basis = ENDS[name]
    matrix = jnp.asarray(matrix, jnp.float32)

    @jax.jit
    @jax.grad
    def mean(t, key):
        op = spectra.MatrixOperator(matrix + t * jnp.eye(4))
        q = spectra.slq(op, key=key, num_steps=4, num_probes=1, basis=basis)
        return jnp.sum(q.weights * q.nodes)

    for key in jax.random.split(KEY, 8):
        assert mean(0.0, key) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.slow
def test_the_gradient_of_the_rounding_of_a_column_of_zeros():
    def error(t):
        op = spectra.MatrixOperator(jnp.diag(jnp.array([1.0, 2.0, 0.0])) * t)
        return spectra.diagonal(op, key=KEY, method="exact").stderr.sum()

    assert jax.jit(jax.grad(error))(1.0) == pytest.approx(float(error(1.0)), rel=1e-5)  # a multiple of t


ERRORS = {
    "xtrace": lambda op: spectra.trace(op, key=KEY, method="xtrace", num_matvecs=12).stderr,
    "norm": lambda op: spectra.frobenius_norm(op, key=KEY, num_matvecs=12).stderr,
    "xdiag": lambda op: spectra.diagonal(op, key=KEY, method="xdiag", num_matvecs=12).stderr.sum(),
}


@pytest.mark.parametrize("name", slow_but(ERRORS, "xtrace"))
def test_the_gradient_of_a_standard_error(name, x64):
    """The pairs of one probe with itself are zero, and the root of zero has no derivative."""
    compare(lambda t: ERRORS[name](spectra.MatrixOperator(SYMMETRIC + t * RAMP)), 0.0)


@pytest.mark.slow
def test_the_gradient_of_an_error_of_zero_and_at_an_operator_of_zeros(x64):
    """Of a diagonal matrix signs know the trace: Σ i, and ± 0, also where all products are zero."""

    def f(t, at):
        op = spectra.MatrixOperator(at + t * RAMP)
        found = spectra.trace(op, key=KEY, method="hutchinson", num_matvecs=12)
        return found.value, found.stderr

    for at in (np.zeros((N, N)), np.eye(N)):
        value, error = jax.jit(jax.jacrev(f))(0.0, at)
        assert value == pytest.approx(N * (N - 1) / 2, rel=1e-12)
        assert abs(error) < 1e-12 * value


@pytest.mark.parametrize("metric", [None, "a metric"])
def test_second_derivatives_of_eigenvalues_are_refused(metric, x64):
    """They were zero where H is linear in t: what the vectors change by was missing."""

    def largest(t):
        op = spectra.MatrixOperator(SMALL + t * np.diag(np.arange(6.0)))
        weights = None if metric is None else jnp.ones(6) * jnp.exp(t)
        return spectra.eigsh(op, 1, which="LA", key=KEY, metric=weights).values[0]

    for second in (jax.grad(jax.grad(largest)), jax.hessian(largest)):
        with pytest.raises(spectra.SpectraError, match="no second derivatives"):
            second(0.1)


@pytest.mark.slow
def test_a_nystrom_sketch_of_an_indefinite_operator_is_nan_inside_jit(x64):
    """Outside it is refused; inside, 4e15 came for a trace of 2."""
    op = spectra.MatrixOperator(SYMMETRIC)

    @jax.jit
    def inside(op):
        trace = spectra.trace(op, key=KEY, method="xnystrace", num_matvecs=12)
        return trace.value, spectra.diagonal(op, key=KEY, method="xnysdiag", num_matvecs=12).value

    for found in jax.tree.leaves(inside(op)):
        assert np.isnan(found).all()
    positive = inside(spectra.MatrixOperator(RANK_FIVE))
    assert positive[0] == pytest.approx(np.trace(RANK_FIVE), rel=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "call",
    [
        lambda op, key: spectra.spectrum(op, key=key),
        lambda op, key: spectra.compare_operators(op, op, key=key),
        lambda op, key: spectra.slq(op, key=key, num_steps=2).cdf(0.0),
        lambda op, key: spectra.slq(op, key=key, num_steps=2).mean(np.exp),
        lambda op, key: spectra.summary(op, key=key),
        lambda op, key: spectra.summary({"one": spectra.slq(op, key=key, num_steps=2)}),
        lambda op, key: spectra.spectral_distances([spectra.slq(op, key=key, num_steps=2)] * 2),
    ],
    ids=["spectrum", "comparison", "cdf", "mean", "summary", "table", "distances"],
)
def test_what_reads_numbers_says_so_where_the_key_alone_is_traced(call):
    op = spectra.MatrixOperator(np.diag(np.arange(6.0)))
    with pytest.raises(spectra.SpectraError, match="on the host: call it outside jit, vmap and grad"):
        jax.vmap(lambda key: call(op, key))(jax.random.split(KEY, 2))


@pytest.mark.parametrize(
    "call",
    [
        lambda op: spectra.class_operators(op),
        lambda op: spectra.loss_slice(op, directions=["gradient"], num_points=3),
        lambda op: spectra.condition_number(op, key=KEY),
    ],
    ids=["classes", "slice", "condition"],
)
def test_what_reads_numbers_of_parameters_says_so_under_grad(call):
    def loss_fn(logits, labels):
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(3), labels])

    def along(scale):
        model = spectra.GGNOperator(
            lambda w, x: x @ w, loss_fn, scale * jnp.eye(3), (jnp.eye(3), jnp.arange(3))
        )
        return call(model)

    with pytest.raises(spectra.SpectraError, match="on the host: call it outside jit, vmap and grad"):
        jax.grad(along)(1.0)
