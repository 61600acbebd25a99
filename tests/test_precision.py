"""The package's own matrix products are in full precision: JAX's default is bfloat16 on a TPU, TF32 on a GPU.

A product inside the model has the operator's `matmul_precision`, "float32" unless the user says otherwise.
All others state theirs where they are traced. Here the programs are traced, and not run.
"""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import spectra
from spectra.krylov import band
from spectra.krylov.layout import Layout
from spectra.operators.kronecker import Kronecker, Place
from spectra.operators.layouts import Layout as Matrices

N = 43  # a size of its own: what was traced before would not be traced again
KEY = jax.random.key(0)
HIGHEST, DEFAULT = ((p, p) for p in (lax.Precision.HIGHEST, lax.Precision.DEFAULT))
MATRIX = jax.ShapeDtypeStruct((N, N), jnp.float32)
VECTOR = jax.ShapeDtypeStruct((N,), jnp.float32)


@pytest.fixture
def precisions(monkeypatch):
    """Of all products of floating-point arrays from here on, as they reach JAX."""
    found = []
    for primitive in (lax.dot_general_p, lax.conv_general_dilated_p):

        def bind(*args, original=primitive.bind, **params):
            if jnp.issubdtype(args[0].dtype, jnp.inexact):
                found.append(params["precision"])
            return original(*args, **params)

        monkeypatch.setattr(primitive, "bind", bind)
    with jax.default_matmul_precision("default"):
        yield found


def of_matrix(estimate):
    """An estimate from a matrix, as a function of the matrix, in a program of its own."""
    return jax.jit(lambda matrix: estimate(spectra.MatrixOperator(matrix)))


ESTIMATES = {
    "slq": lambda op: spectra.slq(op, num_steps=9, num_probes=2, key=KEY).nodes.sum(),
    "slq, no basis": lambda op: spectra.slq(op, num_steps=9, num_probes=2, key=KEY, basis="none").nodes.sum(),
    "trace": lambda op: spectra.trace(op, key=KEY, num_matvecs=12, method="xtrace").value,
    "hutch++": lambda op: spectra.trace(op, key=KEY, num_matvecs=12, method="hutch++").value,
    "diagonal": lambda op: spectra.diagonal(op, key=KEY, num_matvecs=12).value.sum(),
    "funm": lambda op: spectra.funm(op, jnp.sqrt, jnp.ones(N), num_steps=8).value.sum(),
    "solve": lambda op: spectra.solve(op, jnp.ones(N)).x.sum(),
}
DIFFERENTIATED = ("slq", "trace", "funm")  # rules of derivatives are traced when the estimate's code is done


@pytest.mark.slow
@pytest.mark.parametrize("name", ESTIMATES)
def test_estimates_multiply_in_full_precision(name, precisions):
    jax.eval_shape(of_matrix(ESTIMATES[name]), MATRIX)
    assert set(precisions) == {HIGHEST}


@pytest.mark.slow
@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_derivatives_of_estimates_multiply_in_full_precision(name, precisions):
    jax.eval_shape(jax.grad(of_matrix(ESTIMATES[name])), MATRIX)
    assert set(precisions) == {HIGHEST}


def test_a_step_of_eigsh_multiplies_in_full_precision(precisions):
    """All of it: new rows from old ones, and the coefficients of a product on them."""
    layout = Layout.leafwise(VECTOR)
    state = jax.eval_shape(partial(band.empty, layout, 20))
    jax.eval_shape(partial(band.absorb, layout, N), state, 1, 0, VECTOR)
    weights = state.coefficients
    jax.eval_shape(lambda *a: band.replace(layout, *a), state, weights, weights, state.filled)
    assert set(precisions) == {HIGHEST}


