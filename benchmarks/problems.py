"""Networks of the benchmarks: loss, parameters, batch."""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from spectra.demos import digits


def mlp():
    """The demo's network on all digits: 85,002 parameters."""
    batch = tuple(map(jnp.asarray, digits.load_digits()))
    params = digits.MODEL.init(jax.random.key(0), batch[0][:1])["params"]
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
    params = DECODER.init(jax.random.key(0), tokens[:, :-1])["params"]
    return decoder_loss, params, tokens
