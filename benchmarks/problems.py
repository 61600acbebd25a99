"""Networks of the benchmarks: loss, parameters, batch. `torch_problems` has the same ones in PyTorch."""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.flatten_util import ravel_pytree

from spectra.demos import digits


def mlp():
    """The demo's network on all digits: 85,002 parameters."""
    batch = tuple(map(jnp.asarray, digits.load_digits()))
    params = jax.jit(digits.MODEL.init)(jax.random.key(0), batch[0][:1])["params"]
    return digits.loss_fn, params, batch


class Block(nn.Module):
    width: int
    heads: int

    @nn.compact
    def __call__(self, x):
        length = x.shape[1]
        mask = jnp.tril(jnp.ones((length, length), bool))
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=self.heads)(y, y, mask=mask)
        y = nn.LayerNorm()(x)
        return x + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(y)))


class Decoder(nn.Module):
    vocabulary: int = 64
    width: int = 128
    depth: int = 4
    heads: int = 4

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(self.vocabulary, self.width)(tokens)
        x = x + self.param("positions", nn.initializers.normal(0.02), (tokens.shape[1], self.width))
        for _ in range(self.depth):
            x = Block(self.width, self.heads)(x)
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))


DECODER = Decoder()


def decoder_loss(params, batch):
    logits = DECODER.apply({"params": params}, batch[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


def transformer():
    """Decoder-only transformer, 4 layers, width 128, batch 16 x 64 tokens: 0.82M parameters."""
    tokens = jax.random.randint(jax.random.key(1), (16, 65), 0, DECODER.vocabulary)
    params = jax.jit(DECODER.init)(jax.random.key(0), tokens[:1, :-1])["params"]
    return decoder_loss, params, tokens


LARGE = Decoder(vocabulary=256, width=512, depth=8, heads=8)


def large_loss(params, batch):
    logits = LARGE.apply({"params": params}, batch[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


def large():
    """The same with 8 layers of width 512, batch 4 x 64 tokens: 25.5M parameters."""
    tokens = jax.random.randint(jax.random.key(1), (4, 65), 0, LARGE.vocabulary)
    params = LARGE.init(jax.random.key(0), tokens[:, :-1])["params"]
    return large_loss, params, tokens


class CNN(nn.Module):
    """Two convolutions with smooth units and average pooling, and a linear head."""

    widths: tuple[int, ...] = (32, 64)

    @nn.compact
    def __call__(self, x):
        x = x.reshape(-1, 8, 8, 1)
        for width in self.widths:
            x = nn.avg_pool(nn.tanh(nn.Conv(width, (3, 3))(x)), (2, 2), (2, 2))
        return nn.Dense(10)(x.reshape(len(x), -1))


CONVOLUTIONS = CNN()


def cnn_loss(params, batch):
    images, labels = batch
    logits = CONVOLUTIONS.apply({"params": params}, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def cnn(examples: int = 512):
    """Small CNN on digits: 21,386 parameters."""
    batch = tuple(jnp.asarray(x[:examples]) for x in digits.load_digits())
    params = CONVOLUTIONS.init(jax.random.key(0), batch[0][:1])["params"]
    return cnn_loss, params, batch


def small_loss(params, batch):
    images, labels = batch
    hidden = jnp.tanh(images @ params["w1"] + params["b1"])
    logits = hidden @ params["w2"] + params["b2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def small():
    """MLP 64-16-10 on all digits, trained for 200 steps of Adam: 1,210 parameters, few enough for LAPACK."""
    batch = tuple(map(jnp.asarray, digits.load_digits()))
    keys = jax.random.split(jax.random.key(0))
    params = {
        "w1": jax.random.normal(keys[0], (64, 16)) / 8,
        "b1": jnp.zeros(16),
        "w2": jax.random.normal(keys[1], (16, 10)) / 4,
        "b2": jnp.zeros(10),
    }
    optimizer = optax.adam(1e-2)

    @jax.jit
    def train(params, batch):
        def step(carry, _):
            params, state = carry
            update, state = optimizer.update(jax.grad(small_loss)(params, batch), state, params)
            return (optax.apply_updates(params, update), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), length=200)[0][0]

    return small_loss, train(params, batch), batch


def get(name: str, examples: int | None = None):
    """(loss, parameters, batch) of the problem with this name, of its first `examples` only if given."""
    loss_fn, params, batch = globals()[name]()
    return loss_fn, params, batch if examples is None else jax.tree.map(lambda x: x[:examples], batch)


def vector(params, seed: int = 2):
    """Independent standard normal numbers in the shape of the parameters, drawn by one program."""
    flat, unravel = ravel_pytree(params)
    return unravel(jax.random.normal(jax.random.key(seed), flat.shape, flat.dtype))
