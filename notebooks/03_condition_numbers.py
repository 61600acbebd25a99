# %% [markdown]
# # 3. Which of my two condition numbers is right?
#
# You have the condition number of a layer's Hessian twice: from automatic differentiation and from a formula, and
# they differ by orders of magnitude. This notebook takes the smallest network whose Hessian is known in closed form,
# finds out who is right, shows the three mistakes that make the difference, and then asks what the number is good
# for: how fast gradient descent goes.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import spectra
from spectra.report.plots.style import ACCENT, COLOR

jax.config.update("jax_enable_x64", True)
plt.rcParams.update({"font.size": 7, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## A problem with a known answer
#
# A two-layer linear network, $L = \frac12\|Y - W_2 W_1 X\|^2$, of width 100, on five examples of dimension five.
# Examples are *columns* of $X$, whose singular values run from 1 to 10, so $XX^\top$ has the condition number 100. With
# respect to $W_2$ alone the Hessian depends neither on $Y$ nor on $W_2$:
#
# $$H = (W_1 X X^\top W_1^\top) \otimes I_5 \quad\text{(columns of } W_2 \text{ stacked; JAX stacks rows and has } I_5 \otimes \cdot)$$

# %%
rng = np.random.default_rng(0)


def rotation(n):
    return np.linalg.qr(rng.standard_normal((n, n)))[0]


X = rotation(5) @ np.diag(np.linspace(1.0, 10.0, 5)) @ rotation(5)
Y = rng.standard_normal((5, 5))
batch = (jnp.asarray(X), jnp.asarray(Y))
params = {
    "W1": jnp.asarray(rng.standard_normal((100, 5)) / 10),
    "W2": jnp.asarray(rng.standard_normal((5, 100)) / 10),
}


def loss_fn(params, batch):
    x, y = batch
    return 0.5 * jnp.sum((y - params["W2"] @ params["W1"] @ x) ** 2)


gradient = jax.jit(jax.grad(loss_fn))
for _ in range(200):  # some training: both layers move
    params = jax.tree.map(lambda p, g: p - 1e-3 * g, params, gradient(params, batch))

op = spectra.HessianOperator(loss_fn, params, batch)
layer = op.block("W2")
H = np.asarray(layer.as_matrix())
W1 = np.asarray(params["W1"])
closed_form = np.kron(np.eye(5), W1 @ X @ X.T @ W1.T)
print(f"loss {loss_fn(params, batch):.3g}")
print(
    f"|H - closed form| / |closed form| = {np.linalg.norm(H - closed_form) / np.linalg.norm(closed_form):.1e}"
)
assert np.linalg.norm(H - closed_form) < 1e-12 * np.linalg.norm(closed_form)

# %% [markdown]
# Both routes give the same matrix to rounding. So automatic differentiation is right, and so is the formula. And the
# number?

# %%
result = spectra.condition_number(layer, key=jax.random.key(0))
result

# %%
nonzero = np.linalg.eigvalsh(W1 @ X @ X.T @ W1.T)[-5:]
naive = np.linalg.cond(H)
print(f"np.linalg.cond:          {naive:.1e}")
print(f"over the nonzero range:  {result.effective:.6g}, closed form {nonzero[-1] / nonzero[0]:.6g}")
assert naive > 1e12 and result.value == np.inf
assert result.rank == 25 and result.nullity == 475
assert abs(result.effective / (nonzero[-1] / nonzero[0]) - 1) < 1e-9

# %% [markdown]
# $W_2$ has 500 entries, but five examples see only a 5-dimensional part of the width, once for each of five outputs: the
# rank is 25 and the true condition number is infinite. The finite number of `np.linalg.cond` is the largest eigenvalue
# over rounding noise. The ratio over the *numerical range* is what both routes agree on. Without forming a matrix:

# %%
matrix_free = spectra.condition_number(layer, key=jax.random.key(0), method="krylov")
low, _, high = matrix_free.nullity_interval
print(
    f"{matrix_free.num_matvecs} products: effective {matrix_free.effective:.6g}, nullity in [{low:.0f}, {high:.0f}]"
)
assert matrix_free.value == np.inf and low <= 475 <= high
assert abs(matrix_free.effective / result.effective - 1) < 1e-9

# %% [markdown]
# ## Three mistakes
#
# **One: the cast.** In float32 the 475 zeros come out as noise near $6\cdot10^{-8}\sqrt n\,\|H\|$, and dividing by the
# smallest of them gives an arbitrary large number.

# %%
single, data = jax.tree.map(lambda x: x.astype(jnp.float32), (params, batch))
low = spectra.HessianOperator(loss_fn, single, data).block("W2")
low_matrix = np.asarray(low.as_matrix(), np.float64)
low_result = spectra.condition_number(low, key=jax.random.key(0))

fig, ax = plt.subplots(figsize=(3.4, 2.4), dpi=180, layout="constrained")
for matrix, found, color, name in (
    (H, result, COLOR, "float64"),
    (low_matrix, low_result, ACCENT, "float32"),
):
    sizes = np.sort(np.abs(np.linalg.eigvalsh(matrix)))[::-1]
    ax.semilogy(np.arange(1, 501), np.maximum(sizes, 1e-19), ".", markersize=2, color=color, label=name)
    ax.axhline(found.noise_floor, color=color, linewidth=0.7, linestyle="--")
ax.axvspan(0, 25.5, color="0.92", zorder=0)
ax.annotate("rank 25", (32, sizes[0]), fontsize=6, va="center")
ax.set(xlabel="index", ylabel="|eigenvalue|; dashed: noise floor", xlim=(0, 500))
_ = ax.legend(frameon=False, markerscale=3, loc="upper right")
low_naive = np.linalg.cond(low_matrix)
print(f"np.linalg.cond in float32: {low_naive:.1e}, in float64: {naive:.1e}")
print(f"condition_number: effective {low_result.effective:.4g} and {result.effective:.4g}")
assert low_naive < 1e-3 * naive, "the naive numbers differ by orders of magnitude"
assert abs(low_result.effective / result.effective - 1) < 1e-2

# %% [markdown]
# The two naive numbers differ by orders of magnitude though the matrix is the same; the effective one survives the
# cast. `noise_floor` says which eigenvalues are real.
#
# **Two: examples in rows, formula for columns.** Code has examples in rows, and then the Hessian is
# $W_1 X^\top X W_1^\top$. For a square $X$ nothing complains.
#
# **Three: one entry of the gradient tuple.** A loop over backward passes that keeps entry `[0]` while looping over the
# gradient of $W_2$ gets the off-diagonal block $\partial^2 L/\partial W_2\partial W_1$. It may even be square; it is
# never symmetric.

# %%
rows = np.kron(np.eye(5), W1 @ X.T @ X @ W1.T)
eigenvalues = [np.linalg.eigvalsh(m)[-25:] for m in (closed_form, rows)]
print("effective condition number, columns and rows:", *(f"{e[-1] / e[0]:.4g}" for e in eigenvalues))
assert np.linalg.norm(rows - H) > 0.1 * np.linalg.norm(H)

off = np.asarray(jax.hessian(loss_fn)(params, batch)["W2"]["W1"]).reshape(500, 500)
print(f"asymmetry of the off-diagonal block: {np.linalg.norm(off - off.T) / np.linalg.norm(off):.2f}")
try:
    wrong = spectra.FunctionOperator(lambda v: jnp.asarray(off) @ v, jnp.zeros(500))
    spectra.condition_number(wrong, key=jax.random.key(0), method="krylov")
    raise AssertionError("an operator that is not symmetric must be refused")
except spectra.NotSymmetricError as error:
    print("NotSymmetricError:", str(error)[:120], "...")

# %% [markdown]
# ## What the number is good for
#
# Gradient descent on $W_2$ with the best constant step $2/(\lambda_{\max}+\lambda_{\min})$ shrinks the error by
# $(\kappa-1)/(\kappa+1)$ a step, where $\kappa$ is the *effective* condition number: the null space does not move. If
# $\kappa$ is right, it predicts the measured rate.

# %%
kappa = result.effective
step = 2 / (result.largest + result.smallest_nonzero)


def descend(w2, _):
    value, slope = jax.value_and_grad(lambda w: loss_fn({**params, "W2": w}, batch))(w2)
    return w2 - step * slope, value


losses = np.asarray(jax.lax.scan(descend, jnp.asarray(rng.standard_normal((5, 100))), None, length=500)[1])
predicted = ((kappa - 1) / (kappa + 1)) ** 2  # the loss is the square of the error
late = np.arange(100, 400)
measured = np.exp(np.polyfit(late, np.log(losses[late]), 1)[0])
print(f"factor per step: predicted {predicted:.6f}, measured {measured:.6f}")
assert abs(np.log(measured) / np.log(predicted) - 1) < 1e-2

fig, ax = plt.subplots(figsize=(3.4, 2.2), dpi=180, layout="constrained")
ax.semilogy(losses, color=COLOR, linewidth=1, label="gradient descent")
line = losses[100] * predicted ** (np.arange(500) - 100)
ax.semilogy(line, color=ACCENT, linewidth=0.9, linestyle="--", label="predicted from κ")
ax.set(xlabel="step", ylabel="loss")
_ = ax.legend(frameon=False)

# %% [markdown]
# ## Every layer at once
#
# The same for each block of a network, and for the damped matrix $H + \delta I$ that a second-order method inverts.

# %%
table = spectra.condition_number(op, key=jax.random.key(0), per_layer=True)
table

# %%
damped = spectra.condition_number(layer, key=jax.random.key(0), shift=0.1)
print(f"H + 0.1 I: condition number {damped.value:.5g}")
assert abs(damped.value / ((result.largest + 0.1) / 0.1) - 1) < 1e-9
assert table["W2"].rank == 25

# %% [markdown]
# ## What to try next
#
# * Ten examples instead of five, and ten inputs: what are rank and nullity of the block then?
# * `W1` in place of `W2`: which closed form has its block?
# * A `tanh` between the layers: the null space is gone, and so is the closed form; `is_lower_bound` says when a
#   number is only a bound.
# * The page [Which of my two condition numbers is right?](../docs/condition-numbers.md) has the same as text.
