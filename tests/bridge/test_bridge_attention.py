"""Long attention is evaluated in blocks: PyTorch's values and second derivatives, in linear memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import spectra
from spectra.bridge.operators import products

L, S = 270, 250
rng = np.random.default_rng(0)


def normal(*shape):
    return rng.standard_normal(shape)


def some(*shape, hidden, row):
    """A mask added to the logits, with one row in which nothing is allowed."""
    mask = np.where(rng.random(shape) < 0.3, 0.0, hidden)
    mask[..., row, :] = hidden
    return mask


FOUR = (normal(2, 2, L, 3), normal(2, 2, S, 3), normal(2, 2, S, 3))
GROUPED = (normal(2, 4, L, 3), normal(2, 2, S, 3), normal(2, 2, S, 3))
CASES = {
    "heads that share, causal": (GROUPED, {"enable_gqa": True, "is_causal": True}),
    "a mask, a row without keys": (FOUR, {"attn_mask": some(L, S, hidden=1.0, row=5) < 1, "scale": 0.3}),
    "added, a row at minus infinity": (FOUR, {"attn_mask": some(2, 1, L, S, hidden=-np.inf, row=7)}),
    "added, a row at the lowest number": (
        FOUR,
        {"attn_mask": some(2, 1, L, S, hidden=float(np.finfo("f").min), row=7)},
    ),
    "three axes": (tuple(x[0] for x in FOUR), {"attn_mask": some(2, L, S, hidden=-np.inf, row=0)}),
    "five axes": (
        (normal(2, 2, 2, L, 3), normal(2, 1, 2, S, 3), normal(2, 2, 2, S, 3)),
        {"attn_mask": some(2, 1, 1, L, S, hidden=1.0, row=2) < 1},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_values_and_second_derivatives_are_pytorchs(name, monkeypatch, x64):
    monkeypatch.setattr(products, "_written_out", None)  # not the short way
    arrays, options = CASES[name]

    def of(kind, arrays):
        return {key: kind(x) if isinstance(x, np.ndarray) else x for key, x in options.items()}

    tensors = [torch.tensor(x, requires_grad=True) for x in arrays]
    with sdpa_kernel(SDPBackend.MATH):
        out = F.scaled_dot_product_attention(*tensors, **of(torch.tensor, arrays))
        gradient = torch.autograd.grad(out.sin().sum(), tensors, create_graph=True)
        directions = [g.detach().cos() for g in gradient]
        dots = sum((g * d).sum() for g, d in zip(gradient, directions, strict=True))
        second = torch.autograd.grad(dots, tensors)

    @jax.jit
    def ours(arrays, directions):
        def loss(*arrays):
            out = products.attention(*arrays, **of(jnp.asarray, arrays))
            return jnp.sum(jnp.sin(out)), out

        gradient, out = jax.grad(loss, (0, 1, 2), has_aux=True)(*arrays)
        first = jax.grad(lambda *x: loss(*x)[0], (0, 1, 2))
        return out, gradient, jax.jvp(first, arrays, directions)[1]

    got = ours(tuple(map(jnp.asarray, arrays)), tuple(jnp.asarray(d.numpy()) for d in directions))
    for ours_, theirs in zip(jax.tree.leaves(got), [out, *gradient, *second], strict=True):
        theirs = theirs.detach().numpy()
        # n eps of the longest sum, S keys and then L rows, with a factor for the terms of a derivative
        assert np.linalg.norm(ours_ - theirs) <= 8 * (L + S) * np.finfo(float).eps * np.linalg.norm(theirs)


class Decoder(torch.nn.Module):
    """Two layers of causal attention with projections."""

    def __init__(self, width=32, heads=4):
        super().__init__()
        self.heads = heads
        self.project = torch.nn.ModuleList(torch.nn.Linear(width, 3 * width) for _ in range(2))

    def forward(self, x):
        for layer in self.project:
            q, k, v = layer(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        return x


@pytest.mark.slow
def test_a_product_of_a_long_model_takes_a_tenth_of_the_memory(monkeypatch):
    length = 2048
    torch.manual_seed(0)
    x = torch.randn(1, length, 32)
    model = spectra.from_torch(Decoder(), (x,))

    def product(p, v, x):
        def loss(p):
            return jnp.mean(model.apply(p, x) ** 2)

        return jax.jvp(jax.grad(loss), (p,), (v,))[1]

    def bytes_of(long):
        monkeypatch.setattr(products, "LONG", long)
        fresh = jax.jit(lambda *args: product(*args))  # JAX keeps what it traced of a function
        compiled = fresh.lower(model.params, model.params, x.numpy()).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert bytes_of(products.LONG) < bytes_of(10**12) / 10
