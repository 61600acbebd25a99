"""Parameters in float32 where JAX has 64 bits: rounding is that of the program which the user runs there."""

import jax
import jax.numpy as jnp
import numpy as np

import spectra

RNG = np.random.default_rng(0)
X = RNG.standard_normal((12, 4)).astype(np.float32)
LABELS = RNG.integers(0, 3, 12)  # of 64 bits: nothing may say that they are cut
PARAMS = {"a": RNG.standard_normal((4, 6)).astype(np.float32), "h": np.float32(RNG.standard_normal((6, 3)))}


def loss_fn(params, batch, mask=None):
    x, labels = batch
    mask = jax.random.bernoulli(jax.random.key(0), 0.5, (6,)) if mask is None else mask
    logits = (jnp.tanh(x @ params["a"]) * mask) @ params["h"]
    return -jnp.mean(jnp.sum(jax.nn.one_hot(labels, 3) * jax.nn.log_softmax(logits), -1))


def truth():
    """The Hessian in float64, with the mask that is drawn where JAX has 64 bits."""
    mask = jax.random.bernoulli(jax.random.key(0), 0.5, (6,))
    leaves, treedef = jax.tree.flatten(PARAMS)
    flat = np.concatenate([x.ravel() for x in leaves]).astype(float)

    def of_flat(v):
        parts = np.split(np.arange(v.size), [leaves[0].size])
        tree = treedef.unflatten([v[i].reshape(x.shape) for i, x in zip(parts, leaves, strict=True)])
        return loss_fn(tree, (X.astype(float), LABELS), mask)

    return np.asarray(jax.hessian(of_flat)(jnp.asarray(flat)))


def test_random_numbers_of_a_loss_are_those_of_64_bits(x64):
    """Those of 32 bits are others: another mask is no rounding. 2 to 5 roundings of |H| were seen."""
    values = np.linalg.eigvalsh(truth())
    op = spectra.HessianOperator(loss_fn, PARAMS, (X, LABELS))
    assert op.dtype == jnp.float32
    report = spectra.spectrum(op, key=jax.random.key(0))
    assert report.largest.lower <= values[-1] <= report.largest.upper
    assert report.noise_floor <= 20 * op.precision * values[-1]
    pair = spectra.eigsh(op, 1, key=jax.random.key(0))
    assert pair.noise_floor <= 20 * op.precision * values[-1]
    step = spectra.step_quality(op, jax.tree.map(lambda g: -0.1 * g, op.gradient()))
    assert step.rounding <= 40 * op.precision * float(op.loss())
