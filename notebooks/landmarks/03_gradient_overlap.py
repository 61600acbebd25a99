# %% [markdown]
# # The gradient lies in a tiny subspace
#
# [Gur-Ari, Roberts and Dyer (2018)](https://arxiv.org/abs/1812.04754): after a short while most of the
# gradient lies in the span of as many leading eigenvectors of the Hessian as there are classes. With steps as
# long as those of the paper, here, too; a direction without preference would have a share of $10/n$. With
# short steps it is the other way round: those directions are descended first, and then the gradient has left
# them.

# %%
import jax
import jax.numpy as jnp
import optax

import spectra
from spectra.demos import digits

batch = jax.tree.map(jnp.asarray, digits.load_digits())
keys = jax.random.split(jax.random.key(0))
start = {"in": jax.random.normal(keys[0], (64, 64)) / 4, "out": jax.random.normal(keys[1], (64, 10)) / 8}


def loss_fn(params, batch):
    logits = jnp.tanh(batch[0] @ params["in"]) @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def train(rate, size, steps=600):
    def step(params, key):
        index = jax.random.randint(key, (size,), 0, len(batch[0]))
        gradient = jax.grad(loss_fn)(params, (batch[0][index], batch[1][index]))
        return jax.tree.map(lambda a, g: a - rate * g, params, gradient), None

    return jax.lax.scan(step, start, jax.random.split(jax.random.key(1), steps))[0]


found = {}
for name, rate, size in (("long steps, small batches", 0.5, 32), ("short steps, large batches", 0.05, 1000)):
    op = spectra.HessianOperator(loss_fn, train(rate, size), batch)
    pairs = spectra.eigsh(op, 10, which="LA", key=jax.random.key(2), tol=1e-3)
    found[name] = spectra.gradient_overlap(op, pairs)
    print(f"{name}: {100 * found[name].total:.1f} % of the gradient in {10 / op.size:.2%} of the directions")
long, short = found.values()
assert long.total > 0.5 and short.total < 0.5 * long.total
