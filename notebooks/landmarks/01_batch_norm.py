# %% [markdown]
# # Batch normalisation removes the outliers
#
# [Ghorbani, Krishnan and Xiao (2019)](https://arxiv.org/abs/1901.10159) saw the Hessian of a network without
# batch normalisation keep a few eigenvalues far from all others, and the same network with it have none so
# far. Here with a small network on handwritten digits, trained by gradient descent with the same step. The
# mean of a normalised batch couples its examples: the loss is one function of the whole batch, and so is its
# Hessian.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax

import spectra
from spectra.demos import digits

batch = jax.tree.map(lambda x: jnp.asarray(x[:1000]), digits.load_digits())
widths = (64, 64, 64, 64, 10)
start = [jax.random.normal(jax.random.key(i), widths[i : i + 2]) / 32**0.5 for i in range(4)]


def loss_fn(params, batch, normalised):
    x = batch[0]
    for i, weight in enumerate(params):
        x = (jax.nn.softplus(x) if i else x) @ weight
        x = (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5) if normalised and i < 3 else x
    return optax.softmax_cross_entropy_with_integer_labels(x, batch[1]).mean()


found, far = {}, {}
for name in ("without", "with"):
    loss = lambda p, batch, name=name: loss_fn(p, batch, name == "with")
    step = lambda p, _, f=loss: (jax.tree.map(lambda a, g: a - 0.1 * g, p, jax.grad(f)(p, batch)), None)
    op = spectra.HessianOperator(loss, jax.lax.scan(step, start, length=300)[0], batch)
    found[name] = spectra.slq(op, key=jax.random.key(1), num_steps=60, num_probes=2)
    far[name] = np.divide(*spectra.eigsh(op, 10, which="LA", key=jax.random.key(2), tol=1e-3).values[[-1, 0]])
print("largest over tenth eigenvalue:", ", ".join(f"{ratio:.1f} {name}" for name, ratio in far.items()))
assert far["without"] > 3 * far["with"]
ax = spectra.plot_comparison(found)
