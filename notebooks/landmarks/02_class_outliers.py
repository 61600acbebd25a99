# %% [markdown]
# # As many outliers as classes, but one
#
# The Hessian of a classifier with $C$ classes has about $C - 1$ eigenvalues that stand out. [Papyan
# (2020)](https://arxiv.org/abs/2008.11865) traces them to the means of the classes: the Gauss-Newton matrix
# is a sum of four matrices, the class means, what lies across classes, what lies within them, and the terms
# of the examples' own classes. Along each of the nine leading eigenvectors more than two thirds of the
# curvature are that of the first two.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax

import spectra
from spectra.demos import digits

batch = jax.tree.map(lambda x: jnp.asarray(x[:1000]), digits.load_digits())
start = [jax.random.normal(jax.random.key(i), (64, size)) / 6 for i, size in enumerate((64, 10))]


def model_fn(params, images):
    return jnp.tanh(images @ params[0]) @ params[1]


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def step(params, _):
    gradient = jax.grad(lambda p: cross_entropy(model_fn(p, batch[0]), batch[1]))(params)
    return jax.tree.map(lambda a, g: a - 0.3 * g, params, gradient), None


params = jax.lax.scan(step, start, length=400)[0]
ggn = spectra.GGNOperator(model_fn, cross_entropy, params, batch)
split = spectra.class_split(ggn, key=jax.random.key(1))
split

# %%
pairs = spectra.eigsh(ggn, 9, which="LA", key=jax.random.key(2), tol=1e-4)
parts, vectors = spectra.class_operators(ggn), pairs.matrix()
between = np.sum(vectors * ((parts["class_means"] + parts["cross"]) @ vectors), axis=0) / pairs.values
print(f"share of the class means and of what lies across classes: {between.min():.2f} or more")
assert between.min() > 2 / 3
assert split.within[0] < split.whole[8], "nothing within classes is as large as the ninth outlier"
