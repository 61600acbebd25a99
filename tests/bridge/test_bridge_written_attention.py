"""Attention that a module writes out becomes the one in blocks beyond a length, and stays as it is if not."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import spectra
from spectra.bridge.operators import products

LENGTH, WIDTH, HEADS = 140, 8, 2  # two blocks of queries and keys
CAUSAL = torch.ones(LENGTH, LENGTH).tril() > 0


def causal(logits, hidden):
    return logits.masked_fill(~CAUSAL, hidden)


def minus_infinity(q, k, v):
    weights = torch.softmax(causal((q @ k.transpose(-2, -1)) * (1 / math.sqrt(4)), -math.inf), -1)
    return weights @ v


def added(q, k, v):
    logits = torch.matmul(q, k.transpose(2, 3)) / 2 + (1 - CAUSAL.to(q)) * -1e9
    return torch.matmul(torch.nn.functional.softmax(logits, dim=-1), v)


def biased_einsum(q, k, v):
    away = torch.arange(LENGTH).to(q)
    logits = torch.einsum("bhqd,bhkd->bhqk", q, k) - 0.1 * (away[:, None] - away).abs() * 1.0
    logits = torch.where(CAUSAL, logits, torch.finfo(logits.dtype).min)
    return torch.einsum("bhqk,bhkd->bhqd", torch.softmax(logits, -1), v)


def three_axes(q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return (torch.bmm(q, k.transpose(1, 2)).softmax(2) @ v).unflatten(0, (-1, HEADS))


def read_twice(q, k, v):
    weights = torch.softmax(q @ k.transpose(-2, -1), -1)
    return weights @ v + weights.square().sum(-1, keepdim=True)


def not_hidden_for_sure(q, k, v):
    return torch.softmax(causal(q @ k.transpose(-2, -1), -3.0), -1) @ v


def over_queries(q, k, v):
    return torch.softmax(q @ k.transpose(-2, -1), -2) @ v


def transposed(q, k, v):
    return torch.softmax(q @ k.transpose(-2, -1), -1).transpose(-2, -1) @ v


def shared_heads(q, k, v):
    return torch.softmax(q @ k[:, :1].transpose(-2, -1), -1) @ v[:, :1]


KINDS = {
    minus_infinity: True,
    added: True,
    biased_einsum: True,
    three_axes: True,
    read_twice: False,
    not_hidden_for_sure: False,
    over_queries: False,
    transposed: False,
    shared_heads: False,
}


class Layer(torch.nn.Module):
    """Projections around a way of writing attention."""

    def __init__(self, attend):
        super().__init__()
        torch.manual_seed(0)
        self.attend, self.project = attend, torch.nn.Linear(WIDTH, 3 * WIDTH, dtype=torch.float64)

    def forward(self, x):
        parts = self.project(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.attend(*parts).transpose(1, 2).flatten(-2)


@pytest.mark.parametrize("attend", [k if k in (minus_infinity, read_twice)
                                    else pytest.param(k, marks=pytest.mark.slow) for k in KINDS],
                         ids=lambda k: k.__name__)  # fmt: skip
def test_values_and_products_are_pytorchs_in_blocks_or_not(attend, monkeypatch, x64):
    calls = []
    blocks = products.in_blocks
    monkeypatch.setattr(products, "LONG", LENGTH)
    monkeypatch.setattr(products, "in_blocks", lambda *a, **k: calls.append(1) or blocks(*a, **k))
    x = torch.tensor(np.random.default_rng(0).standard_normal((2, LENGTH, WIDTH)))
    module = Layer(attend)
    model = spectra.from_torch(module, (x,))
    calls.clear()

    @jax.jit
    def ours(params):
        def loss(p):
            out = model.apply(p, x.numpy())
            return jnp.sum(jnp.sin(3 * out)), out

        first = jax.grad(loss, has_aux=True)
        (gradient, out), (second, _) = jax.jvp(first, (params,), (jax.tree.map(jnp.cos, params),))
        return out, gradient, second

    got = ours(model.params)
    assert bool(calls) == KINDS[attend]
    params = dict(module.named_parameters())
    out = module(x)
    gradient = torch.autograd.grad((3 * out).sin().sum(), list(params.values()), create_graph=True)
    pairs = zip(gradient, params.values(), strict=True)
    dots = torch.stack([(g * p.detach().cos()).sum() for g, p in pairs]).sum()
    second = torch.autograd.grad(dots, list(params.values()))
    wanted = [out, dict(zip(params, gradient, strict=True)), dict(zip(params, second, strict=True))]
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        other = other.detach().numpy()
        # Sums of LENGTH terms, one after the other in three matrix products: 3 n eps = 9e-14, with a factor
        # for the terms of a derivative.
        assert np.linalg.norm(one - other) <= 24 * LENGTH * np.finfo(float).eps * np.linalg.norm(other)


@pytest.mark.slow
def test_a_row_without_keys_is_what_it_is_written_out(monkeypatch, x64):
    """0 / 0 after minus infinity, as PyTorch has it; the average of all values after a large number."""
    rows = torch.arange(LENGTH)[:, None] != 3
    monkeypatch.setattr(products, "LONG", LENGTH)
    x = torch.tensor(np.random.default_rng(0).standard_normal((1, LENGTH, WIDTH)))

    def lowest(q, k, v):
        return torch.softmax((q @ k.transpose(-2, -1)).masked_fill(~(CAUSAL & rows), -1e10), -1) @ v

    module = Layer(lowest)
    model = spectra.from_torch(module, (x,))
    got = np.asarray(jax.jit(model.apply)(model.params, x.numpy()))
    np.testing.assert_allclose(got, module(x).detach().numpy(), rtol=1e-12, atol=1e-13)


@pytest.mark.slow
def test_not_a_number_hides_nothing(monkeypatch, x64):
    monkeypatch.setattr(products, "LONG", LENGTH)
    x = torch.tensor(np.random.default_rng(0).standard_normal((1, LENGTH, WIDTH)))
    module = Layer(lambda q, k, v: torch.softmax(causal(q @ k.transpose(-2, -1), math.nan), -1) @ v)
    model = spectra.from_torch(module, (x,))
    got = np.isnan(np.asarray(jax.jit(model.apply)(model.params, x.numpy())))
    np.testing.assert_array_equal(got, np.isnan(module(x).detach().numpy()))
    assert got[:, :-1].all()
    assert not got[:, -1].any()
