"""Probes that share an evaluation of the loss: where nothing is saved, several go through one by default."""

import jax
import jax.numpy as jnp
import pytest
from programs import OPTIMISED

import spectra
from spectra.operators.base import product, product_batch

WIDTH, DEPTH, ROWS = 32, 4, 64


def _layer(h, pair):
    return jnp.tanh(h @ pair[0]) @ pair[1] + h


_again = jax.checkpoint(_layer)


def plain(params, x):
    h = x
    for i in range(DEPTH):
        h = _layer(h, [p[i] for p in params])
    return jnp.mean(h**2)


def rematerialised(params, x):
    h = x
    for i in range(DEPTH):
        h = _again(h, [p[i] for p in params])
    return jnp.mean(h**2)


@jax.jit
def arrays():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (DEPTH, WIDTH, 4 * WIDTH), (DEPTH, 4 * WIDTH, WIDTH), (ROWS, WIDTH)
    first, second, x = (jax.random.normal(k, s) / WIDTH**0.5 for k, s in zip(keys, shapes, strict=True))
    return [first, second], x


def batch_of(op, num_probes=8):
    return spectra.plan(op, num_steps=4, num_probes=num_probes).probe_batch


def test_probes_share_what_is_not_saved():
    params, x = arrays()
    for loss, options in (
        (rematerialised, {}),
        (rematerialised, {"linearize": False}),
        (plain, {"linearize": False}),
        (plain, {"linearize": False, "microbatch": 16}),
    ):
        op = spectra.HessianOperator(loss, params, x, **options)
        assert batch_of(op) == batch_of(2.0 * op.shift(1.0)) == 4
        assert batch_of(op, 3) == 3
    saved = spectra.HessianOperator(plain, params, x)
    assert batch_of(saved) == 1  # on a CPU nothing is gained
    assert batch_of(spectra.HessianOperator(plain, params, x, linearize=False, mode="finite-difference")) == 1
    # A stream shares each pass among all probes, as before.
    assert batch_of(spectra.HessianOperator(rematerialised, params, [x, x])) == 8


def test_memory_limits_how_many_share(monkeypatch):
    params, x = arrays()
    op = spectra.HessianOperator(rematerialised, params, x, linearize=False)
    held = op.recomputed_bytes()
    assert held is not None
    assert held >= DEPTH * ROWS * WIDTH * 4  # tangents of the inputs of the layers, at least
    one = held + spectra.plan(op, num_steps=4, num_probes=1).vectors
    monkeypatch.setattr("spectra._memory.available_bytes", lambda *_: 6 * one)
    assert batch_of(op) < 4


def _flops(fn, *args):
    cost = fn.lower(*args).compile(OPTIMISED).cost_analysis()
    assert cost is not None
    return cost["flops"]


@pytest.mark.slow
def test_four_products_under_checkpoint_cost_what_they_share_less():
    """What a run does, as XLA counts it: at most 0.8 of four products one by one.

    In matrix products of a layer the tangents of forward, recomputation and backward sweep are 2 + 2 + 4;
    the values they need are 1 + 1 + 1 (the last, towards the weights, is not needed), of which XLA merges
    some. With one evaluation for four it is (8 + 3/4) / (8 + 3) = 0.795 where nothing is merged.
    """
    params, x = arrays()
    op = spectra.HessianOperator(rematerialised, params, x)
    one = _flops(product, op, op.structure)
    four = jax.tree.map(lambda s: jax.ShapeDtypeStruct((4, *s.shape), s.dtype), op.structure)
    assert _flops(product_batch, op.prepare(), four) <= 0.8 * 4 * one
    assert _flops(product_batch, op, four) <= 0.85 * 4 * one
