"""Models that compute in less than their parameters have: the operator's precision is what its jaxpr says."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from jax import lax

import spectra

X = jnp.asarray(np.random.default_rng(0).standard_normal((12, 4)), jnp.float32)
BODY = np.random.default_rng(1).standard_normal((4, 4)) / 2
PARAMS = {"body": jnp.asarray(BODY, jnp.float32), "head": jnp.ones(4)}
LOW = jnp.bfloat16


def network(params, x, low=None):
    hidden = jnp.tanh(x.astype(low or x.dtype) @ params["body"].astype(low or x.dtype))
    return jnp.mean((hidden.astype(jnp.float32) @ params["head"]) ** 2)


def cast_layer(params, x):
    return network(params, x, LOW)


def recomputed(params, x):
    return jax.checkpoint(cast_layer)(params, x)


def scanned(params, x):
    def body(carry, _):
        return jnp.tanh((carry.astype(LOW) @ params["body"].astype(LOW)).astype(jnp.float32)), None

    return jnp.mean(lax.scan(body, x, None, length=2)[0] ** 2)


def carried_in_low(params, x):
    """What varies enters the low carry in the first pass only through what the pass before left there."""

    def body(carry, _):
        low, full = carry
        return ((full @ params["body"]).astype(LOW), full + jnp.sum(low.astype(jnp.float32))), None

    return jnp.mean(lax.scan(body, ((x @ jnp.eye(4)).astype(LOW), x), None, length=3)[0][1] ** 2)


def branches(params, x):
    return lax.cond(x[0, 0] > 0, cast_layer, network, params, x)


def half(params, x):
    return network(params, x, jnp.float16)


def by_algorithm(params, x):
    hidden = lax.dot(x, params["body"], precision=lax.DotAlgorithmPreset.BF16_BF16_F32)
    return jnp.mean(jnp.tanh(hidden) ** 2)


def reduced(params, x):
    return jnp.mean(jnp.tanh(x @ lax.reduce_precision(params["body"], 8, 10)) ** 2)


def low_inputs(params, x):
    return network(params, x.astype(LOW).astype(jnp.float32))


def no_gradient(params, x):
    gate = lax.stop_gradient(cast_layer(params, x))
    return network(params, x) * gate.astype(jnp.float32)


def compared(params, x):
    return network(params, jnp.where(x @ params["body"].astype(LOW) > 0, x, -x))


def unused(params, x):
    cast_layer(params, x)
    return network(params, x)


def loss_is_computed_in(loss_fn, **options):
    op = spectra.HessianOperator(loss_fn, PARAMS, X, **options)
    assert op.precision == float(jnp.finfo(op.computes_in).eps if "bits" not in op.computes_in else 2.0**-10)
    return op.computes_in


CASTS = {
    cast_layer: "bfloat16",
    recomputed: "bfloat16",
    scanned: "bfloat16",
    carried_in_low: "bfloat16",
    branches: "bfloat16",
    half: "float16",
    by_algorithm: "bfloat16",
    reduced: "10 bits of mantissa",
    network: "float32",
    low_inputs: "float32",
    no_gradient: "float32",
    compared: "float32",
    unused: "float32",
}


@pytest.mark.parametrize("loss_fn", CASTS, ids=lambda fn: fn.__name__)
def test_the_coarsest_operation_on_what_varies_is_found(loss_fn):
    assert loss_is_computed_in(loss_fn) == CASTS[loss_fn]


@pytest.mark.slow
def test_constants_may_be_cast():
    """The body in bfloat16 is a constant to the head; blocks and streams know it as the whole does."""
    assert loss_is_computed_in(cast_layer, wrt="head") == "float32"
    assert loss_is_computed_in(cast_layer, wrt="body", microbatch=5) == "bfloat16"
    op = spectra.HessianOperator(cast_layer, PARAMS, lambda: iter((X[:7], X[7:])))
    assert op.computes_in == "bfloat16"
    assert {name: block.computes_in for name, block in op.blocks().items()} == {
        "body": "bfloat16",
        "head": "float32",
    }
    assert (op - 2 * op.shift(1.0)).computes_in == "bfloat16"
    coarse = spectra.HessianOperator(half, PARAMS, X, matmul_precision="bfloat16")
    assert coarse.computes_in == "bfloat16"
    assert coarse.precision == 2.0**-8


@pytest.mark.slow
def test_float32_layers_of_a_model_in_float64(x64):
    module = linen.Dense(3, dtype=jnp.float32)
    variables = jax.tree.map(lambda x: x.astype(jnp.float64), module.init(jax.random.key(0), X))
    op = spectra.HessianOperator(lambda v, x: jnp.mean(module.apply(v, x) ** 2.0), variables, X)
    assert op.dtype == jnp.float64
    assert op.computes_in == "float32"


@pytest.mark.slow
def test_a_model_in_bfloat16_has_its_noise_stated():
    """Against float64 at the same weights; the floor is 4 eps |H|, and 0.8 to 1.4 eps |H| were seen."""
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: x.astype(jnp.float64), PARAMS["body"])
        full = jax.jit(jax.hessian(lambda w: network({**PARAMS, "body": w}, X.astype(jnp.float64))))(exact)
        values = np.linalg.eigvalsh(np.asarray(full).reshape(16, 16))
    op = spectra.HessianOperator(cast_layer, PARAMS, X, wrt="body")
    quadrature = spectra.slq(op, key=jax.random.key(0), num_steps=8, num_probes=2)
    largest = np.abs(values).max()
    assert 4 * 2.0**-7 * 0.95 * largest <= quadrature.noise_floor <= 8 * 2.0**-7 * largest
    assert abs(max(map(abs, quadrature.range)) - largest) <= quadrature.noise_floor


def underflows(params, x):
    return 2.0**-22 * half(params, x)


def vanishes(params, x):
    return 2.0**-30 * half(params, x)


@pytest.mark.parametrize(
    ("loss_fn", "wrt", "scale"), [(underflows, "*", 2.0**-22), (vanishes, "body", 2.0**-30)]
)
def test_a_matrix_of_which_float16_has_no_digits_is_that_of_float64(loss_fn, wrt, scale):
    """Numbers in float16 are multiples of 6e-8: of one loss the matrix was 31 % off and not symmetric, of the
    other zero. What remains is the rounding of entries to float32."""
    with jax.enable_x64(True):
        flat, unravel = jax.flatten_util.ravel_pytree(jax.tree.map(lambda x: jnp.asarray(x, float), PARAMS))
        wide = X.astype(float)
        truth = np.asarray(jax.jit(jax.hessian(lambda v: network(unravel(v), wide)))(flat))
    op = spectra.HessianOperator(loss_fn, PARAMS, X, wrt=wrt)
    found, truth = np.asarray(op.as_matrix(), float) / scale, truth[: op.size, : op.size]
    assert np.abs(found - truth).max() <= 2.0**-22 * np.abs(truth).max()


@jax.custom_vjp
def skew(w):
    return jnp.sum(w**2)


# A linear map that is not symmetric: the gradient of no function.
skew.defvjp(lambda w: (skew(w), w), lambda w, g: (g * jnp.cumsum(w, axis=0),))


@pytest.mark.slow
def test_an_error_names_the_cast_and_the_remedy():
    def loss_fn(params, x):
        del x
        return skew(params["body"].astype(LOW).astype(jnp.float32))

    op = spectra.HessianOperator(loss_fn, PARAMS, X, wrt="body", mode="reverse-over-reverse")
    with pytest.raises(spectra.NotSymmetricError) as caught:
        spectra.slq(op, key=jax.random.key(0), num_steps=6, num_probes=1)
    message = str(caught.value)
    assert "computes in bfloat16: a cast of float32[4, 4] to bfloat16" in message
    assert "test_roundings.py:" in message
    assert "float32 for the analysis" in message
    assert "dropout" not in message
