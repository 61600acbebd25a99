"""Attention in blocks equals attention written out, in value and in every product, in linear memory."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow_but
from programs import OPTIMISED

import spectra

KEY = jax.random.key(0)


def written_out(q, k, v, bias=None, mask=None, *, is_causal=False, window=None):
    """softmax(Q Kᵀ / sqrt(H) + bias) V in the dtype of the inputs; `jax.nn` has its softmax in float32."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    logits = jnp.einsum("btnh,bsnh->bnts", q, k) / q.shape[-1] ** 0.5
    if bias is not None:
        logits = logits + bias
    rows, columns = jnp.arange(q.shape[1])[:, None], jnp.arange(k.shape[1])
    seen = jnp.ones(logits.shape, bool) if mask is None else jnp.broadcast_to(mask, logits.shape)
    if is_causal:
        seen &= columns <= rows
    if window is not None:
        seen &= (columns >= rows - window[0]) & (columns <= rows + window[1])
    logits = jnp.where(seen, logits, -0.7 * float(np.finfo("f").max))
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(logits), v)


def inputs(t=37, s=37, heads=4, groups=4, dtype=jnp.float64):
    shapes = ((2, t, heads, 3), (2, s, groups, 3), (2, s, groups, 3))
    keys = jax.random.split(KEY, 3)
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def some_mask(t, s, rows=2):
    return jax.random.bernoulli(jax.random.key(1), 0.6, (rows, 1, t, s)).at[:, :, 5].set(False)


AHEAD = "window ahead, the last row without keys"
CASES = {
    "plain": ({}, {}),
    "causal": ({}, {"is_causal": True}),
    "grouped heads": ({"groups": 2}, {"is_causal": True}),
    "other lengths": ({"t": 20, "s": 45}, {}),
    "longer, causal": ({"t": 45, "s": 20}, {"is_causal": True}),
    "window": ({}, {"window": (9, 3)}),
    "window, behind the keys": ({"t": 50, "s": 20}, {"window": (4, 0)}),
    AHEAD: ({}, {"window": (-1, 5)}),
    "causal window": ({"groups": 1}, {"is_causal": True, "window": (12, 0)}),
    "mask, a row without keys": ({}, {"mask": some_mask(37, 37)}),
    "mask, causal": ({}, {"mask": some_mask(37, 37), "is_causal": True}),
    "mask of keys": ({}, {"mask": jnp.arange(37) < 30}),
    "bias": ({}, {"bias": jax.random.normal(KEY, (1, 4, 37, 37))}),
    "bias, a row at the lowest number": (
        {},
        {"bias": jnp.zeros((1, 1, 37, 37)).at[:, :, 4].set(float(np.finfo("f").min))},
    ),
    "bias of heads": ({"groups": 2}, {"bias": jax.random.normal(KEY, (4, 1, 1))}),
}


def blocks(*args, window=None, **options):
    return spectra.attention(*args, **options, local_window_size=window, block_sizes=(8, 16))


def loss(attend, args, options):
    return jnp.sum(jnp.sin(attend(*args, **options)))


