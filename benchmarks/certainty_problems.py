"""Five operators with known spectra: Hessians of two trained networks and a transformer, and two matrices."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.audit.matrices import planted

SIZES = 30, 25, 8
"""Inputs, hidden units and classes of the networks: 983 parameters."""
TOKENS, LENGTH, WIDTH = 12, 8, 8
ORDER = 1000


def mlp(activation) -> np.ndarray:
    """A network with one hidden layer on a mixture of normal distributions that overlap, trained."""
    rng = np.random.default_rng(0)
    inputs, hidden, classes = SIZES
    labels = rng.integers(0, classes, 400)
    centres = rng.standard_normal((classes, inputs))
    data = jnp.asarray(centres[labels] + 1.5 * rng.standard_normal((400, inputs)))
    shapes = [(inputs, hidden), (hidden,), (hidden, classes), (classes,)]

    def loss(flat):
        w1, b1, w2, b2 = _split(flat, shapes)
        return _cross_entropy(activation(data @ w1 + b1) @ w2 + b2, jnp.asarray(labels))

    return _hessian(loss, 0.3 * rng.standard_normal(_count(shapes)), 600, 0.5)


def transformer() -> np.ndarray:
    """One block with two heads on sequences whose next token depends on the last two."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, TOKENS, (64, LENGTH + 1))
    for t in range(2, LENGTH + 1):
        tokens[:, t] = np.where(
            rng.random(64) < 0.8, (tokens[:, t - 1] + tokens[:, t - 2]) % TOKENS, tokens[:, t]
        )
    d = WIDTH
    shapes = [(TOKENS, d), (LENGTH, d), (d, 3 * d), (d, d), (d, 2 * d), (2 * d,), (2 * d, d), (d, TOKENS)]
    inputs, targets = jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:])
    mask = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))

    def normalized(x):
        return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)

    def loss(flat):
        embed, place, qkv, out, up, bias, down, head = _split(flat, shapes)
        x = embed[inputs] + place
        q, k, v = (y.reshape(*y.shape[:2], 2, d // 2) for y in jnp.split(normalized(x) @ qkv, 3, -1))
        scores = jnp.einsum("bihd,bjhd->bhij", q, k) / np.sqrt(d / 2)
        mixed = jnp.einsum("bhij,bjhd->bihd", jax.nn.softmax(jnp.where(mask, scores, -1e9)), v)
        x = x + mixed.reshape(x.shape) @ out
        x = x + jax.nn.gelu(normalized(x) @ up + bias) @ down
        return _cross_entropy((normalized(x) @ head).reshape(-1, TOKENS), targets.reshape(-1))

    return _hessian(loss, 0.3 * rng.standard_normal(_count(shapes)), 800, 0.3)


def power_law() -> np.ndarray:
    """λ_i = i^-1.5."""
    return planted(np.arange(1.0, ORDER + 1) ** -1.5)


def marchenko_pastur() -> np.ndarray:
    """Squared singular values of a random matrix of half the rank, and three spikes."""
    rng = np.random.default_rng(2)
    values = np.zeros(ORDER)
    values[: ORDER // 2] = (
        np.linalg.svd(rng.standard_normal((ORDER, ORDER // 2)) / np.sqrt(ORDER // 2), compute_uv=False) ** 2
    )
    values[:3] = 60, 45, 20
    return planted(values)


PROBLEMS: dict[str, Callable[[], np.ndarray]] = {
    "network, tanh": lambda: mlp(jnp.tanh),
    "network, relu": lambda: mlp(jax.nn.relu),
    "transformer": transformer,
    "power law, i^-1.5": power_law,
    "Marchenko-Pastur, three spikes": marchenko_pastur,
}


def _count(shapes) -> int:
    return sum(int(np.prod(shape)) for shape in shapes)


def _split(flat, shapes):
    edges = np.cumsum([0, *(int(np.prod(shape)) for shape in shapes)])
    return [flat[a:b].reshape(s) for a, b, s in zip(edges[:-1], edges[1:], shapes, strict=True)]


def _cross_entropy(logits, labels):
    return jnp.mean(jax.nn.logsumexp(logits, 1) - jnp.take_along_axis(logits, labels[:, None], 1)[:, 0])


def _hessian(loss, start: np.ndarray, steps: int, rate: float) -> np.ndarray:
    """Its Hessian in float64 after gradient descent with momentum."""

    def step(carry, _):
        flat, speed = carry
        speed = 0.9 * speed - 0.1 * rate * jax.grad(loss)(flat)
        return (flat + speed, speed), None

    first = jnp.asarray(start)
    (flat, _), _ = jax.jit(lambda x: jax.lax.scan(step, (x, jnp.zeros_like(x)), length=steps))(first)
    matrix = np.asarray(jax.jit(jax.hessian(loss))(flat))
    return (matrix + matrix.T) / 2
