# %% [markdown]
# # A mini-batch is sharper than the data
#
# The largest eigenvalue is a convex function of the matrix, so that on average a batch has a larger one than
# all data together; for a small batch by a factor. [Tatzel, Ekman and Hennig
# (2024)](https://arxiv.org/abs/2410.14325) show that curvature along the leading eigenvector of one batch is,
# on another, far smaller. `population` makes an interval of the two.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax

import spectra
from spectra.demos import digits

data = jax.tree.map(jnp.asarray, digits.load_digits())
draw = jax.random.normal
start = {"in": draw(jax.random.key(0), (64, 32)) / 4, "out": draw(jax.random.key(1), (32, 10)) / 6}


def loss_fn(params, batch):
    logits = jnp.tanh(batch[0] @ params["in"]) @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


step = lambda p, _: (jax.tree.map(lambda a, g: a - 0.5 * g, p, jax.grad(loss_fn)(p, data)), None)
params = jax.lax.scan(step, start, length=200)[0]
hessian = lambda part: spectra.HessianOperator(loss_fn, params, part)
top = lambda part: spectra.eigsh(hessian(part), 1, key=jax.random.key(1), tol=1e-3, verify=False).values[0]
order = np.random.default_rng(0).permutation(1797)
batches = [jax.tree.map(lambda x, i=i: x[order[32 * i : 32 * i + 32]], data) for i in range(20)]
small, whole = np.mean([top(part) for part in batches]), top(data)
found = spectra.population(hessian(data), key=jax.random.key(2), num_examples=640, of="data")
print(f"λ₁ of all data {whole:.3f}; of batches of 32 on average {small / whole:.2f} times as large")
print(found)
assert small > 1.2 * whole and found.lower[0] <= whole <= found.upper[0]