@pytest.mark.parametrize("eigenbases", [False, True])
def test_factored_blocks_multiply_in_full_precision(eigenbases, precisions):
    """X -> A X B, and in the eigenbases of A and B."""
    rows, columns = (N + 1, N + 2) if eigenbases else (N, N + 1)
    place = Place("w", 0, None, Matrices((rows, columns), 0, (), 1, rows, columns), "kronecker")
    left, right = (jax.ShapeDtypeStruct((1, n, n), jnp.float32) for n in (rows, columns))

    def product(left, right, x):
        block = Kronecker(left, right, place)
        return (block.eigh() if eigenbases else block).apply(x)

    jax.eval_shape(product, left, right, jax.ShapeDtypeStruct((1, rows, columns), jnp.float32))
    assert set(precisions) == {HIGHEST}


@pytest.mark.parametrize(("asked", "stated"), [("float32", HIGHEST), ("default", DEFAULT)])
def test_the_precision_inside_the_model_is_the_users(asked, stated, precisions):
    def loss_fn(w, x):
        return jnp.mean(jnp.tanh(x @ w) ** 2)

    op = spectra.HessianOperator(loss_fn, jnp.zeros(N), jnp.zeros((5, N)), matmul_precision=asked)
    jax.eval_shape(lambda v: op.mv(v), VECTOR)
    assert set(precisions) == {stated}


class Own(spectra.LinearOperator):
    """A user's class that says nothing of the precision of its products."""

    def __init__(self, matrix, precision=None):
        self.matrix, self.stated = matrix, precision

    @property
    def like(self):
        return VECTOR

    def mv(self, v):
        return lax.dot(self.matrix, v, precision=self.stated)


class Inherited(Own):
    """What it inherits is as precise."""


def of_function(matrix, precision=None):
    return spectra.FunctionOperator(lambda v: lax.dot(matrix, v, precision=precision), VECTOR)


@pytest.mark.parametrize("make", [of_function, Own, Inherited])
def test_products_of_users_are_true_float32_unless_they_say_otherwise(make, precisions):
    """A noise floor of float32 is false where JAX's default of the device multiplies in less."""
    jax.eval_shape(lambda matrix: make(matrix).mv(matrix[0]), MATRIX)
    jax.eval_shape(lambda matrix: ESTIMATES["hutch++"](make(matrix)), MATRIX)
    assert set(precisions) == {HIGHEST}
    del precisions[:]
    jax.eval_shape(lambda matrix: make(matrix, lax.Precision.DEFAULT).mv(matrix[0]), MATRIX)
    assert set(precisions) == {DEFAULT}


ROUNDS = {
    "nothing": (lambda matrix, v: matrix @ v, 2.0**-23),
    "default": (lambda matrix, v: jnp.matmul(matrix, v, precision="default"), 2.0**-8),
    "high": (lambda matrix, v: jnp.matmul(matrix, v, precision="high"), 2.0**-10),
    "a cast": (lambda matrix, v: matrix @ v.astype("bfloat16").astype("float32"), 2.0**-7),
}


@pytest.mark.parametrize("name", ROUNDS)
def test_what_a_function_rounds_by_itself_is_in_the_precision_of_its_products(name):
    """Of a `FunctionOperator` and of a loss; on every device the same."""
    multiply, eps = ROUNDS[name]
    matrix = jnp.eye(N)
    op = spectra.FunctionOperator(partial(multiply, matrix), VECTOR)
    loss = spectra.HessianOperator(lambda w, x: jnp.mean(jnp.tanh(multiply(x, w)) ** 2), jnp.ones(N), matrix)
    assert op.precision == loss.precision == eps
    floor = spectra.slq(op, num_steps=5, num_probes=2, key=KEY).noise_floor
    assert floor >= eps


def test_high_is_tensorfloat32():
    """As JAX has it: three passes of bfloat16 on a TPU, but TF32 on a GPU."""
    options = {"loss_fn": lambda w, x: jnp.mean(jnp.tanh(x @ w)), "params": jnp.ones(N), "data": jnp.eye(N)}
    two = (spectra.HessianOperator(**options, matmul_precision=name) for name in ("high", "tensorfloat32"))
    assert {op.precision for op in two} == {2.0**-11}
