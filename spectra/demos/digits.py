"""A 64-256-256-10 network on scikit-learn's 1,797 handwritten digits, trained with Flax and optax."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from spectra.models.problem import Problem


class MLP(nn.Module):
    """Fully connected network with tanh units: smooth, so that the Hessian tells the whole story."""

    widths: tuple[int, ...] = (256, 256, 10)

    @nn.compact
    def __call__(self, x):
        """Logits (batch, 10) of images (batch, 64)."""
        for width in self.widths[:-1]:
            x = nn.tanh(nn.Dense(width)(x))
        return nn.Dense(self.widths[-1])(x)


MODEL = MLP()


def loss_fn(params, batch):
    """Mean cross-entropy over a batch of (images, labels)."""
    images, labels = batch
    logits = jnp.asarray(MODEL.apply({"params": params}, images))
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images (1797, 64) scaled to [0, 1] and labels (1797,)."""
    from sklearn.datasets import load_digits as sklearn_digits

    digits: Any = sklearn_digits()
    return np.asarray(digits.data / 16, np.float32), np.asarray(digits.target, np.int32)


def train(key: jax.Array, batch, *, epochs: int = 30, batch_size: int = 128, learning_rate: float = 1e-3):
    """Parameters after some epochs of Adam, and the share of the images that they classify right."""
    images, labels = map(jnp.asarray, batch)
    init_key, order_key = jax.random.split(key)
    params = jax.jit(MODEL.init)(init_key, images[:1])["params"]
    optimizer = optax.adam(learning_rate)
    steps = len(images) // batch_size

    @jax.jit
    def epoch(params, state, key):
        order = jax.random.permutation(key, len(images))[: steps * batch_size]

        def step(carry, index):
            params, state = carry
            gradient = jax.grad(loss_fn)(params, (images[index], labels[index]))
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), order.reshape(steps, batch_size))[0]

    state = optimizer.init(params)
    for key in jax.random.split(order_key, epochs):
        params, state = epoch(params, state, key)
    variables: Any = {"params": params}
    right = jnp.mean(jnp.argmax(jnp.asarray(MODEL.apply(variables, images)), -1) == labels)
    return params, float(right)


def problem(seed: int = 0) -> Problem:
    """The trained network as a problem; all 1,797 images are the data."""
    batch = load_digits()
    params, accuracy = train(jax.random.key(seed), batch)
    name = f"the digits network (64-256-256-10 MLP, {100 * accuracy:.1f} % right)"
    return Problem(loss_fn, params, tuple(map(jnp.asarray, batch)), name)
