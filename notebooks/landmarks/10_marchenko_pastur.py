# %% [markdown]
# # Low rank plus a bulk: is the bulk Marchenko and Pastur's?
#
# Papyan's test matrix is three large eigenvalues plus $Z Z^\top / p$ with independent entries of $Z$: its
# bulk ends where [Marchenko and Pastur's
# law](https://en.wikipedia.org/wiki/Marchenko%E2%80%93Pastur_distribution) does, at $(1 + \sqrt\gamma)^2$,
# and a spike $\ell$ is found at $\ell + 1 + \gamma / \ell$ plus small terms. The spectrum of a trained
# network looks alike, a few outliers and a bulk. But the law with the mean and the variance of its bulk ends
# long before that bulk does.

# %%
import jax
import jax.numpy as jnp
import numpy as np

import spectra
from spectra.demos import digits

edge = lambda mean, variance: mean * (1 + np.sqrt(variance) / mean) ** 2
spikes = jnp.zeros(1000).at[:3].set(jnp.array([12.0, 9.0, 6.0]))
z = jax.random.normal(jax.random.key(0), (1000, 2000)) / 2000**0.5
wishart = spectra.FunctionOperator(lambda v: spikes * v + z @ (z.T @ v), spikes)
top = spectra.eigsh(wishart, 4, which="LA", key=jax.random.key(1)).values
print(f"Papyan's matrix: after three outliers {top[0]:.3f}; the law ends at {edge(1, 0.5):.3f}")
assert abs(top[0] / edge(1, 0.5) - 1) < 0.02, "the bulk ends where the law does"

network = digits.problem()
op = spectra.HessianOperator(network.loss_fn, network.params, tuple(x[:500] for x in network.data))
outliers = spectra.eigsh(op, 9, which="LA", key=jax.random.key(2), tol=1e-4)
q = spectra.slq(op, key=jax.random.key(3), num_steps=60, num_probes=4, deflate=outliers)
mean, square = q.bulk.mean(np.asarray), q.bulk.mean(np.square)
beyond = spectra.count_above(q.bulk, edge(mean, square - mean**2)).interval()
print(
    f"network, without 9 outliers: {beyond.lower:.0f} to {beyond.upper:.0f} eigenvalues beyond the law's end"
)
assert beyond.lower > 5
ax = spectra.plot_density(q)
