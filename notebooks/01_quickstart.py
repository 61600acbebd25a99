# %% [markdown]
# # 1. Quickstart: the curvature of a trained network
#
# A network's loss $L(\theta)$ has a Hessian $H = \nabla^2 L(\theta)$ with one eigenvalue for each parameter. For
# 85,002 parameters the matrix has $7\cdot10^9$ entries, and nobody forms it: products $Hv$ are enough. This
# notebook trains a small network, computes the density of all 85,002 eigenvalues with an error band, and finds
# the largest ones exactly.

# %%
import jax
import jax.numpy as jnp
import numpy as np

import spectra
from spectra.demos import digits

# %% [markdown]
# ## A network
#
# 1,797 images of handwritten digits (from scikit-learn), a 64-256-256-10 network, 30 epochs of Adam. Any other
# network works the same way. What counts is a pure function `loss_fn(params, batch)` that returns the mean over
# the batch.

# %%
batch = tuple(map(jnp.asarray, digits.load_digits()))
params, accuracy = digits.train(jax.random.key(0), batch)
loss_fn = digits.loss_fn

print(f"{sum(x.size for x in jax.tree.leaves(params)):,} parameters")
print(f"loss {loss_fn(params, batch):.4f}, {100 * accuracy:.1f} % of the images right")
assert accuracy > 0.98

# %% [markdown]
# ## The Hessian as an operator
#
# The operator holds the loss, the parameters and the data. It multiplies; it never forms the matrix.

# %%
op = spectra.HessianOperator(loss_fn, params, batch)
direction = jax.grad(loss_fn)(params, batch)  # a vector looks like the parameters
product = op @ direction
print(op)
print(jax.tree.map(jnp.shape, product))

# %% [markdown]
# ## The spectrum
#
# Before a run: how much memory and how many products?

# %%
print(spectra.plan(op, num_steps=80, num_probes=4))

# %%
report = spectra.spectrum(op, key=jax.random.key(1), num_steps=80, num_probes=4, name="the digits network")
report

# %%
ax = report.plot()

# %% [markdown]
# Each number in the table carries its uncertainty, and so does the curve: the band holds for the whole curve with
# 95 % confidence. Both axes are logarithmic (the horizontal one on both sides of zero), because the spectrum spans
# several orders of magnitude. How much of it is where?

# %%
top = float(report.largest.estimate)
share = report.quadrature.cdf(np.array([-1e-2, 1e-2]) * top)
inside = share.estimate[1] - share.estimate[0]
print(f"largest eigenvalue {top:.2f}")
print(f"{100 * inside:.1f} % of the eigenvalues are smaller than 1 % of it, on either side of zero")
low, _, high = report.negative
print(f"share of negative eigenvalues: {100 * low:.1f} to {100 * high:.1f} %")
assert inside > 0.9 and high - low > 0.5
print(f"smallest eigenvalue between {report.smallest.lower:.5f} and {report.smallest.upper:.5f}")
assert report.smallest.upper < 0

# %% [markdown]
# Nearly all directions in parameter space are almost flat, and a few are steep. Some eigenvalues are certainly
# negative, because the interval of the smallest lies below zero: the network has not arrived at a minimum. *How many*
# are negative is another matter. They are so close to zero that 80 steps leave it open, and the report says so: its
# interval for the share of negative eigenvalues is wide.
#
# ## The steep directions
#
# The orange stems are eigenvalues that every probe resolves one by one. `eigsh` computes them as pairs, each with
# its residual: an eigenvalue lies within that distance.

# %%
pairs = spectra.eigsh(op, 12, which="LA", key=jax.random.key(2), tol=1e-4)
pairs

# %%
values = pairs.values[::-1]  # descending
rest = report.quadrature.size - len(values)
print("eigenvalue / largest:", np.round(values / values[0], 3))
print("vectors look like the parameters:", jax.tree.map(jnp.shape, pairs.vectors)["Dense_0"])
assert abs(values[0] - top) <= pairs.residuals[-1] + (report.largest.upper - report.largest.estimate)

# %% [markdown]
# The two computations agree on the largest eigenvalue within the errors that they state (that is the assertion).
# The share of the trace in these twelve directions:

# %%
print(f"trace {report.trace.value:.1f} ± {report.trace.stderr:.1f}")
print(f"{100 * values.sum() / report.trace.value:.0f} % of it in 12 of {op.size:,} directions")
assert values.sum() > 0.3 * report.trace.interval().upper

# %% [markdown]
# ## Keep it
#
# A result is one `.npz` file that NumPy alone can read. It also holds how it was made.

# %%
import tempfile
from pathlib import Path

with tempfile.TemporaryDirectory() as folder:
    path = report.save(Path(folder) / "spectrum.npz")
    again = spectra.load(path)
assert np.array_equal(again.quadrature.nodes, report.quadrature.nodes)
print({name: again.provenance[name] for name in ("operator", "mode", "dtype", "key")})

# %% [markdown]
# ## What to try next
#
# * Your own loss: replace `loss_fn`, `params` and `batch`. A list of batches, a `DataLoader` or a generator function
#   in place of `batch` is read as a stream.
# * `spectra.GGNOperator` in place of the Hessian: does the negative part disappear? (Notebook 6 compares blocks,
#   `op.blocks(by="layer")`.)
# * More steps, more probes, or `tol=0.01`: [notebook 2](02_how_sure_am_i.ipynb) shows what each of them buys.
# * The same from the shell: `spectra demo`, then `spectra show` and `spectra plot`.
