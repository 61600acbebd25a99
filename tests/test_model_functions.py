"""Flax modules as functions: they change nothing that they are given; equal options make them equal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import spectra
from spectra.base.errors import StructureError

X = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)


class Normalised(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 2, rngs=rngs)
        self.norm = nnx.BatchNorm(2, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.linear(x))


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x, *, deterministic=False):
        return nn.Dense(2)(nn.Dropout(0.5, deterministic=deterministic)(x))


def mean_square(outputs, targets):
    return jnp.mean((outputs - targets) ** 2)


@pytest.mark.slow
def test_a_call_leaves_the_variables_as_they_were():
    """Outside of an operator too, where nnx writes running statistics into what it is given."""
    model_fn, variables = spectra.nnx_model(Normalised(nnx.Rngs(0)), batch_stats="batch")
    outputs = model_fn(variables, X)
    norm = variables["state"]["norm"]
    np.testing.assert_array_equal([norm["mean"][...], norm["var"][...]], [[0, 0], [1, 1]])  # as made
    slopes = jax.grad(lambda p: jnp.sum(model_fn({**variables, "params": p}, X)))(variables["params"])
    np.testing.assert_array_equal(slopes["norm"]["bias"][...], len(X))
    np.testing.assert_array_equal(model_fn(variables, X), outputs)


@pytest.mark.slow
@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey], ids=["typed", "raw"])
def test_functions_of_equal_keys_are_equal(make):
    """Raw keys are arrays of two numbers, whose comparison has no truth value."""
    first, same, other = (spectra.linen_model(Dropped(), rngs={"dropout": make(i)}) for i in (1, 1, 2))
    assert first == same
    assert hash(first) == hash(same)
    assert first != other
    variables = Dropped().init(jax.random.key(0), X, deterministic=True)
    targets = jnp.zeros((6, 2))
    for model_fn, seed in ((first, 1), (other, 2)):
        op = spectra.GGNOperator(model_fn, mean_square, variables, (X, targets), wrt="params")
        outputs = Dropped().apply(variables, X, rngs={"dropout": make(seed)})
        np.testing.assert_allclose(op.loss(), mean_square(outputs, targets), rtol=1e-5)


def test_options_that_python_takes_for_equal_are_told_apart():
    one, true = (spectra.linen_model(Dropped(), deterministic=value) for value in (1, True))
    assert one != true


@pytest.mark.parametrize(
    "made",
    [
        lambda: spectra.nnx_model(nnx.state(Normalised(nnx.Rngs(0)))),
        lambda: spectra.nnx_model(Normalised),
        lambda: spectra.nnx_model(Dropped()),
        lambda: spectra.linen_model(Normalised(nnx.Rngs(0))),
        lambda: spectra.linen_model({"params": {}}),
    ],
    ids=["state", "class", "linen", "nnx", "variables"],
)
def test_what_is_no_module_of_the_kind_is_refused(made):
    """An AttributeError, 'No attribute set_attributes in State', or at the first call one on `apply`."""
    with pytest.raises(StructureError, match=r"a module of flax.(nnx|linen), and is given (a|the class)"):
        made()
