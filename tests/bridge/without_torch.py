"""Run as a program: load exported folders where importing PyTorch is impossible, and compare.

Usage: python without_torch.py FOLDER... Each folder holds a model and `case.npz` with the inputs
(`input/<index>`), a vector by parameter, and PyTorch's floating outputs, gradient and product (see
`bridge_reference`, whose scalar this repeats: that module imports PyTorch). Prints the largest relative
error of each.
"""

import sys


class _Blocker:
    """Refuse torch and everything below it."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ImportError(f"{name} is blocked in this process")


sys.meta_path.insert(0, _Blocker())  # type: ignore[arg-type]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from spectra import bridge  # noqa: E402
from spectra.bridge import graph  # noqa: E402


def flatten(value):
    """Floating leaves with dictionaries in their own order, which is PyTorch's; JAX would sort them."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from flatten(item)
    elif isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jnp.floating):
        yield value


def evaluate(model, params, leaves):
    args, kwargs = graph.unflatten(model.graph.input_tree, leaves)
    return list(flatten(model.apply(params, *args, **kwargs)))


def scalar(model, params, leaves):
    total = 0
    for out in evaluate(model, params, leaves):
        weight = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
        total = total + (out * out).mean() / 2 + (out * weight).mean()
    return total


def derivatives(model, params, leaves, vector):
    gradient = jax.grad(lambda p: scalar(model, p, leaves))
    return evaluate(model, params, leaves), *jax.jvp(gradient, (params,), (vector,))


def relative(ours, theirs):
    a, b = (np.concatenate([np.ravel(x) for x in values]) for values in (ours, theirs))
    assert np.isfinite(b).all()
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), np.finfo(float).tiny))


def main(folders: list[str]) -> None:
    for folder in folders:
        model = bridge.load(folder)
        data = np.load(f"{folder}/case.npz")

        def named(kind, data=data):
            return {k.partition("/")[2]: data[k] for k in data.files if k.startswith(kind + "/")}

        leaves = [data[f"input/{i}"] for i in range(len(model.graph.inputs))]
        run = jax.jit(derivatives, static_argnums=0)
        outputs, *trees = run(model, model.params, leaves, named("vector"))
        expected = list(named("output").values())
        errors = [max(relative([a], [b]) for a, b in zip(outputs, expected, strict=True))]
        for ours, kind in zip(trees, ("gradient", "product"), strict=True):
            theirs = named(kind)
            errors.append(relative([ours[k] for k in ours], [theirs[k] for k in ours]))
        print(folder, *errors, flush=True)
    assert "torch" not in sys.modules


if __name__ == "__main__":
    main(sys.argv[1:])