@pytest.mark.parametrize("name", slow_but(CASES, "window ahead, the last row without keys"))
def test_values_and_products_are_those_of_attention_written_out(name):
    shapes, options = CASES[name]
    with jax.enable_x64(True):
        args = inputs(**shapes)
        v = [jax.random.normal(jax.random.key(2), x.shape, x.dtype) for x in args]

        @jax.jit
        def everything(args, v):
            def of(attend):
                grad = jax.grad(lambda *args: loss(attend, args, options), (0, 1, 2))
                forward = jax.jvp(grad, args, v)
                backward = jax.grad(lambda *x: sum(map(jnp.vdot, grad(*x), v)), (0, 1, 2))(*args)
                return attend(*args, **options), forward, backward

            return of(blocks), of(written_out)

        ours, plain = everything(tuple(args), tuple(v))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        # 50 terms a sum at most, five sums deep: 1e-12 of the largest entry is 4,500 roundings.
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * np.abs(np.asarray(b)).max())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@jax.default_matmul_precision("highest")  # on a GPU both would be TF32 otherwise, in different orders
def test_lengths_scale_and_dtypes_are_those_of_jax(dtype):
    args = inputs(dtype=dtype)
    options = {
        "scale": 0.2,
        "query_seq_lengths": jnp.array([37, 11], jnp.int32),
        "key_value_seq_lengths": jnp.array([20, 37], jnp.int32),
        "local_window_size": 30,
    }
    ours, plain = spectra.attention(*args, **options), jax.nn.dot_product_attention(*args, **options)
    assert ours.dtype == plain.dtype == dtype
    assert ours.shape == plain.shape
    np.testing.assert_allclose(
        ours.astype("f"), plain.astype("f"), rtol=0, atol=8 * float(jnp.finfo(dtype).eps)
    )
    alone = spectra.attention(*(x[0] for x in args))  # without a batch
    np.testing.assert_allclose(
        alone.astype("f"),
        jax.nn.dot_product_attention(*(x[0] for x in args)).astype("f"),
        rtol=0,
        atol=8 * float(jnp.finfo(dtype).eps),
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@jax.default_matmul_precision("highest")
def test_a_row_hidden_by_a_bias_of_any_dtype_averages_all_values(dtype):
    q, k, v = inputs(dtype=jnp.float32)
    out = spectra.attention(q, k, v, bias=jnp.zeros((1, 1, 37, 37), dtype).at[:, :, 4].set(-jnp.inf))
    # A sum of 37 values of size one, in another order.
    np.testing.assert_allclose(out[:, 4], v.mean(axis=1), rtol=0, atol=37 * 4 * np.finfo("f").eps)


@pytest.mark.parametrize("empty", [(0, 5, 7), (2, 0, 7), (2, 5, 0)], ids=["example", "row", "key"])
def test_without_an_example_a_row_or_a_key_nothing_is_left(empty):
    b, t, s = empty
    q, k = jnp.ones((b, t, 4, 3)), jnp.ones((b, s, 2, 3))
    ours, plain = spectra.attention(q, k, k), jax.nn.dot_product_attention(q, k, k, implementation="xla")
    assert ours.shape == plain.shape == q.shape
    np.testing.assert_array_equal(ours, plain)


def temporary_bytes(attend, length):
    shape = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)

    def product(args, v):
        return jax.jvp(jax.grad(lambda args: loss(attend, args, {"is_causal": True})), (args,), (v,))[1]

    compiled = jax.jit(product).lower((shape,) * 3, (shape,) * 3).compile(OPTIMISED)
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_a_product_takes_memory_that_is_linear_in_the_sequence():
    """Lengths at which blocks no longer count; slope of the logarithms at most 1.1.

    A block of a GPU is a 64th of the square of 8192, a CPU's less than a thousandth.
    """
    short, long = temporary_bytes(spectra.attention, 2048), temporary_bytes(spectra.attention, 8192)
    assert np.log(long / short) <= 1.1 * np.log(4)
    part = 100 if jax.default_backend() == "cpu" else 40
    assert long <= temporary_bytes(jax.nn.dot_product_attention, 8192) / part


@pytest.mark.parametrize(
    ("platform", "heads", "blocks"),
    # On a GPU at most 2^25 logits in a block: 32 x 1024^2 are as many, 64 x 512^2 and 512 x 256^2 are within.
    [("cpu", 4, 32), ("gpu", 4, 4), ("gpu", 32, 4), ("gpu", 64, 8), ("gpu", 512, 16), ("tpu", 10**5, 32)],
)
def test_blocks_are_larger_where_they_fill_more_cores(monkeypatch, platform, heads, blocks):
    monkeypatch.setattr("spectra.models.attention._platform", lambda: platform)
    q = jax.ShapeDtypeStruct((1, 4096, heads, 2), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda *args: spectra.attention(*args))(q, q, q)
    (outer,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    assert outer.params["length"] == blocks


def test_the_platform_is_that_of_the_default_device(monkeypatch):
    from spectra.models.attention import _platform

    assert _platform() == jax.default_backend()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert _platform() == "gpu"
    with jax.default_device(jax.devices("cpu")[0]):
        assert _platform() == "cpu"


@pytest.mark.slow
def test_shapes_that_do_not_fit_are_refused():
    q, k, v = inputs(groups=3, dtype=jnp.float32)
    with pytest.raises(spectra.StructureError, match="multiple of K"):
        spectra.attention(q, k, v)
    q, k, v = inputs(dtype=jnp.float32)
    for wrong in ((q[None], k, v), (q[None], k[None], v[None]), (q, k[:, :, :0], v[:, :, :0])):
        with pytest.raises(spectra.StructureError, match="multiple of K"):
            spectra.attention(*wrong)
    for shape in ((3, 1, 37, 37), (1, 1, 1, 37, 37)):
        with pytest.raises(spectra.StructureError, match=r"mask of shape .* does not broadcast"):
            spectra.attention(q, k, v, mask=jnp.ones(shape, bool))
    wrong_sizes: list[Any] = [(0, 8), (8,), 8, (8.0, 8)]
    for sizes in wrong_sizes:
        with pytest.raises(spectra.StructureError, match="two positive integers"):
            spectra.attention(q, k, v, block_sizes=sizes)
    with pytest.raises(spectra.StructureError, match="give booleans"):
        spectra.attention(q, k, v, mask=jnp.ones((37, 37)))
