"""The product equals PyTorch's double backward on the same weights, inputs and targets."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import SHARP

import spectra

torch = pytest.importorskip("torch")

SIZES = (6, 8, 7, 4)
RNG = np.random.default_rng(0)
WEIGHTS = {
    name: RNG.standard_normal(shape) / np.sqrt(shape[-1])
    for i, (a, b) in enumerate(itertools.pairwise(SIZES))
    for name, shape in ((f"{i}.weight", (b, a)), (f"{i}.bias", (b,)))
}
INPUTS, LABELS = RNG.standard_normal((20, SIZES[0])), RNG.integers(0, SIZES[-1], 20)


def jax_loss(params, batch):
    x, labels = batch
    for i in range(3):
        x = x @ params[f"{i}.weight"].T + params[f"{i}.bias"]
        x = jnp.tanh(x) if i == 0 else jax.nn.silu(x) if i == 1 else x
    picked = jnp.take_along_axis(jax.nn.log_softmax(x), labels[:, None], axis=1)
    return -jnp.mean(picked)


def torch_product(v, dtype):
    """H v by differentiating <gradient, v> once more."""
    functional = torch.nn.functional
    params = {k: torch.tensor(w, dtype=dtype, requires_grad=True) for k, w in WEIGHTS.items()}
    x = torch.tensor(INPUTS, dtype=dtype)
    for i in range(3):
        x = functional.linear(x, params[f"{i}.weight"], params[f"{i}.bias"])
        x = torch.tanh(x) if i == 0 else functional.silu(x) if i == 1 else x
    loss = functional.cross_entropy(x, torch.tensor(LABELS))
    leaves = list(params.values())
    gradients = torch.autograd.grad(loss, leaves, create_graph=True)
    inner = sum((g * torch.tensor(v[k], dtype=dtype)).sum() for k, g in zip(params, gradients, strict=True))
    products = torch.autograd.grad(inner, leaves)
    return {k: p.numpy() for k, p in zip(params, products, strict=True)}


@SHARP
@pytest.mark.parametrize("mode", ["forward-over-reverse", "reverse-over-reverse"])
@pytest.mark.parametrize("linearize", [True, False])
def test_product_equals_double_backward(mode, linearize, dtype):
    v = {k: np.random.default_rng(1).standard_normal(w.shape) for k, w in WEIGHTS.items()}
    params = jax.tree.map(jnp.asarray, WEIGHTS)
    data = (jnp.asarray(INPUTS), jnp.asarray(LABELS))
    op = spectra.HessianOperator(jax_loss, params, data, mode=mode, linearize=linearize)
    product = op.prepare() @ jax.tree.map(jnp.asarray, v)
    expected = torch_product(v, getattr(torch, dtype))
    difference = np.concatenate([np.ravel(product[k] - expected[k]) for k in WEIGHTS])
    size = np.linalg.norm(np.concatenate([np.ravel(x) for x in expected.values()]))
    # The requirement: 84 eps in float32; float64 has 4.5e5 eps to spare and is at 1e-15.
    assert np.linalg.norm(difference) <= (1e-5 if dtype == "float32" else 1e-10) * size


def test_a_torch_data_loader_is_a_stream_and_shuffling_is_refused():
    from torch.utils.data import DataLoader, TensorDataset

    dataset = TensorDataset(torch.tensor(INPUTS, dtype=torch.float32), torch.tensor(LABELS))
    params = jax.tree.map(jnp.asarray, WEIGHTS)
    loader = DataLoader(dataset, batch_size=7, collate_fn=as_numpy)
    streamed = spectra.HessianOperator(jax_loss, params, loader)
    whole = spectra.HessianOperator(jax_loss, params, (jnp.asarray(INPUTS), jnp.asarray(LABELS)))
    v = jnp.ones(whole.size)
    # 32 roundings of a product; |H| is of order one here, |v| is the root of its size.
    bound = 32 * 1.2e-7 * np.sqrt(whole.size)
    assert np.linalg.norm((streamed @ v) - (whole @ v)) <= bound
    torch.manual_seed(0)
    shuffling = DataLoader(dataset, batch_size=7, shuffle=True, collate_fn=as_numpy)
    with pytest.raises(spectra.DataError, match="shuffle=False"):
        spectra.HessianOperator(jax_loss, params, shuffling)


def as_numpy(examples):
    inputs, labels = zip(*examples, strict=True)
    return torch.stack(inputs).numpy(), torch.stack(labels).numpy()
