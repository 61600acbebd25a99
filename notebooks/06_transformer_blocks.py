# %% [markdown]
# # 6. Transformer blocks, and why Adam
#
# On large transformers, it is reported, gradient descent lags far behind Adam, on CNNs much less. One explanation looks
# at the Hessian block by block: the blocks of a transformer have very different spectra, so no single step size suits all
# of them, and Adam gives each its own ([Zhang et al. 2024](https://arxiv.org/abs/2402.16788)). That was seen on large
# networks. This notebook measures all three parts on small ones, and reports what it finds: who wins, how different the
# blocks are, and what Adam's preconditioner makes of the Hessian.

# %%
import argparse
import inspect

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn

import spectra
from spectra.demos import digits
from spectra.report.plots.style import ACCENT, COLOR

plt.rcParams.update({"font.size": 7, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## A transformer on text, a CNN on images
#
# One layer of attention on the characters of a module of Python's standard library, and a CNN (its convolutions written as
# products with patches, see notebook 5) on handwritten digits. Both take the mean cross-entropy.


# %%
class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        length = tokens.shape[1]
        x = nn.Embed(96, 32, name="embedding")(tokens)
        x = x + self.param("positions", nn.initializers.normal(0.02), (length, 32))
        y = nn.LayerNorm()(x)
        query, key, value = (nn.Dense(32, use_bias=False, name=name)(y) for name in ("query", "key", "value"))
        scores = jnp.einsum("btc,bsc->bts", query, key) / np.sqrt(32)
        scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -jnp.inf)
        x = x + nn.Dense(32, use_bias=False, name="out")(jax.nn.softmax(scores) @ value)
        y = nn.gelu(nn.Dense(128, name="mlp_in")(nn.LayerNorm()(x)))
        x = x + nn.Dense(32, name="mlp_out")(y)
        return nn.Dense(96, name="head")(nn.LayerNorm()(x))


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x.reshape(-1, 8, 8, 1)
        for width, name in ((16, "conv1"), (32, "conv2")):
            x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
            rows = [slice(i, i + 2 * ((x.shape[1] - 1) // 2), 2) for i in range(3)]
            x = jnp.concatenate([x[:, i, j] for i in rows for j in rows], axis=-1)
            x = nn.gelu(nn.Dense(width, name=name)(x))
        x = nn.gelu(nn.Dense(64, name="hidden")(x.reshape(len(x), -1)))
        return nn.Dense(10, name="head")(x)


def characters():
    text = inspect.getsource(argparse).encode("ascii", "ignore")
    codes = np.clip(np.frombuffer(text, np.uint8).astype(np.int32) - 31, 0, 95)
    rows = codes[: len(codes) // 33 * 33].reshape(-1, 33)
    return jnp.asarray(rows[:, :-1]), jnp.asarray(rows[:, 1:])


DATA = {"transformer": characters(), "CNN": tuple(map(jnp.asarray, digits.load_digits()))}
MODULES = {"transformer": Transformer(), "CNN": CNN()}


class Loss:
    def __init__(self, module):
        self.module = module

    def __call__(self, params, batch):
        logits = self.module.apply({"params": params}, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


LOSSES = {name: Loss(module) for name, module in MODULES.items()}
START = {
    name: module.init(jax.random.key(0), DATA[name][0][:1])["params"] for name, module in MODULES.items()
}
for name, params in START.items():
    print(
        f"{name}: {sum(x.size for x in jax.tree.leaves(params)):,} parameters, {len(DATA[name][0]):,} examples"
    )

# %% [markdown]
# ## Who wins
#
# The same number of steps and batches for both, and for each optimizer the best of a grid of rates. Gradient descent has
# momentum.


# %%
def train(name, make, rates, steps=250, size=32):
    """Parameters, optimizer state, and the loss of every step, for each rate: one program for all."""
    data = DATA[name]

    @jax.jit
    @jax.vmap
    def run(rate):
        optimizer = make(rate)

        def step(carry, key):
            params, state = carry
            index = jax.random.randint(key, (size,), 0, len(data[0]))
            loss, gradient = jax.value_and_grad(LOSSES[name])(params, (data[0][index], data[1][index]))
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), loss

        start = START[name], optimizer.init(START[name])
        return jax.lax.scan(step, start, jax.random.split(jax.random.key(1), steps))

    found = run(jnp.asarray(rates))
    return [jax.tree.map(lambda x, i=i: x[i], found) for i in range(len(rates))]


RATES = {"gradient descent": (0.1, 0.3), "Adam": (3e-3, 1e-2)}
MAKE = {"gradient descent": lambda rate: optax.sgd(rate, momentum=0.9), "Adam": optax.adam}
best = {}
for name in MODULES:
    for kind, rates in RATES.items():
        runs = train(name, MAKE[kind], rates)
        final = [np.mean(losses[-30:]) for _, losses in runs]
        first = int(np.nanargmin(final))
        best[name, kind] = rates[first], *runs[first][0], runs[first][1]
        print(
            f"{name}, {kind}:",
            ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in zip(rates, final, strict=True)),
        )

_, axes = plt.subplots(1, 2, figsize=(5.6, 2.2), dpi=180, layout="constrained")
for ax, name in zip(axes, MODULES, strict=True):
    for kind, color in (("gradient descent", ACCENT), ("Adam", COLOR)):
        losses = best[name, kind][-1]
        smooth = np.convolve(losses, np.ones(15) / 15, "valid")
        ax.semilogy(smooth, color=color, linewidth=1, label=f"{kind}, rate {best[name, kind][0]:g}")
    ax.set(xlabel="step", ylabel="loss, mean over 15 steps", title=name)
    ax.legend(frameon=False, fontsize=6)

# %% [markdown]
# ## How different are the blocks?
#
# One spectrum for each weight matrix at the start of training, all on the same axes.


# %%
def is_weight(path):
    return path.endswith(("kernel", "embedding"))


BATCH = {name: jax.tree.map(lambda x: x[:32], data) for name, data in DATA.items()}
quadratures = {}
for name in MODULES:
    op = spectra.HessianOperator(LOSSES[name], START[name], BATCH[name]).block(is_weight)
    quadratures[name] = spectra.slq(op.blocks(), key=jax.random.key(2), num_steps=40, num_probes=1)
axes = spectra.plot_blocks(quadratures["transformer"])

# %%
spread = {}
for name, found in quadratures.items():
    norms = {path: max(map(abs, q.range)) for path, q in found.items()}
    distances = spectra.spectral_distances(found, metric="wasserstein")
    spread[name] = distances[~np.eye(len(found), dtype=bool)].mean()
    print(f"{name}: {len(found)} blocks; mean Wasserstein distance of their spectra {spread[name]:.3f}")
    for end in (min(norms, key=norms.get), max(norms, key=norms.get)):
        print(f"  largest |eigenvalue| of {end}: {norms[end]:.3g}")

gap = {
    name: np.mean(best[name, "gradient descent"][-1][-30:]) / np.mean(best[name, "Adam"][-1][-30:])
    for name in MODULES
}
print("final loss of gradient descent over Adam's:", ", ".join(f"{name} {g:.2f}" for name, g in gap.items()))
assert min(gap.values()) > 1, "Adam wins on both"
assert spread["transformer"] < spread["CNN"], "the blocks of this transformer are the more alike ones"

# %% [markdown]
# Adam wins on both networks. But the explanation does not carry over to networks of this size: by this measure the blocks of
# the small transformer are *more* alike than those of the small CNN. One network is no law: `benchmarks/blocks.py` in the
# repository finds the order of the paper, for two layers of width 64 against a CNN with ReLU and pooling. Measure yours.
#
# ## What Adam's preconditioner does
#
# Adam divides by the root of the mean squared gradient, a diagonal $P$. If that helps, then because $P^{-1/2} H P^{-1/2}$ is
# easier than $H$: closer to a multiple of the identity, by the measure $c = \operatorname{tr}H / (\sqrt n \|H\|_F)$ of
# notebook 5, and with a smaller ratio of the largest eigenvalue to a typical one. Both at the parameters where Adam arrived:

# %%
_, params, state, _ = best["transformer", "Adam"]
plain = spectra.HessianOperator(LOSSES["transformer"], params, BATCH["transformer"])
operators = {
    "H": plain,
    "P^-1/2 H P^-1/2": spectra.PreconditionedOperator(plain, state, rule="adam", b2=0.999),
}
measured = {}
for name, op in operators.items():
    q = spectra.slq(op, key=jax.random.key(3), num_steps=60, num_probes=4)
    typical = np.sqrt(q.mean(np.square))
    measured[name] = q.mean(lambda x: x) / typical, q.range[1] / typical
    print(
        f"{name}: c = {measured[name][0]:.3f}, largest eigenvalue over root mean square {measured[name][1]:.0f}"
    )
better = [
    measured["P^-1/2 H P^-1/2"][0] > measured["H"][0],
    measured["P^-1/2 H P^-1/2"][1] < measured["H"][1],
]
print("easier by c:", bool(better[0]), "- easier by the ratio:", bool(better[1]))

# %% [markdown]
# For this network the preconditioned matrix is the easier one by both measures, though not by much.
#
# ## What to try next
#
# * Depth 2 and 4, a larger vocabulary: when do the blocks of the transformer become more different than those of the CNN?
# * `spectral_distances(found, metric="jensen-shannon")`: does the order depend on the measure?
# * The blocks of the preconditioned operator, `PreconditionedOperator(op, state, rule="adam", b2=0.999).blocks()`, side by side.
# * The same for your network: `op.blocks(by="layer")`, `spectra.plot_blocks`, three lines.
