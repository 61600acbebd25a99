"""The time to build KFAC and EKFAC and to invert them, beside curvlinops, in float32.

    taskset -c 0 python -m benchmarks.kfac_speed

needs `pip install curvlinops-for-pytorch`. One network, 64-128-128-10 with tanh, its weights and 512
examples, cross-entropy, exact roots of its Hessian ("type-2"). Turns are interleaved, the first of each,
which compiles, is left out, and the median of processor time is printed: of building, and of a factorised
inverse with exact damping and one product with it. Building ours is timed as users call it and inside
`jit`. Shares are medians over the turns of the ratio to curvlinops' time of the same turn. One core, since
threads of a pool that wait count as processor time.
kfac-jax 0.0.8 cannot read the jaxprs of jax 0.10 (its `eval_jaxpr_eqn` fails) and was not timed.
"""

import itertools
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np

import spectra

SIZES, EXAMPLES, DAMPING, TURNS = (64, 128, 128, 10), 512, 1e-2, 41


def model_fn(params, x):
    for i, (weight, bias) in enumerate(params):
        x = x @ weight + bias
        x = jnp.tanh(x) if i < len(params) - 1 else x
    return x


def loss_fn(logits, labels):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1))


def problem():
    rng = np.random.default_rng(0)
    sizes = itertools.pairwise(SIZES)
    params = [
        (rng.standard_normal((a, b)).astype("f") / a**0.5, rng.standard_normal(b).astype("f"))
        for a, b in sizes
    ]
    return params, (rng.standard_normal((EXAMPLES, 64)).astype("f"), rng.integers(0, 10, EXAMPLES))


def ours(cls, params, data):
    """(build, invert and multiply) as users call them, and with the building inside jit."""
    params, data = jax.tree.map(jnp.asarray, (params, data))
    ones = jax.tree.map(jnp.ones_like, params)

    def build(params, data):
        return cls(model_fn, loss_fn, params, data)

    def invert(op):
        return op.inverse(DAMPING) @ ones

    fast = jax.jit(build)
    return {
        "spectra": (lambda: jax.block_until_ready(build(params, data)), lambda op: np_tree(invert(op))),
        "spectra, in jit": (
            lambda: jax.block_until_ready(fast(params, data)),
            lambda op: np_tree(invert(op)),
        ),
    }


def np_tree(tree):
    """All numbers of a tree in a row; waits for them."""
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def theirs(corrected: bool, params, data):
    """The same of curvlinops, on one thread of PyTorch."""
    import curvlinops
    import torch

    torch.set_num_threads(1)
    layers = []
    for weight, bias in params:
        layer = torch.nn.Linear(*weight.shape)
        layer.weight.data, layer.bias.data = torch.tensor(weight.T.copy()), torch.tensor(bias)
        layers += [layer, torch.nn.Tanh()]
    network = torch.nn.Sequential(*layers[:-1])
    batch = [(torch.tensor(data[0]), torch.tensor(data[1]))]
    cls = curvlinops.EKFACLinearOperator if corrected else curvlinops.KFACLinearOperator
    leaves = list(network.parameters())
    ones = torch.ones(sum(p.numel() for p in leaves))

    def build():
        op = cls(
            network,
            torch.nn.CrossEntropyLoss(),
            leaves,
            batch,
            fisher_type="type-2",
            check_deterministic=False,
            separate_weight_and_bias=False,
        )
        _ = op @ ones  # the factors are computed with the first product
        return op

    def invert(op):
        inverse = curvlinops.KFACInverseLinearOperator(op, damping=DAMPING, use_exact_damping=True)
        parts = torch.split(inverse @ ones, [p.numel() for p in leaves])
        shaped = [x.reshape(p.shape).T.ravel() for x, p in zip(parts, leaves, strict=True)]
        return torch.cat(shaped).numpy()

    return {"curvlinops": (build, invert)}


def measured(ways):
    """{name: (turns, 2) seconds of building and of inverting}, and the products' relative differences."""
    seconds, products = {name: [] for name in ways}, {}
    for _ in range(TURNS):
        for name, (build, invert) in ways.items():
            start = time.process_time()
            op = build()
            middle = time.process_time()
            products[name] = invert(op)
            seconds[name].append((middle - start, time.process_time() - middle))
    first = products["spectra"]
    differences = {name: np.linalg.norm(x - first) / np.linalg.norm(first) for name, x in products.items()}
    return {name: np.array(turns[1:]) for name, turns in seconds.items()}, differences


def main():
    warnings.simplefilter("ignore")
    params, data = problem()
    print(
        "| operator | by | build, ms | share | invert and multiply, ms | share | difference of the product |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, cls in {"KFAC": spectra.KFACOperator, "EKFAC": spectra.EKFACOperator}.items():
        seconds, differences = measured(ours(cls, params, data) | theirs(name == "EKFAC", params, data))
        for way, turns in seconds.items():
            built, inverted = 1e3 * np.median(turns, axis=0)
            shares = np.median(turns / seconds["curvlinops"], axis=0)
            cells = [f"{built:.1f}", f"{shares[0]:.2f}", f"{inverted:.1f}", f"{shares[1]:.2f}"]
            print("|", " | ".join([name, way, *cells, f"{differences[way]:.0e}"]), "|", flush=True)


if __name__ == "__main__":
    main()
