# %% [markdown]
# # Whose Hessian is nearer to a multiple of the identity?
#
# If $H$ were $c I$, gradient descent would arrive in one step. How near it is: $\operatorname{tr} H / (\sqrt
# n \|H\|_F)$, the cosine of the angle between $H$ and the identity, one for $cI$ and $1/\sqrt n$ for rank
# one. A fully connected network and a convolutional one of about as many parameters, trained alike on digits.
# Trace and norm come from the same products.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax

import spectra
from spectra.demos import digits

images, labels = map(jnp.asarray, digits.load_digits())
square = images.reshape(-1, 8, 8)  # a convolution of 4 x 4 with stride 2 is a product with patches
patches = jnp.stack([square[:, i : i + 5 : 2, j : j + 5 : 2] for i in range(4) for j in range(4)], axis=-1)
inputs = {"fully connected": images[:, None], "convolutional": patches.reshape(-1, 9, 16)}
shapes = {"fully connected": ((64, 32), (32, 30), (30, 10)), "convolutional": ((16, 16), (144, 20), (20, 10))}


def loss_fn(params, batch):
    hidden = jnp.tanh(batch[0] @ params[0]).reshape(len(batch[0]), -1)
    logits = jnp.tanh(hidden @ params[1]) @ params[2]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


cosine = {}
for name in inputs:
    batch, keys = (inputs[name], labels), jax.random.split(jax.random.key(0), 3)
    start = [jax.random.normal(key, s) / s[0] ** 0.5 for key, s in zip(keys, shapes[name], strict=True)]
    step = lambda p, _, b=batch: (jax.tree.map(lambda a, g: a - 0.3 * g, p, jax.grad(loss_fn)(p, b)), None)
    op = spectra.HessianOperator(loss_fn, jax.lax.scan(step, start, length=300)[0], batch)
    q = spectra.slq(op, key=jax.random.key(1), num_steps=20, num_probes=16)
    cosine[name] = q.mean(lambda x: x) / np.sqrt(q.mean(np.square))
    print(f"{name}: {op.size:,} parameters, cosine {cosine[name]:.3f}; of rank one: {op.size**-0.5:.3f}")
assert 1.1 * cosine["fully connected"] < cosine["convolutional"] < 0.3, "neither is anywhere near"
