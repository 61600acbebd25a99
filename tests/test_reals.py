"""Functions of a real number that users pass: what they are in JAX, in float32 and in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectra
from spectra.base.reals import FEWEST, RealFunction

SMALL = np.random.default_rng(0).standard_normal((30, 30))
SMALL = (1e-4 * (SMALL + SMALL.T)).astype(np.float32)
VALUES = np.linalg.eigvalsh(SMALL.astype(np.float64))
FUNCTIONS = {
    "exp": (jnp.exp, np.exp),
    "shifted log": (lambda x: jnp.log(x + 3.0), lambda x: np.log(x + 3.0)),
    "cos": (lambda x: jnp.cos(x + 1.0), lambda x: np.cos(x + 1.0)),
    "float32": (lambda x: jax.lax.max(jnp.asarray(x), np.float32(-1.0)) + 1, lambda x: x + 1.0),
    "float32, by hand": (lambda x: np.exp(np.asarray(x, np.float32)), np.exp),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_intervals_hold_what_a_function_rounds(name):
    """In float32 f of an eigenvalue is off by far more than the eigenvalue moves it."""
    f, expected = FUNCTIONS[name]
    found = spectra.trace_of(spectra.MatrixOperator(SMALL), f, key=jax.random.key(0))
    lower, value, upper = found.interval()
    true = float(np.sum(expected(VALUES)))
    assert lower < true < upper
    in_float32 = 30 * 8 * float(np.finfo(np.float32).eps) * np.abs(expected(VALUES)).max()
    assert upper - lower < (3 * in_float32 if "float32" in name else 1e-7)
    assert abs(value - true) < in_float32


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_are_those_of_numpy(name):
    f, expected = FUNCTIONS[name]
    of = RealFunction(f)
    for x in (VALUES, VALUES.reshape(5, 6), VALUES[0], np.zeros(1), np.zeros(0)):
        assert of(x).dtype == np.float64
        assert of(x).shape == np.shape(x)
        np.testing.assert_allclose(of(x), expected(x), rtol=of.rounding or 4 * np.finfo(float).eps)
    assert (of.rounding > 0) == ("float32" in name)


@pytest.mark.slow
def test_a_function_of_jax_meets_few_numbers_of_eigenvalues():
    """Each other number of them compiles its operations anew."""
    seen = []

    def f(x):
        seen.append(np.shape(x))
        return jnp.exp(x)

    spectra.trace_of(spectra.MatrixOperator(SMALL), f, key=jax.random.key(0), num_steps=10)
    spectra.funm(spectra.MatrixOperator(SMALL), f, jnp.ones(30))
    first, *others = dict.fromkeys(seen)
    sizes = [size for (size,) in others if size >= FEWEST]
    assert len(seen) > 50
    assert all(size & (size - 1) == 0 for size in sizes)
    assert len(others) - len(sizes) <= 1, (first, others)  # the first call of either


def test_scalars_complex_values_and_bools():
    x = np.array([-1.0, 0.0, 4.0])
    np.testing.assert_array_equal(RealFunction(lambda x: 2.0)(x), [2, 2, 2])
    np.testing.assert_array_equal(RealFunction(lambda x: np.emath.sqrt(x))(x), [np.nan, 0, 2])
    np.testing.assert_array_equal(RealFunction(lambda x: jnp.sqrt(x + 0j))(x), [np.nan, 0, 2])
    np.testing.assert_array_equal(RealFunction(lambda x: x > 0)(x), [0, 0, 1])
    np.testing.assert_array_equal(RealFunction(lambda x: jnp.float32(0.5))(x), [0.5] * 3)


def test_an_error_of_the_function_is_its_own():
    def f(x):
        raise TypeError("of mine")

    with pytest.raises(TypeError, match="of mine"):
        spectra.trace_of(spectra.MatrixOperator(SMALL), f, key=jax.random.key(0))


@pytest.mark.slow
def test_a_traced_number_in_a_function_is_refused():
    op = spectra.MatrixOperator(SMALL)

    def number(c, find):
        return find(lambda x: jnp.exp(c * x))

    for find in (
        lambda f: spectra.trace_of(op, f, key=jax.random.key(0)).value,
        lambda f: spectra.funm(op, f, jnp.ones(30)).value.sum(),
    ):
        with pytest.raises(spectra.SpectraError, match="vmap or grad traces, and the operator does not"):
            jax.grad(number)(1.0, find)


@pytest.mark.slow
def test_the_mean_of_a_quadrature_is_that_of_its_nodes():
    zeros = spectra.DiagonalOperator(jnp.array([0.0] * 20 + [1.0, 2.0]))
    quadrature = spectra.slq(zeros.shift(1.0), key=jax.random.key(0), num_steps=5, num_probes=4)
    nodes, weights = np.asarray(quadrature.nodes, float), np.asarray(quadrature.weights, float)
    expected = np.sum(weights * np.where(weights > 0, np.log(np.where(weights > 0, nodes, 1.0)), 0)) / 4
    for f in (np.log, jnp.log):
        assert quadrature.mean(f) == pytest.approx(expected, rel=1e-12)
