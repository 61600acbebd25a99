"""KFAC and EKFAC beside curvlinops, on the same weights and data in float64.

    python -m benchmarks.kfac_peers

needs `pip install curvlinops-for-pytorch`. The networks are PyTorch's, through the bridge; curvlinops wants
its layers to be modules, so attention is written with `nn.Linear`. It has no embeddings: their table is left
out. Examples are more than any layer has inputs, so that eigenvectors are unique.
"""

import functools
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np

import spectra

WIDTH, HEADS, TOKENS, CLASSES, EXAMPLES = 8, 2, 5, 3, 48


@functools.cache
def networks():
    """{name: (module, inputs)}, all with classes of whole examples as outputs."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
            self.head = nn.Linear(WIDTH, CLASSES)

        def forward(self, x):
            q, k, v = (
                layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
                for layer in (self.query, self.key, self.value)
            )
            mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return self.head((x + self.out(mixed)).mean(1))

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.hidden, self.head = (
                nn.Embedding(11, WIDTH),
                nn.Linear(WIDTH, WIDTH),
                nn.Linear(WIDTH, CLASSES),
            )

        def forward(self, ids):
            return self.head(torch.tanh(self.hidden(self.table(ids))).mean(1))

    torch.manual_seed(0)
    image, tokens = torch.randn(EXAMPLES, 2, 6, 6), torch.randn(EXAMPLES, TOKENS, WIDTH)
    dense = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, CLASSES))
    convolution = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, stride=2),
        nn.Tanh(),
        nn.Conv2d(4, 3, 2, dilation=2),
        nn.Flatten(),
        nn.Linear(3, CLASSES),
    )
    return {
        "dense": (dense.double(), torch.randn(EXAMPLES, 4).double()),
        "convolution": (convolution.double(), image.double()),
        "attention": (Attention().double(), tokens.double()),
        "embedding": (Words().double(), torch.randint(0, 11, (EXAMPLES, TOKENS))),
    }


def losses():
    """{name: (PyTorch's loss, ours, how the targets are made)}."""
    import torch
    from torch import nn

    labels = torch.arange(EXAMPLES) % CLASSES
    real = torch.linspace(-1, 1, EXAMPLES * CLASSES).reshape(EXAMPLES, CLASSES).double()

    def cross_entropy(logits, labels):
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1))

    def mse(outputs, targets):
        return jnp.mean((outputs - targets) ** 2)

    return {"cross_entropy": (nn.CrossEntropyLoss(), cross_entropy, labels), "mse": (nn.MSELoss(), mse, real)}


@functools.cache
def exported(network: str):
    """The network for JAX."""
    module, inputs = networks()[network]
    return spectra.from_torch(module, (inputs,))


def terms(batch):
    """curvlinops takes an example of PyTorch's MSELoss as as many terms as it has numbers."""
    return batch[1].size


def compare(network: str, loss: str, *, kind="type2", sequence="expand", corrected=False, bias="separate"):
    """The largest relative Frobenius error over all layers' blocks, as dense matrices in PyTorch's order."""
    import curvlinops
    import torch

    module, inputs = networks()[network]
    theirs, ours, targets = losses()[loss]
    layers = [p for name, p in module.named_parameters() if not name.startswith("table")]
    cls = curvlinops.EKFACLinearOperator if corrected else curvlinops.KFACLinearOperator
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = cls(
            module,
            theirs,
            layers,
            [(inputs, targets)],
            fisher_type={"type2": "type-2"}.get(kind, kind),
            kfac_approx=sequence,
            separate_weight_and_bias=bias == "separate",
            check_deterministic=False,
        )
        dense = (reference @ torch.eye(reference.shape[1], dtype=torch.float64)).numpy()
        model = exported(network)
    operator = spectra.EKFACOperator if corrected else spectra.KFACOperator
    data = jnp.asarray(inputs.numpy()), jnp.asarray(targets.numpy())
    options = {"weight_fn": terms} if kind == "empirical" and loss == "mse" else {}
    op = operator(model.apply, ours, model.params, data, kind=kind, sequence=sequence, bias=bias, **options)
    names = [name for name, _ in module.named_parameters() if not name.startswith("table")]
    edges = np.cumsum([0] + [leaf.size for leaf in jax.tree.leaves(model.params)])
    rows = {
        name: np.arange(*pair)
        for name, pair in zip(sorted(model.params), itertools.pairwise(edges), strict=True)
    }
    order = np.concatenate([rows[name] for name in names])
    mine = np.asarray(op.as_matrix())[np.ix_(order, order)]
    # Relative to its own norm, but for blocks that are zero but for rounding: the biases of keys.
    least = 1e-12 * np.linalg.norm(dense)
    starts = itertools.pairwise(np.cumsum([0] + [p.numel() for p in layers]))
    return max(
        np.linalg.norm((mine - dense)[a:b]) / max(np.linalg.norm(dense[a:b]), least) for a, b in starts
    )


def unique(network: str, sequence: str, corrected: bool) -> bool:
    """Whether EKFAC is one matrix: not where a factor has a null space that gradients reach.

    The sums over positions ("reduce") of keys' gradients are zero, those of values span less than the terms.
    """
    return not (corrected and network == "attention" and sequence == "reduce")


def main():
    jax.config.update("jax_enable_x64", True)
    head = ("network", "loss", "kind", "sequence", "operator", "bias", "largest relative error")
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    choices = ("type2", "empirical"), ("expand", "reduce"), (False, True), ("separate", "joint")
    for network, loss, kind, sequence, corrected, bias in itertools.product(networks(), losses(), *choices):
        if not unique(network, sequence, corrected):
            continue
        error = compare(network, loss, kind=kind, sequence=sequence, corrected=corrected, bias=bias)
        name = "EKFAC" if corrected else "KFAC"
        cells = network, loss, kind, sequence, name, bias, f"{error:.1e}"
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
