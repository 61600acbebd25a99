# %% [markdown]
# # One step size for all blocks of a transformer?
#
# [Zhang et al. (2024)](https://arxiv.org/abs/2402.16788) explain why transformers need Adam: the Hessian's
# blocks have very different spectra, so that no single step size suits all. Here for one layer of attention
# on the characters of a page of NumPy's documentation, beside a fully connected network on digits: the
# largest eigenvalue of each weight's own block, at the start. The stable step of plain gradient descent for a
# block is two over that eigenvalue.

# %%
import jax
import jax.numpy as jnp

import spectra
from spectra.demos import digits

text = jnp.frombuffer(jnp.einsum.__doc__[:2112].encode(), jnp.uint8).reshape(64, 33) % 96
draw = lambda i, a, b: jax.random.normal(jax.random.key(i), (a, b)) / a**0.5
decoder = {name: draw(i, 32, 32) for i, name in enumerate(("query", "key", "value", "out", "up", "down"))}
decoder |= {"embedding": 96**0.5 * draw(6, 96, 32), "head": draw(7, 32, 96)}
network = {"first": draw(0, 64, 64), "second": draw(1, 64, 64), "head": draw(2, 64, 10)}
loss = lambda logits, labels: -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1).mean()


def decoder_loss(p, tokens):
    x = p["embedding"][tokens[:, :-1]]
    q, k, v = (jax.nn.standardize(x)[:, :, None] @ p[name] for name in ("query", "key", "value"))
    x = x + jax.nn.dot_product_attention(q, k, v, is_causal=True)[:, :, 0] @ p["out"]
    x = x + jax.nn.gelu(jax.nn.standardize(x) @ p["up"]) @ p["down"]
    return loss(jax.nn.standardize(x) @ p["head"], tokens[:, 1:])


def network_loss(p, batch):
    return loss(jnp.tanh(jnp.tanh(batch[0] @ p["first"]) @ p["second"]) @ p["head"], batch[1])


spread = []
for problem in ((decoder_loss, decoder, text), (network_loss, network, digits.load_digits())):
    table = spectra.summary(spectra.HessianOperator(*problem), key=jax.random.key(9), by="leaf", num_steps=20)
    largest = [row["largest"] for row in table.records()]
    spread.append(max(largest) / min(largest))
    print(f"Their largest eigenvalues differ by a factor of {spread[-1]:.1f}:\n{table}\n")
assert spread[0] > 2 * spread[1]
