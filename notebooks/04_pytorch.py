# %% [markdown]
# # 4. A PyTorch model
#
# The model is a `torch.nn.Module`; the curvature is computed in JAX. `torch.export` gives the graph, and an
# interpreter runs it: no ONNX, no pickles, and on the cluster no torch. This notebook trains a small convolutional
# network in PyTorch, brings it over, and checks what came over against PyTorch's own double backward.

# %%
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import spectra

plt.rcParams.update({"font.size": 7})
_ = torch.manual_seed(0)

# %% [markdown]
# ## Train in PyTorch

# %%
digits = load_digits()
images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)  # (1797, 1, 8, 8)
labels = torch.tensor(digits.target)

module = nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1),
    nn.GELU(),
    nn.Conv2d(8, 16, 3, padding=1, stride=2),
    nn.GELU(),
    nn.Flatten(),
    nn.Linear(256, 10),
)
optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
for _ in range(10):
    for index in torch.randperm(len(images)).split(128):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(images[index]), labels[index])
        loss.backward()
        optimizer.step()
module.eval()
with torch.no_grad():
    right = (module(images).argmax(1) == labels).float().mean().item()
print(f"{sum(p.numel() for p in module.parameters()):,} parameters, {100 * right:.1f} % right")
assert right > 0.95

# %% [markdown]
# ## Bring it over
#
# The example inputs only show shapes; any batch size works afterwards. Parameters keep their PyTorch names.

# %%
model = spectra.from_torch(module, (images[:4],))
loss_fn = spectra.bridge.make_loss(model, "cross_entropy")
images, labels = images[:300], labels[:300]  # enough for the curvature here
data = (jnp.asarray(images.numpy()), jnp.asarray(labels.numpy()))
print({name: value.shape for name, value in model.params.items()})

# %% [markdown]
# ## Is it the same function?
#
# Two checks against PyTorch: the loss, and a Hessian-vector product by double backward in float32.

# %%
op = spectra.HessianOperator(loss_fn, model.params, data)
names = dict(module.named_parameters())
generator = torch.Generator().manual_seed(1)
vector = {name: torch.randn(p.shape, generator=generator) for name, p in names.items()}

torch_loss = nn.functional.cross_entropy(module(images), labels)
gradient = torch.autograd.grad(torch_loss, list(names.values()), create_graph=True)
inner = sum((g * v).sum() for g, v in zip(gradient, vector.values(), strict=True))
double_backward = torch.autograd.grad(inner, list(names.values()))

product = op @ {name: jnp.asarray(v.numpy()) for name, v in vector.items()}
worst = max(
    np.abs(np.asarray(product[name]) - g.numpy()).max() / np.abs(g.numpy()).max()
    for name, g in zip(names, double_backward, strict=True)
)
jax_loss = float(loss_fn(model.params, data))
print(f"loss: PyTorch {torch_loss.item():.7f}, JAX {jax_loss:.7f}")
print("Hessian-vector product: relative difference below 1e-4" if worst < 1e-4 else f"differs by {worst:.1e}")
assert abs(jax_loss / torch_loss.item() - 1) < 1e-5
assert worst < 1e-4

# %% [markdown]
# ## The spectrum

# %%
report = spectra.spectrum(op, key=jax.random.key(0), num_steps=40, num_probes=4, name="a PyTorch CNN")
report

# %%
ax = report.plot()

# %% [markdown]
# ## Layer by layer
#
# Blocks are chosen by PyTorch's names: a glob, a regular expression or a function.

# %%
layers = spectra.slq(op.blocks(by="layer"), key=jax.random.key(1), num_steps=30, num_probes=2)
axes = spectra.plot_blocks(layers)
for name, quadrature in layers.items():
    print(f"layer {name}: {quadrature.size:,} parameters, largest eigenvalue {quadrature.range[1]:.3f}")
whole = float(report.largest.estimate)
assert all(q.range[1] <= whole * (1 + 1e-4) for q in layers.values())

# %% [markdown]
# No block has a larger eigenvalue than the whole (Cauchy's interlacing, checked above). The convolutional kernels
# share their weights over all places of the image; the table above says which layer is steepest here.
#
# ## A DataLoader
#
# Data too large for one batch stay in their loader: the operator reads it anew for every product, weighs batches by
# their size, and refuses a loader that shuffles, since then no two products are of the same matrix.

# %%
dataset = torch.utils.data.TensorDataset(images, labels)
loader = torch.utils.data.DataLoader(dataset, batch_size=125)  # 125, 125, 50
streamed = spectra.HessianOperator(loss_fn, model.params, loader)
pairs = spectra.eigsh(streamed, 3, which="LA", key=jax.random.key(2), tol=1e-4)
print("largest eigenvalues from the loader:", np.round(pairs.values[::-1], 4))
assert abs(pairs.values[-1] / whole - 1) < 1e-4

shuffled = torch.utils.data.DataLoader(dataset, batch_size=125, shuffle=True)
try:
    spectra.HessianOperator(loss_fn, model.params, shuffled)
    raise AssertionError("a shuffling loader must be refused")
except spectra.DataError as error:
    print("DataError:", error)

# %% [markdown]
# ## Leave torch behind
#
# `export` writes `weights.safetensors` and `graph.json`; `load` needs JAX only.

# %%
with tempfile.TemporaryDirectory() as folder:
    spectra.bridge.export(module, (images[:4],), folder)
    print(sorted(p.name for p in Path(folder).iterdir()))
    loaded = spectra.bridge.load(folder)
inputs = data[0]
same = jnp.abs(loaded.apply(loaded.params, inputs) - model.apply(model.params, inputs)).max()
print("largest difference of the outputs:", float(same))
assert same == 0

# %% [markdown]
# ## What to try next
#
# * A model from `torchvision` or `transformers`: call `.eval()` first, and use eager attention
#   (`attn_implementation="eager"`), whose second derivative exists.
# * Another loss: `make_loss(model, "mse_loss")`, `label_smoothing=0.1`, `ignore_index=-100`, as named and meant in
#   `torch.nn.functional`.
# * Weights into a Flax model of your own: `spectra.bridge.to_flax(state_dict, variables)`.
# * From the shell: `spectra export-torch FILE.py:FUNCTION -o model/`.
