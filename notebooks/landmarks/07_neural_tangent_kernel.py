# %% [markdown]
# # The spectrum of the neural tangent kernel
#
# For squared errors the Gauss-Newton matrix is $J^\top J / N$, and the neural tangent kernel ([Jacot, Gabriel
# and Hongler 2018](https://arxiv.org/abs/1806.07572)) is $J J^\top$: apart from zeros they have the same
# eigenvalues. So the spectrum of the kernel costs products with the Gauss-Newton matrix, and $J$ is never
# stored. Here it is, to compare.

# %%
import jax
import jax.numpy as jnp
import numpy as np

import spectra
from spectra.demos import digits

images, labels = jax.tree.map(lambda x: jnp.asarray(x[:60]), digits.load_digits())
keys = jax.random.split(jax.random.key(0))
params = {"in": jax.random.normal(keys[0], (64, 128)) / 8, "out": jax.random.normal(keys[1], (128, 10)) / 11}


def model_fn(params, images):
    return jnp.tanh(images @ params["in"]) @ params["out"]


def squared_error(outputs, targets):
    return 0.5 * jnp.mean(jnp.sum((outputs - targets) ** 2, -1))


op = spectra.GGNOperator(model_fn, squared_error, params, (images, jax.nn.one_hot(labels, 10)))
pairs = spectra.eigsh(op, 20, which="LA", key=jax.random.key(1))
jacobian = jax.tree.leaves(jax.jacobian(model_fn)(params, images))
jacobian = np.concatenate([np.asarray(x, float).reshape(600, -1) for x in jacobian], axis=1)
kernel = np.linalg.eigvalsh(jacobian @ jacobian.T)
error = np.abs(60 * pairs.values - kernel[-20:]).max() / kernel[-1]
print(f"20 eigenvalues of the kernel from {pairs.num_matvecs} products: wrong by {error:.0e} of the largest")
assert error < 1e-5
ax = spectra.plot_cdf(spectra.slq(op, key=jax.random.key(2), num_steps=40, num_probes=4))
