"""Convolutions on a CPU: XLA's slow gradient shown apart, and the network written with matrix products.

The derivatives of a convolution are convolutions of unusual shapes (an image as the filter, the batch as
the feature axis). On a CPU XLA hands them to a library of many threads at the top of a program, and writes
plain loops inside a compiled `while`: the last row is the same product there. Written as patches times a
matrix, the network has matrix products everywhere. `as_products` changes how Flax computes `nn.Conv`, not the
model: parameters, paths and results stay the same.

    with nn.intercept_methods(as_products):
        logits = model.apply({"params": params}, images)
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import spectra
from benchmarks import problems
from benchmarks.settings import Report, Settings, table
from benchmarks.timing import alternate, median_ms, ratio, spread


def as_products(next_call, args, kwargs, context):
    """Flax interceptor: 2-D convolutions of stride 1 and padding SAME as patches times a matrix."""
    layer = context.module
    if not isinstance(layer, nn.Conv) or context.method_name != "__call__" or not _is_plain(layer):
        return next_call(*args, **kwargs)
    if layer.is_initializing():
        return next_call(*args, **kwargs)
    params = layer.variables["params"]
    out = convolve(args[0], params["kernel"])
    return out + params["bias"] if layer.use_bias else out


def _is_plain(layer) -> bool:
    unit = (None, 1, (1, 1))
    once = layer.strides in unit and layer.kernel_dilation in unit and layer.feature_group_count == 1
    return once and layer.padding == "SAME" and len(layer.kernel_size) == 2


def convolve(images, kernel):
    """Convolution of images (N, H, W, C) with a kernel (h, w, C, D), stride 1, padding SAME."""
    height, width, channels, features = kernel.shape
    pads = [((size - 1) // 2, size // 2) for size in (height, width)]
    padded = jnp.pad(images, [(0, 0), *pads, (0, 0)])
    _, rows, columns, _ = images.shape
    shifts = itertools.product(range(height), range(width))
    patches = jnp.concatenate([padded[:, i : i + rows, j : j + columns] for i, j in shifts], axis=-1)
    return patches @ kernel.reshape(height * width * channels, features)


def products_loss(params, batch):
    with nn.intercept_methods(as_products):
        return problems.cnn_loss(params, batch)


@jax.jit
def looped(op, v):
    """One product, in a loop."""
    return jax.lax.fori_loop(0, jnp.int32(1), lambda _, x: op.mv(x), v)


def main(settings: Settings) -> Report:
    _, params, batch = settings.problem("cnn")
    v = problems.vector(params)
    losses = {"convolutions": problems.cnn_loss, "patches and products": products_loss}
    functions = {}
    for name, loss in losses.items():
        op = spectra.HessianOperator(loss, params, batch)
        prepared, multiply = op.prepare(), jax.jit(lambda op, v: op.mv(v))
        functions[f"value, {name}"] = functools.partial(jax.jit(loss), params, batch)
        functions[f"gradient, {name}"] = functools.partial(jax.jit(jax.grad(loss)), params, batch)
        functions[f"product, {name}"] = functools.partial(multiply, prepared, v)
        functions[f"product in a loop, {name}"] = functools.partial(looped, prepared, v)
    results = {name: function() for name, function in functions.items()}
    times = alternate(functions, rounds=settings.choose(15, 1))
    rows = []
    for what in ("value", "gradient", "product", "product in a loop"):
        slow, fast = (f"{what}, {name}" for name in losses)
        a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(results[n])]) for n in (slow, fast))
        rows.append(
            [
                what,
                f"{median_ms(times[slow]):.2f} ± {spread(times[slow]):.0%}",
                f"{median_ms(times[fast]):.2f} ± {spread(times[fast]):.0%}",
                f"{ratio(times, fast, slow):.2f}",
                f"{np.linalg.norm(a - b) / np.linalg.norm(a):.0e}",
            ]
        )
    return Report(
        table(["", "convolutions, ms", "patches and products, ms", "ratio", "relative difference"], rows)
    )


if __name__ == "__main__":
    print("\n".join(main(Settings()).lines))
