# %% [markdown]
# # 2. How many steps, how many probes, and how sure am I?
#
# Stochastic Lanczos quadrature has two knobs. *Steps* $m$ set how sharply each random probe sees the spectrum;
# *probes* $k$ set how well a few random vectors speak for all $n$ directions. They fix different errors. Here the
# network is so small that the exact spectrum is known, and every promise can be checked against it.

# %%
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import spectra
from spectra.demos import digits
from spectra.report.plots.style import ACCENT, COLOR

plt.rcParams.update({"font.size": 7, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## A network with a known spectrum
#
# 64-16-10 on the digits: 1,210 parameters. `dense_hessian` gives the whole matrix, LAPACK its eigenvalues.

# %%
images, labels = map(jnp.asarray, digits.load_digits())
keys = jax.random.split(jax.random.key(0), 2)
params = {
    "w1": jax.random.normal(keys[0], (64, 16)) / 8,
    "b1": jnp.zeros(16),
    "w2": jax.random.normal(keys[1], (16, 10)) / 4,
    "b2": jnp.zeros(10),
}


def loss_fn(params, batch):
    x, y = batch
    logits = jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1))


@jax.jit
def descend(params):
    step = lambda p, _: (
        jax.tree.map(lambda x, g: x - 0.5 * g, p, jax.grad(loss_fn)(p, (images, labels))),
        None,
    )
    return jax.lax.scan(step, params, None, length=500)[0]


params = descend(params)
op = spectra.HessianOperator(loss_fn, params, (images, labels))
exact = np.linalg.eigvalsh(np.asarray(spectra.dense_hessian(loss_fn, params, (images, labels)), np.float64))
n = op.size
print(f"n = {n:,}, loss {loss_fn(params, (images, labels)):.3f}")
print(
    f"eigenvalues from {exact[0]:.4g} to {exact[-1]:.4g}; {np.mean(exact < -1e-6 * exact[-1]):.0%} negative"
)


def exact_cdf(x):
    return np.searchsorted(exact, x, side="right") / n


# %% [markdown]
# ## The band
#
# `slq` returns a quadrature; its `cdf` gives the share of eigenvalues at or below $x$ with a lower and an upper
# curve. The exact step function is drawn over it.

# %%
points = np.sort(np.concatenate([exact, exact - 1e-9, np.linspace(exact[0], exact[-1], 2000)]))
fig, axes = plt.subplots(1, 3, figsize=(6.9, 2.2), dpi=180, sharey=True, layout="constrained")
for ax, (m, k) in zip(axes, [(10, 2), (40, 2), (160, 8)], strict=True):
    quadrature = spectra.slq(op, key=jax.random.key(1), num_steps=m, num_probes=k)
    spectra.plot_eigenvalues(quadrature, ax)
    ax.plot(points, exact_cdf(points), color=ACCENT, linewidth=0.8, label="exact")
    ax.set_title(f"{m} steps, {k} probes", fontsize=7)
    ax.set_xscale("symlog", linthresh=1e-3, linscale=0.6)
    ax.set(xlim=(exact[0], exact[-1]), xticks=[0, 1e-3, 1e-2, 1e-1, 1])
    lower, _, upper = quadrature.cdf(points)
    outside = np.mean((exact_cdf(points) < lower) | (exact_cdf(points) > upper))
    print(
        f"{m:3d} steps, {k} probes: mean width of the band {quadrature.band_width():.4f}, outside {outside:.0%}"
    )
    assert outside == 0
_ = axes[0].legend(frameon=False)
for ax in axes[1:]:
    ax.set_ylabel("")

# %% [markdown]
# ## Which knob closes which gap?
#
# The band has two parts. For each probe, its quadrature brackets the CDF that the probe sees, with
# certainty (Chebyshev, Markov, Stieltjes): **steps** shrink that part. What $k$ random probes see differs from the
# truth by chance, by a known law: **probes** shrink that part, like $1/\sqrt{kn}$. And eigenvalues that all probes
# resolve have a share of $1/n$ each for certain: of these nothing is left to chance. Watch each knob alone.

