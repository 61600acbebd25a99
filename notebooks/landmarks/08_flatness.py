# %% [markdown]
# # Flatness is not a property of a function
#
# A two-layer linear network $W_2 W_1 x$ is the same function when $W_1$ is multiplied by $a$ and $W_2$
# divided by it. Its curvature is not the same: [Dinh et al. (2017)](https://arxiv.org/abs/1703.04933) make
# any minimum as sharp as they please. And one layer has two condition numbers, of which one is right: the
# Hessian with respect to $W_2$ is $I \otimes W_1 X X^\top W_1^\top$ with examples in the *columns* of $X$.
# With examples in rows and the formula unchanged, nothing complains, and the number is another.

# %%
import jax
import jax.numpy as jnp
import numpy as np

import spectra

jax.config.update("jax_enable_x64", True)
rng = np.random.default_rng(0)
left, right = (np.linalg.qr(rng.standard_normal((5, 5)))[0] for _ in range(2))
X = left @ np.diag(np.linspace(1.0, 10.0, 5)) @ right
W1, target = rng.standard_normal((5, 5)), rng.standard_normal((5, 5))
W2 = target @ np.linalg.inv(W1)  # a minimum: the loss is zero


def loss_fn(params, x):
    return 0.5 * jnp.sum((target @ x - params["W2"] @ params["W1"] @ x) ** 2)


sharpness = {}
for a in (1.0, 10.0):
    op = spectra.HessianOperator(loss_fn, {"W1": a * W1, "W2": W2 / a}, X)
    sharpness[a] = spectra.eigsh(op, 1, which="LA", key=jax.random.key(0)).values[0]
    kappa = spectra.condition_number(op.block("W2"), key=jax.random.key(1)).value
    print(f"a = {a:g}: loss {op.loss():.1e}, λ₁ {sharpness[a]:.4g}, condition number of W2 {kappa:.4g}")
exact, wrong = (np.linalg.cond(W1 @ gram @ W1.T) for gram in (X @ X.T, X.T @ X))
print(f"closed form {exact:.4g}; with rows for columns {wrong:.4g}")
assert sharpness[10.0] > 10 * sharpness[1.0], "as sharp as one pleases"
assert abs(kappa / exact - 1) < 1e-8, "the condition number of a block does not change with a"
assert abs(wrong / exact - 1) > 0.2, "and is not that of the transposed formula"
