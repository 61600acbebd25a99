"""What is evaluated again is shared or cut: probes that go through one evaluation, logits in chunks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import OPTIMISED

import spectra
from spectra.krylov.plan import estimate, place_basis
from spectra.operators.base import product, product_batch

WIDTH, DEPTH, ROWS = 32, 4, 64
WIDE = 128


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
    return estimate(op, place_basis(op), num_steps=4, num_probes=num_probes).probe_batch


@pytest.mark.slow
def test_probes_share_what_is_not_saved():
    params, x = arrays()
    choices: list[tuple[Any, dict[str, Any]]] = [
        (rematerialised, {}),
        (rematerialised, {"linearize": False}),
        (plain, {"linearize": False}),
        (plain, {"linearize": False, "microbatch": 16}),
    ]
    for loss, options in choices:
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
    alone = estimate(op, place_basis(op), num_steps=4, num_probes=1, probe_batch=1)
    available = 8 * (alone.basis + alone.vectors)  # half of it is four probes, but for what they hold
    monkeypatch.setattr("spectra.base.host.available_bytes", lambda *_: available)
    assert batch_of(op) == 3


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


def dense_network(params, x):
    for w in params[:-1]:
        x = jnp.tanh(x @ w)
    return jnp.mean((x @ params[-1]) ** 2)


@pytest.mark.slow
def test_a_product_costs_what_is_stated():
    """Two gradients at most, as XLA counts them, where what a product needs is saved; three where it is not.

    With m = 2 · rows · width² for a product of matrices, a gradient of three layers is 3 m forward, 3 m
    towards the weights, and 2 m towards the inputs. Tangents are twice as many, but for the first layer,
    whose input is data: 5 m forward, 5 m towards the weights, 4 m towards the inputs. What they need is the
    gradient itself, but for its 3 m towards the weights. Elementwise operations are some twenty for each
    entry of a layer.
    """
    params, x = [jnp.zeros((WIDE, WIDE))] * 3, jnp.zeros((ROWS, WIDE))
    op, m = spectra.HessianOperator(dense_network, params, x), 2 * ROWS * WIDE**2
    gradient = _flops(jax.jit(jax.grad(dense_network)), params, x)
    saved, recomputed = (_flops(product, part, op.structure) for part in (op.prepare(), op))
    few = 3 * 20 * ROWS * WIDE
    assert 8 * m <= gradient <= 8 * m + few
    assert 14 * m <= saved <= 14 * m + few <= 2 * gradient
    assert saved < recomputed <= (14 + 5) * m + few <= 3 * gradient


TOKENS, WORDS, HIDDEN = 11, 37, 5
VOCABULARY = spectra.VocabularyLoss(chunk=4)


def hidden_states(params, x):
    return jnp.tanh(x @ params["in"]), params["words"], params["bias"]


def logits_of(params, x):
    hidden, words, bias = hidden_states(params, x)
    return hidden @ words + bias


def whole(logits, labels):
    counts = labels != -100
    own = jnp.take_along_axis(logits, jnp.where(counts, labels, 0)[..., None], -1)[..., 0]
    return jnp.sum(jnp.where(counts, jax.nn.logsumexp(logits, -1) - own, 0)) / jnp.sum(counts)


def in_chunks(params, batch):
    return VOCABULARY(hidden_states(params, batch[0]), batch[1])


def all_at_once(params, batch):
    return whole(logits_of(params, batch[0]), batch[1])


def words(tokens=TOKENS):
    rng = np.random.default_rng(0)
    shapes = {"in": (HIDDEN, HIDDEN), "words": (HIDDEN, WORDS), "bias": (WORDS,)}
    params = {name: jnp.asarray(rng.standard_normal(shape)) for name, shape in shapes.items()}
    labels = rng.integers(0, WORDS, (2, tokens))
    labels[0, 3] = -100
    return params, (jnp.asarray(rng.standard_normal((2, tokens, HIDDEN))), jnp.asarray(labels))


@pytest.mark.slow
def test_logits_in_chunks_change_no_matrix(x64):
    params, batch = words()
    v = jax.tree.map(jnp.cos, params)
    pairs = (
        (
            spectra.HessianOperator(in_chunks, params, batch),
            spectra.HessianOperator(all_at_once, params, batch),
        ),
        (
            spectra.GGNOperator(hidden_states, VOCABULARY, params, batch),
            spectra.GGNOperator(logits_of, whole, params, batch),
        ),
    )
    for ours, plain in pairs:
        assert float(ours.loss()) == pytest.approx(float(plain.loss()), rel=1e-14)
        for one, other in zip(jax.tree.leaves(ours @ v), jax.tree.leaves(plain @ v), strict=True):
            # Sums of WORDS and of tokens, in another order: n eps of their terms.
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-14 * 100 * float(jnp.abs(other).max()))
    assert int(VOCABULARY.weight(batch)) == 2 * TOKENS - 1


@pytest.mark.slow
def test_what_is_no_pair_is_refused():
    params, batch = words()
    with pytest.raises(spectra.StructureError, match="instead of logits"):
        VOCABULARY(logits_of(params, batch[0]), batch[1])
    with pytest.raises(spectra.StructureError, match="hidden states"):
        VOCABULARY(hidden_states(params, batch[0]), batch[1][:1])
    with pytest.raises(spectra.SpectraError, match="chunk=0"):
        spectra.VocabularyLoss(chunk=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_a_product_does_not_hold_all_logits(kind):
    """1,024 tokens and 4,096 words: 16 MiB of logits, several times in a product; a chunk has 0.25 MiB."""
    tokens, vocabulary, width = 1024, 4096, 16
    s = jax.ShapeDtypeStruct
    params = {
        "in": s((width, width), "f4"),
        "words": s((width, vocabulary), "f4"),
        "bias": s((vocabulary,), "f4"),
    }
    batch = s((1, tokens, width), "f4"), s((1, tokens), "i4")
    options: dict[str, Any] = {"linearize": False, "check_data": False}
    loss = spectra.VocabularyLoss(chunk=16)
    if kind == "ggn":
        op = spectra.GGNOperator(hidden_states, loss, params, batch, **options)
    else:
        op = spectra.HessianOperator(
            lambda p, b: loss(hidden_states(p, b[0]), b[1]), params, batch, **options
        )
    lowered: Any = product.lower(op, op.structure)
    memory = lowered.compile(OPTIMISED).memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 4 * tokens * vocabulary / 4


class Head(NamedTuple):
    hidden: jax.Array
    kernel: jax.Array


@pytest.mark.slow
def test_vocabulary_loss_takes_its_outputs_as_a_named_tuple():
    def model_fn(params, x):
        return jnp.tanh(x @ params["in"]), params["words"]

    params = {"in": jnp.eye(4), "words": jax.random.normal(jax.random.key(0), (4, 7))}
    batch = jax.random.normal(jax.random.key(1), (5, 4)), jnp.arange(5)
    plain, named = [
        spectra.GGNOperator(model, spectra.VocabularyLoss(chunk=2), params, batch) @ params
        for model in (model_fn, lambda p, x: Head(*model_fn(p, x)))
    ]
    jax.tree.map(np.testing.assert_array_equal, plain, named)