# %%
steps, probes = [3, 5, 10, 20, 40, 80], [1, 2, 4, 8, 16, 32]
by_steps = [spectra.slq(op, key=jax.random.key(2), num_steps=m, num_probes=8).band_width() for m in steps]
by_probes = [spectra.slq(op, key=jax.random.key(2), num_steps=80, num_probes=k).band_width() for k in probes]

fig, (left, right) = plt.subplots(1, 2, figsize=(5.2, 2.2), dpi=180, sharey=True, layout="constrained")
levels = [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02]
left.loglog(steps, by_steps, "o-", color=COLOR, markersize=3)
left.set(xlabel="steps $m$, with 8 probes", ylabel="mean width of the 95 % band")
right.loglog(probes, by_probes, "o-", color=COLOR, markersize=3)
right.set(xlabel="probes $k$, with 80 steps")
for ax, ticks in ((left, steps), (right, probes)):
    ax.set_xticks(ticks, [str(t) for t in ticks])
    ax.set_yticks(levels, [str(level) for level in levels])
    ax.minorticks_off()
print("width by steps: ", *(f"{m}: {w:.4f} " for m, w in zip(steps, by_steps, strict=True)))
print("width by probes:", *(f"{k}: {w:.4f} " for k, w in zip(probes, by_probes, strict=True)))
print(f"80 steps instead of 10: {by_steps[2] / by_steps[5]:.1f} times narrower")
print(f"2 probes instead of 1: {by_probes[0] / by_probes[1]:.1f} times narrower")
print(f"32 probes instead of 2: {by_probes[1] / by_probes[-1]:.1f} times narrower; √16 = 4.0")
assert by_steps[2] > 4 * by_steps[5]
assert by_probes[0] > 4 * by_probes[1] and by_probes[1] < 4 * by_probes[-1]

# %% [markdown]
# More steps resolve more eigenvalues, and the band goes on falling. The second probe is worth far more than any other: with
# one alone a repeated eigenvalue cannot be told from a simple one, so that none counts as resolved. After it, probes
# narrow only what is still sampled, by less than the square root of their number. Steps first, then, and never a single probe.
#
# ## Is 95 % really 95 %?
#
# A hundred keys, a hundred bands, each compared with all 1,210 eigenvalues. Bands hold *at least* their level: the
# two parts add, and a maximum over nodes is bounded by a sum.

# %%
misses, distance, halfwidth = 0, [], []
for key in jax.random.split(jax.random.key(3), 100):
    quadrature = spectra.slq(op, key=key, num_steps=40, num_probes=2)
    lower, estimate, upper = quadrature.cdf(points)
    misses += bool(np.any((exact_cdf(points) < lower) | (exact_cdf(points) > upper)))
    distance.append(np.trapezoid(np.abs(estimate - exact_cdf(points)), points) / (points[-1] - points[0]))
    halfwidth.append(quadrature.band_width() / 2)
print(f"{misses} of 100 bands miss the truth somewhere")
print(
    f"mean distance of the estimate from the truth {np.mean(distance):.4f}, mean half-width {np.mean(halfwidth):.4f}"
)
assert misses <= 11  # more than 11 of 100 at a true rate of 5 % has a probability below half a percent
assert np.mean(distance) < np.mean(halfwidth)

# %% [markdown]
# ## Let it choose: `tol`
#
# `tol` is the share of eigenvalues that may stay in doubt, on average over the range. Steps are added until the
# bracket takes half of it, then probes. If the budget ends first, the status says so: no silence.

