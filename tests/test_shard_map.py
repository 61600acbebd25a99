"""Losses under `jax.shard_map`, as fully sharded models are written: our loops run inside it as outside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow_but
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import spectra
from spectra.bridge.operators.factors import householder_product
from spectra.bridge.operators.recurrent import lstm, packed

MESH = Mesh(np.array(jax.devices()[:1]), ("data",))
"""One device is enough: what a loop refuses is the type of its carry, which is the same for any number."""
WIDTH, LENGTH = 6, 12


def attention(params, x):
    query, key, value = ((x @ w).reshape(*x.shape[:2], 2, 3) for w in params["square"])
    return jnp.mean(spectra.attention(query, key, value, is_causal=True, block_sizes=(4, 8)) ** 2)


def words(params, x):
    hidden = jnp.tanh(x @ params["square"][0])
    return spectra.VocabularyLoss(chunk=5)((hidden, params["square"][1]), jnp.int32(4 * x[..., 0]) % WIDTH)


def recurrent(params, x):
    zero = jnp.zeros((1, len(x), WIDTH))
    inputs = ((zero, zero), [params["gates"], params["gates"] / 2], False, 1, 0.0, False, False)
    return jnp.mean(lstm(x, *inputs, True)[0] ** 2)


def packed_sequences(params, x):
    zero = jnp.zeros((1, len(x), WIDTH))
    lengths = jnp.arange(len(x)) + 2
    inputs = ((zero, zero), [params["gates"], params["gates"] / 2], False, 1, 0.0, False, False)
    return jnp.mean(packed("lstm", x, lengths, *inputs, True)[0] ** 2)


def reflections(params, x):
    return jnp.mean(householder_product(params["square"][0], jnp.tanh(x[0, 0])) ** 2)


LOSSES = {fn.__name__: fn for fn in (attention, words, recurrent, packed_sequences, reflections)}


@pytest.mark.parametrize("name", slow_but(LOSSES, "words"))
def test_a_product_inside_shard_map_is_that_outside(name):
    loss_fn = LOSSES[name]
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "square": jax.random.normal(keys[0], (3, WIDTH, WIDTH)),
        "gates": jax.random.normal(keys[1], (4 * WIDTH, WIDTH)),
    }
    x = jax.random.normal(keys[2], (2, LENGTH, WIDTH))

    def split(params, x):
        def mean(params, x):
            return lax.pmean(loss_fn(params, x), "data")

        return jax.shard_map(mean, mesh=MESH, in_specs=(P(), P("data")), out_specs=P())(params, x)

    v = jax.tree.map(jnp.cos, params)
    options = {"mode": "forward-over-reverse", "linearize": False}
    inside, outside = (spectra.HessianOperator(fn, params, x, **options) @ v for fn in (split, loss_fn))
    for a, b in zip(jax.tree.leaves(inside), jax.tree.leaves(outside), strict=True):
        # The same sums of at most 72 terms, fused in another way.
        scale = max(float(jnp.max(jnp.abs(y))) for y in jax.tree.leaves(outside))
        np.testing.assert_allclose(a, b, rtol=0, atol=72 * float(np.finfo("f").eps) * scale)