# %%
for tol in (0.02, 0.01, 0.005):
    quadrature = spectra.slq(op, key=jax.random.key(4), num_steps=200, num_probes=64, tol=tol)
    m, k, width = quadrature.num_steps, quadrature.num_probes, quadrature.band_width()
    print(f"tol={tol}: {m} steps x {k} probes, {quadrature.num_matvecs} products, width {width:.4f}")
    assert quadrature.status.ok and width <= tol
short = spectra.slq(op, key=jax.random.key(4), num_steps=20, num_probes=2, tol=0.005)
print(short.status)
assert not short.status.ok

# %% [markdown]
# ## The ends of the spectrum
#
# The outermost Ritz value is a Rayleigh quotient: the extreme eigenvalue lies at it or further out, without any
# statistics. How much further is limited by the probes, at 99 %: an eigenvalue beyond would have shown in them. Noise of
# the products is added on both sides.

# %%
report = spectra.spectrum(op, key=jax.random.key(5), num_steps=60, num_probes=4)
for name, interval, truth in (
    ("largest", report.largest, exact[-1]),
    ("smallest", report.smallest, exact[0]),
):
    print(
        f"{name}: {interval.estimate:.6f} in [{interval.lower:.6f}, {interval.upper:.6f}], exact {truth:.6f}"
    )
    assert interval.lower <= truth <= interval.upper

# %% [markdown]
# ## The width of the kernel
#
# A density is a quadrature smoothed by a kernel, and the picture depends on the kernel. The default width is
# proportional to $|\lambda|$ (5 %) and constant near zero, where the spacing of the Ritz values sets it. A constant
# width that fits the outliers flattens the peak at zero; one that fits the bulk leaves spikes with nothing in between.
# Changing it costs no product. Orange: the exact eigenvalues under the same kernel, which is what the band is a band for.

# %%
quadrature = spectra.slq(op, key=jax.random.key(6), num_steps=100, num_probes=8)
default = spectra.spectral_density(quadrature)
wide = spectra.spectral_density(quadrature, bandwidth=0.05 * exact[-1])
narrow = spectra.spectral_density(quadrature, bandwidth=0.0005 * exact[-1])
densities = {"default": default, "constant, 5 % of the largest": wide, "constant, 0.05 %": narrow}
fig, axes = plt.subplots(1, 3, figsize=(6.9, 2.2), dpi=180, layout="constrained")
for ax, (title, density) in zip(axes, densities.items(), strict=True):
    widths = np.interp(exact, density.grid, density.bandwidth)
    kernel = np.exp(-0.5 * ((density.grid[:, None] - exact) / widths) ** 2) / (np.sqrt(2 * np.pi) * widths)
    spectra.plot_density(density, ax)
    ax.plot(density.grid, kernel.mean(1), color=ACCENT, linewidth=0.7, linestyle="--")
    ax.set_title(title, fontsize=7)
    print(
        f"{title}: density at zero {np.interp(0, density.grid, density.density):.3g}, integral {density.integral():.6f}"
    )
    assert abs(density.integral() - 1) < 1e-3

# %% [markdown]
# ## What it costs
#
# A second run of the same shape compiles nothing.

# %%
start = time.perf_counter()
quadrature = spectra.slq(op, key=jax.random.key(7), num_steps=100, num_probes=8)
seconds = time.perf_counter() - start
print("800 products took", "less than 10 s" if seconds < 10 else f"{seconds:.0f} s")
print(f"basis in memory: {4 * n * 100 / 1e6:.1f} MB a probe (4 bytes x n x steps)")

# %% [markdown]
# ## What to try next
#
# * `deflate=spectra.eigsh(op, 10, which="LA", key=key)`: outliers become exact, and all steps go to the bulk.
# * Large networks need fewer probes: the statistical part falls with $1/\sqrt{kn}$. For $n \ge 10^6$ steps are the
#   bottleneck, and one or two probes are enough.
# * `spectra.kpm` when memory is short: three vectors whatever the resolution, at the price of more products.
# * How much depends on *which data* and not on the probes? `spectra.data_variability(op, key=key)`.
